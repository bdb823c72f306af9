"""Makes every page and figure of results anew, from the rows beside them alone; nothing is trained.

python -m experiments.report
"""

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import tyro

from experiments import bench, convergence, corrupted, flatness, jsonl, precision, sweep, table

# What makes the pages of which rows; the first that fits.
WRITERS: tuple[tuple[str, Callable[[Path], Any]], ...] = (
    ("methods_*", sweep.write),
    ("flatness_*", flatness.write),
    ("corruptions_*", corrupted.write),
    ("precision", precision.write),
    ("convergence", convergence.write),
    ("bench_select_*", bench.draw_growth),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where."""

    results: Path = jsonl.RESULTS


def writer(file: Path) -> Callable[[Path], Any] | None:
    """Of the pages and figures of these rows; None where a page written by hand speaks of them."""
    for pattern, write in WRITERS:
        if fnmatch(file.stem, pattern):
            return write
    return table.write if "scale" in jsonl.read(file)[0] else None


def main(arguments: Arguments) -> None:
    for file in sorted(arguments.results.glob("*.jsonl")):
        write = writer(file)
        if write is not None:
            write(file)
            print(f"from {file.name}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))

"""Makes all pages and figures that follow from rows anew, from the rows alone; nothing is trained.

python -m experiments.report
"""

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.figures import selection
from experiments.pages import compiled, convergence, corruptions, flatness, precision, table
from experiments.rows import jsonl

# Names of files, and what makes their pages and figures; the first that fits. All others are tables.
WRITERS: tuple[tuple[str, Callable[[Path], Any]], ...] = (
    ("flatness_*", flatness.write),
    ("corruptions_*", corruptions.write),
    ("precision", precision.write),
    ("compiled", compiled.write),
    ("convergence", convergence.write),
    ("bench_select_*", selection.draw_growth),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes all pages and figures anew that are made of rows; nothing is trained."""

    results: Path = jsonl.RESULTS  # Folder of the rows, and of the pages and figures beside them.


def writer(file: Path) -> Callable[[Path], Any] | None:
    """What makes the pages and figures of a file; None if it has no rows, or a page written by hand speaks of them."""
    rows = jsonl.read(file)
    if not rows:
        return None
    for pattern, write in WRITERS:
        if fnmatch(file.stem, pattern):
            return write
    return table.write if any("scale" in row for row in rows) else None


@cli.command
def main(arguments: Arguments) -> None:
    files = sorted(arguments.results.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"there are no rows in {arguments.results}.")
    failed = []
    for file in files:
        try:
            write = writer(file)
            if write is not None:
                write(file)
                print(f"from {file.name}")
        # One file of another kind, or of a newer version, does not keep the others from their pages.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            failed.append(f"{file.name}: {type(error).__name__}: {error}")
    if failed:
        raise ValueError("no page was made from " + "; ".join(failed))


if __name__ == "__main__":
    main()

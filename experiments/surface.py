"""The loss surface around a finished run's solution, and its roughness Ra.

python -m experiments.surface runs/SOME_RUN
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments import cli, landscapes, solution
from experiments.solution import Solution
from s2sam_jax import analysis

ROWS, FIGURE = "surface.jsonl", "surface.png"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes surface.jsonl and surface.png into the run's folder."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    data: Path | None = None  # Where its data set lies, if no longer where it was.
    examples: int = 1024  # Training images that the loss is the mean of; whole batches are used.
    span: float = 1.0  # The grid runs from -span to span filter norms.
    n: int = 25  # Points along each of the two directions.
    seed: int = 0  # Of the directions.
    pruned: bool = False  # Let pruned weights move as well.


def measure(found: Solution, *, span: float, n: int, seed: int, pruned: bool, progress: Any = None) -> dict[str, Any]:
    """Heights on the grid, and their roughness; the directions are those of the seed."""
    masks = None if pruned else found.masks
    directions = analysis.filter_normalized_directions(found.params, jax.random.key(seed), masks=masks)
    surface = analysis.loss_surface(
        found.loss_fn, found.params, directions, found.batches, span=span, n=n, progress=progress
    )
    return {
        "span": span,
        "n": n,
        "directions_seed": seed,
        "pruned_move": pruned,
        "roughness": analysis.roughness(surface),
        "surface": surface.tolist(),
    }


def run(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Measures, writes and prints; returns the row."""
    folder = arguments.run_dir
    options = {name: getattr(arguments, name) for name in ("span", "n", "seed", "pruned")}
    row = solution.look(
        folder,
        arguments.data,
        arguments.examples,
        console,
        "losses",
        lambda found: arguments.n**2 * len(found.batches),
        partial(measure, **options),
    )
    said = f"Ra = {row['roughness']:.4g} (span {arguments.span:g}, {row['examples']} training images)"
    solution.present(row, folder / ROWS, folder / FIGURE, landscapes.draw_surfaces, [said], console)
    return row


@cli.one_line()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = tyro.cli(Arguments, args=argv)
    return run(arguments, Console())


if __name__ == "__main__":
    main()

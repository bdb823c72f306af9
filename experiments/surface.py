"""The loss surface around a finished run's solution, and its roughness Ra.

python -m experiments.surface runs/SOME_RUN
"""

import dataclasses

import jax
from rich.console import Console

from experiments import cli, solution
from experiments.figures import landscapes
from experiments.rows.jsonl import Row
from experiments.solution import Progress, Solution
from s2sam_jax import analysis


@dataclasses.dataclass(frozen=True)
class Arguments(solution.Arguments):
    """Measures the loss around a run's solution; writes surface.jsonl and surface.png into its folder."""

    span: float = 1.0  # The grid runs from -span to span filter norms.
    n: int = 25  # Points along each of the two directions.
    seed: int = 0  # Of the directions.
    pruned: bool = False  # Let pruned weights move as well.


def measure(found: Solution, *, span: float, n: int, seed: int, pruned: bool, progress: Progress | None = None) -> Row:
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


def said(row: Row) -> list[str]:
    return [f"Ra = {row['roughness']:.4g} (span {row['span']:g}, {row['examples']} training images)"]


ANALYSIS = solution.Analysis(
    name="surface",
    work="losses",
    total=lambda arguments, found: arguments.n**2 * len(found.batches),
    measure=measure,
    draw=landscapes.draw_surfaces,
    say=said,
)


@cli.command
def main(arguments: Arguments) -> Row:
    return ANALYSIS.run(arguments, Console())


if __name__ == "__main__":
    main()

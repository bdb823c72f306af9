"""The Hessian of a finished run's loss: spectrum, largest eigenvalues, trace, and SAM's sharpness.

python -m experiments.spectrum runs/SOME_RUN
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

ROWS, FIGURE = "spectrum.jsonl", "spectrum.png"
EIGENVALUES = 5


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes spectrum.jsonl and spectrum.png into the run's folder."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    data: Path | None = None  # Where its data set lies, if no longer where it was.
    examples: int = 1024  # Training images that the loss is the mean of; whole batches are used.
    steps: int = 60  # Of Lanczos.
    samples: int = 20  # For the trace.
    rho: float = 0.05  # Radius of SAM's sharpness.
    seed: int = 0
    pruned: bool = False  # The Hessian of all weights, pruned ones too.


def measure(
    found: Solution, *, steps: int, samples: int, rho: float, seed: int, pruned: bool, progress: Any = None
) -> dict[str, Any]:
    """Figures of the curvature; of live weights alone unless ``pruned``."""
    masks = None if pruned else found.masks
    loss_fn, params, batches = found.loss_fn, found.params, found.batches
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    options: Any = {"masks": masks, "progress": progress}
    values, bounds = analysis.top_eigenvalues(loss_fn, params, first, batches, k=EIGENVALUES, steps=steps, **options)
    spectrum = analysis.hessian_spectrum(loss_fn, params, second, batches, steps=steps, **options)
    trace, error = analysis.hessian_trace(loss_fn, params, third, batches, samples=samples, **options)
    return {
        "steps": steps,
        "pruned_count": pruned,
        "eigenvalues": values.tolist(),
        "eigenvalue_bounds": bounds.tolist(),
        "nodes": spectrum.nodes.tolist(),
        "weights": spectrum.weights.tolist(),
        "trace": trace,
        "trace_error": error,
        "sharpness_rho": rho,
        "sam_sharpness": analysis.sam_sharpness(loss_fn, params, batches, rho=rho, masks=masks),
    }


def run(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Measures, writes and prints; returns the row."""
    folder = arguments.run_dir
    options = {name: getattr(arguments, name) for name in ("steps", "samples", "rho", "seed", "pruned")}
    row = solution.look(
        folder,
        arguments.data,
        arguments.examples,
        console,
        "products with the Hessian",
        lambda _: 2 * arguments.steps + arguments.samples,
        partial(measure, **options),
    )
    largest = ", ".join(f"{value:.4g}" for value in row["eigenvalues"])
    said = [
        f"eigenvalues {largest}; trace {row['trace']:.4g} ± {row['trace_error']:.2g}",
        f"SAM's sharpness at rho {arguments.rho:g}: {row['sam_sharpness']:.4g}",
    ]
    solution.present(row, folder / ROWS, folder / FIGURE, landscapes.draw_spectra, said, console)
    return row


@cli.one_line()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = tyro.cli(Arguments, args=argv)
    return run(arguments, Console())


if __name__ == "__main__":
    main()

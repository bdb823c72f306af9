"""The Hessian of a finished run's loss: spectrum, largest eigenvalues, trace, and SAM's sharpness.

python -m experiments.spectrum runs/SOME_RUN
"""

import dataclasses
from typing import Any

import jax
from rich.console import Console

from experiments import cli, solution
from experiments.figures import landscapes
from experiments.rows.jsonl import Row
from experiments.solution import Progress, Solution
from s2sam_jax import analysis

EIGENVALUES = 5


@dataclasses.dataclass(frozen=True)
class Arguments(solution.Arguments):
    """Measures the Hessian of a run's loss; writes spectrum.jsonl and spectrum.png into its folder."""

    steps: int = 60  # Of the Lanczos iteration that gives eigenvalues and spectrum.
    samples: int = 20  # Random vectors that the trace is estimated from.
    rho: float = 0.05  # Radius of SAM's sharpness.
    seed: int = 0  # Of the random vectors.
    pruned: bool = False  # Take the Hessian of all weights, pruned ones too.


def measure(
    found: Solution, *, steps: int, samples: int, rho: float, seed: int, pruned: bool, progress: Progress | None = None
) -> Row:
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
        "eigenvalue_ratio": float(values[0] / values[-1]) if len(values) == EIGENVALUES else None,
        "nodes": spectrum.nodes.tolist(),
        "weights": spectrum.weights.tolist(),
        "trace": trace,
        "trace_error": error,
        "sharpness_rho": rho,
        "sam_sharpness": analysis.sam_sharpness(loss_fn, params, batches, rho=rho, masks=masks),
    }


def said(row: Row) -> list[str]:
    largest = ", ".join(f"{value:.4g}" for value in row["eigenvalues"])
    found = row["eigenvalue_ratio"]
    ratio = "" if found is None else f" (λ1/λ{EIGENVALUES} {found:.3g})"
    return [
        f"eigenvalues {largest}{ratio}; trace {row['trace']:.4g} ± {row['trace_error']:.2g}",
        f"SAM's sharpness at rho {row['sharpness_rho']:g}: {row['sam_sharpness']:.4g}",
    ]


ANALYSIS = solution.Analysis(
    name="spectrum",
    work="products with the Hessian",
    total=lambda arguments, _: 2 * arguments.steps + arguments.samples,
    measure=measure,
    draw=landscapes.draw_spectra,
    say=said,
)


@cli.command
def main(arguments: Arguments) -> Row:
    return ANALYSIS.run(arguments, Console())


if __name__ == "__main__":
    main()

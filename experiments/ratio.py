"""How much SAM changes each coordinate of a finished run's gradient, on average over the training images.

python -m experiments.ratio runs/SOME_RUN
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import cli, solution
from experiments.figures import landscapes
from experiments.rows.jsonl import Row
from experiments.solution import Progress, Solution
from s2sam_jax import analysis, sam

EDGES = np.linspace(-12.0, 6.0, 73)  # what lies outside goes into the first and the last bin


@dataclasses.dataclass(frozen=True)
class Arguments(solution.Arguments):
    """Measures how much SAM changes a run's gradient; writes ratio.jsonl and ratio.png into its folder."""

    rho: float = 0.05  # Radius of SAM's perturbation.
    pruned: bool = False  # Count the coordinates of pruned weights as well.


def measure(found: Solution, *, rho: float, pruned: bool, progress: Progress | None = None) -> Row:
    """A histogram of r over the coordinates whose gradient is not zero."""
    masks = None if pruned else found.masks
    gradient_on = jax.jit(jax.grad(found.loss_fn))

    def gradient(params: Any) -> Any:
        total = None
        for batch in found.batches:
            one = gradient_on(params, batch)
            total = one if total is None else jax.tree.map(lambda a, b: a + b, total, one)
            if progress is not None:
                progress(1)
        mean = jax.tree.map(lambda g: g / len(found.batches), total)
        return mean if masks is None else jax.tree.map(lambda g, m: jnp.where(m, g, 0), mean, masks)

    grads, tx = gradient(found.params), sam(rho)
    sam_grads, _ = tx.update(grads, tx.init(found.params), found.params, grad_fn=gradient)
    ratios = analysis.gradient_difference_ratio(grads, sam_grads, masks=masks)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(ratios)])
    values = values[~np.isnan(values)]
    return {
        "rho": rho,
        "pruned_count": pruned,
        "r_edges": EDGES.tolist(),
        "r_counts": np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)[0].tolist(),
        "r_below_zero": float(np.mean(values < 0)),
    }


def said(row: Row) -> list[str]:
    return [f"r < 0 at {row['r_below_zero']:.1%} of the weights (rho {row['rho']:g})"]


ANALYSIS = solution.Analysis(
    name="ratio",
    work="gradients",
    total=lambda _, found: 2 * len(found.batches),
    measure=measure,
    draw=landscapes.draw_ratios,
    say=said,
)


@cli.command
def main(arguments: Arguments) -> Row:
    return ANALYSIS.run(arguments, Console())


if __name__ == "__main__":
    main()

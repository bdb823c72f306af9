"""Do SGD, SAM, SSAM and S2-SAM keep to bounds whose constants are known? Gradients without convexity, risk with it.

    python -m experiments.convergence

Runs what is missing in the rows file, and rewrites page and figure beside it from the rows alone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments import cli
from experiments.pages import convergence as page
from experiments.rows import jsonl, missing, provenance
from experiments.rows.jsonl import Row
from experiments.theory import nonconvex, stability


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures gradients and risks on problems with known constants, and compares them with their bounds."""

    radii: tuple[float, ...] = (0.075, 0.5)  # Rho, for the gradients; the Sparse SAM paper asks for at most 0.0758.
    steps: int = 100_000  # Length of each run whose gradients are measured.
    seeds: int = 8  # How many runs gradients are averaged over.
    sizes: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)  # Examples in a training set, for the risks.
    sets: int = 200  # Training sets drawn of each size, for the risks.
    risk_radii: tuple[float, ...] = (0.0, 0.1, 1.0)  # Rho, for the risks; 0 is SGD.
    rows: Path = jsonl.RESULTS / "convergence.jsonl"  # File that rows are added to; page and figure lie beside it.


def gradients(name: str, rho: float, steps: int, seeds: int) -> Row:
    """The mean squared gradient of the first ``T`` steps, at two ``T`` a decade, and the bounds on its expectation."""
    rows, keys = nonconvex.problem(0), jax.random.split(jax.random.key(1), seeds)
    start = jnp.zeros(nonconvex.DIMENSION)
    first_loss = float(nonconvex.loss(start, rows))
    squares, last = jax.vmap(lambda key: nonconvex.squared_gradients(rows, key, rho, name=name, steps=steps))(keys)
    taken = np.unique(np.geomspace(10, steps, 1 + round(2 * np.log10(steps / 10))).round().astype(int))
    means = np.cumsum(np.asarray(squares, np.float64), axis=1)[:, taken - 1] / taken
    return {
        "steps": taken.tolist(),
        "seeds": seeds,
        "mean": means.mean(axis=0).tolist(),
        "error": (means.std(axis=0, ddof=1) / seeds**0.5).tolist(),
        "bound": nonconvex.gradient_bound(taken, first_loss, rho).tolist(),
        "paper_bound": nonconvex.paper_bound(taken, first_loss, rho).tolist(),
        "first_loss": first_loss,
        "curvature_first": float(nonconvex.lowest_curvature(start, rows)),
        "curvature_last": [float(nonconvex.lowest_curvature(w, rows)) for w in last],
    }


def risks(n: int, rho: float, sets: int) -> Row:
    """Means of gap, excess risk and distance over training sets, their standard errors, and the bounds."""
    found = jax.device_get(stability.measure(jax.random.key(0), rho, n=n, sets=sets))
    return {
        "sets": sets,
        "mean": {name: float(values.mean()) for name, values in found.items()},
        "error": {name: float(values.std(ddof=1) / sets**0.5) for name, values in found.items()},
        "bound": stability.risk_bound(n, rho),
    }


def run(arguments: Arguments) -> None:
    """Measures what has no row yet; each row is written as soon as it is there."""
    optimizers = [name for name in nonconvex.OPTIMIZERS if name != "sgd"]
    walks = [("sgd", 0.0), *((name, rho) for rho in arguments.radii for name in optimizers)]
    wanted: dict[tuple[str, Any, float], Row] = {
        ("gradients", name, rho): {"last_step": arguments.steps, "seeds": arguments.seeds} for name, rho in walks
    }
    wanted |= {("risk", n, rho): {"sets": arguments.sets} for rho in arguments.risk_radii for n in arguments.sizes}
    rows = jsonl.read(arguments.rows, ("part", "of", "rho"))
    have = {(row["part"], row["of"], row["rho"]): row | {"last_step": row.get("steps", [0])[-1]} for row in rows}
    environment = provenance.environment()
    for part, of, rho in track(missing.of(arguments.rows, have, wanted), description="runs"):
        row = {"part": part, "of": of, "rho": rho}
        if part == "gradients":
            row |= gradients(str(of), rho, arguments.steps, arguments.seeds)
        else:
            row |= risks(int(of), rho, arguments.sets)
        jsonl.append(arguments.rows, row | environment)


@cli.command
def main(arguments: Arguments) -> None:
    run(arguments)
    page.write(arguments.rows)


if __name__ == "__main__":
    main()

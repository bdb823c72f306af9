"""What low precision leaves of a perturbation, and whether rounding at random helps: trained networks on digits.

    python -m experiments.precision

Runs what is missing in the rows file, and rewrites the page beside it from the rows alone.
"""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

from experiments import cli, solution, tasks
from experiments.config import Config
from experiments.pages import precision as page
from experiments.pages.precision import ROUNDINGS
from experiments.recipes import methods
from experiments.rows import jsonl, missing, provenance
from experiments.rows.jsonl import Row
from experiments.solution import Solution
from experiments.training import loop
from experiments.training.record import Last
from s2sam_jax import perturb, sharpness_metrics, stochastic_round

FORMATS = {"tensorfloat32": 10, "bfloat16": 7}  # Bits of mantissa.
minus = jax.jit(optax.tree.sub)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains networks on digits, and measures what low precision leaves of their perturbation."""

    methods: tuple[str, ...] = ("dense", "rigl")  # A network is trained for each method and seed.
    seeds: tuple[int, ...] = (0, 1)  # Which ones, not how many.
    radii: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1, 0.5)  # Of the perturbations that are measured.
    epochs: int = 20  # Of each training.
    examples: int = 256  # Training images over which gradients are averaged.
    draws: int = 4  # How often weights are rounded at random.
    rows: Path = jsonl.RESULTS / "precision.jsonl"  # File that rows are added to; the page is written beside it.
    cache: Path = cli.COMPILED  # Folder of compiled programs, for the next run.


class Step(NamedTuple):
    """Weights before and after a perturbation, and the gradients at both."""

    before: Any
    after: Any
    gradient_before: Any
    gradient_after: Any


@partial(jax.jit, static_argnames="dtype")
def rounded(tree: Any, dtype: str, key: jax.Array | None) -> Any:
    """Weights as products see them, in float32: rounded at random by the key, or without one to nearest."""
    if dtype == "float32":
        return tree
    if key is not None:
        return jax.tree.map(lambda x: x.astype(jnp.float32), stochastic_round(tree, key, dtype))
    return jax.tree.map(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=FORMATS[dtype]), tree)


@jax.jit
def mean(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


@jax.jit
def cosine(a: Any, b: Any) -> jax.Array:
    """Between two trees, each taken as one vector."""
    product = jnp.asarray(optax.tree.vdot(a, b))
    return product / jnp.maximum(optax.tree.norm(a) * optax.tree.norm(b), 1e-30)


def measure(found: Solution, opt_state: Any, arguments: Arguments) -> list[Row]:
    """A row for each place where weights are kept, format of products, radius and rounding.

    Weights are kept in float32 and rounded for products alone, or lie on the format's grid themselves.
    """
    one, perturbed = jax.jit(jax.grad(found.loss_fn)), jax.jit(perturb)
    telemetry = jax.jit(sharpness_metrics, static_argnames="compute_dtype")

    def gradient(params: Any) -> Any:
        return mean([one(params, batch) for batch in found.batches])

    rows = []
    for dtype, stored in (("float32", "float32"), *itertools.product(FORMATS, ("float32", "format"))):
        params = rounded(found.params, dtype, None) if stored == "format" else found.params
        clean = gradient(params)
        for rho in arguments.radii:
            state = optax.tree.set(opt_state, rho=jnp.asarray(rho))
            point = perturbed(params, state)
            metrics = telemetry(params, state, compute_dtype=dtype)
            common = {"dtype": dtype, "stored": stored, "rho_measured": rho}
            common |= {name: float(value) for name, value in metrics.items()}
            exact = Step(params, point, clean, gradient(point))
            for rounding in ("nearest",) if dtype == "float32" else ROUNDINGS:
                keys = [None] if rounding == "nearest" else list(jax.random.split(jax.random.key(0), arguments.draws))
                # Both points are rounded by the same noise, so that their difference is due to the perturbation alone.
                pairs = [[rounded(tree, dtype, key) for tree in (params, point)] for key in keys]
                draws = [Step(before, after, gradient(before), gradient(after)) for before, after in pairs]
                rows.append(common | {"rounding": rounding, "draws": len(keys)} | compared(draws, exact, rho))
    return rows


def compared(draws: list[Step], exact: Step, rho: float) -> dict[str, float]:
    """What is left of an exact step where weights are rounded: a figure for each column of the page."""
    moves = [minus(draw.after, draw.before) for draw in draws]
    changes = [minus(draw.gradient_after, draw.gradient_before) for draw in draws]
    move, change = minus(exact.after, exact.before), minus(exact.gradient_after, exact.gradient_before)
    figures = {
        "kept": mean([optax.tree.norm(m) for m in moves]) / rho,
        "cosine": mean([cosine(m, move) for m in moves]),
        "gradient": mean([cosine(draw.gradient_after, exact.gradient_after) for draw in draws]),
        "change": mean([cosine(c, change) for c in changes]),
        "mean_change": cosine(mean(changes), change),
    }
    return {name: float(value) for name, value in figures.items()}


def networks(file: Path) -> dict[tuple[str, int], Row]:
    """What has been measured of each network, by its method and seed."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in jsonl.read(file, ("method", "seed", "config", "rho_measured", "draws")):
        found.setdefault((row["method"], row["seed"]), []).append(row)
    return {
        network: {
            "config": rows[0]["config"],
            "radii": sorted({row["rho_measured"] for row in rows}),
            "draws": max(row["draws"] for row in rows),
        }
        for network, rows in found.items()
    }


def run(arguments: Arguments) -> None:
    """Trains what has no rows yet; the rows of a network are written together."""
    loaded = tasks.load(Config())
    configs = {
        (method, seed): dataclasses.replace(methods.config_of(method, "s2sam", 0.9, seed), epochs=arguments.epochs)
        for method, seed in itertools.product(arguments.methods, arguments.seeds)
    }
    measured = {"radii": sorted(arguments.radii), "draws": arguments.draws}
    wanted = {cell: {"config": config} | measured for cell, config in configs.items()}
    for method, seed in track(missing.of(arguments.rows, networks(arguments.rows), wanted), description="networks"):
        config = configs[method, seed]
        task, last = tasks.make(config, loaded), Last()
        state = loop.train(config, task, last)
        found = solution.of_state(config, task, state, arguments.examples)
        live = jax.tree.leaves(found.masks or jax.tree.map(jnp.ones_like, found.params))
        common = {"method": method, "live_parameters": int(sum(jnp.sum(mask) for mask in live))}
        common |= provenance.of_run(config) | {"test_accuracy": last.last["test_accuracy_recalibrated"]}
        jsonl.append(arguments.rows, *(common | row for row in measure(found, state.opt_state, arguments)))


@cli.command
def main(arguments: Arguments) -> None:
    cli.keep_compiled(arguments.cache)
    run(arguments)
    page.write(arguments.rows)


if __name__ == "__main__":
    main()

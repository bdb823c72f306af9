"""What low precision leaves of a perturbation, and whether rounding at random helps: trained networks on digits.

    python -m experiments.precision

Runs what is missing in the rows file, and rewrites the page beside it from the rows alone.
"""

import dataclasses
import itertools
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

from experiments import cli, solution, tasks
from experiments.config import Config
from experiments.recipes import methods
from experiments.rows import files, jsonl, missing, pages, provenance
from experiments.rows.jsonl import Row
from experiments.solution import Solution
from experiments.training import loop
from experiments.training.record import Last
from s2sam_jax import perturb, sharpness_metrics, stochastic_round

FORMATS, ROUNDINGS = {"tensorfloat32": 10, "bfloat16": 7}, ("nearest", "random")  # With their bits of mantissa.
COLUMNS = {
    "kept norm / ρ": "kept",
    "cosine with ε": "cosine",
    "gradient": "gradient",
    "its change by ε": "change",
    "the same, draws averaged": "mean_change",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains networks on digits, and measures what low precision leaves of their perturbation."""

    methods: tuple[str, ...] = ("dense", "rigl")  # A network is trained for each method and seed.
    seeds: tuple[int, ...] = (0, 1)  # Which ones, not how many.
    radii: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1, 0.5)  # Of the perturbations that are measured.
    epochs: int = 20
    examples: int = 256  # Training images that gradients are the mean of.
    draws: int = 4  # How often weights are rounded at random.
    rows: Path = jsonl.RESULTS / "precision.jsonl"  # File that rows are added to; the page is written beside it.
    cache: Path = cli.COMPILED  # Folder of compiled programs, for the next run.


@partial(jax.jit, static_argnames="dtype")
def rounded(tree: Any, dtype: str, key: jax.Array | None) -> Any:
    """Weights as products see them, in float32: rounded at random by the key, or without one to nearest."""
    if dtype == "float32":
        return tree
    if key is not None:
        return jax.tree.map(lambda x: x.astype(jnp.float32), stochastic_round(tree, key, dtype))
    return jax.tree.map(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=FORMATS[dtype]), tree)


@jax.jit
def minus(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.subtract, a, b)


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

    Weights are kept in float32 and rounded for products alone, or lie on the format's grid themselves. A draw at random
    rounds both points by the same noise, so that their difference is due to the perturbation alone.
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
            there, metrics = gradient(point), telemetry(params, state, compute_dtype=dtype)
            common = {"dtype": dtype, "stored": stored, "rho_measured": rho}
            common |= {name: float(value) for name, value in metrics.items()}
            for rounding in ("nearest",) if dtype == "float32" else ROUNDINGS:
                keys = [None] if rounding == "nearest" else list(jax.random.split(jax.random.key(0), arguments.draws))
                low = [[rounded(tree, dtype, key) for tree in (params, point)] for key in keys]
                gradients = [[gradient(tree) for tree in pair] for pair in low]
                changes = [minus(after, before) for before, after in gradients]
                exact, epsilon = minus(there, clean), minus(point, params)
                figures = {
                    "kept": mean([optax.tree.norm(minus(after, before)) for before, after in low]) / rho,
                    "cosine": mean([cosine(minus(after, before), epsilon) for before, after in low]),
                    "gradient": mean([cosine(after, there) for _, after in gradients]),
                    "change": mean([cosine(change, exact) for change in changes]),
                    "mean_change": cosine(mean(changes), exact),
                }
                figures = {name: float(value) for name, value in figures.items()}
                rows.append(common | {"rounding": rounding, "draws": len(keys)} | figures)
    return rows


def networks(file: Path) -> dict[tuple[str, int], Row]:
    """What has been measured of each."""
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


def table(rows: list[Row]) -> str:
    """Means over networks."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        where = row["dtype"] if row["stored"] == "format" else row["stored"]
        groups.setdefault((where, row["dtype"], row["rounding"], row["rho_measured"]), []).append(row)
    lines = []
    for (stored, dtype, rounding, rho), mine in groups.items():
        means = [f"{statistics.mean(row[field] for row in mine):.3f}" for field in COLUMNS.values()]
        lines.append([stored, dtype, rounding, f"{rho:g}", *means])
    return pages.table(["weights in", "products in", "rounding", "ρ", *COLUMNS], lines)


def found_mean(rows: list[Row], field: str, **where: Any) -> str:
    """Over the rows whose fields have these values."""
    values = [row[field] for row in rows if all(row[name] == value for name, value in where.items())]
    return f"{statistics.mean(values):.2f}" if values else "–"


def conclusion(rows: list[Row]) -> str:
    """In figures of the smallest radius, where there is most to lose."""
    rho = min(row["rho_measured"] for row in rows)
    figure = partial(found_mean, [row for row in rows if row["rho_measured"] == rho])
    bf16 = {(s, r): {"dtype": "bfloat16", "stored": s, "rounding": r} for s in ("float32", "format") for r in ROUNDINGS}
    nearest, random = bf16["float32", "nearest"], bf16["float32", "random"]
    grid, grid_random = bf16["format", "nearest"], bf16["format", "random"]
    tf32 = {"dtype": "tensorfloat32", "stored": "float32", "rounding": "nearest"}
    return f"""Means over all networks at ρ = {rho:g}:

* Rounding to nearest does not shorten the perturbation but replaces it: some weights jump by a whole step, the others
  stay. In bfloat16 the difference has {figure("kept", **nearest)} times the norm of ε and a cosine of
  {figure("cosine", **nearest)} with it, in TF32 {figure("kept", **tf32)} and {figure("cosine", **tf32)}. The norm alone
  would not show it.
* The gradient itself hardly suffers ({figure("gradient", **nearest)} in bfloat16). What ε does to it, which is all that
  tells S2-SAM from SGD, does: {figure("change", **nearest)} in bfloat16, {figure("change", **tf32)} in TF32.
* Rounding at random brings the point no nearer. From float32 weights the cosine with ε is
  {figure("cosine", **random)}, as the place of each weight within its step is already as good as random; from weights
  on the grid it is {figure("cosine", **grid_random)} against {figure("cosine", **grid)}. It helps on average: its
  errors are independent, so that at fixed weights the mean change of the gradient over {rows[-1]["draws"]} draws is at
  {figure("mean_change", **random)} (float32 weights) and {figure("mean_change", **grid_random)} (on the grid), a single
  draw at {figure("change", **random)} and {figure("change", **grid_random)}, and rounding to nearest, however often
  repeated, at {figure("change", **nearest)} and {figure("change", **grid)}.
* So float32 with `jax_default_matmul_precision="highest"` is the remedy, or a larger ρ; `stochastic_round` is for where
  only bfloat16 can be had."""


def page(rows: list[Row], name: str) -> str:
    """The conclusion, and a table a method."""
    first = rows[0]
    live = {row["method"]: row["live_parameters"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    head = f"""# What low precision leaves of the perturbation

scikit-learn's digits, ResNet-8 of width 8 trained with S2-SAM ({first["config"]["epochs"]} epochs; rigl: 90 % zeros),
seeds {", ".join(map(str, seeds))}. ε is along the last gradient of training. Only weights are rounded, to what products
would see; the rest is float32. Gradients are of the loss in evaluation mode. A weight's share of ε is about ρ / √d,
with {", ".join(f"d = {count:,} live weights ({method})" for method, count in live.items())}: ρ = 0.005 is to each of
20,000 weights what 0.05 is on 2 million. Columns: ‖c(w + ε) − c(w)‖ / ρ and its cosine with ε, c being the rounding;
cosines with what float32 gives, of the gradient at c(w + ε), and of the gradient there less that at c(w); the last one
with changes averaged over draws. Device: {pages.values(rows, "device")}. Made by
`python -m experiments.precision` from `{name}`."""
    tables = [f"## {method}\n\n{table([row for row in rows if row['method'] == method])}" for method in live]
    return "\n\n".join([head, conclusion(rows), *tables])


def write(file: Path) -> None:
    """The page, from the rows alone."""
    files.write_text(file.with_suffix(".md"), page(jsonl.read(file), file.name) + "\n")


@cli.command
def main(arguments: Arguments) -> None:
    cli.keep_compiled(arguments.cache)
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main()

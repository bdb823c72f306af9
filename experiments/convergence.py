"""Do SGD, SAM, SSAM and S2-SAM keep to bounds whose constants are known? Gradients without convexity, risk with it.

    python -m experiments.convergence

Runs what is missing in the rows file, and rewrites page and figure beside it from the rows alone.
"""

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments import cli
from experiments.figures.convergence import RISKS, draw_bounds, label
from experiments.rows import files, jsonl, missing, pages, provenance
from experiments.rows.jsonl import Row
from experiments.theory import nonconvex, stability


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures gradients and risks on problems with known constants, and compares them with their bounds."""

    radii: tuple[float, ...] = (0.075, 0.5)  # Of the gradients; the Sparse SAM paper's bound asks for at most 0.0758.
    steps: int = 100_000  # Of the gradients.
    seeds: int = 8  # Of the gradients: how many.
    sizes: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)  # Of the risks: examples in a training set.
    sets: int = 200  # Of the risks: training sets drawn of each size.
    risk_radii: tuple[float, ...] = (0.0, 0.1, 1.0)  # Of the risks; 0 is SGD.
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
    """Means over training sets, their standard errors, and the bounds."""
    found = jax.device_get(stability.measure(jax.random.key(0), rho, n=n, sets=sets))
    return {
        "sets": sets,
        "mean": {name: float(values.mean()) for name, values in found.items()},
        "error": {name: float(values.std(ddof=1) / sets**0.5) for name, values in found.items()},
        "bound": stability.risk_bound(n, rho),
    }


def run(arguments: Arguments) -> None:
    """Each row is written as soon as it is there."""
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


def slope(steps: Any, values: Any) -> float:
    """Of a straight line through logarithms."""
    return float(np.polyfit(np.log(steps), np.log(values), 1)[0])


def gradient_table(rows: list[Row]) -> str:
    """Measured means, and the largest share of a bound that is used up."""
    steps = rows[0]["steps"]
    shown = [index for index, count in enumerate(steps) if np.log10(count) % 1 == 0]
    header = ["optimizer", *(f"T = {steps[i]:,}" for i in shown), "slope", "largest measured / bound", "/ the paper's"]
    lines = []
    for row in rows:
        values = [f"{row['mean'][i]:.2e} ± {row['error'][i]:.0e}" for i in shown]
        ours, theirs = (np.max(np.divide(row["mean"], row[bound])) for bound in ("bound", "paper_bound"))
        paper = f"{theirs:.3f}" if row["rho"] <= nonconvex.LARGEST_GRADIENT * nonconvex.RATE / 2 else "–"
        last = slope(steps[-3:], row["mean"][-3:])
        lines.append([label(row), *values, f"{last:.2f}", f"{ours:.3f}", paper])
    for rho in dict.fromkeys(row["rho"] for row in rows):
        bound = next(row["bound"] for row in rows if row["rho"] == rho)
        values = [f"{bound[i]:.2e}" for i in shown]
        lines.append([f"*bound, ρ₀ = {rho:g}*", *values, f"{slope(steps[-3:], bound[-3:]):.2f}", "", ""])
    return pages.table(header, lines)


def risk_table(rows: list[Row]) -> str:
    """Measured means beside their bounds."""
    lines = []
    for row in rows:
        pairs = [(f"{row['mean'][name]:.4f} ± {row['error'][name]:.4f}", f"{row['bound'][name]:.3f}") for name in RISKS]
        lines.append([f"{row['rho']:g}", str(row["of"]), *itertools.chain(*pairs)])
    header = "ρ₀", "n", "F − F_S at w̄", "bound", "F(w̄) − F(w°)", "bound", "distance of w̄, w̄'", "bound"
    return pages.table(header, lines)


def page(rows: list[Row], name: str) -> str:
    """What was run, what came out, and why the bounds hold."""
    found = [row for row in rows if row["part"] == "gradients"]
    risk = [row for row in rows if row["part"] == "risk"]
    kept = all(np.all(np.less_equal(row["mean"], row["bound"])) for row in found)
    kept &= all(row["mean"][field] <= row["bound"][field] for row in risk for field in RISKS)
    curvatures = [value for row in found for value in row["curvature_last"]]
    apart = max(np.max(np.abs(np.divide(row["mean"], found[0]["mean"]) - 1)) for row in found)
    steps = found[0]["steps"][-3:]
    slopes = [slope(steps, row["mean"][-3:]) for row in found]
    return f"""# Bounds with known constants, and what is measured

{"Every measured mean is below its bound." if kept else "**A measured mean is above its bound.**"} \
{pages.source(rows, "convergence", name)}.

![measured means and bounds]({Path(name).with_suffix(".png")})

## Gradients, without convexity

f is the mean of 1 − exp(−(x·w − y)²/2) over {nonconvex.ROWS} rows with |x| = 1 in {nonconvex.DIMENSION} dimensions; \
batches of {nonconvex.BATCH} with replacement, from w = 0, η₀ = {nonconvex.RATE:g}. L = {nonconvex.SMOOTHNESS:g}, \
G = {nonconvex.LARGEST_GRADIENT:.3f} and σ² = {nonconvex.VARIANCE:.3f} follow from the formula. The least eigenvalue \
of the Hessian is {found[0]["curvature_first"]:.3f} at the start and {min(curvatures):.3f} to \
{max(curvatures):.3f} at the ends of the runs. SSAM perturbs half of the coordinates: "fixed" is one random mask, \
"refreshed" is SSAM-D every 10 steps. Mean of |∇f(w_t)|² over the first T steps, ± standard error over \
{found[0]["seeds"]} seeds; the paper's bound where ρ₀ ≤ G η₀/2, as it asks:

{gradient_table(found)}

Slopes are of logarithms over the last decade: {min(slopes):.2f} to {max(slopes):.2f} as measured, \
{_speed(slopes)} The bound's tends to −1/2. No optimizer is further from SGD than {apart:.0%}, so that lines \
of the figure lie on top of each other: this compares each with its bound, not with the others.

{inspect.getdoc(nonconvex.gradient_bound)}

{inspect.getdoc(nonconvex.paper_bound)}

## Risk, with convexity

Logistic regression in {stability.DIMENSION} dimensions, |x| = 1, so L = {stability.SMOOTHNESS:g} and \
G = {stability.LIPSCHITZ:g}; labels are drawn by w° with |w°| = 5, which minimises F. One example a step, \
T = {stability.PASSES} n, η₀ = {stability.RATE:g}, ρ_t = ρ₀/√t. F is exact in the labels and a mean over \
{stability.TEST:,} points. Means over {risk[0]["sets"]} training sets ± standard error; ρ₀ = 0 is SGD:

{risk_table(risk)}

{inspect.getdoc(stability.risk_bound)}
"""


def _speed(slopes: list[float]) -> str:
    """What the slopes say, beside the rate that is proved."""
    if max(slopes) < -0.5:
        return "faster than the −1/2 that is proved for the worst case."
    return "slower than −1/2, within the logarithm." if min(slopes) > -0.5 else "on both sides of −1/2."


def write(file: Path) -> None:
    """Page and figure, from the rows alone."""
    rows = jsonl.read(file)
    files.write_text(file.with_suffix(".md"), page(rows, file.name))
    draw_bounds(rows, file.with_suffix(".png"))


@cli.command
def main(arguments: Arguments) -> None:
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main()

"""Measured gradients and risks beside their bounds, and why these hold: the page of experiments.convergence."""

import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.figures.convergence import RISKS, draw_bounds, label
from experiments.pages import markdown
from experiments.rows import files, jsonl
from experiments.rows.jsonl import Row
from experiments.theory import nonconvex, stability


def slope(steps: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms of both."""
    return float(np.polyfit(np.log(steps), np.log(values), 1)[0])


def gradient_table(rows: list[Row]) -> str:
    """Measured means, and the largest share of each bound that they reach."""
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
    return markdown.table(header, lines)


def risk_table(rows: list[Row]) -> str:
    """Measured means beside their bounds."""
    lines = []
    for row in rows:
        pairs = [(f"{row['mean'][name]:.4f} ± {row['error'][name]:.4f}", f"{row['bound'][name]:.3f}") for name in RISKS]
        lines.append([f"{row['rho']:g}", str(row["of"]), *itertools.chain(*pairs)])
    header = "ρ₀", "n", "F − F_S at w̄", "bound", "F(w̄) − F(w°)", "bound", "distance of w̄, w̄'", "bound"
    return markdown.table(header, lines)


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
{markdown.source(rows, "convergence", name)}.

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

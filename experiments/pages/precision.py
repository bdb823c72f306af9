"""What low precision leaves of a perturbation, in tables and sentences: the page of experiments.precision."""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from experiments.pages import markdown
from experiments.rows import files, jsonl
from experiments.rows.jsonl import Row

ROUNDINGS = ("nearest", "random")
COLUMNS = {
    "kept norm / ρ": "kept",
    "cosine with ε": "cosine",
    "gradient": "gradient",
    "its change by ε": "change",
    "the same, draws averaged": "mean_change",
}


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
    return markdown.table(["weights in", "products in", "rounding", "ρ", *COLUMNS], lines)


def found_mean(rows: list[Row], field: str, **where: Any) -> str:
    """The mean of a field over the rows whose other fields have these values."""
    values = [row[field] for row in rows if all(row[name] == value for name, value in where.items())]
    return f"{statistics.mean(values):.2f}" if values else "–"


def conclusion(rows: list[Row]) -> str:
    """What the figures say at the smallest radius, where there is most to lose."""
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
    """The conclusion, and a table for each method."""
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
with changes averaged over draws. Device: {markdown.values(rows, "device")}. Made by
`python -m experiments.precision` from `{name}`."""
    tables = [f"## {method}\n\n{table([row for row in rows if row['method'] == method])}" for method in live]
    return "\n\n".join([head, conclusion(rows), *tables])


def write(file: Path) -> None:
    """The page, from the rows alone."""
    files.write_text(file.with_suffix(".md"), page(jsonl.read(file), file.name) + "\n")

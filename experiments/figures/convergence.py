"""Measured gradients and risks below their bounds."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import COLOURS, GREY, MARKERS, tidy
from experiments.rows.jsonl import Row

RISKS = {"gap": "F − F_S at w̄", "excess": "F(w̄) − F(w°)", "distance": "|w̄ − w̄'|"}


def draw_bounds(rows: Sequence[Row], file: Path) -> None:
    """Gradients against steps, and risks against examples, each below its dashed bound."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    _gradients(panels[0], [row for row in rows if row["part"] == "gradients"])
    _risks(panels[1], [row for row in rows if row["part"] == "risk"])
    for axes in panels:
        axes.legend(frameon=False, fontsize=7)
        tidy(axes)
    figure.savefig(file, dpi=120)


def label(row: Row) -> str:
    """Optimizer and radius."""
    return row["of"] if row["of"] == "sgd" else f"{row['of']}, ρ₀ = {row['rho']:g}"


def _gradients(axes: Axes, rows: Sequence[Row]) -> None:
    """Gradients of SGD, and of the largest radius."""
    largest = max(row["rho"] for row in rows)
    shown = [row for row in rows if row["rho"] in (0.0, largest)]
    for row, colour, marker in zip(shown, cycle(COLOURS), cycle(MARKERS)):
        axes.loglog(row["steps"], row["mean"], marker + "-", color=colour, markersize=3, label=label(row))
    axes.loglog(shown[-1]["steps"], shown[-1]["bound"], "--", color=GREY, label=f"bound, ρ₀ = {largest:g}")
    axes.set(title="Mean squared gradient, non-convex", xlabel="T", ylabel="mean of |∇f|² over T steps")


def _risks(axes: Axes, rows: Sequence[Row]) -> None:
    """Risks of the largest radius."""
    largest = max(row["rho"] for row in rows)
    mine = [row for row in rows if row["rho"] == largest]
    sizes = [row["of"] for row in mine]
    for (field, name), colour, style in zip(RISKS.items(), COLOURS, ("--", "--", ":"), strict=False):
        values, errors = ([row[kind][field] for row in mine] for kind in ("mean", "error"))
        axes.errorbar(sizes, values, yerr=errors, color=colour, marker="o", markersize=3, label=name)
        axes.plot(sizes, [row["bound"][field] for row in mine], style, color=colour, label=f"bound on {name}")
    axes.set(title=f"S2-SAM on logistic regression, ρ₀ = {largest:g}", xlabel="training examples n")
    axes.set(xscale="log", yscale="log")

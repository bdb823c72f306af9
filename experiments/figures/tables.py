"""Lines of a table, the paper's and ours: figures, differences, and gains against sparsity."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, ScalarFormatter

from experiments.figures.style import COLOURS, GREY, tidy


def draw_comparison(lines: Sequence[Any], title: str, file: Path) -> None:
    """Lines of a paper's table: figures, and differences to the baseline; filled ours, hollow the paper's."""
    figure = Figure(figsize=(11, max(3.0, 0.24 * len(lines) + 1.4)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    optimizers = list(dict.fromkeys(line.optimizer for line in lines))
    colours = dict(zip(optimizers, cycle(COLOURS)))
    for place, line in enumerate(lines):
        colour = colours[line.optimizer]
        for axes, ours, spread, paper in (
            (panels[0], line.ours, line.spread, line.paper),
            (panels[1], line.difference, line.difference_spread, line.paper_difference),
        ):
            if paper is not None:
                axes.plot(paper, place, "D", color=colour, markerfacecolor="none", markersize=5)
            if ours is not None:
                axes.errorbar(ours, place, xerr=spread, fmt="o", color=colour, markersize=5, capsize=3)
    labels = [line.row + ("" if line.sparsity is None else f", {100 * line.sparsity:g} %") for line in lines]
    panels[0].set_yticks(range(len(lines)), labels, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].set(xlabel=" / ".join(dict.fromkeys(line.metric for line in lines)))
    panels[1].set(xlabel="difference to the baseline, paired by seed")
    panels[1].axvline(0.0, color=GREY, linewidth=0.8)
    for axes in panels:
        tidy(axes)
    figure.suptitle(f"{title}: filled ours, ± over seeds; hollow the paper's")
    figure.savefig(file, dpi=120)


def draw_gains(lines: Sequence[Any], title: str, file: Path) -> None:
    """Paired differences to the baseline against the share of zeros, with 95 % intervals; hollow the paper's.

    A panel for each method; a line without zeros belongs to all of them.
    """
    labels = {line.name: line.row for line in lines}
    gains = [line for line in lines if line.difference is not None]
    methods = list(dict.fromkeys(labels[line.baseline] for line in gains if line.sparsity))
    if not methods:
        return
    optimizers = list(dict.fromkeys(line.optimizer for line in gains))
    figure = Figure(figsize=(5 * len(methods), 3.8), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, methods, strict=True):
        mine = [line for line in gains if not line.sparsity or labels[line.baseline] == method]
        for index, (optimizer, colour) in enumerate(zip(optimizers, cycle(COLOURS))):
            points = [(100 * (line.sparsity or 0), line) for line in mine if line.optimizer == optimizer]
            # Side by side, so that intervals do not hide each other.
            places = [zeros + (index - (len(optimizers) - 1) / 2) for zeros, _ in points]
            values = [line.difference for _, line in points]
            halves = [math.nan if line.interval is None else line.interval for _, line in points]
            style: dict[str, Any] = {"fmt": "o-", "color": colour, "markersize": 4, "capsize": 2, "linewidth": 1}
            axes.errorbar(places, values, yerr=halves, label=optimizer, **style)
            printed = [(zeros, line.paper_difference) for zeros, line in points if line.paper_difference is not None]
            if printed:
                axes.plot(*zip(*printed, strict=True), "D", color=colour, markerfacecolor="none", markersize=5)
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        axes.set(title=method, xlabel="zeros (%)")
        axes.set_yscale("symlog", linthresh=2.0)
        axes.yaxis.set_major_locator(FixedLocator([-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        tidy(axes)
    panels[0].set(ylabel="gain (points)")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{title}: gain over SGD, paired by seed, 95 % intervals; hollow the paper's")
    figure.savefig(file, dpi=120)

"""One figure per run or comparison: training loss, test accuracy, and what is left of each layer."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, ScalarFormatter

from experiments.record import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY = "#7F7F7F"  # What does not belong to one run alone.
MARKERS = "osD^vP"


def draw(runs: Mapping[str, list[Row]], title: str, file: Path) -> None:
    """Draws runs, by their label, from their rows."""
    layers = {label: rows[-1]["layers"] for label, rows in runs.items() if rows[-1]["layers"]}
    most = max((len(counts) for counts in layers.values()), default=0)
    figure = Figure(figsize=(14 if layers else 9, max(4.2, 0.2 * most + 1)), layout="constrained")
    panels = figure.subplots(1, 3 if layers else 2, width_ratios=(1, 1, 1.4) if layers else (1, 1))
    figure.suptitle(title)
    _curves(panels[0], runs, "train_loss", 1, "Training loss", "cross-entropy (nats)")
    panels[0].set_yscale("log")
    _curves(panels[1], runs, "test_accuracy", 100, "Test accuracy", "accuracy (%)")
    if layers:
        _bars(panels[2], layers)
    if len(runs) > 1:
        panels[0].legend(frameon=False)
    figure.savefig(file, dpi=120)


def _curves(axes: Axes, runs: Mapping[str, list[Row]], field: str, scale: float, title: str, unit: str) -> None:
    for (label, rows), colour, marker in zip(runs.items(), cycle(COLOURS), cycle(MARKERS)):
        epochs, values = [row["epoch"] for row in rows], [scale * row[field] for row in rows]
        axes.plot(epochs, values, label=label, color=colour, marker=marker, markersize=3, linewidth=1.5)
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame where there is no axis."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, layers: Mapping[str, Mapping[str, list[int]]]) -> None:
    names = list(dict.fromkeys(name for counts in layers.values() for name in counts))
    first, *others = layers.values()
    if others and all(counts == first for counts in others):
        layers = {"all": first}
    height = 0.8 / len(layers)
    colours = COLOURS if len(layers) > 1 else (GREY,)
    for index, ((label, counts), colour) in enumerate(zip(layers.items(), cycle(colours))):
        left = [100 * (1 - counts[name][0] / counts[name][1]) if name in counts else 0.0 for name in names]
        positions = [row + (index - (len(layers) - 1) / 2) * height for row in range(len(names))]
        bars = axes.barh(positions, left, height=height, color=colour, label=label)
        if len(layers) == 1:
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), [name.removesuffix("/kernel") for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Weights left per layer", xlabel="non-zero weights (%)", xlim=(0, 108))
    axes.spines[["top", "right"]].set_visible(False)


def draw_growth(points: Sequence[Mapping[str, Any]], device: str, file: Path) -> None:
    """Time and memory of selection against the number of scores, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, field, label in (
        (panels[0], "seconds", "time (s)"),
        (panels[1], "temporary_bytes", "temporary memory (bytes)"),
    ):
        for way, colour in zip(dict.fromkeys(point["way"] for point in points), cycle(COLOURS)):
            mine = [point for point in points if point["way"] == way]
            axes.loglog([p["parameters"] for p in mine], [p[field] for p in mine], "o-", color=colour, label=way)
        axes.set(xlabel="scores", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Selecting the largest tenth, {device}")
    figure.savefig(file, dpi=120)


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

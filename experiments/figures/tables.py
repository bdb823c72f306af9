"""Lines of a table, the paper's and ours: figures, differences, and gains against sparsity."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, ScalarFormatter

from experiments.config import LABELS
from experiments.figures.style import GREY, colour_of, tidy
from experiments.rows.comparison import Line


def draw_comparison(lines: Sequence[Line], title: str, file: Path) -> None:
    """Lines of a paper's table: means with their deviations, and gains with their intervals; hollow the paper's."""
    figure = Figure(figsize=(11, max(3.0, 0.24 * len(lines) + 1.4)), layout="constrained")
    means, gains = figure.subplots(1, 2, sharey=True)
    for place, line in enumerate(lines):
        _mark(means, place, line.optimizer, line.ours, line.spread, line.paper)
        _mark(gains, place, line.optimizer, line.difference, line.interval, line.paper_difference)
        if line.baseline is None and place:
            for axes in (means, gains):
                axes.axhline(place - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    labels = [line.row + ("" if line.sparsity is None else f", {100 * line.sparsity:g} %") for line in lines]
    means.set_yticks(range(len(lines)), labels, fontsize=8)
    means.set_ylim(len(lines) - 0.5, -0.5)
    means.set(xlabel=f"{' / '.join(dict.fromkeys(line.metric for line in lines))}, ± deviation over seeds")
    gains.set(xlabel="difference to the baseline, paired by seed, 95 % interval")
    gains.axvline(0.0, color=GREY, linewidth=0.8)
    _cut(gains, [gain for line in lines for gain in (line.difference, line.paper_difference)])
    for axes in (means, gains):
        tidy(axes)
    figure.suptitle(title + ("; hollow: the paper's" if any(line.paper is not None for line in lines) else ""))
    figure.savefig(file, dpi=120)


def _mark(axes: Axes, place: int, optimizer: str, ours: float | None, half: float | None, paper: float | None) -> None:
    """Ours with its error bar, and the paper's, as far as they are known."""
    _hollow(axes, paper, place, optimizer)
    if ours is not None:
        axes.errorbar(ours, place, xerr=half, fmt="o", color=colour_of(optimizer), markersize=5, capsize=3)


def _hollow(axes: Axes, x: float | None, y: float | None, optimizer: str) -> None:
    """The paper's figure as a hollow mark, if it is known."""
    if x is not None and y is not None:
        axes.plot(x, y, "D", color=colour_of(optimizer), markerfacecolor="none", markersize=5)


def _cut(axes: Axes, gains: Iterable[float | None]) -> None:
    """Lets wide intervals go on beyond the figure, where those of a few pairs would make all gains look alike."""
    if reach := 2.5 * max((abs(gain) for gain in gains if gain is not None), default=0.0):
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -reach), min(right, reach))


def draw_gains(lines: Sequence[Line], title: str, file: Path) -> None:
    """Paired differences to the baseline against the share of zeros, with 95 % intervals; hollow the paper's.

    A panel for each method; a line without zeros belongs to all of them.
    """
    labels: dict[str | None, str] = {line.name: line.row for line in lines}
    gains = [line for line in lines if line.difference is not None]
    methods = list(dict.fromkeys(labels[line.baseline] for line in gains if line.sparsity))
    if not methods:
        return
    optimizers = list(dict.fromkeys(line.optimizer for line in gains))
    figure = Figure(figsize=(5 * len(methods), 3.8), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, methods, strict=True):
        mine = [line for line in gains if not line.sparsity or labels[line.baseline] == method]
        for index, optimizer in enumerate(optimizers):
            points = [(100 * (line.sparsity or 0), line) for line in mine if line.optimizer == optimizer]
            # Side by side, so that intervals do not hide each other.
            places = [zeros + (index - (len(optimizers) - 1) / 2) for zeros, _ in points]
            values = [line.difference for _, line in points]
            halves = [math.nan if line.interval is None else line.interval for _, line in points]
            style: dict[str, Any] = {"fmt": "o-", "color": colour_of(optimizer), "markersize": 4, "capsize": 2}
            axes.errorbar(places, values, yerr=halves, label=LABELS.get(optimizer, optimizer), linewidth=1, **style)
            for zeros, line in points:
                _hollow(axes, zeros, line.paper_difference, optimizer)
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


def draw_prices(lines: Sequence[Line], title: str, file: Path) -> None:
    """Gains over SGD or AdamW, a panel for each such line; the optimizers with the fewest gradients come first."""
    gains = sorted((line for line in lines if line.difference is not None), key=lambda line: line.gradients or 0.0)
    bases = [line for line in lines if line.name in {gain.baseline for gain in gains}]
    if not bases:
        return
    kinds: dict[str | None, str] = {base.name: base.row.rpartition(", ")[0] for base in bases}
    words = {line.name: line.row.removeprefix(f"{kinds[line.baseline]}, ") for line in gains}
    places = {word: place for place, word in enumerate(dict.fromkeys(words.values()))}
    prices = {words[line.name]: line.gradients for line in gains}
    figure = Figure(figsize=(3.6 * len(bases) + 1.8, 0.24 * len(places) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
    for axes, base in zip(panels, bases, strict=True):
        mine = [line for line in gains if line.baseline == base.name]
        for line in mine:
            _mark(axes, places[words[line.name]], line.optimizer, line.difference, line.interval, None)
        axes.axvline(0.0, color=GREY, linewidth=0.8)
        zeros = "" if base.sparsity is None else f", {100 * base.sparsity:g} %"
        plain = base.row.rpartition(", ")[2]
        axes.set(title=f"{kinds[base.name]}{zeros}\n({plain}: {base.ours:.1f})", xlabel=f"points over {plain}")
        _cut(axes, [line.difference for line in gains])
        tidy(axes)
    panels[0].set_yticks(range(len(places)), [f"{word} ({prices[word]:.3g})" for word in places], fontsize=8)
    panels[0].set_ylim(len(places) - 0.5, -0.5)
    figure.suptitle(f"{title}: gains, paired by seed, 95 % intervals; in parentheses, gradients per step")
    figure.savefig(file, dpi=120)

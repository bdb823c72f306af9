"""One figure per run or comparison: training loss, test accuracy, and what is left of each layer."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures.style import COLOURS, GREY, MARKERS, tidy
from experiments.rows.jsonl import Row


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

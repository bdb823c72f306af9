"""Training curves of many runs: the mean over seeds with its standard deviation, a line for each setting."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.config import choices, differing
from experiments.figures.style import COLOURS, MARKERS, tidy
from experiments.rows.jsonl import Row

MOST = len(COLOURS) * len(MARKERS)  # Lines that look different.
PANELS = (
    ("train_loss", 1.0, "Training loss", "loss (nats)"),
    ("test_accuracy", 100.0, "Test accuracy", "accuracy (%)"),
)


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of runs that differ in their seed alone, under what tells them from the others."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(choices(row["config"])), []).append(row)
    settings = [json.loads(group) for group in groups]
    fields = differing(settings)
    labels = [", ".join(_word(field, one[field]) for field in fields if field in one) for one in settings]
    return {label or one["optimizer"]: mine for label, one, mine in zip(labels, settings, groups.values(), strict=True)}


def _word(field: str, value: object) -> str:
    return str(value) if field in ("optimizer", "method", "model") else f"{field} {value}"


def draw_curves(groups: Mapping[str, Sequence[Row]], title: str, file: Path) -> None:
    """A line for each group of rows, and around it a band as wide as the seeds differ."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (field, scale, heading, unit) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for (label, rows), colour, marker in zip(groups.items(), cycle(COLOURS), cycle(MARKERS)):
            _band(axes, rows, field, scale, label, colour, marker)
        axes.set(title=heading, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    losses, accuracies = figure.axes
    losses.set_yscale("log")
    for formatted in (losses.yaxis.set_major_formatter, losses.yaxis.set_minor_formatter):
        formatted("{x:g}")
    figure.legend(*accuracies.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    seeds = sorted({len({row["seed"] for row in rows}) for rows in groups.values()})
    figure.suptitle(f"{title} (mean ± standard deviation, {' or '.join(map(str, seeds))} seeds)")
    figure.savefig(file, dpi=120)


def _band(axes: Axes, rows: Sequence[Row], field: str, scale: float, label: str, colour: str, marker: str) -> None:
    epochs = sorted({row["epoch"] for row in rows})
    values = [[scale * row[field] for row in rows if row["epoch"] == epoch] for epoch in epochs]
    mean = np.array([np.mean(v) for v in values])
    spread = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
    low = np.maximum(mean - spread, np.min(np.concatenate(values)) / 2)  # a loss is drawn on a logarithmic scale
    axes.fill_between(epochs, low, mean + spread, color=colour, alpha=0.2, linewidth=0)
    axes.plot(epochs, mean, label=label, color=colour, marker=marker, markersize=3, linewidth=1.5)

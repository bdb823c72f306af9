"""A number of each run against its sparsity: a panel for each method, a line for each optimizer."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.config import LABELS
from experiments.figures.style import MARKERS, colour_of, tidy
from experiments.rows.jsonl import Row


class Quantity(NamedTuple):
    """A field of rows, how the figure names it, and the factor and scale it is drawn with."""

    field: str
    label: str
    title: str
    factor: float = 1.0
    logarithmic: bool = False


FLATNESS = (
    Quantity("roughness", "Ra (nats)", "Roughness of the loss surface", logarithmic=True),
    Quantity("largest_eigenvalue", "λ1", "Largest eigenvalue of the Hessian", logarithmic=True),
    Quantity("test_accuracy_recalibrated", "accuracy (%)", "Test accuracy", factor=100.0),
)


def draw(rows: Sequence[Row], quantity: Quantity, title: str, file: Path) -> None:
    """A dot for each seed, and lines through their means."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    columns = min(len(methods), 4)
    lines = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(4 * columns + 1, 3.4 * lines + 0.4), layout="constrained")
    panels = np.ravel(figure.subplots(lines, columns, sharey=True, squeeze=False))
    for axes in panels[len(methods) :]:
        axes.remove()
    for axes, method in zip(panels, methods, strict=False):
        for index, (optimizer, marker) in enumerate(zip(optimizers, cycle(MARKERS))):
            mine = [row for row in rows if row["method"] == method and row["optimizer"] == optimizer]
            sparsities = sorted({row["sparsity_asked"] for row in mine})
            # Side by side, so that dots do not hide each other.
            places = {s: 100 * s + 0.3 * (index - (len(optimizers) - 1) / 2) for s in sparsities}
            values = [(row["sparsity_asked"], quantity.factor * row[quantity.field]) for row in mine]
            means = [np.mean([value for sparsity, value in values if sparsity == s]) for s in sparsities]
            colour, name = colour_of(optimizer), LABELS.get(optimizer, optimizer)
            axes.plot(places.values(), means, color=colour, marker=marker, markersize=5, linewidth=1, label=name)
            dots = [places[sparsity] for sparsity, _ in values]
            axes.plot(dots, [value for _, value in values], ".", color=colour, markersize=3, alpha=0.6)
        known = sorted({100 * row["sparsity_asked"] for row in rows if row["method"] == method})
        axes.set(title=method, xlabel="zeros (%)", xlim=(known[0] - 2, known[-1] + 2))
        axes.set_xticks(known, [f"{s:g}" for s in known])
        tidy(axes)
        if quantity.logarithmic:
            axes.set_yscale("log")
    for axes in panels[::columns]:
        axes.set_ylabel(quantity.label)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)

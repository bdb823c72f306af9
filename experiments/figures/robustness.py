"""Accuracy under each corruption, of one run or of several optimizers side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.config import LABELS
from experiments.figures.style import colour_of, tidy
from experiments.rows.jsonl import Row


def draw_corruptions(rows: Sequence[Row], title: str, file: Path) -> None:
    """Means over severities on clean and corrupted images, and over the seeds of an optimizer, ± their deviation."""
    names = list(rows[0]["by_corruption"])
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure = Figure(figsize=(0.5 * len(names) + 3, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, optimizer in enumerate(optimizers):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        found = 100 * np.array([[row["clean_accuracy"], *(row["by_corruption"][n] for n in names)] for row in mine])
        deviation = found.std(axis=0, ddof=1) if len(mine) > 1 else None
        places = np.arange(len(names) + 1) + 0.2 * (index - (len(optimizers) - 1) / 2)
        style = {"fmt": "o", "color": colour_of(optimizer), "markersize": 4, "capsize": 2}
        axes.errorbar(places, found.mean(axis=0), yerr=deviation, label=LABELS[optimizer], **style)
    words = [name.replace("_", " ") for name in ("clean", *names)]
    axes.set_xticks(range(len(words)), words, rotation=45, ha="right", fontsize=8)
    axes.set(ylabel="accuracy (%)", title=title)
    axes.legend(frameon=False)
    tidy(axes)
    figure.savefig(file, dpi=120)

"""Which connections die and grow: density and change of every layer over a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures.style import COLOURS, GREY, tidy
from experiments.rows.jsonl import Row


def draw_masks(rows: Sequence[Row], title: str, file: Path) -> None:
    """Density by layer, the share of its weights that grew, and how many died and grew in all, epoch by epoch.

    Raises:
      ValueError: for rows of dense training, or from before masks were counted.
    """
    if not all(row.get("masks") for row in rows):
        raise ValueError(f"{title} has no counts of masks in its rows: it is dense, or of an older version.")
    names = list(rows[0]["masks"])
    counts = np.array([[row["masks"][name] for name in names] for row in rows], float)  # row, layer, figure
    zeros, sizes, died, grown = np.moveaxis(counts, -1, 0)
    live = sizes - zeros
    figure = Figure(figsize=(15, max(4.2, 0.2 * len(names) + 1.4)), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 1.0))
    epochs = [row["epoch"] for row in rows]
    edges = np.array([epochs[0] - (epochs[1] - epochs[0] if len(epochs) > 1 else epochs[0]), *epochs], float)
    _heat(panels[0], edges, 100 * live / sizes, "Density", "non-zero weights (%)")
    panels[0].set_yticks(range(len(names)), [name.removesuffix("/kernel") for name in names], fontsize=8)
    share = 100 * grown / np.maximum(live, 1)
    _heat(panels[1], edges, share, "New connections", "grown since the row before (% of live)")
    panels[1].set_yticks([])
    for values, label, colour in ((grown, "grew", COLOURS[0]), (-died, "died", COLOURS[1])):
        panels[2].bar(epochs, values.sum(1), width=0.8 * np.diff(edges), label=label, color=colour)
    panels[2].axhline(0.0, color=GREY, linewidth=0.8)
    panels[2].set(title="All layers", ylabel="weights since the row before")
    panels[2].yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    panels[2].legend(frameon=False)
    tidy(panels[2])
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _heat(axes: Axes, edges: np.ndarray, values: np.ndarray, title: str, unit: str) -> None:
    """Layers downwards, a column a row of the run."""
    borders = np.arange(values.shape[1] + 1) - 0.5
    drawn = axes.pcolormesh(edges, borders, values.T, cmap="viridis", vmin=0)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.figure.colorbar(drawn, ax=axes, label=unit)

"""What the analyses of a finished run have found: its loss surface, the spectrum of its Hessian, what SAM changes."""

import math
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.style import COLOURS, GREY, tidy
from experiments.rows.jsonl import Row
from s2sam_jax.analysis import Spectrum


def draw_surfaces(rows: Mapping[str, Row], file: Path) -> None:
    """The loss around each solution as a surface above its contours, all to one scale."""
    columns = min(len(rows), 4)
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(4.2 * columns, 6.6 * lines), layout="constrained")
    everything = np.concatenate([np.ravel(row["surface"]) for row in rows.values()])
    top = np.max(everything[np.isfinite(everything)], initial=0.0) or 1.0
    for place, (label, row) in enumerate(rows.items()):
        heights = np.nan_to_num(row["surface"], nan=top, posinf=top)
        line = np.linspace(-row["span"], row["span"], row["n"])
        alpha, beta = np.meshgrid(line, line, indexing="ij")
        first = 2 * columns * (place // columns) + place % columns + 1
        solid: Any = figure.add_subplot(2 * lines, columns, first, projection="3d")
        solid.plot_surface(alpha, beta, heights, cmap="viridis", vmin=0, vmax=top, linewidth=0)
        solid.set(title=f"{label}\nRa = {row['roughness']:.3g}", zlim=(0, top), xlabel="α", ylabel="β")
        solid.set_zlabel("training loss (nats)")
        flat = figure.add_subplot(2 * lines, columns, first + columns)
        low = 1.01 * max(heights.min(), 1e-4 * heights.max())
        if 0 < low < heights.max():
            levels = np.geomspace(low, heights.max(), 10)  # wells are steep
            drawn = flat.contour(alpha, beta, heights, levels=levels, norm="log", cmap="viridis")
            flat.clabel(drawn, fmt="%.2g", fontsize=7)
        flat.plot(0, 0, "+", color="black")
        flat.set(xlabel="α (filter norms)", ylabel="β (filter norms)", aspect="equal")
    figure.savefig(file, dpi=110)


def draw_spectra(rows: Mapping[str, Row], file: Path) -> None:
    """Densities of the Hessian's eigenvalues, on a logarithmic scale."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, row), colour in zip(rows.items(), cycle(COLOURS)):
        found = Spectrum(np.asarray(row["nodes"]), np.asarray(row["weights"]))
        low, high = found.nodes.min(), found.nodes.max()
        high = max(high, low + 1e-6)  # a single eigenvalue
        margin = 0.05 * (high - low)
        grid = np.linspace(low - margin, high + margin, 2000)
        axes.semilogy(grid, found.density(grid, sigma=(high - low) / 100) + 1e-12, color=colour, label=label)
    axes.set(title="Density of the Hessian's eigenvalues", xlabel="eigenvalue", ylabel="density", ylim=(1e-6, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def draw_ratios(rows: Mapping[str, Row], file: Path) -> None:
    """How SAM's gradient differs from the plain one, by coordinates: below r = 0 by less than its own size."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color=GREY, linewidth=1.0)
    for (label, row), colour in zip(rows.items(), cycle(COLOURS)):
        edges, shares = np.asarray(row["r_edges"]), 100 * np.asarray(row["r_counts"]) / sum(row["r_counts"])
        axes.stairs(shares, edges, color=colour, linewidth=1.5, label=f"{label}: {row['r_below_zero']:.1%} below 0")
    axes.set(
        title="How much SAM changes each coordinate of the gradient",
        xlabel="r = ln |(g of SAM − g) / g|",
        ylabel="weights (% a bin)",
    )
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    figure.savefig(file, dpi=120)

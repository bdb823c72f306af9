"""Figures of solutions: loss surfaces, spectra, what SAM changes, and how it all goes with sparsity."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.config import LABELS
from experiments.figures.style import COLOURS, GREY, MARKERS, colour_of, tidy
from experiments.rows.jsonl import Row
from s2sam_jax.analysis import Spectrum


def draw_surfaces(rows: Mapping[str, Row], file: Path) -> None:
    """Each as a surface above its contours, all to one scale."""
    columns = min(len(rows), 4)
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(4.2 * columns, 6.6 * lines), layout="constrained")
    everything = np.concatenate([np.ravel(row["surface"]) for row in rows.values()])
    top = np.max(everything[np.isfinite(everything)], initial=0.0) or 1.0
    for place, (label, row) in enumerate(rows.items()):
        heights, line = (
            np.nan_to_num(row["surface"], nan=top, posinf=top),
            np.linspace(-row["span"], row["span"], row["n"]),
        )
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
    axes.set(
        title="Density of the Hessian's eigenvalues", xlabel="eigenvalue", ylabel="density", ylim=(1e-6, None)
    )  # fmt: skip
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def draw_ratios(rows: Mapping[str, Row], file: Path) -> None:
    """How SAM's gradient differs from the plain one, coordinate by coordinate; left of the line by less than itself."""
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


def draw_against_sparsity(
    rows: Sequence[Row],
    field: str,
    label: str,
    title: str,
    file: Path,
    *,
    scale: float = 1.0,
    logarithmic: bool = False,
) -> None:
    """A panel a method: a dot a seed, and a line an optimizer through the means."""
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
            means = [np.mean([scale * row[field] for row in mine if row["sparsity_asked"] == s]) for s in sparsities]
            drawn = colour_of(optimizer)
            label_of = LABELS.get(optimizer, optimizer)
            axes.plot(places.values(), means, color=drawn, marker=marker, markersize=5, linewidth=1, label=label_of)
            dots = [places[row["sparsity_asked"]] for row in mine], [scale * row[field] for row in mine]
            axes.plot(*dots, ".", color=drawn, markersize=3, alpha=0.6)
        known = sorted({100 * row["sparsity_asked"] for row in rows if row["method"] == method})
        axes.set(title=method, xlabel="zeros (%)", xlim=(known[0] - 2, known[-1] + 2))
        axes.set_xticks(known, [f"{s:g}" for s in known])
        tidy(axes)
        if logarithmic:
            axes.set_yscale("log")
    for axes in panels[::columns]:
        axes.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)

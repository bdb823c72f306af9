"""How selection grows with the number of scores."""

from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures.style import COLOURS
from experiments.rows import jsonl


def draw_growth(file: Path) -> None:
    """Time and memory of selection against the number of scores, both axes logarithmic; beside its rows' file."""
    points, device = jsonl.read(file), file.stem.removeprefix("bench_select_")
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
    figure.savefig(file.with_suffix(".png"), dpi=120)

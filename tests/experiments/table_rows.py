"""Rows of runs that never were, and tables as they are printed."""

import numpy as np
from rich.console import Console

from experiments import recipes, table
from experiments.pages import rendering


def synthetic():
    """Five seeds of a pair of which one run is missing, and a row that nothing is printed for."""
    rng = np.random.default_rng(0)
    rows = []
    for name in ("table1.rigl-0.9.sgd", "table1.rigl-0.9.s2sam", "table2.rigl-0.8.s2sam", "table5.rigl-0.8.sgd"):
        for seed in range(5):
            value = None if name.startswith("table5") else float(rng.normal(90, 1))
            rows.append({"recipe": table.described(recipes.get(name)), "seed": seed, "value": value})
    return rows[1:]


def printed(lines, width):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(rendering.terminal(lines, "table1, cpu", console.width), soft_wrap=True)
    return captured.get()

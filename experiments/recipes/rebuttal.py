"""Tables of the S2-SAM rebuttal on CIFAR-10: LRR, larger pruning rounds, and MEST from dense to 98 %."""

from collections.abc import Iterator
from typing import Any

from experiments.recipes.base import REBUTTAL, Recipe, cell, lines
from experiments.recipes.cifar import KNOWN, OPTIMIZERS, UNKNOWN, row

# Columns: sparsity, SGD and S2-SAM.
LRR = """
0.8  94.68 94.87
0.9  94.05 94.39
0.95 93.82 94.22
"""
# Columns: share pruned in a round, the rounds it takes, SGD and S2-SAM, at 90 %.
LOTTERY = """
0.2 11 92.31 92.58
0.3 6  91.71 92.32
0.4 4  90.73 91.44
"""
# Columns: sparsity, SGD, and S2-SAM with the difference that is printed.
SWEEP = """
0    94.58 94.99(+0.41)
0.2  94.35 94.67(+0.32)
0.4  93.92 94.38(+0.46)
0.6  93.58 94.11(+0.53)
0.8  93.23 93.88(+0.65)
0.9  92.56 93.43(+0.87)
0.95 91.15 91.58(+0.43)
0.98 89.22 91.22(+2.00)
"""


def recipes() -> Iterator[Recipe]:
    for sparsity, *cells in lines(LRR):
        known = f'"Original training settings" (rebuttal). {KNOWN}'
        for optimizer, text in zip(OPTIMIZERS, cells, strict=True):
            yield row("rebuttal-lrr", "lrr", float(sparsity), optimizer, cell(text), known=known, paper=REBUTTAL)
    for fraction, count, *cells in lines(LOTTERY):
        yield from _lottery(float(fraction), int(count), cells)
    for sparsity, *cells in lines(SWEEP):
        key = "mest-em" if float(sparsity) else "dense"
        for optimizer, text in zip(OPTIMIZERS, cells, strict=True):
            yield row("rebuttal-sweep", key, float(sparsity), optimizer, cell(text), paper=REBUTTAL)


def _lottery(fraction: float, count: int, cells: list[str]) -> Iterator[Recipe]:
    known = f"{fraction:.0%} of the rest pruned a round, {count} rounds (rebuttal). {KNOWN}"
    reached, unknown = (1 - fraction) ** count, UNKNOWN
    if reached > 0.1:
        short = f"{count} rounds of {fraction:.0%} leave {reached:.1%} of the weights (here as many as 90 % takes)."
        unknown = f"{short} {UNKNOWN}"
    table = f"rebuttal-lottery-{100 * fraction:.0f}"  # the fraction is no part of a recipe's name otherwise
    for optimizer, text in zip(OPTIMIZERS, cells, strict=True):
        common: dict[str, Any] = {"known": known, "unknown": unknown, "paper": REBUTTAL, "prune_fraction": fraction}
        yield row(table, "lottery", 0.9, optimizer, cell(text), **common)

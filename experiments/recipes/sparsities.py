"""Does the gain grow with the sparsity? MEST(EM) and RigL-ERK from dense to 98 %, with SGD, S2-SAM and SAM.

The rebuttal's sweep of MEST(EM), with SAM beside it, and the same for RigL-ERK, of which Table 1 has three sparsities.
"""

from collections.abc import Iterator
from typing import cast

from experiments.config import OptimizerName
from experiments.recipes import cifar, rebuttal
from experiments.recipes.base import OURS, REBUTTAL, Printed, Recipe, cell, lines

OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "s2sam", "sam")
SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
PAPER = f"{REBUTTAL}, and Table 1 of the paper"
NO_PAPER = OURS | {"known": "Nothing: no paper has this row."}


def recipes() -> Iterator[Recipe]:
    printed = _printed()
    for key, sparsities in (("dense", (0.0,)), ("mest-em", SPARSITIES), ("rigl-erk", SPARSITIES)):
        for sparsity in sparsities:
            for optimizer in OPTIMIZERS:
                value = printed.get((key, sparsity, optimizer), Printed())
                source = NO_PAPER if value.value is None else {"paper": PAPER}
                yield cifar.row("sparsities", key, sparsity, optimizer, value, **source)


def _printed() -> dict[tuple[str, float, OptimizerName], Printed]:
    """What the paper and its rebuttal have of these rows."""
    found: dict[tuple[str, float, OptimizerName], Printed] = {}
    for sparsity, *cells in lines(rebuttal.SWEEP):
        key = "mest-em" if float(sparsity) else "dense"
        for optimizer, text in zip(cifar.OPTIMIZERS, cells, strict=True):
            found[key, float(sparsity), optimizer] = cell(text)
    for key, word, *cells in lines(cifar.TABLE_1["cifar10"]):
        if key == "rigl-erk":
            for sparsity, text in zip(cifar.SPARSITIES, cells, strict=True):
                found[key, sparsity, cast(OptimizerName, word)] = cell(text)
    return found

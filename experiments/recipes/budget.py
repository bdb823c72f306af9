"""The whole sharpness family, dense and under RigL: at equal epochs, and at equal gradient evaluations.

A comparison of our own; no paper has it. rho is to be tuned for each row by the same grid: ``experiments.tune``.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from experiments.config import OptimizerName
from experiments.recipes import cifar
from experiments.recipes.base import OURS, Printed, Recipe

OPTIMIZERS: tuple[OptimizerName, ...] = (
    "sgd", "sam", "asam", "ssam-f", "ssam-d", "s2sam", "msam", "looksam", "gsam", "esam",
)  # fmt: skip
ROWS = (("dense", 0.0), ("rigl-erk", 0.9), ("rigl-erk", 0.95), ("rigl-erk", 0.98))
UNKNOWN = "rho (here 0.05, to be tuned on held-out training images by `experiments.tune`); all else is Table 1's."


def recipes() -> Iterator[Recipe]:
    for (key, sparsity), optimizer in itertools.product(ROWS, OPTIMIZERS):
        equal_epochs = _row("budget", key, sparsity, optimizer)
        yield equal_epochs
        # SSAM's formula counts what hardware for sparse gradients would save; it evaluates two.
        share = 1 / (2.0 if optimizer.startswith("ssam") else equal_epochs.gradients)
        shorter = _row("budget-gradients", key, sparsity, optimizer)
        config = dataclasses.replace(shorter.config, epochs=round(share * shorter.config.epochs))
        yield dataclasses.replace(shorter, config=config, share=share)


def _row(table: str, key: str, sparsity: float, optimizer: OptimizerName) -> Recipe:
    return cifar.row(table, key, sparsity, optimizer, Printed(), unknown=UNKNOWN, **OURS)

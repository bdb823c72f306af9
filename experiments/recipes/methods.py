"""Does every sparse method gain by S2-SAM? Digits, a ResNet-8 of width 8, 20 epochs, as ``--scale digits`` has."""

import dataclasses
import itertools
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.config.variants import ROUNDS
from experiments.recipes.base import OURS, Printed, Recipe, recipe
from experiments.training import sparse_methods

METHODS = (
    "static", "magnitude", "gmp", "snip", "grasp", "set", "dsr", "rigl", "itop", "mest-em", "mest-ems",
    "lottery", "lrr",
)  # fmt: skip
# CHEX prunes whole channels, of which half is much; Chase half of them before it comes to single weights.
CELLS = (*itertools.product(METHODS, (0.9, 0.95)), ("chase", 0.9), ("chex", 0.5))
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "s2sam")
ROUND_EPOCHS, PRUNE_FRACTION = 10, 0.4
UNKNOWN = (
    "All: rho untuned, weight decay 5e-4 for both, masks updated once an epoch over three quarters of training, GMP's "
    "from a fifth of it on, those of SET, DSR, ITOP, CHEX and Chase from the second epoch; a round of lottery and LRR "
    f"has {ROUND_EPOCHS} epochs and prunes {PRUNE_FRACTION:.0%}, so they train for longer."
)


def config_of(method: str, optimizer: OptimizerName, sparsity: float, seed: int = 0) -> Config:
    """A run at that scale."""
    small = Config(width=8, epochs=20, eval_every=10_000, method=method, optimizer=optimizer, sparsity=sparsity)
    small = dataclasses.replace(small, seed=seed)
    if method not in ROUNDS:
        return small
    one = dataclasses.replace(small, epochs=ROUND_EPOCHS, prune_fraction=PRUNE_FRACTION)
    return sparse_methods.for_each_training(one)


def recipes() -> Iterator[Recipe]:
    for (method, sparsity), optimizer in itertools.product(CELLS, OPTIMIZERS):
        config = config_of(method, optimizer, sparsity)
        yield recipe("methods", method, method, config, Printed(), unknown=UNKNOWN, **OURS)

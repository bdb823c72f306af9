"""Does S2-SAM lose accuracy because a network is trained too briefly? 1,000 images of CIFAR-10, 10 to 100 epochs.

One number is changed, that of the epochs: the learning rate falls to zero by their end, and RigL's 20 updates spread
over them. RigL-ERK at 90 %, and beside it dense.
"""

import dataclasses
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes.base import Recipe, by_radius

EPOCHS = (10, 30, 100)
RADII: tuple[tuple[OptimizerName, float], ...] = (("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("sam", 0.05))
UNKNOWN = "All: rho untuned, weight decay 5e-4 for all."


def recipes() -> Iterator[Recipe]:
    for epochs in EPOCHS:
        sparse = Config(
            dataset="cifar10",
            subset=1000,
            epochs=epochs,
            eval_every=epochs,
            checkpoint_every=epochs,
            distribution="erk",
            update_every=epochs / 20,
        )
        dense = dataclasses.replace(sparse, method="dense")
        for key, label, base in (("dense", "dense", dense), ("rigl-erk", "RigL (ERK)", sparse)):
            yield from by_radius("length", f"{epochs}-{key}", f"{epochs} epochs, {label}", base, RADII, UNKNOWN)

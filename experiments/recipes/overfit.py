"""Do SAM and S2-SAM gain where the network can learn its training images by heart? Few digits, many epochs.

RigL-ERK at 90 %, the same number of steps (within 1 %) for every number of images: what changes is how often each is
seen.
"""

import dataclasses
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes.base import LABELS, Printed, Recipe, recipe

# Training images and epochs, about 440 steps each.
SIZES = ((128, 220), (384, 73), (1437, 20))
RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("sam", 0.05), ("sam", 0.2),
)  # fmt: skip
KNOWN = "Nothing: the comparison is ours."
UNKNOWN = "All: RigL's update every epoch's worth of 22 steps, rho untuned, weight decay 5e-4 for all."


def recipes() -> Iterator[Recipe]:
    for images, epochs in SIZES:
        base = Config(
            width=8,
            subset=images,
            epochs=epochs,
            eval_every=epochs,
            checkpoint_every=epochs,
            distribution="erk",
            update_every=epochs / 20,
        )
        for optimizer, rho in RADII:
            config = dataclasses.replace(base, optimizer=optimizer, rho=rho)
            name = "sgd" if optimizer == "sgd" else f"{optimizer}-{rho:g}"
            label = LABELS[optimizer] + ("" if optimizer == "sgd" else f", rho {rho:g}")
            key = f"{images}-{name}"
            found = recipe("overfit", key, label, config, Printed(), known=KNOWN, unknown=UNKNOWN, paper="none: ours")
            baseline = None if optimizer == "sgd" else f"overfit.{images}-sgd"
            row = f"{images} images, {label}"
            yield dataclasses.replace(found, name=f"overfit.{key}", row=row, baseline=baseline)

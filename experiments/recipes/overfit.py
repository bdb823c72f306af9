"""Do SAM and S2-SAM gain where the network can learn its training images by heart? Few images, many epochs.

The same number of steps (within 1 %) for every number of images, so that what changes is how often each is seen. Of
digits RigL-ERK at 90 %; of CIFAR-10 beside it the control, dense, where SAM's gain is well known.
"""

import dataclasses
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes.base import Recipe, by_radius

# Training images and epochs: about 440 steps each, and 800.
DIGITS = ((128, 220), (384, 73), (1437, 20))
CIFAR = ((128, 400), (512, 100))
RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("sam", 0.05), ("sam", 0.2),
)  # fmt: skip
UNKNOWN = "All: RigL's 20 updates spread over the training, rho untuned, weight decay 5e-4 for all."


def recipes() -> Iterator[Recipe]:
    for images, epochs in DIGITS:
        base = _base(images, epochs, width=8)
        yield from by_radius("overfit", f"{images}", f"{images} images", base, RADII, UNKNOWN)
    for images, epochs in CIFAR:
        sparse = dataclasses.replace(_base(images, epochs), dataset="cifar10")
        dense = dataclasses.replace(sparse, method="dense")
        for key, label, base in (("dense", "dense", dense), ("rigl-erk", "RigL (ERK)", sparse)):
            yield from by_radius(
                "overfit-cifar10", f"{images}-{key}", f"{images} images, {label}", base, RADII, UNKNOWN
            )


def _base(images: int, epochs: int, width: int | None = None) -> Config:
    return Config(
        width=width,
        subset=images,
        epochs=epochs,
        eval_every=epochs,
        checkpoint_every=epochs,
        distribution="erk",
        update_every=epochs / 20,
    )

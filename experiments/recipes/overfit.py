"""Do SAM and S2-SAM gain where the network can learn its training images by heart? Few images, many epochs.

Of digits: RigL-ERK at 90 %, the same number of steps (within 1 %) for every number of images, so that what changes is
how often each is seen. Of CIFAR-10: the control, dense, where SAM's gain is well known, beside RigL-ERK at 90 %.
"""

import dataclasses
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes.base import LABELS, Printed, Recipe, recipe

# Training images and epochs, about 440 steps each.
SIZES = ((128, 220), (384, 73), (1437, 20))
CIFAR_SIZE = (512, 100)
RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("sam", 0.05), ("sam", 0.2),
)  # fmt: skip
KNOWN = "Nothing: the comparison is ours."
UNKNOWN = "All: RigL's 20 updates spread over the training, rho untuned, weight decay 5e-4 for all."


def recipes() -> Iterator[Recipe]:
    for images, epochs in SIZES:
        yield from _rows("overfit", f"{images}", f"{images} images", _base(images, epochs, width=8))
    images, epochs = CIFAR_SIZE
    sparse = dataclasses.replace(_base(images, epochs), dataset="cifar10")
    dense = dataclasses.replace(sparse, method="dense", distribution=None, update_every=None)
    yield from _rows("overfit-cifar10", "dense", "dense", dense)
    yield from _rows("overfit-cifar10", "rigl-erk", "RigL (ERK)", sparse)


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


def _rows(table: str, stem: str, label: str, base: Config) -> Iterator[Recipe]:
    for optimizer, rho in RADII:
        config = dataclasses.replace(base, optimizer=optimizer, rho=rho)
        plain = optimizer == "sgd"
        key = f"{stem}-sgd" if plain else f"{stem}-{optimizer}-{rho:g}"
        row = f"{label}, {LABELS[optimizer]}" + ("" if plain else f", rho {rho:g}")
        found = recipe(table, key, row, config, Printed(), known=KNOWN, unknown=UNKNOWN, paper="none: ours")
        baseline = None if plain else f"{table}.{stem}-sgd"
        yield dataclasses.replace(found, name=f"{table}.{key}", row=row, baseline=baseline)

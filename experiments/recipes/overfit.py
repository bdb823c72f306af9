"""Do SAM and S2-SAM gain where the network can learn its training images by heart? Few images, many epochs.

The same number of steps (within 1 %) for every number of images, so that what changes is how often each is seen. Of
digits RigL-ERK at 90 %; of CIFAR-10 beside it the control, dense, where SAM's gain is well known.
"""

import dataclasses
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes.base import LABELS, Printed, Recipe, recipe

# Training images and epochs: about 440 steps each, and 800.
DIGITS = ((128, 220), (384, 73), (1437, 20))
CIFAR = ((128, 400), (512, 100))
RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("sam", 0.05), ("sam", 0.2),
)  # fmt: skip
KNOWN = "Nothing: the comparison is ours."
UNKNOWN = "All: RigL's 20 updates spread over the training, rho untuned, weight decay 5e-4 for all."


def recipes() -> Iterator[Recipe]:
    for images, epochs in DIGITS:
        yield from _rows("overfit", f"{images}", f"{images} images", _base(images, epochs, width=8))
    for images, epochs in CIFAR:
        sparse = dataclasses.replace(_base(images, epochs), dataset="cifar10")
        dense = dataclasses.replace(sparse, method="dense", distribution=None, update_every=None)
        yield from _rows("overfit-cifar10", f"{images}-dense", f"{images} images, dense", dense)
        yield from _rows("overfit-cifar10", f"{images}-rigl-erk", f"{images} images, RigL (ERK)", sparse)


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

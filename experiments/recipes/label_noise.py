"""Does S2-SAM do what SAM does, where SAM is known to gain most? Images of which 40 % have a wrong label.

SAM keeps networks from learning wrong labels by heart (Baek, Kolter, Raghunathan, "Why is SAM robust to label noise?",
ICLR 2024). Dense and under RigL-ERK at 90 %; the test labels are right. All of digits, and beside it what the same
radii do where all labels are right; the same with AdamW in place of SGD; and 1,000 images of CIFAR-10.
"""

import dataclasses
from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes.base import Recipe, by_radius

RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("s2sam", 0.5), ("s2sam", 1.0), ("s2sam-opposite", 0.2),
    ("sam", 0.05), ("sam", 0.2), ("sam", 0.5),
)  # fmt: skip
# The rest of the family, at one radius, and ASAM, whose radii are larger, at ten times that.
RELATIVES: tuple[tuple[OptimizerName, float], ...] = (
    ("asam", 2.0), ("ssam-f", 0.2), ("ssam-d", 0.2), ("msam", 0.2), ("looksam", 0.2), ("gsam", 0.2), ("esam", 0.2),
)  # fmt: skip
CIFAR_RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.05), ("s2sam", 0.2), ("s2sam", 0.5), ("s2sam", 1.0), ("sam", 0.05), ("sam", 0.2),
)  # fmt: skip
ADAMW_RADII: tuple[tuple[OptimizerName, float], ...] = (
    ("sgd", 0.05), ("s2sam", 0.2), ("s2sam", 0.5), ("sam", 0.2), ("sam", 0.5),
)  # fmt: skip
UNKNOWN = "All: 100 epochs, rho untuned, weight decay 5e-4 for all, RigL updates its masks once an epoch."
UNKNOWN_OF_ADAMW = (
    "All: 100 epochs, learning rate 1e-3, rho untuned, weight decay 0.05 for all, RigL updates its masks once an epoch."
)


def recipes() -> Iterator[Recipe]:
    sparse = Config(label_noise=0.4, epochs=100, checkpoint_every=100, distribution="erk", update_every=1.0)
    dense = dataclasses.replace(sparse, method="dense")
    for key, label, base in (("dense", "dense", dense), ("rigl-erk", "RigL (ERK)", sparse)):
        yield from by_radius("label-noise", key, label, base, RADII + RELATIVES, UNKNOWN)
        # A large radius from the start may keep a network from learning anything.
        rising = dataclasses.replace(base, rho_schedule="warmup")
        for found in by_radius("label-noise", f"{key}-rising", f"{label}, rising", rising, [("s2sam", 1.0)], UNKNOWN):
            yield dataclasses.replace(found, baseline=f"label-noise.{key}-sgd")
        right = dataclasses.replace(base, label_noise=0.0)
        yield from by_radius("label-noise", f"right-{key}", f"right labels, {label}", right, RADII, UNKNOWN)
        adamw = dataclasses.replace(base, base="adamw", learning_rate=1e-3, weight_decay=0.05)
        yield from by_radius("label-noise-adamw", key, label, adamw, ADAMW_RADII, UNKNOWN_OF_ADAMW)
        right = dataclasses.replace(adamw, label_noise=0.0)
        stem, name = f"right-{key}", f"right labels, {label}"
        yield from by_radius("label-noise-adamw", stem, name, right, ADAMW_RADII, UNKNOWN_OF_ADAMW)
        cifar = dataclasses.replace(base, dataset="cifar10", subset=1000, eval_every=10)
        yield from by_radius("label-noise-cifar10", key, label, cifar, CIFAR_RADII, UNKNOWN)

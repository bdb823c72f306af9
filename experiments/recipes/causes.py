"""What makes the difference between SGD and S2-SAM? RigL-ERK at 95 %, one thing changed at a time.

The released scripts compare SGD of weight decay 1e-4 with S2-SAM of 5e-4, and perturb by far less than rho. Each row
is compared with SGD of weight decay 5e-4. "As released" is a bundle of three: the cube of the gradient in the
perturbation, which makes it tiny; pruned weights perturbed; dense gradients in the momentum. The last has a row of its
own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.config import OptimizerName
from experiments.recipes import cifar
from experiments.recipes.base import OURS, Printed, Recipe

SPARSITY = 0.95
# Key, label, optimizer and what else is changed.
ROWS: tuple[tuple[str, str, OptimizerName, dict[str, Any]], ...] = (
    ("sgd", "SGD", "sgd", {}),
    ("sgd-decay-1e-4", "SGD, weight decay 1e-4", "sgd", {"weight_decay": 1e-4}),
    ("sgd-dense-momentum", "SGD, momentum of pruned weights too", "sgd", {"mask_grads": False}),
    ("s2sam-rho-0.001", "S2-SAM, rho 0.001", "s2sam", {"rho": 0.001}),
    ("s2sam-rho-0.01", "S2-SAM, rho 0.01", "s2sam", {"rho": 0.01}),
    ("s2sam", "S2-SAM, rho 0.05", "s2sam", {}),
    ("s2sam-warmup", "S2-SAM, rho rises to 0.05 over a third", "s2sam", {"rho_schedule": "warmup"}),
    ("s2sam-learning-rate", "S2-SAM, rho falls with the learning rate", "s2sam", {"rho_schedule": "learning-rate"}),
    ("s2sam-adaptive", "S2-SAM, adaptive (by the weights), rho 0.5", "s2sam-adaptive", {"rho": 0.5}),
    ("s2sam-opposite", "S2-SAM, downhill", "s2sam-opposite", {}),
    ("s2sam-released", "S2-SAM as released", "s2sam-released", {}),
    ("sam", "SAM, rho 0.05", "sam", {}),
)
UNKNOWN = "All is Table 1's but for what the row names."


def recipes() -> Iterator[Recipe]:
    for key, label, optimizer, changes in ROWS:
        found = cifar.row("causes", "rigl-erk", SPARSITY, optimizer, Printed(), unknown=UNKNOWN, **OURS, **changes)
        baseline = None if key == "sgd" else "causes.sgd"
        yield dataclasses.replace(found, name=f"causes.{key}", key=key, row=label, baseline=baseline)

"""One row per method: how to build it, whether it draws at random while training, and a hand-worked update."""

from typing import Any, NamedTuple

import numpy as np

from s2sam_jax import methods


class Golden(NamedTuple):
    weights: Any
    grads: Any
    mask: Any
    new_mask: Any
    step: int = 0


class MethodRow(NamedTuple):
    name: str
    make: Any
    random_updates: bool
    golden: Golden | None = None


def bits(text):
    return np.array([c == "1" for c in text])


METHODS = [
    MethodRow("static", methods.static, random_updates=False),
    MethodRow(
        "snip",
        methods.snip,
        random_updates=False,
        golden=Golden([0.5, -1, 0.2, 2, -0.1], [1, 0.3, -4, 0.05, 2], bits("11111"), bits("11100")),
    ),
    MethodRow(
        "rigl",
        lambda: methods.rigl(lambda step: 0.5),
        random_updates=False,
        golden=Golden(
            weights=[0.5, -0.05, 0.3, -0.9, 0, 0, 0, 0],
            grads=[0.1, 0.8, -0.05, 0.2, 0.3, -0.7, 0.05, 0.6],
            mask=bits("11110000"),
            new_mask=bits("11010100"),
        ),
    ),
]

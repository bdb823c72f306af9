"""One row per method: how to build it, whether it draws at random while training, and a hand-worked update."""

from typing import Any, NamedTuple

import numpy as np

from s2sam_jax import ChannelAxis, ChannelGroup, methods


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


GROUPS = [
    ChannelGroup(name, filters=(ChannelAxis(f"{name}/kernel", -1),), scales=(ChannelAxis(f"norm/{name}", 0),))
    for name in ("conv", "head")
]


def network(conv, head, norm_conv, norm_head):
    return {
        "conv": {"kernel": np.array(conv)},
        "head": {"kernel": np.array(head)},
        "norm": {"conv": np.array(norm_conv), "head": np.array(norm_head)},
    }


METHODS = [
    MethodRow("static", methods.static, random_updates=False),
    MethodRow(
        "snip",
        lambda: methods.snip(keep_at_least=1),
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
    MethodRow(
        "grasp",
        lambda: methods.grasp(keep_at_least=1),
        random_updates=False,
        # With the gradient function w**3, H g = 3 w**2 g, so that the scores are 3 w**3 g.
        golden=Golden([1, -1, 0.5, 2], [1, 1, -4, 0.1], bits("1111"), bits("1001")),
    ),
    # The first firing only saves; the rounds have a test of their own.
    MethodRow("lottery", methods.lottery, False, Golden([0.5, -0.1, 0.3, 0.2], [0.0] * 4, bits("1111"), bits("1111"))),
    MethodRow("lrr", methods.lrr, False, Golden([0.5, -0.1, 0.3, 0.2], [0.0] * 4, bits("1111"), bits("1111"))),
    MethodRow("magnitude", methods.magnitude, random_updates=False),
    MethodRow(
        "gmp",
        methods.gmp,
        random_updates=False,
        # Halfway 1 - 1/8 of the 4 zeros are due: 3.
        golden=Golden([0.5, -0.05, 0.3, -0.9, 0.2, -0.4, 0.1, 0.6], [0.0] * 8, bits("11111111"), bits("10110101"), 75),
    ),
    MethodRow(
        "set",
        lambda: methods.set(0.5),
        random_updates=True,
        # Half of one positive, and half of one negative weight, is none.
        golden=Golden([0.5, -0.3, 0, 0, 0, 0, 0, 0], [0.0] * 8, bits("11000000"), bits("11000000")),
    ),
    MethodRow(
        "dsr",
        lambda: methods.dsr(threshold=0.3),
        random_updates=True,
        # Two fall below 0.3, and of the places open to growth there are two.
        golden=Golden([0.5, 0.4, -0.2, 0.6, 0.29, -0.7, 0, 0], [0.0] * 8, bits("11111100"), bits("11010111")),
    ),
    MethodRow(
        "itop",
        lambda: methods.itop("gradient"),
        random_updates=False,
        # Half of three weights, rounded up, is two: the largest stays, and two large gradients come.
        golden=Golden(
            weights=[0.5, -0.05, 0.3, 0, 0, 0, 0, 0],
            grads=[0.1, 0.8, -0.05, 0.2, 0.3, -0.7, 0.05, 0.6],
            mask=bits("11100000"),
            new_mask=bits("11000100"),
        ),
    ),
    MethodRow(
        "mest",
        lambda: methods.mest(((0.0, 0.1),), lam=0.5),
        random_updates=True,
        # The last update only prunes: to the four largest |w| + |g| / 2.
        golden=Golden(
            weights=[0.5, -0.05, 0.3, -0.9, 0.2, -0.4, 0.1, 0.6],
            grads=[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            mask=bits("11111111"),
            new_mask=bits("11010001"),
            step=150,
        ),
    ),
    MethodRow(
        "chex",
        lambda: methods.chex(GROUPS),
        random_updates=True,
        # Of six channels the three with the largest scales stay, two here and one there. The last update regrows none.
        golden=Golden(
            weights=network([[1, 1, 0], [0, 1, 0], [0, 0, 0.5], [1, 0, 0]], np.diag([1, 3, 2]), [1, 2, 3], [0, 0, 4]),
            grads=network(np.zeros((4, 3)), np.zeros((3, 3)), np.zeros(3), np.zeros(3)),
            mask=network(np.ones((4, 3), bool), np.ones((3, 3), bool), bits("111"), bits("111")),
            new_mask=network([bits("110")] * 4, [bits("010")] * 3, bits("110"), bits("010")),
            step=150,
        ),
    ),
    MethodRow(
        "chase",
        lambda: methods.chase(GROUPS),
        random_updates=False,
        # Mean magnitudes .125, .1, .3, .1 and .7, .05: three of six channels stay, and all the budget just fills them.
        golden=Golden(
            weights=network(
                [[0.5, 0.1, 0.9, 0.2], [0, 0.1, 0, 0.2], [0, 0.1, 0.3, 0], [0, 0.1, 0, 0]],
                [[0.7, 0.05]],
                [1] * 4,
                [1] * 2,
            ),
            grads=network(np.ones((4, 4)), [[1, 1]], [1] * 4, [1] * 2),
            mask=network(
                [bits("1111"), bits("0101"), bits("0110"), bits("0100")], [bits("11")], bits("1111"), bits("11")
            ),
            new_mask=network([bits("1010")] * 4, [bits("10")], bits("1010"), bits("10")),
            step=150,
        ),
    ),
]

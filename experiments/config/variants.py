"""The sparse methods by the names that a config has for them: the library's, and the forms that papers report."""

from typing import Any

from s2sam_jax import methods

ROUNDS = ("lottery", "lrr")  # Methods that train several times in one run.
ONE_SHOT = ("static", "magnitude", "magnitude-global", "snip", "grasp")  # Methods that no clock of masks is for.
# Methods of the library whose first masks do not depend on the weights.
RANDOM = ("static", "set", "rigl", "itop", "dsr", "chase")

# Names of their own for the forms that papers report.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude-global": ("magnitude", {"scope": "global"}),
    "gmp-global": ("gmp", {"scope": "global"}),
    "set-itop": ("itop", {"growth": "random"}),
    "rigl-itop": ("itop", {"growth": "gradient"}),
    "mest-em": ("mest", {}),
    # The released profiles for 98 %, where 2 % more would be all; VGG-19 has its own.
    "mest-em-98": ("mest", {"extra": ((0.0, 0.002), (100 / 160, 0.001), (130 / 160, 0.0))}),
    "mest-em-98-vgg": ("mest", {"extra": ((0.0, 0.01), (100 / 160, 0.005), (130 / 160, 0.0))}),
    "mest-ems-98": ("mest", {"soft_bound": True, "extra": ((0.0, 0.05), (100 / 160, 0.02), (130 / 160, 0.0))}),
    "mest-ems-98-vgg": ("mest", {"soft_bound": True, "extra": ((0.0, 0.05), (100 / 160, 0.025), (130 / 160, 0.0))}),
    "mest-ems": ("mest", {"soft_bound": True, "extra": ((0.0, 0.05), (90 / 160, 0.025), (120 / 160, 0.0))}),
    # Channels every 2 epochs, weights every 0.4, both up to epoch 80 of 100.
    "chase-imagenet": ("chase", {"channel_every": 5, "removal_end": 0.8, "exploration_end": 0.8}),
}


def in_library(name: str) -> tuple[str, dict[str, Any]]:
    """The library's name of a method and the options that make the variant; ``dense`` stays as it is."""
    return VARIANTS.get(name, (name, {}))


def method_names() -> list[str]:
    return ["dense", *methods.available(), *VARIANTS]

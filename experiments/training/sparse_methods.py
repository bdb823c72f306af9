"""From a config to a sparse method and its clock."""

import dataclasses
import inspect
import math
from collections.abc import Sequence

from experiments.config import Config
from experiments.config.variants import ONE_SHOT, ROUNDS, in_library
from s2sam_jax import ChannelGroup, Every, SparseMethod, methods

# Epochs between mask updates, and the fraction of training at which they end, as the CIFAR experiments of the papers
# have them: in steps of batch 128, RigL every 100, ITOP every 1500 (random) or 4000 (gradient), GMP every 1000; MEST
# every 5 epochs, Chase every 1000 steps of batch 100. CHEX's are its ImageNet ones. DSR's own interval grows from 0.2
# to 1.6 epochs; here it is one.
CIFAR_RECIPES = {
    "rigl": (0.256, 0.75),
    "set": (1.0, 1.0),
    "dsr": (1.0, 0.95),
    "set-itop": (3.84, 1.0),
    "itop": (3.84, 1.0),
    "rigl-itop": (10.24, 1.0),
    # To the end, as MEST's phases are fractions of the clock; in its last phase nothing moves any more.
    "mest": (5.0, 1.0),
    "mest-em": (5.0, 1.0),
    "mest-ems": (5.0, 1.0),
    "mest-em-98": (5.0, 1.0),
    "mest-em-98-vgg": (5.0, 1.0),
    "mest-ems-98": (5.0, 1.0),
    "mest-ems-98-vgg": (5.0, 1.0),
    "chex": (2.0, 0.72),
    "chase": (2.0, 1.0),
    "gmp": (2.56, 0.77),
    "gmp-global": (2.56, 0.77),
}
ELSEWHERE = (1.0, 0.75)
# RigL and MEST change masks at the very first step. These compare weights or scales that have been trained, so that
# they wait an interval, or half of a training that is shorter than two.
AFTER_AN_INTERVAL = ("set", "dsr", "itop", "chex", "chase")
GMP_BEGINS = 0.205  # Of training: at 20,000 of 97,656 steps in RigL's comparison on CIFAR.
OPTIONS = ("drop_fraction", "prune_fraction", "rounds", "channel_sparsity", "explore")
PRUNE_FRACTION = 0.2  # Of a round, where the config gives none.


def make(config: Config, groups: Sequence[ChannelGroup] = ()) -> SparseMethod:
    """The method of that name, with what it reads of the config; on the network's channels, if it has any."""
    if config.images_per_class is not None and config.method == "grasp":
        return methods.static()  # scored before training
    name, options = in_library(config.method)
    factory = getattr(methods, name)
    known = inspect.signature(factory).parameters
    given = {option: getattr(config, option) for option in OPTIONS if option in known}
    given = {option: value for option, value in given.items() if value is not None}
    if "groups" in known:
        if not groups:
            raise ValueError(f"{config.method} removes channels, but {config.model} declares none.")
        given["groups"] = groups
    return factory(**options, **given)


def clock(config: Config, steps_per_epoch: int) -> Every | None:
    """When masks change. Its end is a call that fires, so that gradual methods get where they should."""
    if config.method in ONE_SHOT:
        return None
    if config.method in ROUNDS:
        rewind = round(config.rewind_epochs * steps_per_epoch)
        return Every(rewind, round_steps(config, steps_per_epoch) - rewind + 1)
    every, end = CIFAR_RECIPES.get(config.method, ELSEWHERE) if config.dataset.startswith("cifar") else ELSEWHERE
    every = steps(config.update_every or every, steps_per_epoch)
    end = end if config.update_end is None else config.update_end
    total = config.epochs * steps_per_epoch
    family, start = in_library(config.method)[0], 0
    if family == "gmp":
        start = int(GMP_BEGINS * total) // every * every
    elif family in AFTER_AN_INTERVAL:
        start = min(every, total // 2)
    return Every(start, every, max(start, min(int(end * total), total - 1) // every * every))


def trainings(config: Config) -> int:
    """How often a run trains: a lottery once before its first pruning, and once after each."""
    if config.method not in ROUNDS:
        return 1
    if config.rounds:
        return config.rounds + 1
    kept = 1 - (config.prune_fraction or PRUNE_FRACTION)
    fewest = math.ceil(round(math.log(1 - config.sparsity) / math.log(kept), 6))  # prunings that reach the sparsity
    return fewest + 1


def for_each_training(config: Config) -> Config:
    """The run whose trainings are each as long as the config has the whole: only a lottery has several."""
    return dataclasses.replace(config, epochs=trainings(config) * config.epochs)


def round_steps(config: Config, steps_per_epoch: int) -> int:
    """Steps of one round of a lottery: the epochs are shared out among all of them, the dense one first.

    The learning rate falls over this many steps; for other methods it is the whole run.
    """
    total = config.epochs * steps_per_epoch
    if config.method not in ROUNDS:
        return total
    rewind, count = round(config.rewind_epochs * steps_per_epoch), trainings(config)
    length = (total - rewind) // count + rewind - 1
    if length - rewind < 1:
        raise ValueError(
            f"epochs={config.epochs} are too few: {count - 1} prunings make {count} rounds of training, and each needs "
            "some steps."
        )
    return length


def steps(epochs: float, steps_per_epoch: int) -> int:
    return max(1, round(epochs * steps_per_epoch))

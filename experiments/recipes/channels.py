"""S2-SAM with networks that lose whole channels: Table 3, CHEX and Chase; and the same on CIFAR-10."""

import itertools
from collections.abc import Iterator
from typing import Any

from experiments.recipes import cifar, imagenet
from experiments.recipes.base import Printed, Recipe, recipe
from experiments.recipes.cifar import OPTIMIZERS

# CHEX, as released: 1.024 at batch 1024 after 8 epochs of warm-up, 250 epochs, masks every 2 up to 180.
_CHEX: dict[str, Any] = {
    "method": "chex", "epochs": 250, "batch_size": 1024, "learning_rate": 1.024, "warmup_epochs": 8.0,
    "momentum": 0.875, "nesterov": False, "weight_decay": 2**-15, "update_every": 2.0, "update_end": 180 / 250,
}  # fmt: skip
# Chase, as released: 0.512 at batch 512, masks every 1000 steps, channels every 2 epochs up to 80 of 100.
_CHASE: dict[str, Any] = {
    "method": "chase-imagenet", "epochs": 100, "batch_size": 512, "learning_rate": 0.512, "warmup_epochs": 8.0,
    "nesterov": False, "update_every": 0.4, "update_end": 1.0,
}  # fmt: skip

# Row, label, network, sparsity and the options of the method.
ROWS: tuple[tuple[str, str, str, float, dict[str, Any]], ...] = (
    ("chex-resnet34", "CHEX, ResNet-34", "resnet34", 0.5, _CHEX | {"explore": 0.2}),
    ("chex-resnet50", "CHEX, ResNet-50", "resnet50", 0.5, _CHEX | {"explore": 0.2}),
    ("chex-resnet50", "CHEX, ResNet-50", "resnet50", 0.7, _CHEX | {"explore": 0.3}),
    ("chase-resnet34", "Chase, ResNet-34", "resnet34", 0.8, _CHASE | {"channel_sparsity": 0.3}),
    ("chase-resnet34", "Chase, ResNet-34", "resnet34", 0.9, _CHASE | {"channel_sparsity": 0.4}),
    ("chase-resnet50", "Chase, ResNet-50", "resnet50", 0.8, _CHASE | {"channel_sparsity": 0.3}),
    ("chase-resnet50", "Chase, ResNet-50", "resnet50", 0.9, _CHASE | {"channel_sparsity": 0.4}),
)

KNOWN = "Methods, networks and data (paper)."
UNKNOWN = {
    "chex": (
        "The numbers, which rows there are, and all of the training: here CHEX's own, half of the channels for 2 and "
        "70 % for 1 GFLOP of ResNet-50. Without its mixup of 0.2; norms decay like all else; shortcuts keep their "
        "channels, and so do the outputs of blocks, so that more of the network stays than there; rho 0.05."
    ),
    "chase": (
        "The numbers, which rows there are, and all of the training: here Chase's own, with its 30 and 40 % of "
        "channels gone, paired with 80 and 90 % of zeros by choice. Its ImageNet script moves weights within layers "
        "and keeps 0.5 % more of them; here they move over all, down to the planned number. Channels go together "
        "with a mask update, not half an interval later; norms decay like all else; rho 0.05."
    ),
}


def on_cifar() -> Iterator[Recipe]:
    """The same methods where they are small enough to be tried."""
    known = "Nothing: the paper has these methods on ImageNet alone."
    for (key, sparsity), optimizer in itertools.product((("chex", 0.5), ("chase", 0.9)), OPTIMIZERS):
        yield cifar.row("table3-cifar10", key, sparsity, optimizer, Printed(), known=known)


def recipes() -> Iterator[Recipe]:
    yield from on_imagenet()
    yield from on_cifar()


def on_imagenet() -> Iterator[Recipe]:
    for (key, label, model, sparsity, options), optimizer in itertools.product(ROWS, OPTIMIZERS):
        config = imagenet.dense(model=model, sparsity=sparsity, optimizer=optimizer, **options)
        unknown = UNKNOWN[key.partition("-")[0]]
        yield recipe("table3", key, label, config, Printed(), known=KNOWN, unknown=unknown)

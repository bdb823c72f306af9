"""S2-SAM without sparsity: Table 6, to which the rebuttal adds SAM."""

from collections.abc import Iterator

from experiments.config import Config, OptimizerName
from experiments.recipes import cifar, imagenet
from experiments.recipes.base import REBUTTAL, S2SAM, Recipe, cell, lines, recipe

# Columns: network, SGD, S2-SAM, and SAM of the rebuttal.
TABLE_6 = """
resnet32           94.58 94.99(+0.41) 95.32
mobilenet-v2-cifar 94.13 94.55(+0.42) 94.77
vgg19              94.21 94.48(+0.27) 94.71
efficientnet-b0    76.54 77.10(+0.56) 77.38
resnet34           74.09 74.58(+0.49) 74.77
resnet50           76.90 77.32(+0.42) 77.58
"""
LABELS = {
    "resnet32": "ResNet-32",
    "mobilenet-v2-cifar": "MobileNet-V2",
    "vgg19": "VGG-19",
    "efficientnet-b0": "EfficientNet-B0",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
}
ON_CIFAR = ("resnet32", "mobilenet-v2-cifar", "vgg19")
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "s2sam", "sam")


def recipes() -> Iterator[Recipe]:
    for model, *cells in lines(TABLE_6):
        for optimizer, text in zip(OPTIMIZERS, cells, strict=True):
            run, known, unknown = (_on_cifar if model in ON_CIFAR else _on_imagenet)(model, optimizer)
            paper = REBUTTAL if optimizer == "sam" else S2SAM
            key, label = model.removesuffix("-cifar"), LABELS[model]
            yield recipe("table6", key, label, run, cell(text), known=known, unknown=unknown, paper=paper)


def _on_cifar(model: str, optimizer: OptimizerName) -> tuple[Config, str, str]:
    known = f"Network, its parameter count, data and result (paper). {cifar.SCHEDULE}"
    return cifar.config("dense", 0.0, optimizer, model=model), known, cifar.UNKNOWN


def _on_imagenet(model: str, optimizer: OptimizerName) -> tuple[Config, str, str]:
    known = "Network, its parameter count, data and result (paper)."
    return imagenet.dense(model=model, optimizer=optimizer), known, imagenet.UNKNOWN

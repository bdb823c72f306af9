"""The models with few blocks, for tests that are not about their depth."""

from functools import partial

import pytest

from experiments import models
from experiments.models import efficientnet, mobilenet, resnet, resnet_imagenet, transformer, vit, wide_resnet


@pytest.fixture
def shallow(monkeypatch):
    """The same classes with few blocks, which compile quickly."""
    makes = {
        "wrn28x10": partial(wide_resnet.WideResNet, 1, 10),
        "resnet18-cifar": partial(resnet_imagenet.ResNet, resnet.Block, (1, 1), small_images=True),
        "resnet34": partial(resnet_imagenet.ResNet, resnet.Block, (1, 1), small_images=False),
        "resnet50": partial(resnet_imagenet.ResNet, resnet_imagenet.Bottleneck, (1, 1), small_images=False),
        "vit-small-cifar": partial(vit.ViT, 4, 32, 2),
        "transformer-base": partial(transformer.Transformer, 2, 0.1),
    }
    for name, make in makes.items():
        monkeypatch.setitem(models.MODELS, name, models.MODELS[name]._replace(make=make))
    for module in (mobilenet, efficientnet):
        monkeypatch.setattr(module, "_GROUPS", module._GROUPS[:3:2])

"""Models by name, as pure functions of their parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.models.resnet import ResNet

_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5}


class Network(NamedTuple):
    """A model split into trees of arrays and a function.

    Attributes:
      params: what is trained.
      model_state: the rest, such as BatchNorm statistics.
      apply: ``(params, model_state, images, train) -> (logits, model_state)``.
    """

    params: Any
    model_state: Any
    apply: Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]


def build(name: str, *, width: int, channels: int, classes: int, seed: int) -> Network:
    """A freshly initialised model."""
    model = ResNet(_BLOCKS[name], width, channels, classes, rngs=nnx.Rngs(seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params: Any, model_state: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state)
        logits = model(images, train=train)
        return logits, nnx.as_pure(nnx.split(model, nnx.Param, ...)[2])

    return Network(nnx.as_pure(params), nnx.as_pure(rest), apply)

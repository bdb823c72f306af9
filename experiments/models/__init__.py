"""Models by name, as pure functions of their parameters."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import efficientnet, mobilenet, resnet, transformer, vgg, vit, wide_resnet
from experiments.trees import by_name
from s2sam_jax import ChannelGroup


class Spec(NamedTuple):
    """A model and the sizes that it was published with.

    Attributes:
      make: the module, but for ``width``, ``widths``, ``classes``, ``dtype`` and ``rngs``, and ``channels`` for images.
      width: channels of the first stage, or of the stem, or features of the embedding; other sizes scale with it.
      image_size: pixels on a side; None for a model of text.
      classes: of its data set, or the size of the vocabulary.
    """

    make: Callable[..., Any]
    width: int
    image_size: int | None
    classes: int

    @property
    def text(self) -> bool:
        return self.image_size is None


class Network(NamedTuple):
    """A model split into trees of arrays and a function.

    Attributes:
      params: what is trained.
      model_state: the rest: BatchNorm statistics, or nothing.
      apply: ``(params, model_state, inputs, train, key=None, method="__call__") -> (outputs, model_state)``. Inputs are
        an array of images, or for text a tuple of the arguments of the method, which may be "encode" or "decode". The
        key is for dropout.
      groups: the channels that can be removed. ``build`` takes their names for ``widths``.
    """

    params: Any
    model_state: Any
    apply: Callable[..., tuple[Any, Any]]
    groups: tuple[ChannelGroup, ...] = ()


_SIZES = (3, 4, 6, 3)
_cifar = partial(resnet.ResNet, resnet.Block, small_images=True)
_three_stages = partial(_cifar, head_init=nnx.initializers.normal(0.01))

MODELS: dict[str, Spec] = {
    "resnet8": Spec(partial(_three_stages, (1, 1, 1)), 16, 32, 10),
    "resnet20": Spec(partial(_three_stages, (3, 3, 3)), 16, 32, 10),
    "resnet32": Spec(partial(_three_stages, (5, 5, 5)), 32, 32, 10),
    "wrn28x10": Spec(partial(wide_resnet.WideResNet, 4, 10), 160, 32, 10),
    "resnet18-cifar": Spec(partial(_cifar, (2, 2, 2, 2)), 64, 32, 10),
    "resnet34-cifar": Spec(partial(_cifar, _SIZES), 64, 32, 10),
    "resnet34": Spec(partial(resnet.ResNet, resnet.Block, _SIZES, small_images=False), 64, 224, 1000),
    "resnet50": Spec(partial(resnet.ResNet, resnet.Bottleneck, _SIZES, small_images=False), 64, 224, 1000),
    "vgg19": Spec(vgg.VGG19, 64, 32, 10),
    "mobilenet-v2-cifar": Spec(mobilenet.MobileNetV2, 32, 32, 10),
    "efficientnet-b0": Spec(efficientnet.EfficientNetB0, 32, 224, 1000),
    "vit-small-cifar": Spec(partial(vit.ViT, 4, 32, 12), 192, 32, 10),
    "vit-small": Spec(partial(vit.ViT, 16, 224, 12), 192, 224, 1000),
    "transformer-base": Spec(partial(transformer.Transformer, 6, 0.1), 512, None, 37_000),
}


def build(
    name: str,
    *,
    width: int | None = None,
    channels: int | None = None,
    classes: int,
    seed: int,
    dtype: DTypeLike = jnp.float32,
    precision: str | None = None,
    widths: Mapping[str, int] | None = None,
) -> Network:
    """A freshly initialised model.

    Args:
      name: a key of ``MODELS``.
      width: as ``Spec.width``, to narrow the model; default: its own.
      channels: of the images; None for a model of text.
      classes: outputs; for text, the size of the vocabulary.
      seed: of the initialisation.
      dtype: what convolutions and matrix products compute in; parameters and outputs are float32.
      precision: of the products of layers, for ``jax.lax.Precision``; default: "highest" in float32.
      widths: channels of groups that have fewer than the model's own, by the name of the group.

    Raises:
      ValueError: for an unknown name of a model or a group, and for a size that the model cannot have.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}; there are {', '.join(MODELS)}.")
    spec = MODELS[name]
    width = spec.width if width is None else width
    if width < 1:
        raise ValueError(f"width must be at least 1; got {width}.")
    if (channels is None) != spec.text:
        expected = "no channels, being of text" if spec.text else "the channels of its images"
        raise ValueError(f"{name} needs {expected}; got channels={channels}.")
    options = {} if spec.text else {"channels": channels}

    def make(widths: Mapping[str, int]) -> Any:
        return spec.make(width=width, classes=classes, widths=widths, dtype=dtype, rngs=nnx.Rngs(seed), **options)

    if widths:
        _check_widths(name, widths, nnx.eval_shape(lambda: make({})))
    model = make(widths or {})
    if precision is not None:
        model.set_attributes(precision=precision)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    has_dropout = any(isinstance(module, nnx.Dropout) for _, module in nnx.iter_modules(model))

    def apply(
        params: Any, model_state: Any, inputs: Any, train: bool, key: jax.Array | None = None, method: str = "__call__"
    ) -> tuple[Any, Any]:
        if train and has_dropout and key is None:
            raise ValueError(f"{name} has dropout: in training, apply needs a key.")
        model = nnx.merge(graphdef, params, model_state)
        arguments = inputs if spec.text else (inputs,)
        rngs = None if key is None else nnx.Rngs(key)
        outputs = getattr(model, method)(*arguments, train=train, rngs=rngs)
        return outputs, nnx.as_pure(nnx.split(model, nnx.Param, ...)[2])

    return Network(nnx.as_pure(params), nnx.as_pure(rest), apply, model.groups())


def _check_widths(name: str, widths: Mapping[str, int], full: Any) -> None:
    """Against the groups of the model that has all its channels."""
    leaves = by_name(nnx.as_pure(nnx.state(full, nnx.Param)))
    sizes = {group.name: leaves[group.filters[0].path].shape[group.filters[0].axis] for group in full.groups()}
    if unknown := sorted(widths.keys() - sizes.keys()):
        raise ValueError(f"{name} has no channel groups {unknown}; there are {', '.join(sizes)}.")
    if wrong := {group: size for group, size in widths.items() if not 1 <= size <= sizes[group]}:
        full_sizes = {group: sizes[group] for group in wrong}
        raise ValueError(f"{name} can have from 1 to {full_sizes} channels in these groups; got {wrong}.")

"""MobileNet-V2 for small images.

The form of kuangliu's pytorch-cifar: no stride in the stem and the second group, ReLU, an expansion in every block, and
a 1x1 shortcut where the channels change at stride 1. Initialised like it, by PyTorch's default (with a bias of zero
here).
"""

from collections.abc import Mapping
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from s2sam_jax import ChannelGroup

_WIDTH = 32
# At that width: expansion, channels, blocks, and the stride of the first block.
_GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_LAST = 1280

_conv = partial(layers.conv, kernel_init=layers.TORCH_DEFAULT)


class Block(nnx.Module):
    """Expansion, depthwise convolution and projection; a shortcut unless there is a stride."""

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        expansion: int,
        stride: int,
        *,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.name = name
        inner = widths.get(f"{name}/conv1", inputs * expansion)
        self.conv1 = _conv(inputs, inner, 1, dtype=dtype, rngs=rngs)
        self.norm1 = layers.BatchNorm(inner, rngs=rngs)
        self.conv2 = _conv(inner, inner, 3, stride=stride, groups=inner, dtype=dtype, rngs=rngs)
        self.norm2 = layers.BatchNorm(inner, rngs=rngs)
        self.conv3 = _conv(inner, outputs, 1, dtype=dtype, rngs=rngs)
        self.norm3 = layers.BatchNorm(outputs, rngs=rngs)
        self.residual = stride == 1
        self.projects = self.residual and inputs != outputs
        if self.projects:
            self.shortcut = _conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)
            self.shortcut_norm = layers.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = jax.nn.relu(self.norm2(self.conv2(y), use_running_average=not train))
        y = self.norm3(self.conv3(y), use_running_average=not train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=not train)
        return x + y if self.residual else y

    def groups(self) -> tuple[ChannelGroup, ...]:
        """The expanded channels, which the depthwise convolution keeps apart."""
        name = self.name
        norms = [f"{name}/norm1", f"{name}/norm2"]
        return (layers.channel_group(f"{name}/conv1", f"{name}/conv2", norms=norms, readers=[f"{name}/conv3"]),)


class MobileNetV2(nnx.Module):
    """``width`` is that of the stem."""

    def __init__(
        self,
        *,
        width: int,
        channels: int,
        classes: int,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(channels, width, 3, dtype=dtype, rngs=rngs)
        self.norm = layers.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List()
        inputs = width
        for expansion, size, count, first_stride in _GROUPS:
            outputs = max(1, size * width // _WIDTH)
            for index in range(count):
                stride = first_stride if index == 0 else 1
                name = f"blocks/{len(self.blocks)}"
                block = Block(name, inputs, outputs, expansion, stride, widths=widths, dtype=dtype, rngs=rngs)
                self.blocks.append(block)
                inputs = outputs
        outputs = _LAST * width // _WIDTH
        self.last = _conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)
        self.last_norm = layers.BatchNorm(outputs, rngs=rngs)
        self.head = layers.classifier(outputs, classes, kernel_init=layers.TORCH_DEFAULT, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # no dropout
        x = jax.nn.relu(self.norm(self.stem(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        x = jax.nn.relu(self.last_norm(self.last(x), use_running_average=not train))
        return self.head(layers.global_average(x))

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups())

"""ResNets: of three stages for CIFAR, and of four for ImageNet or, with another stem, for small images.

All have a projection where the shape changes. Initialised by He's rule by fan-out, every BatchNorm scale 1; the last
layer as in GraSP, N(0, 0.01), where there are three stages, and else as in torchvision, by PyTorch's default (with a
bias of zero here).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from s2sam_jax import ChannelGroup


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    expansion = 1

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.name = name
        hidden = widths.get(f"{name}/conv1", outputs)
        self.conv1 = layers.conv(inputs, hidden, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.norm1 = layers.BatchNorm(hidden, rngs=rngs)
        self.conv2 = layers.conv(hidden, outputs, 3, dtype=dtype, rngs=rngs)
        self.norm2 = layers.BatchNorm(outputs, rngs=rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = layers.conv(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs)
            self.shortcut_norm = layers.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = self.norm2(self.conv2(y), use_running_average=not train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=not train)
        return jax.nn.relu(x + y)

    def groups(self) -> tuple[ChannelGroup, ...]:
        name = self.name
        return (layers.channel_group(f"{name}/conv1", norms=[f"{name}/norm1"], readers=[f"{name}/conv2"]),)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions; the stride is on the 3x3 one ("v1.5")."""

    expansion = 4

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.name = name
        first, second = (widths.get(f"{name}/{conv}", outputs // self.expansion) for conv in ("conv1", "conv2"))
        self.conv1 = layers.conv(inputs, first, 1, dtype=dtype, rngs=rngs)
        self.norm1 = layers.BatchNorm(first, rngs=rngs)
        self.conv2 = layers.conv(first, second, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.norm2 = layers.BatchNorm(second, rngs=rngs)
        self.conv3 = layers.conv(second, outputs, 1, dtype=dtype, rngs=rngs)
        self.norm3 = layers.BatchNorm(outputs, rngs=rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = layers.conv(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs)
            self.shortcut_norm = layers.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = jax.nn.relu(self.norm2(self.conv2(y), use_running_average=not train))
        y = self.norm3(self.conv3(y), use_running_average=not train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=not train)
        return jax.nn.relu(x + y)

    def groups(self) -> tuple[ChannelGroup, ...]:
        name = self.name
        return (
            layers.channel_group(f"{name}/conv1", norms=[f"{name}/norm1"], readers=[f"{name}/conv2"]),
            layers.channel_group(f"{name}/conv2", norms=[f"{name}/norm2"], readers=[f"{name}/conv3"]),
        )


class ResNet(nnx.Module):
    """``blocks`` per stage; the widths inside them double from stage to stage, from ``width`` on."""

    def __init__(
        self,
        block: type[Block] | type[Bottleneck],
        blocks: Sequence[int],
        *,
        small_images: bool,
        head_init: nnx.Initializer = layers.TORCH_DEFAULT,
        width: int,
        channels: int,
        classes: int,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.small_images = small_images
        size, stride = (3, 1) if small_images else (7, 2)
        self.stem = layers.conv(channels, width, size, stride=stride, dtype=dtype, rngs=rngs)
        self.norm = layers.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List()
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage * block.expansion
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"blocks/{len(self.blocks)}"
                self.blocks.append(block(name, inputs, outputs, stride, widths=widths, dtype=dtype, rngs=rngs))
                inputs = outputs
        self.head = layers.classifier(inputs, classes, kernel_init=head_init, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # no dropout
        x = jax.nn.relu(self.norm(self.stem(x), use_running_average=not train))
        if not self.small_images:
            padding: Any = ((1, 1), (1, 1))  # the annotation of max_pool has names only
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(layers.global_average(x))

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups())

"""ResNets for small images: a 3x3 stem and three stages of basic blocks.

The form of GraSP, which has a projection where the shape changes; its initialisation too: He by fan-out, and N(0, 0.01)
in the last layer.
"""

from collections.abc import Mapping

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


class ResNet(nnx.Module):
    """``6 * blocks + 2`` layers; the widths of the stages are 1, 2 and 4 times ``width``."""

    def __init__(
        self,
        blocks: int,
        *,
        width: int,
        channels: int,
        classes: int,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stem = layers.conv(channels, width, 3, dtype=dtype, rngs=rngs)
        self.norm = layers.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List()
        inputs = width
        for stage in range(3):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name, outputs = f"blocks/{len(self.blocks)}", width * 2**stage
                self.blocks.append(Block(name, inputs, outputs, stride, widths=widths, dtype=dtype, rngs=rngs))
                inputs = outputs
        self.head = layers.classifier(inputs, classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # no dropout
        x = jax.nn.relu(self.norm(self.stem(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(layers.global_average(x))

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups())

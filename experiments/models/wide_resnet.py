"""Wide ResNets: blocks with BatchNorm and ReLU in front of their convolutions.

Initialised as in the code of SSAM: He by fan-out, the last layer by PyTorch's default with a bias of zero.
"""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from s2sam_jax import ChannelGroup


class Block(nnx.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is a convolution of the normalised input."""

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
        self.norm1 = layers.BatchNorm(inputs, rngs=rngs)
        self.conv1 = layers.conv(inputs, hidden, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.norm2 = layers.BatchNorm(hidden, rngs=rngs)
        self.conv2 = layers.conv(hidden, outputs, 3, dtype=dtype, rngs=rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = layers.conv(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = jax.nn.relu(self.norm1(x, use_running_average=not train))
        if self.projects:
            x = self.shortcut(y)
        y = jax.nn.relu(self.norm2(self.conv1(y), use_running_average=not train))
        return x + self.conv2(y)

    def groups(self) -> tuple[ChannelGroup, ...]:
        name = self.name
        return (layers.channel_group(f"{name}/conv1", norms=[f"{name}/norm2"], readers=[f"{name}/conv2"]),)


class WideResNet(nnx.Module):
    """``6 * blocks + 4`` layers; stages of 1, 2 and 4 times ``width`` channels behind a stem of ``width / factor``."""

    def __init__(
        self,
        blocks: int,
        factor: int,
        *,
        width: int,
        channels: int,
        classes: int,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inputs = max(1, width // factor)
        self.stem = layers.conv(channels, inputs, 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List()
        for stage in range(3):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name, outputs = f"blocks/{len(self.blocks)}", width * 2**stage
                self.blocks.append(Block(name, inputs, outputs, stride, widths=widths, dtype=dtype, rngs=rngs))
                inputs = outputs
        self.norm = layers.BatchNorm(inputs, rngs=rngs)
        self.head = layers.classifier(inputs, classes, kernel_init=layers.TORCH_DEFAULT, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # no dropout
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, train=train)
        x = jax.nn.relu(self.norm(x, use_running_average=not train))
        return self.head(layers.global_average(x))

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups())

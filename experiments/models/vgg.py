"""VGG-19 with BatchNorm and one linear layer, for small images.

The form of GraSP, and its initialisation: He by fan-out, and N(0, 0.01) in the last layer.
"""

from collections.abc import Mapping
from itertools import pairwise

import jax
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from s2sam_jax import ChannelGroup

# Of each stage: its channels over ``width``, and how many convolutions it has.
_STAGES = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))


class Block(nnx.Module):
    """A 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = layers.conv(inputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.norm1 = layers.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return jax.nn.relu(self.norm1(self.conv1(x), use_running_average=not train))


class VGG19(nnx.Module):
    """Five stages with a max-pool between them, and an average over what is left (2x2 pixels of 32x32)."""

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
        self.stages = nnx.List()
        inputs = channels
        for factor, count in _STAGES:
            stage = nnx.List()
            for index in range(count):
                outputs = widths.get(f"stages/{len(self.stages)}/{index}/conv1", width * factor)
                stage.append(Block(inputs, outputs, dtype=dtype, rngs=rngs))
                inputs = outputs
            self.stages.append(stage)
        self.head = layers.classifier(inputs, classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # no dropout
        for index, stage in enumerate(self.stages):
            if index > 0:
                # SAME rounds odd sizes up, so that images under 16 pixels keep their last one.
                x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
            for block in stage:
                x = block(x, train=train)
        return self.head(layers.global_average(x))

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Of every convolution that another one reads."""
        names = [f"stages/{stage}/{index}" for stage, blocks in enumerate(self.stages) for index in range(len(blocks))]
        return tuple(
            layers.channel_group(f"{name}/conv1", norms=[f"{name}/norm1"], readers=[f"{reader}/conv1"])
            for name, reader in pairwise(names)
        )

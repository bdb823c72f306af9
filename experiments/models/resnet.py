"""ResNets for small images: a 3x3 stem and three stages of basic blocks."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# Perturbations are small beside the weights: TF32, the default of GPUs for float32, would lose much of them.
_conv = partial(
    nnx.Conv,
    use_bias=False,
    kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    precision="highest",
)
_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(inputs, outputs, (3, 3), strides=stride, padding=1, rngs=rngs)
        self.norm1 = _norm(outputs, rngs=rngs)
        self.conv2 = _conv(outputs, outputs, (3, 3), padding=1, rngs=rngs)
        self.norm2 = _norm(outputs, rngs=rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = _conv(inputs, outputs, (1, 1), strides=stride, padding=0, rngs=rngs)
            self.shortcut_norm = _norm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = jax.nn.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = self.norm2(self.conv2(y), use_running_average=not train)
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=not train)
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """``6 * blocks + 2`` layers; the widths of the stages are 1, 2 and 4 times ``width``."""

    def __init__(self, blocks: int, width: int, channels: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = _conv(channels, width, (3, 3), padding=1, rngs=rngs)
        self.norm = _norm(width, rngs=rngs)
        self.blocks = nnx.List()
        inputs = width
        for stage in range(3):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(Block(inputs, width * 2**stage, stride, rngs=rngs))
                inputs = width * 2**stage
        self.head = nnx.Linear(
            inputs, classes, kernel_init=nnx.initializers.normal(0.01), precision="highest", rngs=rngs
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = jax.nn.relu(self.norm(self.stem(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(jnp.mean(x, axis=(1, 2)))

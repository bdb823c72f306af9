"""EfficientNet-B0.

Initialised as in the authors' code: He by fan-out (that of one group in a depthwise convolution), and
U(-1/sqrt(fan_out), 1/sqrt(fan_out)) in the last layer.
"""

from collections.abc import Mapping
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from s2sam_jax import ChannelAxis, ChannelGroup

_WIDTH = 32
# At that width: expansion, kernel size, channels, blocks, and the stride of the first block.
_GROUPS = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
_LAST = 1280
_DROP_CONNECT = 0.2
_DROPOUT = 0.2

_norm = partial(layers.BatchNorm, momentum=0.99, epsilon=1e-3)


class SqueezeExcite(nnx.Module):
    """Scales each channel by a function of the means of all."""

    def __init__(self, features: int, inner: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.squeeze = layers.linear(features, inner, kernel_init=layers.HE_FAN_OUT, dtype=dtype, rngs=rngs)
        self.excite = layers.linear(inner, features, kernel_init=layers.HE_FAN_OUT, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(layers.global_average(x)))))
        return x * scale[:, None, None, :]


class Block(nnx.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation and projection.

    Where there is a shortcut, whole examples lose the rest of the block with probability ``drop`` (drop-connect).
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        expansion: int,
        size: int,
        stride: int,
        drop: float,
        *,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.name = name
        inner = widths.get(f"{name}/conv1", inputs * expansion)
        self.expands = expansion != 1
        if self.expands:
            self.conv1 = layers.conv(inputs, inner, 1, dtype=dtype, rngs=rngs)
            self.norm1 = _norm(inner, rngs=rngs)
        depthwise = nnx.initializers.variance_scaling(2.0 * inner, "fan_out", "normal")
        self.conv2 = layers.conv(
            inner, inner, size, stride=stride, groups=inner, kernel_init=depthwise, dtype=dtype, rngs=rngs
        )
        self.norm2 = _norm(inner, rngs=rngs)
        self.attention = SqueezeExcite(inner, max(1, inputs // 4), dtype=dtype, rngs=rngs)
        self.conv3 = layers.conv(inner, outputs, 1, dtype=dtype, rngs=rngs)
        self.norm3 = _norm(outputs, rngs=rngs)
        self.residual = stride == 1 and inputs == outputs
        self.drop = nnx.Dropout(drop, broadcast_dims=(1, 2, 3))

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
        y = x
        if self.expands:
            y = jax.nn.silu(self.norm1(self.conv1(y), use_running_average=not train))
        y = jax.nn.silu(self.norm2(self.conv2(y), use_running_average=not train))
        y = self.norm3(self.conv3(self.attention(y)), use_running_average=not train)
        return x + self.drop(y, deterministic=not train, rngs=rngs) if self.residual else y

    def groups(self) -> tuple[ChannelGroup, ...]:
        """The expanded channels, if there are: without expansion, the block works on those of the layer before it."""
        if not self.expands:
            return ()
        conv1, conv2, conv3, norm1, norm2, squeeze, excite = (
            f"{self.name}/{layer}"
            for layer in ("conv1", "conv2", "conv3", "norm1", "norm2", "attention/squeeze", "attention/excite")
        )
        group = layers.channel_group(conv1, conv2, excite, norms=[norm1, norm2], readers=[squeeze, conv3])
        return (group._replace(biases=(*group.biases, ChannelAxis(f"{excite}/bias", 0))),)


class EfficientNetB0(nnx.Module):
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
        self.stem = layers.conv(channels, width, 3, stride=2, dtype=dtype, rngs=rngs)
        self.norm = _norm(width, rngs=rngs)
        self.blocks = nnx.List()
        depth = sum(count for *_, count, _ in _GROUPS)
        inputs = width
        for expansion, size, features, count, first_stride in _GROUPS:
            outputs = max(1, features * width // _WIDTH)
            for index in range(count):
                stride = first_stride if index == 0 else 1
                name, drop = f"blocks/{len(self.blocks)}", _DROP_CONNECT * len(self.blocks) / depth
                sizes = (inputs, outputs, expansion, size, stride, drop)
                self.blocks.append(Block(name, *sizes, widths=widths, dtype=dtype, rngs=rngs))
                inputs = outputs
        outputs = _LAST * width // _WIDTH
        self.last = layers.conv(inputs, outputs, 1, dtype=dtype, rngs=rngs)
        self.last_norm = _norm(outputs, rngs=rngs)
        self.dropout = nnx.Dropout(_DROPOUT)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        self.head = layers.classifier(outputs, classes, kernel_init=uniform, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = jax.nn.silu(self.norm(self.stem(x), use_running_average=not train))
        for block in self.blocks:
            x = block(x, train=train, rngs=rngs)
        x = jax.nn.silu(self.last_norm(self.last(x), use_running_average=not train))
        return self.head(self.dropout(layers.global_average(x), deterministic=not train, rngs=rngs))

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups())

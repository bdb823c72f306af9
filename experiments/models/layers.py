"""Makers of the layers that the models share, and the groups of channels that can be removed from them.

Parameters are float32 always; ``dtype`` is what convolutions and matrix products compute in.
"""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from s2sam_jax import ChannelAxis, ChannelGroup

HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's own for convolutions and linear layers.
TORCH_DEFAULT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def precision(dtype: DTypeLike) -> str | None:
    """Perturbations are small beside the weights: TF32, the default of GPUs for float32, would lose much of them."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def conv(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    kernel_init: nnx.Initializer = HE_FAN_OUT,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Square, without bias, padded alike on all sides so that stride 1 keeps the size."""
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=kernel_init,
        dtype=dtype,
        precision=precision(dtype),
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """Computes in float32 and returns the type that it was given."""

    def __init__(self, features: int, *, momentum: float = 0.9, epsilon: float = 1e-5, rngs: nnx.Rngs):
        super().__init__(features, momentum=momentum, epsilon=epsilon, rngs=rngs)

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """What the base class computes; but assigning with an index, as it does, takes most of the time of tracing."""
        if mask is not None:
            raise ValueError("BatchNorm takes the statistics of whole batches; got a mask.")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = range(x.ndim - 1)
            mean, mean_square = jnp.mean(wide, axes), jnp.mean(jnp.square(wide), axes)
            var = jnp.maximum(0.0, mean_square - jnp.square(mean))
            for running, new in ((self.mean, mean), (self.var, var)):
                moved = self.momentum * running[...] + (1 - self.momentum) * new
                running.set_value(jax.lax.stop_gradient(moved))
        scale, bias = cast(nnx.Param[jax.Array], self.scale), cast(nnx.Param[jax.Array], self.bias)
        return ((wide - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale[...]) + bias[...]).astype(x.dtype)


def linear(
    inputs: int,
    outputs: int,
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        precision=precision(dtype),
        rngs=rngs,
    )


def classifier(inputs: int, classes: int, *, kernel_init: nnx.Initializer, rngs: nnx.Rngs) -> nnx.Linear:
    """The last layer, in float32 whatever the rest computes in: it is cheap, and the loss follows."""
    return linear(inputs, classes, kernel_init=kernel_init, dtype=jnp.float32, rngs=rngs)


def global_average(x: jax.Array) -> jax.Array:
    """The mean over the pixels, in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def channel_group(*layers: str, norms: Sequence[str], readers: Sequence[str]) -> ChannelGroup:
    """The outputs of ``layers`` that ``norms`` normalise and ``readers`` read, under the name of the first layer.

    What is added to another branch (the residual stream, and what a shortcut puts out) is in no group: a channel
    removed from one term of a sum leaves the sum as wide as it was.
    """
    return ChannelGroup(
        layers[0],
        filters=tuple(ChannelAxis(f"{layer}/kernel", -1) for layer in layers),
        scales=tuple(ChannelAxis(f"{norm}/scale", 0) for norm in norms),
        biases=tuple(ChannelAxis(f"{norm}/bias", 0) for norm in norms),
        inputs=tuple(ChannelAxis(f"{reader}/kernel", -2) for reader in readers),
        statistics=tuple(ChannelAxis(f"{norm}/{moment}", 0) for norm in norms for moment in ("mean", "var")),
    )

"""Multi-head attention and the feed-forward network, which the ViT and the Transformer share.

Every weight is a plain matrix, as sparsity counts rows and columns. LayerNorm is in float32 and so are the sums around
the layers; matrix products compute in ``dtype``.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from s2sam_jax import ChannelAxis, ChannelGroup


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)


class Attention(nnx.Module):
    """Heads of 64 features, or one head where the width is smaller."""

    def __init__(self, width: int, *, use_bias: bool, kernel_init: nnx.Initializer, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = max(1, width // 64)
        if width % self.heads:
            raise ValueError(f"width must be a multiple of its {self.heads} attention heads; got width={width}.")
        matrix = partial(layers.linear, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.query = matrix(width, width)
        self.key = matrix(width, width)
        self.value = matrix(width, width)
        self.out = matrix(width, width)
        self.precision = layers.precision(dtype)

    def __call__(self, queries: jax.Array, keys: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """From ``[batch, length, width]`` to ``keys``; ``mask`` broadcasts to ``[batch, heads, queries, keys]``."""
        query, key, value = (
            x.reshape(*x.shape[:2], self.heads, -1) for x in (self.query(queries), self.key(keys), self.value(keys))
        )
        with jax.default_matmul_precision(self.precision):
            attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return self.out(attended.reshape(queries.shape))


class FeedForward(nnx.Module):
    """Two layers, with four times the width between them; the activation maps zero to zero."""

    def __init__(
        self,
        name: str,
        width: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        widths: Mapping[str, int],
        kernel_init: nnx.Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.name = name
        hidden = widths.get(f"{name}/inner", 4 * width)
        self.inner = layers.linear(width, hidden, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.outer = layers.linear(hidden, width, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(self.activation(self.inner(x)))

    def groups(self) -> tuple[ChannelGroup, ...]:
        """The hidden features, which no norm follows."""
        group = layers.channel_group(f"{self.name}/inner", norms=[], readers=[f"{self.name}/outer"])
        return (group._replace(biases=(ChannelAxis(f"{self.name}/inner/bias", 0),)),)

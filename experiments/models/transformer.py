"""The encoder-decoder Transformer of Vaswani et al., 2017.

Post-norm, ReLU, attention without biases, and one embedding for sources, targets and output. Initialised by Glorot's
uniform, and N(0, 1/width) in the embedding (so as fairseq), whose scaled rows and logits then have variance one.
"""

from collections.abc import Mapping
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from experiments.models.attention import Attention, FeedForward, layer_norm
from s2sam_jax import ChannelGroup

PADDING = 0

_GLOROT = nnx.initializers.xavier_uniform()
_attention = partial(Attention, use_bias=False, kernel_init=_GLOROT)
_feed_forward = partial(FeedForward, activation=jax.nn.relu, kernel_init=_GLOROT)


def sinusoids(length: int, width: int) -> jax.Array:
    """Sines and cosines of each position, alternating, with wavelengths from 2π to 10000 · 2π."""
    rates = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None] * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, width)


class EncoderLayer(nnx.Module):
    def __init__(
        self, name: str, width: int, dropout: float, *, widths: Mapping[str, int], dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.attention = _attention(width, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(width, rngs=rngs)
        self.feed_forward = _feed_forward(f"{name}/feed_forward", width, widths=widths, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
        dropout = partial(self.dropout, deterministic=not train, rngs=rngs)
        x = self.norm1(x + dropout(self.attention(x, x, mask)))
        return self.norm2(x + dropout(self.feed_forward(x)))


class DecoderLayer(nnx.Module):
    def __init__(
        self, name: str, width: int, dropout: float, *, widths: Mapping[str, int], dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.attention = _attention(width, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(width, rngs=rngs)
        self.cross_attention = _attention(width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.feed_forward = _feed_forward(f"{name}/feed_forward", width, widths=widths, dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        causal: jax.Array,
        mask: jax.Array,
        *,
        train: bool,
        rngs: nnx.Rngs | None,
    ) -> jax.Array:
        dropout = partial(self.dropout, deterministic=not train, rngs=rngs)
        x = self.norm1(x + dropout(self.attention(x, x, causal)))
        x = self.norm2(x + dropout(self.cross_attention(x, memory, mask)))
        return self.norm3(x + dropout(self.feed_forward(x)))


class Transformer(nnx.Module):
    """Logits of the next token; ``classes`` is the size of the vocabulary, whose token 0 is padding.

    Sentences are padded at their end. In the sources padding is masked; in the targets it need not be, as no token sees
    what comes after it.
    """

    def __init__(
        self,
        depth: int,
        dropout: float,
        *,
        width: int,
        classes: int,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if width % 2:
            raise ValueError(f"width must be even, for sines and cosines of the positions; got width={width}.")
        embedding_init = nnx.initializers.normal(width**-0.5)
        self.embedding = nnx.Param(embedding_init(rngs.params(), (classes, width), jnp.float32))
        options = {"widths": widths, "dtype": dtype, "rngs": rngs}
        self.encoder = nnx.List([EncoderLayer(f"encoder/{i}", width, dropout, **options) for i in range(depth)])
        self.decoder = nnx.List([DecoderLayer(f"decoder/{i}", width, dropout, **options) for i in range(depth)])
        self.dropout = nnx.Dropout(dropout)
        self.dtype = dtype

    def __call__(
        self, sources: jax.Array, targets_in: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """``int[batch, length]`` twice to ``float32[batch, length of targets_in, classes]``."""
        memory = self.encode(sources, train=train, rngs=rngs)
        return self.decode(memory, sources, targets_in, train=train, rngs=rngs)

    def encode(self, sources: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        """What :meth:`decode` attends to: ``float32[batch, length, width]``."""
        x = self._embed(sources, train=train, rngs=rngs)
        for layer in self.encoder:
            x = layer(x, _not_padding(sources), train=train, rngs=rngs)
        return x

    def decode(
        self,
        memory: jax.Array,
        sources: jax.Array,
        targets_in: jax.Array,
        *,
        train: bool,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """The logits that a call gives, from what :meth:`encode` made of the sources."""
        length = targets_in.shape[1]
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        x = self._embed(targets_in, train=train, rngs=rngs)
        for layer in self.decoder:
            x = layer(x, memory, causal, _not_padding(sources), train=train, rngs=rngs)
        return jnp.einsum(
            "btd,vd->btv",
            x.astype(self.dtype),
            self.embedding.astype(self.dtype),
            precision=layers.precision(self.dtype),
            preferred_element_type=jnp.float32,
        )

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for layer in chain(self.encoder, self.decoder) for group in layer.feed_forward.groups())

    def _embed(self, tokens: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
        width = self.embedding.shape[1]
        x = self.embedding[tokens] * width**0.5 + sinusoids(tokens.shape[1], width)
        return self.dropout(x, deterministic=not train, rngs=rngs)


def _not_padding(tokens: jax.Array) -> jax.Array:
    return (tokens != PADDING)[:, None, None, :]

"""Vision Transformers: pre-norm, GELU, a class token and learned positions.

Initialised as in the code of DeiT, N(0, 0.02) with zero biases: a last layer of zeros, as in the first ViT, would leave
methods that score weights by their first gradient without a score.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models import layers
from experiments.models.attention import Attention, FeedForward, layer_norm
from s2sam_jax import ChannelGroup

_INIT = nnx.initializers.normal(0.02)
_gelu = partial(jax.nn.gelu, approximate=False)


class Block(nnx.Module):
    """Attention and a feed-forward network, each on the normalised input and added to it."""

    def __init__(self, name: str, width: int, *, widths: Mapping[str, int], dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = layer_norm(width, rngs=rngs)
        self.attention = Attention(width, use_bias=True, kernel_init=_INIT, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.feed_forward = FeedForward(
            f"{name}/feed_forward", width, _gelu, widths=widths, kernel_init=_INIT, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.feed_forward(self.norm2(x))


class ViT(nnx.Module):
    """For square images of one size, whose side is a multiple of ``patch``."""

    def __init__(
        self,
        patch: int,
        image_size: int,
        depth: int,
        *,
        width: int,
        channels: int,
        classes: int,
        widths: Mapping[str, int],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.image_size = image_size
        self.patches = nnx.Conv(
            channels,
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            kernel_init=nnx.initializers.lecun_normal(),
            dtype=dtype,
            precision=layers.precision(dtype),
            rngs=rngs,
        )
        self.token = nnx.Param(_INIT(rngs.params(), (width,), jnp.float32))
        self.positions = nnx.Param(_INIT(rngs.params(), ((image_size // patch) ** 2 + 1, width), jnp.float32))
        self.blocks = nnx.List(
            [Block(f"blocks/{index}", width, widths=widths, dtype=dtype, rngs=rngs) for index in range(depth)]
        )
        self.norm = layer_norm(width, rngs=rngs)
        self.head = layers.classifier(width, classes, kernel_init=_INIT, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        del train, rngs  # neither BatchNorm nor dropout
        size = self.image_size
        if x.shape[1:3] != (size, size):
            raise ValueError(f"This ViT has positions for images of {size}x{size} pixels; got the shape {x.shape}.")
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    def groups(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for block in self.blocks for group in block.feed_forward.groups())

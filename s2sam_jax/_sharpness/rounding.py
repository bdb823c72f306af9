"""Numbers as a narrower floating-point format would hold them, to nearest or at random."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from s2sam_jax._base.types import Params

# Stored bits of the mantissa, of formats that share float32's exponent: their numbers are float32's with low bits zero.
_MANTISSA = {"float32": 23, "tensorfloat32": 10, "bfloat16": 7}
FORMATS = (*_MANTISSA, "float16")

Pair = tuple[jax.Array, jax.Array]


def round_to_nearest(x: jax.Array, dtype: str) -> jax.Array:
    """``x`` rounded to a format, ties to even, as float32."""
    x = x.astype(jnp.float32)
    if dtype == "float16":
        # The barrier keeps the compiler from dropping the two casts as excess precision.
        return jax.lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32)
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_MANTISSA[dtype])


def check_format(dtype: DTypeLike, allowed: Sequence[str], name: str) -> str:
    """The name of the format, which may be given as a type."""
    found = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if found not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {found!r}.")
    return found


def stochastic_round(tree: Params, key: jax.Array, dtype: DTypeLike) -> Params:
    r"""Rounds at random to one of the two neighbours in a narrower format, so that the mean is the number itself.

    .. math:: P(\hat x = \lceil x \rceil) = \frac{x - \lfloor x \rfloor}{\lceil x \rceil - \lfloor x \rfloor}

    If weights are already numbers of the format, rounding to nearest discards any perturbation below half a unit in
    the last place; here it is kept in expectation, at the price of noise in every weight. Inside a loss, gradients pass
    straight through, as through a plain cast.

    Args:
      tree: any pytree of floating-point arrays; wider ones are first rounded to float32.
      key: PRNG key; use a new one for each step, or the noise is always the same.
      dtype: bfloat16 or ``"tensorfloat32"`` (ten bits of mantissa, the format of NVIDIA's matrix units).

    Returns:
      The rounded tree, as bfloat16, or as float32 whose lower bits are zero. Infinities and NaNs are kept.

    Raises:
      ValueError: for any other ``dtype``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax import stochastic_round
      >>> x = jnp.full(10_000, 1 + 1 / 512)  # a quarter of the way from 1 to the next bfloat16
      >>> rounded = stochastic_round(x, jax.random.key(0), "bfloat16")
      >>> print(jnp.unique(rounded), abs(rounded.astype(jnp.float32).mean() - x[0]) < 1e-4)
      [1 1.00781] True
    """
    name = check_format(dtype, ("bfloat16", "tensorfloat32"), "stochastic_round's dtype")
    drop, stored = 23 - _MANTISSA[name], jnp.bfloat16 if name == "bfloat16" else jnp.float32
    leaves, treedef = jax.tree.flatten(tree)

    def rounded(x: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.bits(key, x.shape, jnp.uint32) >> (32 - drop)
        return _cut(x.astype(jnp.float32), drop, noise).astype(stored)

    return treedef.unflatten([rounded(x, k) for x, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)])


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _cut(x: jax.Array, drop: int, added: jax.Array) -> jax.Array:
    """Adds to the magnitude, as an integer, then zeroes its ``drop`` lowest bits; a carry moves on to the exponent."""
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + added) & jnp.uint32(2**32 - 2**drop)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x)


@_cut.defjvp
def _straight_through(drop: int, primals: Pair, tangents: Pair) -> Pair:
    """A step function's derivative is zero or none; a cast's is that of the number before it."""
    x, added = primals
    return _cut(x, drop, added), tangents[0]

"""Whole numbers out of fractions: rounding errors must not cost one."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import NUMBERS


def rounded_down(amount: Any) -> Any:
    """The floor, an int or int32; an amount that rounding has put just below a whole number counts as that number."""
    if isinstance(amount, NUMBERS):
        return math.floor(round(float(amount), 6))
    return jnp.floor(amount + _slack(amount)).astype(jnp.int32)


def rounded_up(amount: Any) -> Any:
    """The ceiling, an int or int32; an amount that rounding has put just above a whole number counts as that number."""
    if isinstance(amount, NUMBERS):
        return math.ceil(round(float(amount), 6))
    return jnp.ceil(amount - _slack(amount)).astype(jnp.int32)


def part(number: jax.Array, fraction: jax.typing.ArrayLike, rounded: Callable[[Any], Any] = rounded_down) -> jax.Array:
    """A fraction of an int32, computed in float32, whose rounding may exceed the number: hence the clip."""
    return jnp.clip(rounded(number.astype(jnp.float32) * jnp.asarray(fraction, jnp.float32)), 0, number)


def kept(size: int, sparsity: float) -> int:
    """``N - floor(S * N)``."""
    return size - rounded_down(sparsity * size)


def _slack(amount: jax.Array) -> jax.Array:
    """A few ulps of float32, but never enough to turn one whole number into another."""
    return jnp.minimum(amount * 2**-21, 1 / 8)

"""Whole numbers out of fractions: rounding errors must not cost one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = (int, float, np.integer, np.floating)


def rounded_down(amount: Any) -> Any:
    """The floor, an int or int32; an amount that rounding has put just below a whole number counts as that."""
    if isinstance(amount, _NUMBERS):
        return math.floor(round(float(amount), 6))
    return jnp.floor(amount + _slack(amount)).astype(jnp.int32)


def rounded_up(amount: Any) -> Any:
    """The ceiling, an int or int32; an amount that rounding has put just above a whole number counts as that."""
    if isinstance(amount, _NUMBERS):
        return math.ceil(round(float(amount), 6))
    return jnp.ceil(amount - _slack(amount)).astype(jnp.int32)


def kept(size: int, sparsity: float) -> int:
    """``N - floor(S * N)``."""
    return size - rounded_down(sparsity * size)


def check_fractions(caller: str, **fractions: Any) -> None:
    """Numbers must lie in [0, 1]; schedules and traced values are only known when they run."""
    for name, value in fractions.items():
        if isinstance(value, _NUMBERS) and not 0 <= value <= 1:
            raise ValueError(f"{caller} needs 0 <= {name} <= 1; got {value}.")


def _slack(amount: jax.Array) -> jax.Array:
    """A few ulps of float32, but never so much that an amount without a fraction would become another."""
    return jnp.minimum(amount * 2**-21, 1 / 8)

"""Numbers that may change with the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import check_non_negative
from s2sam_jax._base.types import ScalarOrSchedule


def schedule(value: ScalarOrSchedule, name: str) -> Callable[[jax.Array], jax.Array]:
    """A scalar or a schedule as a function of the step, in the default float type."""
    if not callable(value):
        check_non_negative(value, name)
    return lambda step: jnp.array(value(step) if callable(value) else value, jnp.result_type(float))


def cosine(first: float, step: jax.Array, end: int, last: float = 0.0) -> jax.Array:
    """``last + (first - last) / 2 * (1 + cos(pi * t / T))``, and its value at T from there on; exact at both ends."""
    share = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(step / max(end, 1), 0.0, 1.0)))
    return first * share + last * (1.0 - share)

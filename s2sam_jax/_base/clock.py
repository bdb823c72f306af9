"""When masks and perturbations are renewed: a clock that counts calls of update, and one tick of it."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

NEVER = int(jnp.iinfo(jnp.int32).max)


@dataclasses.dataclass(frozen=True)
class Every:
    """A clock that fires at ``start, start + every, ...``, up to and including ``end``.

    Args:
      start: first call that fires, counted from 0.
      every: calls from one firing to the next, at least 1.
      end: last call that may fire; ``None`` means no end. Methods that anneal over training (RigL) use it
        as their horizon and require it.

    Raises:
      ValueError: when a bound is negative, out of order or beyond int32.
      TypeError: for bounds that are not integers, or are traced.

    Example:
      >>> clock = Every(start=0, every=100, end=250)
      >>> [step for step in range(400) if clock.at_or_after(step) == step]
      [0, 100, 200]
    """

    start: int = 0
    every: int = 100
    end: int | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "start", operator.index(self.start))  # NumPy's integers too
            object.__setattr__(self, "every", operator.index(self.every))
            object.__setattr__(self, "end", None if self.end is None else operator.index(self.end))
        except TypeError as error:
            raise TypeError(
                f"Every counts calls in integers; got {self.start!r}, {self.every!r}, {self.end!r}. Traced ones, as "
                "optax.inject_hyperparams makes them, will not do: name those arguments in its static_args."
            ) from error
        if self.start < 0 or self.every < 1:
            raise ValueError(f"Every needs start >= 0 and every >= 1; got start={self.start}, every={self.every}.")
        if self.start >= NEVER or self.every >= NEVER:
            raise ValueError(f"Every counts in int32: start and every must be below 2**31 - 1; got {self}.")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"Every needs end >= start; got start={self.start}, end={self.end}.")
        if self.end is not None:
            object.__setattr__(self, "end", min(self.end, NEVER - 1))

    def at_or_after(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The first firing at or after ``step`` as int32[]; ``NEVER`` when there is none."""
        step = jnp.maximum(jnp.asarray(step, jnp.int32), self.start)
        wait, last = (self.start - step) % self.every, NEVER if self.end is None else self.end
        return jnp.where(wait <= last - step, step + wait, NEVER)  # compared so that no sum leaves int32


def increment(step: jax.Array) -> jax.Array:
    """The next step, at most ``NEVER - 1``: one that wrapped, or reached it, would fire clocks that have ended."""
    return jnp.minimum(step, NEVER - 2) + 1


def tick(
    clock: Every | None, state: Any, refresh: bool | jax.Array | None
) -> tuple[bool | jax.Array, jax.Array, jax.Array]:
    """Whether this call fires, and ``step`` and ``next_update`` of the state after it.

    ``refresh`` decides if the caller gives it; otherwise the state's ``next_update`` does, even if the clock has been
    replaced since.
    """
    step = increment(state.step)
    if clock is None:
        return False, step, state.next_update
    due = state.step >= state.next_update if refresh is None else refresh
    if isinstance(due, jax.Array) and not isinstance(due, Tracer):  # outside jit, lax.cond compiles at every call
        due = bool(jax.device_get(due))
    if isinstance(due, bool):
        return due, step, clock.at_or_after(step) if due else state.next_update
    return due, step, jnp.where(due, clock.at_or_after(step), state.next_update)

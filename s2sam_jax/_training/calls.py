"""The train step as it is called: from Python, compiled, or inside ``jit``, as it is."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from s2sam_jax._training.batches import Batch
from s2sam_jax._training.gradient import Metrics
from s2sam_jax._training.host_clock import HostClock
from s2sam_jax._training.train_state import TrainState

Flags = tuple[tuple[str, bool], ...]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class TrainStep:
    """Called like a function, and lowered like a jitted one; ``called`` is what runs where nothing is traced."""

    __name__ = "train_step"  # and of the programs that it is jitted to

    def __init__(self, one: Step, called: Step | None = None):
        self._one = one
        self._whole = jax.jit(one, donate_argnames="state")
        self._called = called or self._whole

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_kind(state)
        kinds = set(map(type, jax.tree.leaves((state, batch))))  # few; asking every leaf would take Python long
        traced = any(issubclass(kind, Tracer) for kind in kinds)
        return self._one(state, batch) if traced else self._called(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        _check_kind(state)
        return self._whole.lower(state, batch)


def two_programs(differentiate: Callable[..., Any], update: Callable[..., Any]) -> Step:
    """The host decides when masks change: for CPU, where gradients of convolutions are slow inside ``lax.cond``.

    The update is compiled for each kind of call, but the gradient, by far the longer to compile, only once.
    """
    differentiate = jax.jit(differentiate)
    update = jax.jit(update, donate_argnames="state", static_argnames="flags")
    clock = HostClock()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # A step that is refused moves no clock: whoever lifts the freeze exchanges first_bad_step.
        flags = clock.flags(state.opt_state, state.first_bad_step)
        new_state, metrics = update(state, differentiate(state, batch), batch, flags)
        clock.advance(flags, new_state.opt_state, new_state.first_bad_step)
        return new_state, metrics

    return step


def _check_kind(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"The step needs a TrainState; got a {type(state).__name__}. Restore checkpoints into the structure of "
            "TrainState.create(params, tx)."
        )

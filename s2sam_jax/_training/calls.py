"""How the train step is called: compiled when called from Python, as a pure function inside ``jit``."""

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
    """The step that :func:`make_train_step` returns: a function that can be lowered like a jitted one.

    Called with arrays, it is compiled and donates its state (on CPU, and with ``vmap=True``, its clocks are kept on the
    host); called inside ``jit``, ``lax.scan`` or ``vmap``, it is a pure function.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import TrainState, make_train_step, s2sam
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean((batch @ params) ** 2), (model_state, {})
      >>> tx = optax.chain(s2sam(rho=0.05), optax.sgd(0.25))
      >>> step, state = make_train_step(loss_fn, tx), TrainState.create(jnp.ones(1), tx)
      >>> compiled = step.lower(state, jnp.ones((4, 1))).compile()
      >>> print(compiled.memory_analysis().alias_size_in_bytes > 0)
      True
    """

    __name__ = "train_step"  # and of programs that it is jitted to

    def __init__(self, pure: Step, eager: Step | None = None):
        """``eager`` runs if nothing is traced; by default it is ``pure``, compiled as a whole."""
        self._pure = pure
        self._whole = jax.jit(pure, donate_argnames="state")
        self._eager = eager or self._whole

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_kind(state)
        _check_not_donated(state)
        kinds = set(map(type, jax.tree.leaves((state, batch))))  # few; asking every leaf would take Python long
        traced = any(issubclass(kind, Tracer) for kind in kinds)
        return self._pure(state, batch) if traced else self._eager(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step as one program that donates its state, from arrays or ``jax.ShapeDtypeStruct``.

        On CPU, and with ``vmap=True``, a call from Python runs two other programs; under ``vmap`` this one would make
        new masks at every step. The ``jax.ShapeDtypeStruct`` of a sharded array needs its ``sharding``.
        """
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


def _check_not_donated(state: TrainState) -> None:
    step = state.step
    if isinstance(step, jax.Array) and not isinstance(step, Tracer) and step.is_deleted():
        raise ValueError("This state was donated to an earlier step: go on from the state which that one returned.")

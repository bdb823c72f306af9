"""When masks are due, known on the host without waiting for the device."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import optax

from s2sam_jax._masks import SparseState
from s2sam_jax._ssam import SSAMState
from s2sam_jax._tree import find_states


class HostClock:
    """Foretells on the host which calls refresh a mask, without waiting for the device.

    The clocks live in the optimizer state. They are read once, then counted along, and read again after each refresh
    or when a state comes in that this clock has not just handed out. Off CPU, where a ``lax.cond`` is cheap, and where
    a wrapper makes calls and updates differ, no flags are given and the state's own clock decides.
    """

    _FLAGS = ((SparseState, "refresh_masks"), (SSAMState, "refresh_perturbation"))

    def __init__(self):
        self._last: Callable[[], Any] = lambda: None
        self._clocks: dict[str, tuple[int, int]] = {}

    def flags(self, step: jax.Array, opt_state: Any) -> tuple[tuple[str, bool], ...]:
        if self._last() is not step:
            self._clocks = self._read(opt_state)
        return tuple((name, now == due) for name, (now, due) in self._clocks.items())

    def advance(self, step: jax.Array, opt_state: Any, flags: tuple[tuple[str, bool], ...]) -> None:
        if any(due for _, due in flags):
            self._clocks = self._read(opt_state)
        else:
            self._clocks = {name: (now + 1, due) for name, (now, due) in self._clocks.items()}
        self._last = weakref.ref(step)

    def _read(self, opt_state: Any) -> dict[str, tuple[int, int]]:
        wrapped = find_states(opt_state, optax.MultiStepsState) + find_states(opt_state, optax.ApplyIfFiniteState)
        if wrapped or jax.default_backend() != "cpu":
            return {}
        clocks = {}
        for kind, name in self._FLAGS:
            states = find_states(opt_state, kind)
            if len(states) == 1:
                clocks[name] = (int(states[0].step), int(states[0].next_update))
        return clocks

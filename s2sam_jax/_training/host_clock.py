"""When masks and extra gradients are due, known on the host without waiting for the device."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.tree import find_states, scalar
from s2sam_jax._sharpness.looksam import LookSAMState
from s2sam_jax._sharpness.ssam import SSAMState


class HostClock:
    """Predicts on the host which calls refresh a mask or LookSAM's direction, without waiting for the device.

    The clocks live in the optimizer state. They are read once, then counted along, and read again after each refresh
    or when a state comes in that this clock has not just handed out. Where a wrapper makes calls and updates differ, no
    flags are given and the state's own clock decides, in a ``lax.cond``.
    """

    _FLAGS = (
        (SparseState, "refresh_masks"),
        (SSAMState, "refresh_perturbation"),
        (LookSAMState, "refresh_sam"),
    )

    _SKIPPING = (
        optax.MultiStepsState,
        optax.ApplyIfFiniteState,
        optax.transforms.ConditionallyTransformState,
        optax.transforms.ConditionallyMaskState,
    )

    def __init__(self):
        self._last: list[Callable[[], Any]] = []
        self._clocks: dict[str, tuple[int, int]] = {}

    def flags(self, opt_state: Any, *beside: Any) -> tuple[tuple[str, bool], ...]:
        """What is due at this call. ``beside`` are further arrays, the same as before if the state is."""
        owners = self._owners(opt_state)
        known = self._knows([*_clocks_of(owners), *beside])
        # Where something is due, a wrapper of the user's may have skipped updates.
        if not known or any(now >= due for now, due in self._clocks.values()):
            self._clocks = self._read(owners)
        return tuple((name, now >= due) for name, (now, due) in self._clocks.items())

    def advance(self, flags: tuple[tuple[str, bool], ...], opt_state: Any, *beside: Any) -> None:
        owners = self._owners(opt_state) if flags else {}
        if any(due for _, due in flags):
            self._clocks = self._read(owners)
        else:
            self._clocks = {name: (now + 1, due) for name, (now, due) in self._clocks.items()}
        self._last = [weakref.ref(array) for array in (*_clocks_of(owners), *beside)]

    def _knows(self, arrays: list[Any]) -> bool:
        """Whether these are the very arrays that the last step has handed out."""
        if len(self._last) != len(arrays):
            return False
        return all(last() is array for last, array in zip(self._last, arrays, strict=True))

    def _owners(self, opt_state: Any) -> dict[str, Any]:
        """The states with a clock, by the name of their flag; none where calls and updates may differ."""
        if find_states(opt_state, self._SKIPPING):
            return {}
        found = {name: find_states(opt_state, kind) for kind, name in self._FLAGS}
        return {name: states[0] for name, states in found.items() if len(states) == 1}

    def _read(self, owners: dict[str, Any]) -> dict[str, tuple[int, int]]:
        return {name: (_newest(state.step), _newest(state.next_update)) for name, state in owners.items()}


def _clocks_of(owners: dict[str, Any]) -> list[Any]:
    return [array for state in owners.values() for array in (state.step, state.next_update)]


def _newest(count: Any) -> int:
    """A count, or that of several networks side by side, of which all agree that have not been frozen."""
    return int(np.max(scalar(count)))

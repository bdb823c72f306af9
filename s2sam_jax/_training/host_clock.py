"""When masks and extra gradients are due, known on the host without waiting for the device."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.optax_wrappers import SKIPPING
from s2sam_jax._base.tree import find_states, scalar
from s2sam_jax._sharpness.looksam import LookSAMState
from s2sam_jax._sharpness.ssam import SSAMState

Count = tuple[Any, Any]  # of a state with a clock: calls so far, and the one that is due next


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

    def __init__(self):
        self._last: list[Callable[[], Any]] = []
        self._clocks: dict[str, tuple[int, int]] = {}
        self._structure = jax.tree.structure(())
        self._places: dict[str, Any] = {}  # of a count among the leaves of that structure

    def __reduce__(self) -> Any:
        """A copy begins afresh, as arrays of another process are not these (cloudpickle, as Ray uses it)."""
        return HostClock, ()

    def flags(self, opt_state: Any, *beside: Any) -> tuple[tuple[str, bool], ...]:
        """What is due at this call. ``beside`` are further arrays, the same as before if the state is."""
        counts = self._counts(opt_state)
        # Also read again if something is due: a wrapper of the user's may have skipped updates.
        if not self._knows(counts, beside) or any(now >= due for now, due in self._clocks.values()):
            self._clocks = _read(counts)
        return tuple((name, now >= due) for name, (now, due) in self._clocks.items())

    def advance(self, flags: tuple[tuple[str, bool], ...], opt_state: Any, *beside: Any) -> None:
        counts = self._counts(opt_state)
        if any(due for _, due in flags):
            self._clocks = _read(counts)
        else:
            self._clocks = {name: (now + 1, due) for name, (now, due) in self._clocks.items()}
        self._last = [weakref.ref(array) for array in _arrays(counts, beside)]

    def _counts(self, opt_state: Any) -> dict[str, Count]:
        """Found by their places, which are looked up once for a structure: a walk in Python takes long."""
        leaves, structure = jax.tree.flatten(opt_state)
        if structure != self._structure:
            self._structure, self._places = structure, self._find(structure)
        return {name: (leaves[step], leaves[due]) for name, (step, due) in self._places.items()}

    def _find(self, structure: Any) -> dict[str, Any]:
        """Which leaves are the counts, by the name of the flag; none if calls and updates may differ."""
        numbered = structure.unflatten(range(structure.num_leaves))
        if find_states(numbered, SKIPPING):
            return {}
        found = {name: find_states(numbered, kind) for kind, name in self._FLAGS}
        owners = {name: states[0] for name, states in found.items() if len(states) == 1}
        return {name: (scalar(state.step), scalar(state.next_update)) for name, state in owners.items()}

    def _knows(self, counts: dict[str, Count], beside: tuple[Any, ...]) -> bool:
        """Whether these are the very arrays that the last step has handed out."""
        arrays = _arrays(counts, beside)
        if len(self._last) != len(arrays):
            return False
        return all(last() is array for last, array in zip(self._last, arrays, strict=True))


def _arrays(counts: dict[str, Count], beside: tuple[Any, ...]) -> list[Any]:
    return [*(array for pair in counts.values() for array in pair), *beside]


def _read(counts: dict[str, Count]) -> dict[str, tuple[int, int]]:
    # An explicit transfer, as jax.transfer_guard may refuse others.
    return {name: (_newest(step), _newest(due)) for name, (step, due) in jax.device_get(counts).items()}


def _newest(count: Any) -> int:
    """A count; of several networks side by side the largest, on which all that are not frozen agree."""
    return int(np.max(count))

"""Which connections die and grow: the masks after an epoch against those before it."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import Config
from experiments.trees import by_name
from s2sam_jax import TrainState, get_masks

Counts = dict[str, list[int]]  # by kernel: zeros, size, died, grown


def masks_of(config: Config, state: TrainState) -> Any:
    """Copies, as a state is donated to its next step; None for dense training."""
    return None if config.method == "dense" else _copy(get_masks(state.opt_state, state.params))


def count(before: Any, after: Any) -> Counts:
    """Counts by kernel; empty for dense training. What dies and comes back in between does not show."""
    if after is None:
        return {}
    counts = jax.device_get(_compare(before, after))
    return {
        name: [int(zeros), mask.size, int(died), int(grown)]
        for (name, mask), (zeros, died, grown) in zip(by_name(after).items(), counts, strict=True)
        if mask.ndim >= 2
    }


def total(counts: Counts, more: Counts) -> Counts:
    """The counts of two spans of time together, one after the other."""
    earlier = {name: counts.get(name, [0, 0, 0, 0]) for name in more}
    return {
        name: [zeros, size, earlier[name][2] + died, earlier[name][3] + grown]
        for name, (zeros, size, died, grown) in more.items()
    }


@jax.jit
def _copy(masks: Any) -> Any:
    return jax.tree.map(jnp.copy, masks)


@jax.jit
def _compare(before: Any, after: Any) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [(jnp.sum(~new), jnp.sum(old & ~new), jnp.sum(new & ~old)) for old, new in pairs]

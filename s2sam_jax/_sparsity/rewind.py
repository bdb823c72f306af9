"""Iterative pruning in rounds: train, prune a fraction of what is left, go back."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.clock import Every
from s2sam_jax._base.counts import rounded_up
from s2sam_jax._base.tree import masked
from s2sam_jax._base.types import MaskInputs, MaskUpdate, Params, SparseMethod
from s2sam_jax._sparsity.plan import global_count, sparse_size
from s2sam_jax._sparsity.pruning import dense_init, keep_largest


class RewindState(NamedTuple):
    """State of ``lottery`` and ``lrr``.

    Attributes:
      firings: int32[], times the clock has fired; the first one saves, each later one ends a round.
      params: weights to go back to; ``None`` for ``lrr``.
      inner_state: the optimizer state to go back to, as a list of its trees like the parameters and its other leaves;
        without their types, so that nothing which looks for a state inside ``opt_state`` takes the saved one for it.
    """

    firings: jax.Array
    params: Params | None
    inner_state: list[Any]


def remaining_weights(size: int, target: int, fraction: float) -> list[int]:
    """Weights left after 0, 1, ... prunings of ``ceil(fraction * remaining)``; the last one stops at the target."""
    left = [size]
    while left[-1] > target:
        left.append(max(target, left[-1] - max(rounded_up(fraction * left[-1]), 1)))  # tiny ones are rounded to 0
    return left


def rewinding(fraction: float, rounds: int | None, name: str, *, rewind_weights: bool) -> SparseMethod:
    """The method both share; ``rewind_weights`` tells them apart."""
    if not 0 < fraction < 1:
        raise ValueError(f"{name} needs 0 < prune_fraction < 1; got {fraction}.")

    def init(x: MaskInputs) -> MaskUpdate:
        left = remaining_weights(sparse_size(x), global_count(x), fraction)
        if left[0] and rounds is not None:  # optax.tree.map_params has no leaves
            _check_rounds(name, rounds, left, fraction)
        _check_end(name, x.when, len(left))
        params = x.params if rewind_weights else None
        start = RewindState(jnp.zeros((), jnp.int32), params, _untyped(x.inner_state, x.params))
        return dense_init(x)._replace(state=start)

    def update(x: MaskInputs, state: RewindState) -> MaskUpdate:
        left = remaining_weights(sparse_size(x), global_count(x), fraction)
        first = state.firings == 0
        ends_round = ~first & (state.firings < len(left))
        count = jnp.asarray(left, jnp.int32)[jnp.minimum(state.firings, len(left) - 1)]
        masks = keep_largest(x, jax.tree.map(jnp.abs, x.params), count)
        saved_state = optax.tree.where(first, _untyped(x.inner_state, x.params), state.inner_state)
        rewound = jax.tree.unflatten(jax.tree.structure(x.inner_state), jax.tree.leaves(saved_state))
        inner_state = optax.tree.where(ends_round, rewound, x.inner_state)
        params = optax.tree.where(first, x.params, state.params) if rewind_weights else None
        values = optax.tree.where(ends_round, masked(masks, params), x.params) if rewind_weights else None
        saved = RewindState(state.firings + 1, params, saved_state)
        return MaskUpdate(masks, saved, values, inner_state, skip=first | ends_round)

    return SparseMethod(init, update, "monotone", ranks="global")


def _check_rounds(name: str, rounds: int, left: list[int], fraction: float) -> None:
    """``rounds`` cannot stand in for the sparsity, which everything else is planned by; it is only checked."""
    if rounds == len(left) - 1:
        return
    size, all_rounds = left[0], remaining_weights(left[0], 1, fraction)
    # Six digits, rounded down, as up would take a round more; where they do not suffice, no sparsity is named.
    sparsity = math.floor(1e6 * (1 - all_rounds[min(max(rounds, 0), len(all_rounds) - 1)] / size)) / 1e6
    reached = remaining_weights(size, size - int(sparsity * size), fraction)
    advice = f", or give the sparsity that {rounds} rounds reach, {sparsity:g}" if len(reached) - 1 == rounds else ""
    raise ValueError(
        f"{name}: rounds={rounds} and the sparsity disagree: pruning {fraction:g} of the rest each round reaches "
        f"{left[-1]} of {size} weights in {len(left) - 1} rounds. Leave rounds out{advice}."
    )


def _check_end(name: str, when: Every | None, firings: int) -> None:
    """The first firing saves, and each later one prunes: a clock that ends early would never reach the sparsity."""
    if when is None or when.end is None:
        return
    last = when.start + when.every * (firings - 1)
    if when.end < last:
        raise ValueError(
            f"{name} reaches the sparsity after {firings - 1} prunings, the last of them at call {last}, but the clock "
            f"ends at {when.end}: give when=Every({when.start}, {when.every}, end={last}) or later, prune more each "
            "round, or make the rounds shorter."
        )


def _untyped(inner_state: Any, params: Params) -> list[Any]:
    structure = jax.tree.structure(params)
    return jax.tree.leaves(inner_state, is_leaf=lambda node: jax.tree.structure(node) == structure)

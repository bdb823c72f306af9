"""Masks in an optimizer state: where they are kept, and how to read them."""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.optax_wrappers import comes_last
from s2sam_jax._base.select import ones
from s2sam_jax._base.tree import by_name, check_same_named, find_states, map_named
from s2sam_jax._base.types import Masks, Params


class SparseState(NamedTuple):
    """State of :func:`sparsify`.

    Attributes:
      step: int32[], calls of update; the clock of the mask updates.
      next_update: int32[], the call at which the masks change next.
      masks: bool, with the treedef, shapes and sharding of the parameters; all true on dense leaves.
      nnz: int32[leaves], ones in each mask, in the order of ``jax.tree.leaves``; written only when the masks are
        (:func:`check_masks` compares). A single array, since one per leaf would slow down every step.
      key: typed PRNG key (Orbax saves it; formats without typed keys need ``jax.random.key_data``); a mask update uses
        ``fold_in(key, step)``.
      method_state: the method's own state.
      inner_state: state of the wrapped optimizer.
    """

    step: jax.Array
    next_update: jax.Array
    masks: Masks
    nnz: jax.Array
    key: jax.Array
    method_state: Any
    inner_state: Any


def count_masks(masks: Masks) -> jax.Array:
    """Ones per leaf, int32[leaves]."""
    leaves = jax.tree.leaves(masks)
    return jnp.stack(ones(leaves)) if leaves else jnp.zeros(0, jnp.int32)


def full_counts(params: Params) -> Any:
    """Ones of each mask if all are true, a tree of int32[].

    Raises:
      ValueError: naming the leaves that int32 cannot count, as a stack of all layers of a large model.
    """
    if large := {name: p.size for name, p in by_name(params).items() if p.size >= 2**31}:
        raise ValueError(
            f"sparsify counts the weights of a leaf in int32, and these have more: {large}. Cut them into several "
            "leaves (a stack of layers into several scans), or keep them out of sparsify by optax.multi_transform."
        )
    return jax.tree.map(lambda p: jnp.array(p.size, jnp.int32), params)


def get_masks(opt_state: Any, params: Params | None = None) -> Masks:
    """The masks inside an optimizer state.

    Args:
      opt_state: a state that holds one :class:`SparseState`, at any depth, or several on disjoint leaves; with several,
        ``params`` is needed to put the masks together.
      params: if given, the result has exactly this structure, all true on leaves that no state covers.

    Returns:
      Bool tree like the parameters.

    Raises:
      ValueError: when there is no :class:`SparseState`, several and no ``params``, a mask has no parameter of its path
        and shape, or something stands behind ``sparsify`` in its chain.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import get_masks, methods, sparsify
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params)
      >>> int(get_masks(state)["kernel"].sum())
      2
    """
    states = sparse_states(opt_state, "get_masks")
    if params is None:
        if len(states) > 1:
            raise ValueError("get_masks: opt_state holds several SparseStates; pass params to get one tree.")
        return states[0].masks
    found = masks_of(states, params)
    return map_named(lambda path, p: found[path] if path in found else jnp.ones_like(p, dtype=bool), params)


def sparse_states(opt_state: Any, caller: str) -> list[SparseState]:
    states = find_states(opt_state, SparseState)
    if not states:
        raise ValueError(
            f"{caller} found no SparseState in opt_state (a {type(opt_state).__name__}). Wrap the optimizer in "
            "sparsify(); if the state comes from a checkpoint, restore it into the structure of tx.init(params)."
        )
    names = Counter(name for state in states for name in by_name(state.masks))
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(
            f"{caller}: two sparsify have masks of {twice}, which would contradict each other; one is enough."
        )
    if not comes_last(opt_state, SparseState):
        raise ValueError(
            f"{caller}: something stands behind sparsify() in its chain, and would change the updates that keep pruned "
            "weights at zero; put it inside: sparsify(optax.chain(..., optax.scale_by_learning_rate(0.1)), ...)."
        )
    return states


def masks_by_path(states: list[SparseState]) -> dict[str, jax.Array]:
    """The masks of all states together."""
    return {path: mask for state in states for path, mask in by_name(state.masks).items()}


def masks_of(states: list[SparseState], params: Params) -> dict[str, jax.Array]:
    """The masks by path, all of which must have a parameter of their path and shape."""
    masks = masks_by_path(states)
    covered = {path: p for path, p in by_name(params).items() if path in masks}
    check_same_named(covered, masks, "params", "the masks in opt_state")
    return masks

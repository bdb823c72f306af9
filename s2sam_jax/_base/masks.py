"""Masks in an optimizer state: where they are kept, and how to read, set and apply them."""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.optax_wrappers import comes_last, hides_leaves, with_extra_args
from s2sam_jax._base.select import ones
from s2sam_jax._base.state_rule import mask_mirrored
from s2sam_jax._base.tree import align, by_name, check_same_named, find_states, map_named, map_states
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
      ValueError: when there is no :class:`SparseState`, several and no ``params``, or something behind ``sparsify`` in
        its chain.

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
    found = _by_path(states)
    return map_named(lambda path, p: found[path] if path in found else jnp.ones_like(p, dtype=bool), params)


def set_masks(opt_state: Any, masks: Masks) -> Any:
    """Installs masks (from one-shot scores, a file, another run) in an optimizer state.

    Counts are recomputed, and the state of the wrapped optimizer is zeroed off the new masks. Call :func:`apply_masks`
    on the parameters afterwards. Under ``Block`` and ``Channel`` masks must cover whole units, as those of
    ``select(..., structure=...)`` do; otherwise the next mask update revives every unit with at least one live weight.
    If the state has been used in training, the optimizer state of revived weights starts from zero. That suits SGD and
    Adam, but not ``schedule_free`` or Rprop.

    Args:
      opt_state: a state with a :class:`SparseState`.
      masks: bool tree like the parameters.

    Returns:
      The new optimizer state.

    Raises:
      ValueError: when there is no :class:`SparseState`, or the masks have other leaves or shapes.
      TypeError: when a mask is not bool.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import get_masks, methods, select, set_masks, sparsify
      >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
      >>> state = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params)
      >>> state = set_masks(state, select(jax.tree.map(jnp.abs, params), sparsity=0.5))
      >>> print(get_masks(state)["kernel"])
      [[False  True]
       [ True False]]
    """
    wrong = [name for name, mask in by_name(masks).items() if mask.dtype != jnp.bool_]
    if wrong:
        raise TypeError(f"set_masks needs bool masks; these are not: {wrong}.")
    states = sparse_states(opt_state, "set_masks")
    covered = _by_path(states)
    given = by_name(masks)
    if len(states) > 1 or any(hides_leaves(state.masks) for state in states):  # each covers a part of the parameters
        given = {path: mask for path, mask in given.items() if path in covered}
    check_same_named(given, covered, "masks", "the masks in opt_state")

    def install(state: SparseState) -> SparseState:
        new = jax.tree.map(jnp.array, align(masks, state.masks))
        inner_state = mask_mirrored(new, state.inner_state)
        nnz = jax.tree.map(lambda _: count_masks(new), state.nnz)  # Flax NNX may have wrapped it in a variable
        return state._replace(masks=new, nnz=nnz, inner_state=inner_state)

    return map_states(install, opt_state, SparseState)


def apply_masks(params: Params, opt_state: Any) -> Params:
    """Zeroes pruned weights. Call it once after ``init`` (``TrainState.create`` does); not needed between updates.

    Args:
      params: any pytree of parameters.
      opt_state: a state with a :class:`SparseState`.

    Returns:
      The parameters with exact zeros off the masks.

    Raises:
      ValueError: when there is no :class:`SparseState`, a mask has no parameter of its path and shape, or something
        stands behind ``sparsify`` in its chain and would change its updates.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import apply_masks, methods, sparsify
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.75).init(params)
      >>> print(apply_masks(params, state)["kernel"].sum())
      4.0
    """
    masks = _by_path(sparse_states(opt_state, "apply_masks"))
    covered = {path: p for path, p in by_name(params).items() if path in masks}
    check_same_named(covered, masks, "params", "the masks in opt_state")

    def zero(path, param):
        return jnp.where(masks[path], param, jnp.zeros((), param.dtype)) if path in masks else param

    return map_named(zero, params)


def update_masks(
    tx: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params, **extra_args: Any
) -> tuple[Params, Any]:
    """One update that changes the masks, whatever the clock says: the second program of a two-program loop.

    A loop that jits its ordinary step with ``refresh_masks=False``, and calls this when the clock fires, has no mask
    update in its hot path. With ``nnx.Optimizer``, whose state ``tx`` cannot read, call
    ``optimizer.update(model, grads, refresh_masks=True)`` instead, with the flag static under ``jit``.

    Args:
      tx: the optimizer, containing :func:`sparsify`.
      grads: dense gradient.
      opt_state: the optimizer state.
      params: clean parameters.
      **extra_args: passed on to ``tx.update``, such as ``grad_fn`` and ``value``.

    Returns:
      New parameters and new optimizer state.

    Raises:
      ValueError: when ``opt_state`` holds no :class:`SparseState`, or ``optax.MultiSteps`` is around it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, get_masks, methods, sparsify, update_masks
      >>> tx = sparsify(optax.sgd(0.1), methods.rigl(1.0), sparsity=0.5, when=Every(0, 100, 1000))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> grads = {"kernel": jnp.array([[9.0, 0.0], [8.0, 0.0]])}
      >>> params, state = update_masks(tx, grads, tx.init(params), params)
      >>> print(get_masks(state)["kernel"])
      [[ True False]
       [ True False]]
    """
    sparse_states(opt_state, "update_masks")
    if find_states(opt_state, optax.MultiStepsState):
        raise ValueError("update_masks: inside optax.MultiSteps an update is not one call; let the clock decide there.")
    tx = with_extra_args(tx)
    updates, opt_state = tx.update(grads, opt_state, params, refresh_masks=True, **extra_args)
    return optax.apply_updates(params, updates), opt_state


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


def _by_path(states: list[SparseState]) -> dict[str, jax.Array]:
    """The masks of all states together."""
    return {path: mask for state in states for path, mask in by_name(state.masks).items()}

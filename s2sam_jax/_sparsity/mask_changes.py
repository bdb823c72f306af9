"""Masks that a user sets, applies or has updated."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.masks import SparseState, count_masks, masks_by_path, masks_of, sparse_states
from s2sam_jax._base.optax_wrappers import hides_leaves, with_extra_args
from s2sam_jax._base.state_rule import mask_mirrored
from s2sam_jax._base.tree import align, by_name, check_same_named, find_states, map_named, map_states, scalar
from s2sam_jax._base.types import Masks, Params
from s2sam_jax._sharpness.order import check_order


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
      ValueError: when there is no :class:`SparseState`, one of several networks, or the masks have other leaves or
        shapes.
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
    if any(jnp.ndim(scalar(state.nnz)) > 1 for state in states):
        raise ValueError("set_masks sets those of one network; this state is of several: use jax.vmap(set_masks).")
    covered = masks_by_path(states)
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
      opt_state: a state with a :class:`SparseState`, of this network alone.

    Returns:
      The parameters with exact zeros off the masks.

    Raises:
      ValueError: when there is no :class:`SparseState`, a mask has no parameter of its path and shape, something stands
        behind ``sparsify`` in its chain and would change its updates, or ``sam`` or a variant stands outside of it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import apply_masks, methods, sparsify
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.75).init(params)
      >>> print(apply_masks(params, state)["kernel"].sum())
      4.0
    """
    states = sparse_states(opt_state, "apply_masks")
    check_order(opt_state)  # every loop comes by here, if it is one of a sparse network
    masks = masks_of(states, params)

    def zero(path, param):
        return jnp.where(masks[path], param, jnp.zeros((), param.dtype)) if path in masks else param

    return map_named(zero, params)


def update_masks(
    tx: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params, **extra_args: Any
) -> tuple[Params, Any]:
    """One update of the masks, whatever the clock says: the second program of a two-program loop.

    A loop that jits its ordinary step with ``refresh_masks=False``, and calls this when the clock fires, has no mask
    update in its hot path. (Methods that anneal, such as RigL, move nothing past the end of their clock.) With
    ``nnx.Optimizer``, whose state ``tx`` cannot read, call ``optimizer.update(model, grads, refresh_masks=True)``
    instead, with the flag static under ``jit``.

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

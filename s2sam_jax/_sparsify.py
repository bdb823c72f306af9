"""Any optax optimizer, made sparse: masks in the state, exact zeros through plain ``optax.apply_updates``."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._masks import SparseState, count_masks
from s2sam_jax._s2sam_wrapper import S2SAMWrapperState
from s2sam_jax._sparsity import DISTRIBUTIONS, Distribution, Prunable, check_sparsity, kernels
from s2sam_jax._tree import check_same_leaves, copy_key, find_states, increment, mask_mirrored, masked, where
from s2sam_jax._types import NEVER, Every, GradFn, MaskInputs, Masks, MaskUpdate, SparseMethod


def sparsify(
    inner: optax.GradientTransformation,
    method: SparseMethod,
    *,
    sparsity: float,
    distribution: str | Distribution = "erk",
    when: Every | None = None,
    prunable: Prunable = kernels,
    overrides: Mapping[str, float] | None = None,
    seed: int | jax.Array = 0,
    mask_grads: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a sparse network with any optimizer: a method chooses the masks, this keeps them.

    .. math:: m \leftarrow \mathrm{method}(w, g, m), \quad u = \mathrm{inner}(m \odot g), \quad
              \text{update} = m\ ?\ u : -w

    After ``optax.apply_updates`` pruned weights are exactly 0.0, in any loop. One rule holds for the state of every
    optimizer: a floating leaf that mirrors a parameter (momentum, second moments, the last gradient) is zero wherever
    the mask is off, so a newly grown weight starts from nothing. Everything that shapes the gradient goes inside::

        sparsify(optax.chain(s2sam(), optax.clip_by_global_norm(1.0), optax.sgd(0.1)), methods.rigl(), sparsity=0.9)

    and ``optax.MultiSteps`` and ``optax.apply_if_finite`` outside. Call ``apply_masks(params, opt_state)`` once
    after ``init``.

    Args:
      inner: the optimizer.
      method: a mask-update method, e.g. ``methods.rigl()``.
      sparsity: fraction of zeros in ``[0, 1)``, over the prunable leaves.
      distribution: ``"uniform"``, ``"er"``, ``"erk"``, or a function with the signature of :func:`uniform`.
      when: when masks change, counted in calls of update; needed by methods whose masks change.
      prunable: ``(path, leaf) -> bool``; by default leaves of two or more dimensions.
      overrides: sparsity by path pattern, as in :func:`uniform`.
      seed: integer or PRNG key, possibly traced, for random masks and growth.
      mask_grads: ``False`` hands the dense gradient to ``inner`` and lets its state be dense, as the released S2-SAM
        code does; weights are sparse all the same.

    Returns:
      A transformation whose ``update`` needs ``params``. It forwards all extra arguments inward, adds ``masks`` and
      ``dense_grads``, and masks what ``grad_fn`` returns. ``refresh_masks`` (a Python bool) tells it whether this
      call changes the masks, where the caller keeps the clock; left out, a ``lax.cond`` decides.

    Raises:
      ValueError: for a sparsity out of range or unreachable, an unknown distribution, a method that needs ``when``,
        an ``inner`` that must go outside, or parameters of another structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import apply_masks, methods, sparsify
      >>> tx = sparsify(optax.adam(0.1), methods.static(), sparsity=0.75)
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> state = tx.init(params)
      >>> params = apply_masks(params, state)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> int((params["kernel"] != 0).sum()), int((params["bias"] != 0).sum())
      (4, 4)
    """
    check_sparsity(sparsity, "sparsity")
    _check_method(method, when)
    update_masks = method.update or _unchanged
    inner = optax.with_extra_args_support(inner)
    distribute = _distribution(distribution)

    def plan(params):
        return distribute(params, sparsity, prunable=prunable, overrides=overrides)

    def init_fn(params):
        key, step = copy_key(seed), jnp.zeros((), jnp.int32)
        dense = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
        inputs = MaskInputs(params, None, dense, plan(params), step, jax.random.fold_in(key, NEVER), when, None)
        masks, method_state, _ = method.init(inputs)
        inner_state = inner.init(masked(masks, params))
        _check_order(inner_state)
        if mask_grads:
            inner_state = mask_mirrored(masks, inner_state)
        return SparseState(
            step, _next_update(method, when, step), masks, count_masks(masks), key, method_state, inner_state
        )

    def new_masks(due, grads, state, live, grad_fn):
        """The masks of this step, with their counts, the method's state, and whether the inner update is skipped."""

        def change():
            key = jax.random.fold_in(state.key, state.step)
            inputs = MaskInputs(live, grads, state.masks, plan(live), state.step, key, when, grad_fn)
            masks, method_state, skip = update_masks(inputs, state.method_state)
            return masks, count_masks(masks), method_state, skip

        def keep():
            return state.masks, state.nnz, state.method_state, False

        if isinstance(due, bool):
            return change() if due else keep()
        return jax.lax.cond(due, change, keep)

    def run_inner(grads, state, live, masks, grad_fn, extra_args):
        """One update of the wrapped optimizer, on masked gradients and with the state rule before and after."""
        inner_state, inner_grads = state.inner_state, grads
        if mask_grads:
            inner_state, inner_grads = mask_mirrored(masks, inner_state), masked(masks, grads)
            grad_fn = _masked_grad_fn(grad_fn, masks)
        extra_args |= {"masks": masks, "dense_grads": grads, "grad_fn": grad_fn}
        return inner.update(inner_grads, inner_state, masked(masks, live), **extra_args)

    def update_fn(updates, state, params=None, *, grad_fn=None, refresh_masks=None, **extra_args):
        if params is None:
            raise ValueError("sparsify needs params: call tx.update(grads, state, params).")
        check_same_leaves(updates, state.masks, "grads", "the masks")
        check_same_leaves(params, state.masks, "params", "the masks")
        live = masked(state.masks, params)
        due = _due(method, state, refresh_masks)
        masks, nnz, method_state, skip = new_masks(due, updates, state, live, grad_fn)

        if skip is True:
            steps, inner_state = jax.tree.map(jnp.zeros_like, updates), state.inner_state
        else:
            steps, inner_state = run_inner(updates, state, live, masks, grad_fn, extra_args)
        if isinstance(skip, jax.Array):
            steps = where(skip, jax.tree.map(jnp.zeros_like, steps), steps)
            inner_state = where(skip, state.inner_state, inner_state)
        if mask_grads:
            inner_state = mask_mirrored(masks, inner_state)

        step = increment(state.step)
        next_update = state.next_update if due is False else _next_update(method, when, step)
        new_state = SparseState(step, next_update, masks, nnz, state.key, method_state, inner_state)
        return jax.tree.map(_sparse_step, masks, state.masks, steps, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _unchanged(x: MaskInputs, state: Any) -> MaskUpdate:
    return MaskUpdate(x.masks, state)


def _sparse_step(mask: jax.Array, old_mask: jax.Array, step: jax.Array, param: jax.Array) -> jax.Array:
    """Lands pruned weights on exactly 0.0 and starts grown ones from it, even if ``param`` was never masked."""
    return jnp.where(mask, jnp.where(old_mask, step, step - param), -param)


def _masked_grad_fn(grad_fn: GradFn | None, masks: Masks) -> GradFn | None:
    return None if grad_fn is None else lambda params: masked(masks, grad_fn(params))


def _due(method: SparseMethod, state: SparseState, refresh: bool | jax.Array | None) -> bool | jax.Array:
    if method.update is None:
        return False
    return state.step == state.next_update if refresh is None else refresh


def _next_update(method: SparseMethod, when: Every | None, step: jax.Array) -> jax.Array:
    never = jnp.full((), NEVER, jnp.int32)
    return never if method.update is None or when is None else when.at_or_after(step)


def _distribution(distribution: str | Distribution) -> Distribution:
    if callable(distribution):
        return distribution
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"Unknown distribution {distribution!r}; use one of {sorted(DISTRIBUTIONS)} or a function.")
    return DISTRIBUTIONS[distribution]


def _check_method(method: SparseMethod, when: Every | None) -> None:
    if not isinstance(method, SparseMethod):
        raise TypeError(f"sparsify needs a SparseMethod, such as methods.rigl(); got {method!r}.")
    if method.update is not None and when is None:
        raise ValueError("This method changes its masks: pass when=Every(start, every, end), in calls of update.")


def _check_order(inner_state: Any) -> None:
    for kind, name in (
        (optax.MultiStepsState, "optax.MultiSteps"),
        (optax.ApplyIfFiniteState, "optax.apply_if_finite"),
        (S2SAMWrapperState, "s2sam_wrapper"),
        (SparseState, "sparsify"),
    ):
        if find_states(inner_state, kind):
            raise ValueError(
                f"sparsify({name}(...)) is the wrong way round: put {name} outside, {name}(sparsify(...))."
            )

"""Any optax optimizer, made sparse: masks in the state, exact zeros through plain ``optax.apply_updates``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_sparsity
from s2sam_jax._base.clock import NEVER, Every, tick
from s2sam_jax._base.masks import SparseState, count_masks, full_counts
from s2sam_jax._base.optax_wrappers import HOLDING_BACK, check_none_inside
from s2sam_jax._base.state_rule import mask_mirrored, start_mirrored
from s2sam_jax._base.structure import UNSTRUCTURED, Structure, check_structure
from s2sam_jax._base.tree import check_same_leaves, find_states, map_states, masked, own_key, where
from s2sam_jax._base.types import GradFn, MaskInputs, Masks, MaskUpdate, Params, SparseMethod
from s2sam_jax._sharpness.order import check_comes_first
from s2sam_jax._sharpness.s2sam import S2SAMState
from s2sam_jax._sharpness.s2sam_wrapper import S2SAMWrapperState
from s2sam_jax._sparsity import stacks
from s2sam_jax._sparsity.distributions import Distribution, DistributionName, Prunable, distribution_of, is_kernel
from s2sam_jax._sparsity.method_checks import check_alike, check_invariant, check_method, check_returned
from s2sam_jax._sparsity.units import fit_plan, structured


def sparsify(
    inner: optax.GradientTransformation,
    method: SparseMethod,
    *,
    sparsity: float,
    distribution: DistributionName | Distribution | None = None,
    when: Every | None = None,
    prunable: Prunable = is_kernel,
    overrides: Mapping[str, float] | None = None,
    structure: Structure = UNSTRUCTURED,
    stacked: stacks.Stacked | None = None,
    seed: int | jax.Array = 0,
    mask_grads: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes any optimizer sparse: a method chooses the masks, and this transformation keeps to them.

    .. math:: m \leftarrow \mathrm{method}(w, g, m), \quad u = \mathrm{inner}(m \odot g), \quad
              \text{update} = m\ ?\ u : -w

    After ``optax.apply_updates`` pruned weights are exactly 0.0, in any loop. One rule holds for the state of every
    optimizer: every floating-point leaf with the path and shape of a parameter (momentum, second moments, the last
    gradient) is zero where the mask is off, whenever ``inner`` is called. A newly grown weight gets the state that
    ``inner.init`` would give it, which is zero for nearly all optimizers. Everything that shapes the gradient goes
    inside::

        sparsify(optax.chain(s2sam(), optax.clip_by_global_norm(1.0), optax.sgd(0.1)), methods.rigl(), sparsity=0.9)

    ``optax.MultiSteps`` and ``optax.apply_if_finite`` go outside; behind it in a chain goes nothing, as it would change
    these updates. Call ``apply_masks(params, opt_state)`` once after ``init``.

    Args:
      inner: the optimizer.
      method: a mask-update method, e.g. ``methods.rigl()``.
      sparsity: fraction of zeros in ``[0, 1)``, over the prunable leaves.
      distribution: ``"uniform"``, ``"er"``, ``"erk"``, or a function with the signature of :func:`uniform`. By default
        ``"erk"``, but ``"uniform"`` for methods that rank all leaves together (there only the total matters, and which
        leaves stay dense) and under N:M (which allows no other).
      when: when masks change, counted in calls of update; required by methods that change their masks, unless they
        have a clock of their own.
      prunable: ``(path, leaf) -> bool``; by default floating-point leaves of two or more dimensions, except those named
        ``bias``, ``scale``, ``offset``, ``beta`` or ``gamma``, or ending in ``_bias`` or ``_scale`` (in any case).
      overrides: sparsity by path pattern, as in :func:`uniform`.
      structure: ``NM(n, m)`` keeps n of every m weights; ``Block(shape)`` and ``Channel()`` keep whole units, and
        sparsity then counts units. For methods that rank within leaves by magnitude.
      stacked: the axis on which leaves stack layers, by path pattern: ``{"layers/*": 0}`` for ``lax.scan``; a tuple of
        axes where there are several, as for the experts of each layer. Each layer is then a leaf of its own to
        ``distribution``, ``prunable``, ``overrides``, ``structure`` and ``method``. Its number stands before the last
        part of its path: ``"layers/mlp/3/kernel"``.
      seed: integer or PRNG key, possibly traced, for random masks and growth; that of ``TrainState.create`` does not
        change them.
      mask_grads: ``False`` passes the dense gradient to ``inner`` and lets its state be dense, as in the released
        S2-SAM code; weights are sparse all the same.

    Returns:
      A transformation whose ``update`` needs ``params``. It passes all extra arguments on to ``inner``, adds ``masks``
      and ``dense_grads``, and masks what ``grad_fn`` and ``second_grad_fn`` return. ``refresh_masks`` (a Python bool)
      says whether this call changes the masks, if the caller keeps the clock; if omitted, a ``lax.cond`` in ``jit``.

    Raises:
      ValueError: for a sparsity out of range or unreachable, an unknown distribution, a missing ``when``, an ``inner``
        that must go outside or has ``sam`` behind something else, leaves or a method that do not fit ``structure`` or
        ``stacked``, a leaf of 2**31 weights or more, an update without ``params``, or gradients or parameters with
        other leaves than the masks.
      TypeError: for a traced sparsity, or a ``method``, ``when``, ``structure`` or ``stacked`` of the wrong type.

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
    if isinstance(sparsity, jax.Array):  # which would be traced with the update
        sparsity = sparsity.dtype.type(sparsity)
    check_structure(structure)
    check_method(method)
    stacked = stacks.check_stacked(stacked)
    when = _clock(method, when)
    method = structured(method, structure)
    distribute = distribution_of(distribution, method.ranks, structure)

    def plan(params: Params) -> Any:
        layers = stacks.layers_of(params, stacked)
        return fit_plan(structure, layers, distribute(layers, sparsity, prunable=prunable, overrides=overrides))

    setup = _Setup(optax.with_extra_args_support(inner), method, plan, when, structure, stacked, seed, mask_grads)
    return optax.GradientTransformationExtraArgs(partial(_init, setup), partial(_update, setup))


class _Setup(NamedTuple):
    """What a sparse optimizer is made of."""

    inner: optax.GradientTransformationExtraArgs
    method: SparseMethod
    plan: Callable[[Params], Any]  # sparsity of each leaf, or layer of a stacked one
    when: Every | None  # None where masks never change
    structure: Structure
    stacked: stacks.Axes
    seed: int | jax.Array
    mask_grads: bool


def _init(setup: _Setup, params: Params) -> SparseState:
    key, step = own_key(setup.seed, "sparsify"), jnp.zeros((), jnp.int32)
    dense = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    inner_state = setup.inner.init(params)
    _check_order(inner_state)
    inputs = MaskInputs(
        params=params,
        masks=dense,
        sparsities=setup.plan(params),
        nnz=full_counts(params),
        step=step,
        key=jax.random.fold_in(key, NEVER),
        when=setup.when,
        inner_state=inner_state,
        structure=setup.structure,
    )
    inputs = stacks.inputs_in_layers(inputs, setup.stacked)
    new = stacks.update_in_leaves(check_returned(setup.method.init(inputs), inputs, "init"), params, setup.stacked)
    own = jax.tree.map(jnp.array, new.state)  # a copy: what it has of parameters or masks is donated together with them
    # The state rule applies from the first update on, as set_masks may revive other weights until then. Masking by
    # all-true masks gives the state the types that it will have.
    inner_state = mask_mirrored(dense, inner_state)
    first = jnp.full((), NEVER, jnp.int32) if setup.when is None else setup.when.at_or_after(0)
    return SparseState(step, first, new.masks, count_masks(new.masks), key, own, inner_state)


def _update(
    setup: _Setup,
    updates: Params,
    state: Any,
    params: Params | None = None,
    *,
    grad_fn: GradFn | None = None,
    refresh_masks: bool | jax.Array | None = None,
    **extra_args: Any,
) -> tuple[Params, SparseState]:
    if params is None:
        raise ValueError("sparsify needs params: call tx.update(grads, state, params).")
    check_same_leaves(grads := updates, state.masks, "grads", "the masks")
    check_same_leaves(params, state.masks, "params", "the masks")
    due, step, next_update = tick(setup.when, state, refresh_masks)
    new, nnz = _new_masks(setup, due, grads, state, params, grad_fn)
    weights = masked(state.masks, params) if new.values is None else new.values
    if new.restart is not None:
        weights = jax.tree.map(lambda r, w: jnp.where(r, jnp.zeros_like(w), w), new.restart, weights)
    inner_state = _ruled(setup, state, new, due, weights)

    steps = jax.tree.map(jnp.zeros_like, grads)
    skip = new.skip if isinstance(new.skip, jax.Array) else bool(new.skip)
    if skip is not True:
        moved = _inner_update(setup, grads, inner_state, weights, new.masks, grad_fn, extra_args)
        stayed = (steps, inner_state)
        steps, inner_state = where(skip, stayed, moved) if isinstance(skip, jax.Array) else moved

    new_state = SparseState(step, next_update, new.masks, nnz, state.key, new.state, inner_state)
    if due is not False:  # weights may be replaced, or grown where the caller's are not zero
        steps = jax.tree.map(lambda u, w, p: u + (w - p), steps, weights, params)
    return jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), new.masks, steps, params), new_state


def _new_masks(
    setup: _Setup, due: bool | jax.Array, grads: Params, state: SparseState, params: Params, grad_fn: GradFn | None
) -> tuple[MaskUpdate, jax.Array]:
    """The method's update at this step, and the ones per leaf of its masks."""
    if due is False or (update := setup.method.update) is None:
        return MaskUpdate(state.masks, state.method_state), state.nnz

    def change():
        live = masked(state.masks, params)  # in here, so that it costs nothing where nothing changes
        inputs = MaskInputs(
            params=live,
            masks=state.masks,
            sparsities=setup.plan(live),
            grads=grads,
            nnz=jax.tree.unflatten(jax.tree.structure(state.masks), list(state.nnz)),
            step=state.step,
            key=jax.random.fold_in(state.key, state.step),
            when=setup.when,
            grad_fn=grad_fn,
            inner_state=state.inner_state,
            structure=setup.structure,
        )
        inputs = stacks.inputs_in_layers(inputs, setup.stacked)
        own = stacks.state_in_layers(state.method_state, live, setup.stacked)
        new = check_returned(update(inputs, own), inputs, "update")
        check_alike("state", new.state, own)
        check_invariant(setup.method, inputs, new)
        new = stacks.update_in_leaves(new, state.masks, setup.stacked)
        return new, count_masks(new.masks)

    def keep():
        values = None if asked.values is None else masked(state.masks, params)
        inner_state = None if asked.inner_state is None else state.inner_state
        restart = None if asked.restart is None else jax.tree.map(jnp.zeros_like, state.masks)
        return MaskUpdate(state.masks, state.method_state, values, inner_state, restart, skip=False), state.nnz

    if due is True:
        return change()
    asked, _ = jax.eval_shape(change)  # which of the optional trees this method returns
    return jax.lax.cond(due, change, keep)


def _ruled(setup: _Setup, state: SparseState, new: MaskUpdate, due: bool | jax.Array, weights: Params) -> Any:
    """The state rule, before the inner update: after it, XLA would compute updates twice, masked and not.

    The old masks are applied first, so that optimizers that add noise accumulate no state for weights yet to grow.
    """
    inner_state = state.inner_state if new.inner_state is None else new.inner_state
    if setup.mask_grads and new.inner_state is None:
        inner_state = mask_mirrored(state.masks, inner_state)
    if due is False:
        return inner_state
    if not setup.mask_grads:  # the last gradient lives on the masks all the same, where no inner step renews it
        return map_states(lambda s: mask_mirrored(new.masks, s), inner_state, S2SAMState)
    if setup.method.invariant != "monotone":
        grown = jax.tree.map(lambda now, before: now & ~before, new.masks, state.masks)
        inner_state = start_mirrored(grown, inner_state, setup.inner.init(weights))
    return mask_mirrored(new.masks, inner_state)


def _inner_update(
    setup: _Setup,
    grads: Params,
    inner_state: Any,
    weights: Params,
    masks: Masks,
    grad_fn: GradFn | None,
    extra_args: dict[str, Any],
) -> tuple[Params, Any]:
    """One update of the wrapped optimizer, on masked gradients."""
    inner_grads = grads
    if setup.mask_grads:
        inner_grads, grad_fn = masked(masks, grads), _masked_grad_fn(grad_fn, masks)
        if (second := extra_args.get("second_grad_fn")) is not None:
            extra_args |= {"second_grad_fn": lambda point: masked(masks, second(lambda g: point(masked(masks, g))))}
    extra_args |= {"masks": masks, "dense_grads": grads, "grad_fn": grad_fn}
    return setup.inner.update(inner_grads, inner_state, masked(masks, weights), **extra_args)


def _masked_grad_fn(grad_fn: GradFn | None, masks: Masks) -> GradFn | None:
    return None if grad_fn is None else lambda params: masked(masks, grad_fn(params))


def _clock(method: SparseMethod, when: Every | None) -> Every | None:
    when = method.when if when is None else when
    if not isinstance(when, Every | None):
        raise TypeError(f"sparsify needs when=Every(start, every, end), in calls of update; got {when!r}.")
    if method.update is None:
        return None
    if when is None:
        raise ValueError("This method changes its masks: pass when=Every(start, every, end), in calls of update.")
    return when


def _check_order(inner_state: Any) -> None:
    if find_states(inner_state, SparseState):
        raise ValueError("sparsify(sparsify(...)): one is enough; masks of two methods would contradict each other.")
    check_comes_first(inner_state)
    check_none_inside(inner_state, (*HOLDING_BACK, (S2SAMWrapperState, "s2sam_wrapper")), "sparsify")

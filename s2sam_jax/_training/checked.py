"""Debugging: an optimizer that checks what it is given and what it promises, through ``jax.experimental.checkify``."""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify

from s2sam_jax._base.masks import SparseState, get_masks
from s2sam_jax._base.optax_wrappers import SKIPPING, Optimizer, check_state_of_tx, with_extra_args
from s2sam_jax._base.state_rule import Unmasked, mask_mirrored
from s2sam_jax._base.tree import at_least_f32, by_name, check_same_leaves, find_states, map_states, masked, norm, scalar
from s2sam_jax._base.types import GradFn, Params
from s2sam_jax._sharpness.order import check_order
from s2sam_jax._sharpness.perturb import perturb, perturbations, perturbing
from s2sam_jax._sharpness.s2sam import S2SAMState, last_gradient
from s2sam_jax._sparsity.mask_checks import Fault, not_finite, sparse_faults


def checked(tx: Optimizer) -> optax.GradientTransformationExtraArgs:
    r"""Debug mode: the same optimizer, with checks of what goes into every update and what comes out.

    Updates, state and checkpoints are those of ``tx``. The checks use ``checkify.check``, so the step must be
    functionalized; an error names every leaf at fault, how many of its entries are wrong, and what to do::

        step = checkify.checkify(jax.jit(make_train_step(loss_fn, checked(tx))))
        error, (state, metrics) = step(state, batch)
        error.throw()

    ``jax.jit(checkify.checkify(...))`` takes less time per call, but cannot be used for steps that mutate Flax NNX
    modules. Without ``checkify`` JAX refuses to compile ("Cannot abstractly evaluate a checkify.check which was not
    functionalized"); outside ``jit`` a fault is raised at once. The checks, in this order:

    * trees: gradient, parameters and state have the leaves, shapes and structure of ``tx.init(params)``;
    * what goes in: each mask has as many ones as at the last mask update; weights, and the last gradient of
      :func:`s2sam`, are exactly zero where pruned; parameters, state, loss (the extra argument ``value``) and the
      gradient of live weights are finite;
    * the length of the perturbation of :func:`s2sam` and :func:`msam`, with ``T = 1``, or ASAM's ``T = |w| + eta`` (not
      for ``compat="authors"``):

      .. math:: \|\epsilon / T\|_2 = \rho\, \|T g\|_2 / (\|T g\|_2 + \mathrm{eps});

    * where the gradient was taken: if the state perturbs and ``grad_fn`` is among the extra arguments, the gradient
      must be that at ``perturb(params, opt_state)``, each leaf up to the global norm times the square root of its
      dtype's precision. This costs one gradient per step; ``grad_fn`` must use the same batch and random numbers;
    * what comes out: masks, weights and the last gradient as above, and a finite update; what :func:`s2sam` remembers
      has the direction of the gradient, which decay or clipping before it would change; and no optimizer state went in
      off the masks, unless updates leave some there themselves (Adamax's epsilon, ``mask_grads=False``).

    All other checks cost a few passes over parameters and state. A loss or gradient that is not finite is not reported
    if ``tx`` contains ``optax.apply_if_finite``, which handles it; otherwise ``make_train_step`` still freezes at it,
    unless ``freeze=False``.

    Args:
      tx: the whole optimizer, including any :func:`sparsify`.

    Returns:
      A transformation with the ``init`` of ``tx``. Its ``update`` needs ``params`` and forwards all extra arguments.

    Raises:
      ValueError: from the update, while it is traced: for missing parameters, trees that do not fit, and ``sam`` or a
        variant behind something in its chain.
      jax.experimental.checkify.JaxRuntimeError: from ``error.throw()``, or the update outside ``jit``: for all else.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.experimental import checkify
      >>> from s2sam_jax import checked, methods, sparsify
      >>> tx = checked(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.75))
      >>> params = {"kernel": jnp.ones((2, 2))}  # apply_masks(params, state) was forgotten
      >>> error, _ = jax.jit(checkify.checkify(tx.update))(params, tx.init(params), params)
      >>> print(error.get().split(";")[0])
      checked found before the update:
        kernel: 3 pruned weights are not zero
    """
    optimizer = with_extra_args(tx)

    def update_fn(updates, state, params=None, **extra_args):
        params = _fitting(tx, updates, state, params)
        _check("before the update", _before(updates, state, params, extra_args.get("value")))
        _check("a perturbation of another length than rho says", _lengths(state, params), _close)
        if perturbing(state) and (grad_fn := extra_args.get("grad_fn")) is not None:
            wrong_point = "a gradient that was not taken at perturb(params, opt_state), or a grad_fn of another batch"
            _check(wrong_point, _deviations(updates, state, params, grad_fn), operator.le)
        steps, new_state = optimizer.update(updates, state, params, **extra_args)
        due = _due(state, extra_args.get("refresh_masks"))
        _check("after the update", _after(steps, new_state, params))
        _check("an s2sam that does not come first", _remembered(updates, state, new_state, params), operator.le)
        _check("state that no update leaves", _left_over(state, new_state, due))
        return steps, new_state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _fitting(tx: Optimizer, grads: Params, state: Any, params: Params | None) -> Params:
    """The parameters, after a look at the structure of everything."""
    if params is None:
        raise ValueError("checked needs params: call tx.update(grads, state, params).")
    check_same_leaves(grads, params, "grads", "params")
    expected = jax.eval_shape(tx.init, params)
    check_same_leaves(state, expected, "opt_state", "tx.init(params)")
    check_state_of_tx(state, expected, "tx.init(params)")
    check_order(expected)
    return params


def _before(grads: Params, opt_state: Any, params: Params, loss: jax.Array | None) -> Iterator[Fault]:
    sparse, weights = find_states(opt_state, SparseState), by_name(params)
    for state in sparse:
        yield from sparse_faults(weights, state)
    pruned = {path for state in sparse for path in by_name(state.masks)}
    yield from _finite({path: x for path, x in weights.items() if path not in pruned}, "weights")
    if not find_states(opt_state, optax.ApplyIfFiniteState):
        yield from _finite(_live(grads, opt_state, params), "entries of the gradient")
        if loss is not None:
            yield Fault("loss", "not finite", jnp.sum(~jnp.isfinite(loss)), 0)
    yield from _finite_state(opt_state)


def _after(steps: Params, opt_state: Any, params: Params) -> Iterator[Fault]:
    weights = by_name(optax.apply_updates(params, steps))
    for state in find_states(opt_state, SparseState):
        yield from sparse_faults(
            weights, state, advice="an update has brought them back; change no updates outside of sparsify()"
        )
    yield from _finite(by_name(steps), "entries of the update")
    yield Fault("update", "its norm is not finite", jnp.sum(~jnp.isfinite(norm(steps))), 0)


def _finite(leaves: dict[str, jax.Array], what: str) -> Iterator[Fault]:
    for path, x in leaves.items():
        yield not_finite(path, x, what)


def _finite_state(opt_state: Any) -> Iterator[Fault]:
    """Only arrays: a scalar may start at infinity, as the best loss so far does."""
    leaves = by_name(opt_state).items()
    arrays = {f"opt_state/{path}": x for path, x in leaves if x.ndim and jnp.issubdtype(x.dtype, jnp.inexact)}
    yield from _finite(arrays, "entries")


def _live(grads: Params, opt_state: Any, params: Params) -> dict[str, jax.Array]:
    """Without what is behind a mask, where a gradient may be anything."""
    sparse = find_states(opt_state, SparseState)
    return by_name(masked(get_masks(opt_state, params), grads) if sparse else grads)


def _lengths(opt_state: Any, params: Params) -> Iterator[Fault]:
    weights = by_name(params)
    for state, directions, epsilon in perturbations(weights, opt_state):
        if isinstance(state, S2SAMState) and state.norm is not None:
            continue
        scales = {path: jnp.ones(()) for path in directions}
        if isinstance(state, S2SAMState) and state.eta is not None:
            scales = {path: jnp.abs(at_least_f32(weights[path])) + scalar(state.eta) for path in directions}
        scaled = [scales[path] * at_least_f32(g) for path, g in directions.items()]
        direction = _long_norm(scaled)
        length = _long_norm([e / jnp.where(scales[path] > 0, scales[path], 1.0) for path, e in epsilon.items()])
        wanted = scalar(state.rho) * direction / jnp.where(norm(scaled) == 0, 1, direction + scalar(state.eps))
        name = f"{type(state).__name__} of {', '.join(directions)}"
        text = "its perturbation has norm {}, not {}; rho has to be a number >= 0, and the last gradient in range"
        yield Fault(name, text, length, wanted)


def _close(length: jax.Array, wanted: jax.Array) -> jax.Array:
    return jnp.abs(length - wanted) <= 1e-3 * jnp.abs(wanted) + 1e-12


def _long_norm(arrays: list[jax.Array]) -> jax.Array:
    """A norm that neither overflows nor underflows."""
    largest = jnp.max(jnp.array([jnp.max(jnp.abs(x), initial=0.0) for x in arrays]), initial=0.0)
    largest = jnp.where(largest > 0, largest, 1.0)
    return largest * norm([x / largest for x in arrays])


def _deviations(grads: Params, opt_state: Any, params: Params, grad_fn: GradFn) -> Iterator[Fault]:
    """How far each leaf is from the gradient where it belongs, and how far rounding may take it."""
    expected = _live(grad_fn(perturb(params, opt_state)), opt_state, params)
    length = norm(expected)
    text = "differs by {}, where rounding explains {}; take the gradient at perturb(params, opt_state)"
    for path, grad in _live(grads, opt_state, params).items():
        deviation = norm(at_least_f32(grad) - at_least_f32(expected[path]))
        yield Fault(path, text, deviation, length * float(jnp.finfo(grad.dtype).eps) ** 0.5)


def _remembered(grads: Params, before: Any, opt_state: Any, params: Params) -> Iterator[Fault]:
    """By how much the direction that s2sam has stored differs from that of the gradient.

    Changes of the gradient before s2sam, such as decay, show nowhere else. Calls that change masks may skip s2sam,
    whose step then stands still, or is that of an earlier call.
    """
    if find_states(opt_state, SKIPPING):
        return
    text = "s2sam has remembered a direction that differs by {}, where rounding explains {}; put it first in its chain"
    for last, state in zip(find_states(before, S2SAMState), find_states(opt_state, S2SAMState), strict=True):
        skipped = scalar(state.step) != scalar(last.step) + 1
        stored = by_name(last_gradient(state))
        given = by_name(grads) if isinstance(state.last_grad, Unmasked) else _live(grads, opt_state, params)
        given = {path: given[path] for path in stored}
        lengths = [jnp.where((length := norm(tree)) > 0, length, 1.0) for tree in (stored, given)]
        for path, x in stored.items():
            deviation = norm(at_least_f32(x) / lengths[0] - at_least_f32(given[path]) / lengths[1])
            yield Fault(path, text, jnp.where(skipped, 0, deviation), float(jnp.finfo(x.dtype).eps) ** 0.5)


def _due(before: Any, refresh: bool | None) -> jax.Array:
    """Whether this call changes masks."""
    sparse = find_states(before, SparseState)
    return jnp.array([s.step >= s.next_update if refresh is None else refresh for s in sparse], bool).any()


def _left_over(before: Any, after: Any, due: jax.Array) -> Iterator[Fault]:
    """State off the masks that has not come from an update.

    Some optimizers, and ``mask_grads=False``, leave something there at every update. But what is there before an update
    and not after it was zeroed by ``sparsify``, so came from elsewhere, unless the masks have changed in between.
    """
    # What init leaves there is masked at the first call.
    due |= jnp.array([s.step == 0 for s in find_states(before, SparseState)], bool).any()
    text = "{} entries of pruned weights were not zero; restore the whole state, or set_masks(opt_state, masks)"
    left = _off_masks(after)
    for name, number in _off_masks(before).items():
        yield Fault(f"opt_state/{name}", text, jnp.where(due | (left[name] > 0), 0, number), 0)


def _off_masks(opt_state: Any) -> dict[str, jax.Array]:
    """The number of non-zero entries off the mask, for every state leaf that the state rule covers."""
    ruled = map_states(lambda s: s._replace(inner_state=mask_mirrored(s.masks, s.inner_state)), opt_state, SparseState)
    pairs = zip(by_name(opt_state).items(), jax.tree.leaves(ruled), strict=True)
    return {path: jnp.sum((x != 0) & (zeroed == 0)) for (path, x), zeroed in pairs if x is not zeroed}


def _check(found: str, faults: Iterable[Fault], equal: Callable[[Any, Any], Any] = operator.eq) -> None:
    """A single check for all faults, as each check would be compiled by itself."""
    faults = list(faults)
    if not faults:
        return
    values = jnp.stack([fault.value for fault in faults])
    wanted = jnp.stack([jnp.asarray(fault.wanted) for fault in faults])
    fits = equal(values, wanted)
    lines = _Lines("\n".join([f"checked found {found}:", *(fault.line for fault in faults)]))
    checkify.check(jnp.all(fits), lines, fits, values, wanted)


class _Lines(str):
    """The text of a failed check: when ``checkify`` formats it, only the lines at fault remain."""

    def format(self, *args: Any, **kwargs: Any) -> str:
        del kwargs
        header, *lines = self.split("\n")
        rows = zip(lines, *map(np.asarray, args), strict=True)
        return "\n  ".join([header, *(line.format(*numbers) for line, fits, *numbers in rows if not fits)])

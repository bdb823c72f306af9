"""Metrics of a perturbation: its norm, how far it raises the loss, and what low precision leaves of it."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from s2sam_jax._base.masks import SparseState, get_masks
from s2sam_jax._base.state_rule import Unmasked
from s2sam_jax._base.tree import at_least_f32, by_name, check_real, check_same_leaves, find_states, norm
from s2sam_jax._base.types import Params
from s2sam_jax._sharpness.perturb import perturb, perturbing
from s2sam_jax._sharpness.rounding import FORMATS, check_format, round_to_nearest
from s2sam_jax._sharpness.s2sam import S2SAMState, last_gradient


def sharpness_metrics(
    params: Params,
    opt_state: Any,
    grads: Params | None = None,
    *,
    loss_fn: Callable[[Params], jax.Array] | None = None,
    compute_dtype: DTypeLike | None = None,
    perturbed: Params | None = None,
) -> dict[str, jax.Array]:
    r"""Measures the perturbation of this step, and what low precision leaves of it.

    With :math:`\epsilon` from :func:`perturb`, and :math:`c` the rounding (to nearest) of weights to the format that
    matrix products are computed in:

    .. math:: \mathrm{kept} = \frac{\|c(w + \epsilon) - c(w)\|}{\|\epsilon\|}, \qquad
              \mathrm{cosine} = \cos(c(w + \epsilon) - c(w),\; \epsilon)

    The norm of :math:`\epsilon` is ``rho``, except for :func:`esam`, the mask of :func:`ssam` and the adaptive forms. A
    kept norm of 1 alone says little: rounding that leaves most weights where they were and moves a few by a whole
    spacing can also give it, so read the cosine. Call it between the gradient and ``tx.update``. Norms and cosines are
    computed in float32 or wider, also for bfloat16 parameters.

    Args:
      params: the clean parameters (with :func:`s2sam_wrapper`: ``eval_params(params, opt_state)``).
      opt_state: the optimizer state, or a train state around it.
      grads: gradient of this step, to get its cosine with the last one.
      loss_fn: ``params -> loss[]`` on the current batch; costs two more forward passes.
      compute_dtype: bfloat16, float16 or float32, or ``"tensorfloat32"`` (in which recent GPUs multiply float32 by
        default).
      perturbed: the perturbed parameters, where :func:`perturb` cannot compute them: for ``sam`` and its variants,
        whose ascent is inside their update, or the loop's own parameters under :func:`s2sam_wrapper`.

    Returns:
      Device scalars: ``epsilon_norm``; with ``grads``, ``cosine_last_gradient`` (over the leaves whose gradient is
      remembered, and only over live weights if it is masked); with ``loss_fn``, ``loss_increase``,
      :math:`L(w + \epsilon) - L(w)`; with ``compute_dtype``, ``epsilon_kept`` and ``epsilon_cosine``. Ratios with a
      zero denominator are 0, as at S2-SAM's first step.

    Raises:
      ValueError: for an unknown ``compute_dtype``, ``grads`` or ``perturbed`` that do not fit, ``grads`` if no state
        remembers the last gradient, and whenever :func:`perturb` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax import s2sam, sharpness_metrics
      >>> tx, params, loss = s2sam(rho=0.01), jnp.array([3.0, 4.0]), lambda w: 0.5 * jnp.sum(w**2)
      >>> _, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
      >>> metrics = sharpness_metrics(params, state, jnp.array([4.0, 3.0]), loss_fn=loss, compute_dtype="bfloat16")
      >>> for name, value in metrics.items():  # epsilon is [0.006, 0.008]; bfloat16 has steps of 1/64 and 1/32 there
      ...     print(f"{name} {value:.3f}")
      epsilon_norm 0.010
      cosine_last_gradient 0.960
      loss_increase 0.050
      epsilon_kept 0.000
      epsilon_cosine 0.000
    """
    compute_format = None if compute_dtype is None else check_format(compute_dtype, FORMATS, "compute_dtype")
    clean = jax.tree.map(at_least_f32, params)
    if perturbed is None:
        if not perturbing(opt_state):
            raise ValueError(
                "sharpness_metrics found no state of s2sam() or msam() in opt_state, which would say where the "
                "gradient is taken. For sam and its variants, and under s2sam_wrapper, give perturbed=."
            )
        point = perturb(clean, opt_state)
    else:
        check_same_leaves(perturbed, params, "perturbed", "params")
        point = jax.tree.map(at_least_f32, perturbed)
    epsilon = jax.tree.map(jnp.subtract, point, clean)
    metrics = {"epsilon_norm": norm(epsilon)}
    if grads is not None:
        metrics["cosine_last_gradient"] = _cosine_last_gradient(grads, params, opt_state)
    if loss_fn is not None:
        stored = jax.tree.map(lambda p, q: q.astype(p.dtype), params, point)
        metrics["loss_increase"] = loss_fn(stored) - loss_fn(params)
    if compute_format is not None:
        check_real(params, "sharpness_metrics(compute_dtype=...)")
        kept = jax.tree.map(lambda p, q: _rounded(q, compute_format) - _rounded(p, compute_format), clean, point)
        metrics["epsilon_kept"] = _ratio(norm(kept), metrics["epsilon_norm"])
        metrics["epsilon_cosine"] = _cosine(jax.tree.leaves(kept), jax.tree.leaves(epsilon))
    return metrics


def warn_if_perturbation_lost(metrics: Mapping[str, Any], threshold: float = 0.9) -> None:
    """Warns if low precision removes the perturbation. Runs on the host and waits for the device: call it rarely.

    Args:
      metrics: from :func:`sharpness_metrics`, after S2-SAM's first step, whose perturbation is zero by definition.
      threshold: the perturbation counts as lost if ``epsilon_cosine`` is below it.

    Warns:
      UserWarning: if the perturbation is zero or not finite, or ``epsilon_cosine`` is below the threshold or NaN.

    Example:
      >>> from s2sam_jax import warn_if_perturbation_lost
      >>> warn_if_perturbation_lost({"epsilon_norm": 0.05, "epsilon_cosine": 0.98})
    """
    length, cosine = float(metrics["epsilon_norm"]), float(metrics.get("epsilon_cosine", math.inf))
    if not math.isfinite(length):
        message = (
            f"The perturbation is not finite: its norm is {length}, as where the gradient it follows was not finite. "
            "first_bad_step of make_train_step tells the step, and checked(tx) the leaf."
        )
    elif length == 0:
        message = (
            "Sharpness-aware training is off: the perturbation is exactly zero. Past the first step rho must be above "
            "0, and parameters precise enough to hold w + epsilon."
        )
    elif not cosine >= threshold:
        message = (
            "Low precision takes the perturbation away: the cosine of what is left with epsilon is "
            f"{cosine:.2f}, below {threshold:g}. Compute in float32 with jax_default_matmul_precision='highest', "
            "or raise rho."
        )
    else:
        return
    warnings.warn(message, stacklevel=2)


def _rounded(x: jax.Array, dtype: str) -> jax.Array:
    """The rounded value, in the precision of ``x``."""
    return round_to_nearest(x, dtype).astype(x.dtype)


def _cosine_last_gradient(grads: Params, params: Params, opt_state: Any) -> jax.Array:
    """Over the leaves that the states of s2sam claim."""
    states = find_states(opt_state, S2SAMState)
    if not states:
        raise ValueError(
            "sharpness_metrics compares grads with the last ones, which s2sam() remembers, and opt_state has no "
            "S2SAMState. Leave grads out."
        )
    given, masks, pairs = by_name(grads), {}, []
    if find_states(opt_state, SparseState):
        masks = by_name(get_masks(opt_state, params))
    for state in states:
        dense = isinstance(state.last_grad, Unmasked)
        for path, last in by_name(last_gradient(state)).items():
            if path not in given or jnp.shape(given[path]) != jnp.shape(last):
                raise ValueError(f"sharpness_metrics: grads lack the leaf {path}{jnp.shape(last)}.")
            live = dense or masks.get(path, True)
            pairs.append((jnp.where(live, given[path], 0), last))
    return _cosine(*zip(*pairs, strict=True))


def _cosine(a: Any, b: Any) -> jax.Array:
    """Between two sequences of arrays, each taken as one vector."""
    pairs = [(at_least_f32(x), at_least_f32(y)) for x, y in zip(a, b, strict=True)]
    product = sum((jnp.real(jnp.sum(x * jnp.conj(y))) for x, y in pairs), jnp.zeros((), jnp.float32))
    return _ratio(product, norm(list(a)) * norm(list(b)))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))

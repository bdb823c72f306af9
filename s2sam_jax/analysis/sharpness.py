"""How sharp a solution is along the steps that sharpness-aware methods take."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.arguments import check_non_negative
from s2sam_jax._base.tree import at_least_f32, check_real, check_same_leaves, masked, norm
from s2sam_jax._base.types import BatchLoss, Masks, Params
from s2sam_jax._sharpness.ascent import add, ascent
from s2sam_jax.analysis._batches import listed


def gradient_difference_ratio(grads: Params, sam_grads: Params, *, masks: Masks | None = None) -> Params:
    r"""How much SAM changes each coordinate of the gradient.

    .. math:: r_j = \ln \left| \frac{g^{SAM}_j - g_j}{g_j} \right|

    Below 0 the difference is smaller than the gradient itself. That this holds for most coordinates is the starting
    point of Sparse SAM.

    Args:
      grads: gradient at the weights.
      sam_grads: gradient at the perturbed weights, on the same batch.
      masks: if given, pruned coordinates are NaN.

    Returns:
      A tree like ``grads``: NaN where the gradient is zero, ``-inf`` where both are equal.

    Raises:
      ValueError: for trees that do not match.

    Reference:
      Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022,
      figure 1. The base of the logarithm is not given there; here it is natural.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax.analysis import gradient_difference_ratio
      >>> print(gradient_difference_ratio(jnp.array([1.0, 2.0, 0.0]), jnp.array([2.0, 2.0, 1.0])))
      [  0. -inf  nan]
    """
    check_same_leaves(sam_grads, grads, "sam_grads", "grads")

    def ratio(g, other):
        return jnp.where(g == 0, jnp.nan, jnp.log(jnp.abs((other - g) / jnp.where(g == 0, 1, g))))

    ratios = jax.tree.map(ratio, grads, sam_grads)
    if masks is None:
        return ratios
    check_same_leaves(masks, grads, "masks", "grads")
    return jax.tree.map(lambda m, r: jnp.where(m, r, jnp.nan), masks, ratios)


def sam_sharpness(
    loss_fn: BatchLoss,
    params: Params,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    steps: int = 1,
    masks: Masks | None = None,
) -> float:
    r"""How far the loss rises within a radius, as found by gradient ascent.

    .. math:: \max_{\|\epsilon\| \le \rho} L(w + \epsilon) - L(w)

    One step is SAM's own ascent, :math:`\epsilon = \rho\, g / \|g\|`. Further steps follow the gradient at the point
    reached, each by a third of the radius, and back onto the sphere if outside it; the highest loss seen counts.

    Args:
      loss_fn: ``(params, batch) -> loss[]``, in evaluation mode.
      params: the solution; numbers narrower than float32 are widened first.
      batches: the data, in batches of equal size; the loss is their mean.
      rho: radius, L2 over all leaves.
      steps: ascent steps.
      masks: if given, only live weights are perturbed.

    Returns:
      A float, at least 0.

    Raises:
      ValueError: for masks that do not fit, no batches, a negative ``rho``, or ``steps`` below 1.
      FloatingPointError: if the loss, or a gradient on the way, is not finite.

    Reference:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, equation 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax.analysis import sam_sharpness
      >>> sam_sharpness(lambda w, batch: jnp.sum(w**2), jnp.array([3.0, 4.0]), [None], rho=1.0)
      11.0
    """
    check_non_negative(rho, "rho")
    rho, batches = float(rho), listed(batches, "sam_sharpness")
    if steps < 1 or not batches:
        raise ValueError(f"sam_sharpness needs steps >= 1 and batches; got {steps} and {len(batches)} batches.")
    if masks is not None:
        check_same_leaves(masks, params, "masks", "params")
    check_real(params, "sam_sharpness")
    params = jax.tree.map(at_least_f32, params)  # a small perturbation would be lost in bfloat16

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))

    def at(point):
        losses, grads = zip(*(value_and_grad(point, batch) for batch in batches), strict=True)
        mean = jax.tree.map(lambda *g: sum(g) / len(batches), *grads)
        loss = _finite("loss", np.mean(np.asarray(losses, np.float64)), rho)  # float32 sums would hide a small rise
        return loss, mean if masks is None else masked(masks, mean)

    (base, grads), epsilon = at(params), jax.tree.map(jnp.zeros_like, params)
    highest = base
    for step in range(steps):
        _finite("gradient's norm", norm(grads), rho)
        epsilon = _ascend(epsilon, grads, rho=rho, length=rho if step == 0 else rho / 3)
        loss, grads = at(jax.tree.map(add, params, epsilon))
        highest = max(highest, loss)
    return highest - base


def _finite(name: str, value: Any, rho: float) -> float:
    """The value as a float; NaN would look like no sharpness at all, as it is above nothing."""
    if not math.isfinite(found := float(value)):
        raise FloatingPointError(
            f"sam_sharpness needs a loss and gradients that are finite within rho={rho:g}; the {name} is {found}. "
            "Look at the loss at the solution itself, or take a smaller rho."
        )
    return found


@jax.jit
def _ascend(epsilon: Params, grads: Params, *, rho: float, length: float) -> Params:
    """A step of that length along the gradient, and back onto the sphere if it ends outside."""
    leaves, treedef = jax.tree.flatten(grads)
    step = treedef.unflatten(ascent(leaves, rho=length, eps=1e-12))
    moved = jax.tree.map(jnp.add, epsilon, step)
    shrink = jnp.minimum(1.0, rho / jnp.maximum(norm(moved), 1e-12))
    return jax.tree.map(lambda e: shrink * e, moved)

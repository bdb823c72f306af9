"""GraSP: prune before training, keeping what carries the gradient flow."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from s2sam_jax._base.clock import Every
from s2sam_jax._base.optax_wrappers import check_nothing_hidden
from s2sam_jax._base.types import GradFn, MaskInputs, MaskUpdate, Params, SparseMethod
from s2sam_jax._sparsity.plan import global_count
from s2sam_jax._sparsity.pruning import dense_init, keep_largest, one_shot_skip, saliency, summed


def grasp(*, keep_at_least: int = 0) -> SparseMethod:
    r"""Prunes once, on the first batch, so that the gradient norm after pruning is preserved.

    .. math:: m = \mathrm{top}_\kappa\big(w \odot H g\big)

    that is, the weights of largest :math:`-w \odot Hg` are pruned. ``Hg`` is computed forward over reverse, at about
    the cost of two gradients. The call that makes the mask takes no gradient step: survivors keep their initial value,
    and their optimizer state is untouched; pruned weights stay zero, without state. This form uses one batch
    and the loss's own temperature; for the paper's form (several batches, logits divided by 200), use
    :func:`grasp_scores` and :func:`masks_from_scores` with ``set_masks`` and ``methods.static``.

    Args:
      keep_at_least: number of weights that each leaf keeps regardless of their scores; at 0 whole layers can vanish
        (:func:`~s2sam_jax.warn_if_collapsed` names them).

    Returns:
      A method with its own clock, which fires at the first call of ``update``; that call needs ``grad_fn``.

    Raises:
      ValueError: for a negative ``keep_at_least``.
      TypeError: from ``update`` without ``grad_fn``.

    Reference:
      Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, Algorithm 1. Its
      code removes one weight fewer, by its threshold, re-initialises the last layer for scoring, and takes g and H over
      the kernels alone; none of that is done here: H g is over all parameters, including those that stay dense.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import methods, sparsify
      >>> hessian = jnp.array([[2, -1, 0], [-1, 1, 0.5], [0, 0.5, 3]])
      >>> grad_fn = jax.grad(lambda w: 0.5 * w @ hessian @ w + jnp.dot(jnp.array([0.5, -1, 1]), w))
      >>> tx = sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.34, prunable=lambda path, leaf: True)
      >>> params = jnp.array([1.0, 2.0, -1.0])
      >>> _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(state.masks)
      [ True False  True]
    """
    if keep_at_least < 0:
        raise ValueError(f"grasp needs keep_at_least >= 0; got {keep_at_least}.")

    def update(x: MaskInputs, state: Any) -> MaskUpdate:
        if x.grad_fn is None:
            raise TypeError(
                "grasp needs grad_fn for its Hessian product: tx.update(grads, state, params, grad_fn=grad_fn)."
            )
        check_nothing_hidden(x.params, "grasp", "sparsify(prunable=...) keeps leaves dense.")
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), x.grads, x.params)
        scores = jax.tree.map(saliency, x.params, _hvp(x.grad_fn, x.params, grads))
        masks = keep_largest(x, scores, global_count(x), keep_at_least)
        return MaskUpdate(masks, state, skip=one_shot_skip(x, masks))

    return SparseMethod(dense_init, update, "monotone", ranks="global", when=Every(0, 1, 0))


def grasp_scores(
    logits_fn: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Iterable[tuple[Any, jax.Array]],
    *,
    temperature: float = 200.0,
) -> Params:
    r"""GraSP's scores over several batches, signed so that the largest are kept.

    .. math:: g = \sum_b \nabla L_b, \qquad s = w \odot \sum_b H_b\, g, \qquad
              L_b = \mathrm{mean\ cross\ entropy}(\mathrm{logits} / T)

    All gradients are summed before the Hessian product.

    Args:
      logits_fn: ``(params, inputs) -> logits[batch, classes]``.
      params: the initial weights.
      batches: pairs of inputs and integer labels, all held at once, as they are iterated over twice.
      temperature: T, which divides the logits.

    Returns:
      A tree like ``params``, in float32 or wider; keep the largest.

    Raises:
      ValueError: if there is no batch, or the temperature is not positive.

    Reference:
      Wang et al., ICLR 2020, Algorithm 1, with ``S = -s``.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import methods
      >>> batches = [(jnp.eye(2), jnp.array([0, 1]))]
      >>> methods.grasp_scores(lambda w, x: x @ w, jnp.eye(2), batches).shape
      (2, 2)
    """
    batches = list(batches)
    if not batches:
        raise ValueError("grasp_scores needs at least one batch; got none.")
    if temperature <= 0:
        raise ValueError(f"grasp_scores needs temperature > 0; got {temperature}.")

    def loss_fn(params, inputs, labels):
        logits = logits_fn(params, inputs) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(jax.grad(loss_fn))
    product = jax.jit(lambda p, g, inputs, labels: _hvp(lambda q: jax.grad(loss_fn)(q, inputs, labels), p, g))
    grads = optax.tree.cast_like(summed(gradient(params, *batch) for batch in batches), params)
    return jax.tree.map(saliency, params, summed(product(params, grads, *batch) for batch in batches))


def _hvp(grad_fn: GradFn, params: Params, vector: Params) -> Params:
    return jax.jvp(grad_fn, (params,), (vector,))[1]

"""SNIP: prune before training, by how sensitive the loss is to each connection."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.clock import Every
from s2sam_jax._base.types import MaskInputs, MaskUpdate, Params, SparseMethod
from s2sam_jax._sparsity.plan import global_count
from s2sam_jax._sparsity.pruning import dense_init, keep_largest, one_shot_skip, saliency, summed


def snip(*, keep_at_least: int = 0) -> SparseMethod:
    r"""Prunes once, on the first batch, by connection sensitivity ranked over all leaves.

    .. math:: s_j = |w_j\, \partial L / \partial w_j|, \qquad m = \mathrm{top}_\kappa(s)

    The call that makes the mask takes no gradient step: survivors keep their initial value, and their optimizer state
    is untouched; pruned weights stay zero, without state. For scores over several batches use
    :func:`snip_scores` and :func:`masks_from_scores` with ``set_masks`` and ``methods.static``.

    Args:
      keep_at_least: number of weights that each leaf keeps regardless of their scores; at 0, as in the paper, whole
        layers can vanish (:func:`~s2sam_jax.warn_if_collapsed` names them).

    Returns:
      A method with its own clock, which fires at the first call of ``update``.

    Raises:
      ValueError: for a negative ``keep_at_least``.

    Reference:
      Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019, Algorithm 1. Its code
      ranks biases too, and scores a different initialisation from the one it trains; neither is done here.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.snip(), sparsity=0.6, prunable=lambda path, leaf: True)
      >>> params, grads = jnp.array([0.5, -1, 0.2, 2, -0.1]), jnp.array([1, 0.3, -4, 0.05, 2])
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> print(state.masks)
      [ True False  True False False]
    """
    if keep_at_least < 0:
        raise ValueError(f"snip needs keep_at_least >= 0; got {keep_at_least}.")

    def update(x: MaskInputs, state: Any) -> MaskUpdate:
        scores = jax.tree.map(lambda w, g: jnp.abs(saliency(w, g)), x.params, x.grads)
        masks = keep_largest(x, scores, global_count(x), keep_at_least)
        return MaskUpdate(masks, state, skip=one_shot_skip(x, masks))

    return SparseMethod(dense_init, update, "monotone", ranks="global", when=Every(0, 1, 0))


def snip_scores(loss_fn: Callable[[Params, Any], jax.Array], params: Params, batches: Iterable[Any]) -> Params:
    r"""Connection sensitivity over several batches.

    .. math:: s_j = |w_j \sum_b \partial L_b / \partial w_j|

    Args:
      loss_fn: ``(params, batch) -> loss[]``.
      params: the initial weights.
      batches: any number of batches.

    Returns:
      A tree like ``params``, in float32 or wider; keep the largest.

    Raises:
      ValueError: if there is no batch.

    Reference:
      Lee et al., ICLR 2019, Eq. (4), up to its normalisation, which does not change the ranking.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import methods
      >>> print(methods.snip_scores(lambda w, x: jnp.dot(w, x), jnp.array([0.5, -2.0]), [jnp.array([4.0, 3.0])]))
      [2. 6.]
    """
    grad_fn = jax.jit(jax.grad(loss_fn))
    total = summed(grad_fn(params, batch) for batch in batches)
    if total is None:
        raise ValueError("snip_scores needs at least one batch; got none.")
    return jax.tree.map(lambda w, g: jnp.abs(saliency(w, g)), params, total)

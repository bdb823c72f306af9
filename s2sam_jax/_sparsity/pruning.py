"""The building blocks of methods that rank all leaves together."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.select import keep_best
from s2sam_jax._base.tree import at_least_f32
from s2sam_jax._base.types import MaskInputs, Masks, MaskUpdate
from s2sam_jax._sparsity.distributions import Prunable, is_kernel, same_everywhere
from s2sam_jax._sparsity.plan import global_count, replace_sparse, sparse_leaves


def dense_init(x: MaskInputs) -> MaskUpdate:
    """All true, and no state."""
    return MaskUpdate(x.masks)


def keep_largest(x: MaskInputs, scores: Any, count: int | jax.Array, keep_at_least: int = 0) -> Masks:
    """Keeps ``count`` live weights of the sparse leaves, ranked together; dense leaves stay as they are.

    With ``keep_at_least``, that many of each leaf (or all it has) are kept first.
    """
    ranked, live = sparse_leaves(x, scores), sparse_leaves(x, x.masks)
    if not ranked:
        return x.masks
    at_least = [min(keep_at_least, s.size) for s in ranked]
    return replace_sparse(x, x.masks, keep_best(ranked, count, at_least, live))


def saliency(weight: jax.Array, slope: jax.Array) -> jax.Array:
    """The product in float32 or wider: in float16 products underflow, and the ties would go by position."""
    return at_least_f32(weight) * at_least_f32(slope)


def summed(trees: Iterable[Any]) -> Any:
    """The sum, in float32 or wider: in bfloat16 it would swallow many small trees. ``None`` if there are no trees."""
    total = None
    for tree in trees:
        tree = jax.tree.map(at_least_f32, tree)
        total = tree if total is None else optax.tree.add(total, tree)
    return total


def one_shot_skip(x: MaskInputs, masks: Masks) -> bool | jax.Array:
    """The call that prunes takes no step. A clock that fires again, with nothing left to prune, costs none."""
    if x.when is not None and x.when.end is not None and x.when.end < x.when.start + x.when.every:
        return True
    lost = jax.tree.map(lambda was, now: jnp.any(was & ~now), x.masks, masks)
    return jnp.any(jnp.array(jax.tree.leaves(lost)))


def masks_from_scores(scores: Any, sparsity: float, *, prunable: Prunable = is_kernel, keep_at_least: int = 0) -> Masks:
    r"""One-shot masks that keep the largest scores, ranked over all prunable leaves together.

    .. math:: m = \mathrm{top}_\kappa(s), \qquad \kappa = N - \lfloor S N \rfloor

    Install them with ``set_masks`` and apply them with ``apply_masks``.

    Args:
      scores: pytree like the parameters, e.g. from :func:`snip_scores`.
      sparsity: fraction of zeros in ``[0, 1)`` over the prunable leaves.
      prunable: ``(path, leaf) -> bool``, as in ``sparsify``; other leaves get masks that are all true.
      keep_at_least: number of weights that each leaf keeps regardless of their scores.

    Returns:
      Bool masks like ``scores``. A layer may lose all its weights; once the masks are installed,
      :func:`~s2sam_jax.warn_if_collapsed` names it.

    Raises:
      ValueError: for a sparsity out of range, or if nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import methods
      >>> scores = {"a": jnp.array([[1.0, 9.0]]), "b": jnp.array([[8.0, 2.0]]), "bias": jnp.zeros(2)}
      >>> masks = methods.masks_from_scores(scores, 0.5)
      >>> print(masks["a"], masks["b"], masks["bias"])
      [[False  True]] [[ True False]] [ True  True]
    """
    dense = jax.tree.map(lambda s: jnp.ones_like(s, dtype=bool), scores)
    x = MaskInputs(scores, dense, same_everywhere(scores, sparsity, prunable))
    return keep_largest(x, scores, global_count(x), keep_at_least)

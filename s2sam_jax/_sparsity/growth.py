"""Drop and grow: masks that keep some weights and add others, and which weights start anew."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.select import best_in_groups, select
from s2sam_jax._base.structure import NM
from s2sam_jax._base.types import MaskInputs, Masks
from s2sam_jax._sparsity.plan import replace_sparse, sparse_leaves


def grow(x: MaskInputs, keep: list[Any], added: list[Any], scores: list[Any]) -> Masks:
    """The kept weights and, per sparse leaf, ``added`` more: the best-scored of all that were not kept.

    Under N:M only those that a group has room for: if as many are added as were dropped, every group is full again.
    """
    free = [~m for m in keep]
    if isinstance(x.structure, NM):
        free = best_in_groups(scores, x.structure, among=free, taken=keep)
    grown = select(scores, count=added, among=free)
    return replace_sparse(x, x.masks, [k | g for k, g in zip(keep, grown, strict=True)])


def restarted(x: MaskInputs, keep: list[jax.Array]) -> Masks:
    """True where a sparse leaf's weight was not kept, so that it starts from zero if it is grown."""
    nothing = jax.tree.map(lambda m: m & ~m, x.masks)  # not zeros, which would lose the mask's sharding
    return replace_sparse(x, nothing, [~k for k in keep])


def move_smallest(x: MaskInputs, moved: list[jax.Array], growth_scores: list[jax.Array]) -> Masks:
    """Per sparse leaf, drops the ``moved`` smallest weights and grows as many of the best-scored.

    All positions that were not kept are candidates, those just dropped among them.
    """
    left = [n - k for n, k in zip(sparse_leaves(x, x.nnz), moved, strict=True)]
    weights = [jnp.abs(w) for w in sparse_leaves(x, x.params)]
    return grow(x, select(weights, count=left, among=sparse_leaves(x, x.masks)), moved, growth_scores)

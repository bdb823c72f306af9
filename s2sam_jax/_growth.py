"""The pieces that methods are made of: which leaves, drop and grow, first masks, schedules."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._select import kept, random_masks, select
from s2sam_jax._types import MaskInputs, Masks, MaskUpdate


def random_init(x: MaskInputs) -> MaskUpdate:
    """Random masks with exactly the planned count per leaf, and no state."""
    leaves = sparse_leaves(x, x.params)
    planned = zip(leaves, sparse_leaves(x, x.sparsities), strict=True)
    masks = random_masks(x.key, [kept(p.size, sparsity) for p, sparsity in planned], leaves)
    return MaskUpdate(replace_sparse(x, x.masks, masks))


def cosine(fraction: float, step: jax.Array, end: int) -> jax.Array:
    """``fraction / 2 * (1 + cos(pi * t / T))``, and its value at T from there on."""
    progress = jnp.clip(step / max(end, 1), 0.0, 1.0)
    return 0.5 * fraction * (1.0 + jnp.cos(jnp.pi * progress))


def sparse_leaves(x: MaskInputs, tree: Any) -> list[Any]:
    """The leaves of a tree like the parameters that are to be sparse."""
    planned = zip(jax.tree.leaves(tree), jax.tree.leaves(x.sparsities), strict=True)
    return [leaf for leaf, sparsity in planned if sparsity > 0]


def replace_sparse(x: MaskInputs, tree: Any, new: list[Any]) -> Any:
    """The tree with other sparse leaves; the dense ones stay as they are."""
    leaves, treedef = jax.tree.flatten(tree)
    rest = iter(new)
    planned = zip(leaves, jax.tree.leaves(x.sparsities), strict=True)
    return treedef.unflatten([next(rest) if sparsity > 0 else leaf for leaf, sparsity in planned])


def grow(x: MaskInputs, keep: list[Any], added: list[Any], scores: list[Any]) -> Masks:
    """The kept weights and, per sparse leaf, ``added`` more: the best-scored of all that were not kept."""
    grown = select(scores, count=added, among=[~m for m in keep])
    return replace_sparse(x, x.masks, [k | g for k, g in zip(keep, grown, strict=True)])


def move_smallest(x: MaskInputs, fraction: Any, growth_scores: Any) -> Masks:
    """Per sparse leaf, drops ``floor(fraction * active)`` smallest weights and grows as many of the best-scored.

    All positions that were not kept are candidates, those just dropped among them.
    """
    old, active = sparse_leaves(x, x.masks), sparse_leaves(x, x.nnz)
    moved = [jnp.floor(n * jnp.asarray(fraction, jnp.float32)).astype(jnp.int32) for n in active]
    left = [n - k for n, k in zip(active, moved, strict=True)]
    keep = select([jnp.abs(w) for w in sparse_leaves(x, x.params)], count=left, among=old)
    return grow(x, keep, moved, sparse_leaves(x, growth_scores))


def magnitude_init(x: MaskInputs) -> MaskUpdate:
    """Masks of the largest weights with exactly the planned count per leaf, and no state."""
    weights = sparse_leaves(x, x.params)
    planned = zip(weights, sparse_leaves(x, x.sparsities), strict=True)
    masks = select([jnp.abs(w) for w in weights], count=[kept(w.size, sparsity) for w, sparsity in planned])
    return MaskUpdate(replace_sparse(x, x.masks, masks))


def total_zeros(x: MaskInputs) -> int:
    """The zeros planned over all sparse leaves together: their mean sparsity, weighted by size."""
    sizes = [p.size for p in sparse_leaves(x, x.params)]
    zeros = sum(size * sparsity for size, sparsity in zip(sizes, sparse_leaves(x, x.sparsities), strict=True))
    return sum(sizes) - kept(sum(sizes), zeros / max(sum(sizes), 1))


def first_and_last(x: MaskInputs, method: str) -> tuple[int, int]:
    """The first and the last call on which the clock fires; the last may lie before ``end``."""
    if x.when is None or x.when.end is None:
        raise ValueError(f"{method} follows the clock to its end: give when=Every(..., end=...).")
    return x.when.start, x.when.end - (x.when.end - x.when.start) % x.when.every

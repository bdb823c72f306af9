"""The building blocks of methods: which leaves, drop and grow, first masks, schedules."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.counts import kept, rounded_down
from s2sam_jax._base.select import best_in_groups, random_scores, select
from s2sam_jax._base.structure import NM
from s2sam_jax._base.types import MaskInputs, Masks, MaskUpdate


def random_init(x: MaskInputs) -> MaskUpdate:
    """Random masks with exactly the planned count per leaf, and no state."""
    return first_masks(x, random_scores(x.key, sparse_leaves(x, x.params)))


def magnitude_init(x: MaskInputs) -> MaskUpdate:
    """Masks of the largest weights with exactly the planned count per leaf, and no state."""
    return first_masks(x, [jnp.abs(w) for w in sparse_leaves(x, x.params)])


def first_masks(x: MaskInputs, scores: list[jax.Array]) -> MaskUpdate:
    """The best-scored weights of each sparse leaf, as many as planned; under N:M, those of each group."""
    if isinstance(x.structure, NM):
        masks = select(scores, structure=x.structure)
    else:
        masks = select(scores, count=planned_counts(x))
    return MaskUpdate(replace_sparse(x, x.masks, masks))


def sparse_leaves(x: MaskInputs, tree: Any) -> list[Any]:
    """The leaves of a tree like the parameters that are to be sparse."""
    planned = zip(jax.tree.leaves(tree), jax.tree.leaves(x.sparsities), strict=True)
    return [leaf for leaf, sparsity in planned if sparsity > 0]


def sparse_size(x: MaskInputs) -> int:
    """Weights in the leaves that are to be sparse."""
    return sum(p.size for p in sparse_leaves(x, x.params))


def planned_counts(x: MaskInputs) -> list[int]:
    """How many weights of each sparse leaf are to survive, ``n - floor(s n)``."""
    planned = zip(sparse_leaves(x, x.params), sparse_leaves(x, x.sparsities), strict=True)
    return [kept(p.size, sparsity) for p, sparsity in planned]


def global_count(x: MaskInputs) -> int:
    """How many weights are to survive in all sparse leaves together, by their mean sparsity, weighted by size."""
    planned = zip(sparse_leaves(x, x.params), sparse_leaves(x, x.sparsities), strict=True)
    return sparse_size(x) - rounded_down(sum(p.size * sparsity for p, sparsity in planned))


def replace_sparse(x: MaskInputs, tree: Any, new: list[Any]) -> Any:
    """The tree with other sparse leaves; the dense ones stay as they are."""
    leaves, treedef = jax.tree.flatten(tree)
    rest = iter(new)
    planned = zip(leaves, jax.tree.leaves(x.sparsities), strict=True)
    return treedef.unflatten([next(rest) if sparsity > 0 else leaf for leaf, sparsity in planned])


def grow(x: MaskInputs, keep: list[Any], added: list[Any], scores: list[Any]) -> Masks:
    """The kept weights and, per sparse leaf, ``added`` more: the best-scored of all that were not kept.

    Under N:M only :func:`openings` are candidates: if as many are added as were dropped, every group is full again.
    """
    free = [~m for m in keep]
    candidates = openings(keep, scores, x.structure) if isinstance(x.structure, NM) else free
    grown = select(scores, count=added, among=candidates)
    return replace_sparse(x, x.masks, [k | g for k, g in zip(keep, grown, strict=True)])


def restarted(x: MaskInputs, keep: list[jax.Array]) -> Masks:
    """True where a sparse leaf's weight was not kept, so that it starts from zero if it is grown."""
    nothing = jax.tree.map(lambda m: m & ~m, x.masks)  # not zeros, which would lose the mask's sharding
    return replace_sparse(x, nothing, [~k for k in keep])


def openings(keep: list[jax.Array], scores: list[jax.Array], structure: NM) -> list[jax.Array]:
    """Where N:M lets weights grow: in each group, the best-scored of those not kept, until it would have n."""
    return best_in_groups(scores, structure, among=[~m for m in keep], taken=keep)


def move_smallest(x: MaskInputs, moved: list[jax.Array], growth_scores: list[jax.Array]) -> Masks:
    """Per sparse leaf, drops the ``moved`` smallest weights and grows as many of the best-scored.

    All positions that were not kept are candidates, those just dropped among them.
    """
    left = [n - k for n, k in zip(sparse_leaves(x, x.nnz), moved, strict=True)]
    weights = [jnp.abs(w) for w in sparse_leaves(x, x.params)]
    return grow(x, select(weights, count=left, among=sparse_leaves(x, x.masks)), moved, growth_scores)


def first_and_last(x: MaskInputs, method: str) -> tuple[int, int]:
    """The first and the last call on which the clock fires; the last may lie before ``end``."""
    if x.when is None or x.when.end is None:
        raise ValueError(f"{method} follows the clock to its end: give when=Every(..., end=...).")
    return x.when.start, x.when.end - (x.when.end - x.when.start) % x.when.every

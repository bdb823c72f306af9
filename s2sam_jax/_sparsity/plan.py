"""What is planned for a method: its sparse leaves, how many weights survive, its first masks, the clock's ends."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.counts import kept, rounded_down
from s2sam_jax._base.select import random_scores, select
from s2sam_jax._base.structure import NM
from s2sam_jax._base.types import MaskInputs, MaskUpdate


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


def first_and_last(x: MaskInputs, method: str) -> tuple[int, int]:
    """The first and the last call on which the clock fires; the last may lie before ``end``."""
    if x.when is None or x.when.end is None:
        raise ValueError(f"{method} follows the clock to its end: give when=Every(..., end=...).")
    return x.when.start, x.when.end - (x.when.end - x.when.start) % x.when.every

"""The pieces that drop-and-grow methods are made of."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._select import kept, random_masks, select
from s2sam_jax._types import MaskInputs, Masks, MaskUpdate


def random_init(x: MaskInputs) -> MaskUpdate:
    """Random masks with exactly the planned count per leaf, and no state."""
    counts = jax.tree.map(lambda p, sparsity: kept(p.size, sparsity), x.params, x.sparsities)
    return MaskUpdate(random_masks(x.key, counts, x.params))


def cosine(fraction: float, step: jax.Array, end: int) -> jax.Array:
    """``fraction / 2 * (1 + cos(pi * t / T))``, and its value at T from there on."""
    progress = jnp.clip(step / max(end, 1), 0.0, 1.0)
    return 0.5 * fraction * (1.0 + jnp.cos(jnp.pi * progress))


def move_smallest(x: MaskInputs, fraction: Any, growth_scores: Any) -> Masks:
    """Per sparse leaf, drops ``floor(fraction * active)`` smallest weights and grows as many of the best-scored.

    All positions that were not kept are candidates, those just dropped among them.
    """
    sparse = [sparsity > 0 for sparsity in jax.tree.leaves(x.sparsities)]
    masks, treedef = jax.tree.flatten(x.masks)

    def only_sparse(tree):
        return [leaf for leaf, chosen in zip(jax.tree.leaves(tree), sparse, strict=True) if chosen]

    old = only_sparse(masks)
    active = [jnp.sum(m, dtype=jnp.int32) for m in old]
    moved = [jnp.floor(n * jnp.asarray(fraction, jnp.float32)).astype(jnp.int32) for n in active]
    keep = select(
        [jnp.abs(w) for w in only_sparse(x.params)],
        count=[n - k for n, k in zip(active, moved, strict=True)],
        among=old,
    )
    grown = select(only_sparse(growth_scores), count=moved, among=[~m for m in keep])
    new = iter([k | g for k, g in zip(keep, grown, strict=True)])
    return treedef.unflatten([next(new) if chosen else m for m, chosen in zip(masks, sparse, strict=True)])

"""Which coordinates Sparse SAM perturbs: the best-scored, or those of a mask that drops and grows."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.counts import part, rounded_down
from s2sam_jax._base.select import best_in_groups, random_scores, select
from s2sam_jax._base.structure import NM, check_fits
from s2sam_jax._base.tree import by_name
from s2sam_jax._base.types import Masks, Params


def top(scores: Params, live: Masks | None, sparsity: float) -> Masks:
    """The best-scored fraction ``1 - sparsity`` of all coordinates, or of the live ones."""
    return select(scores, count=_kept(_size(scores, live), sparsity), among=live, scope="global")


def top_in_groups(scores: Params, live: Masks | None, structure: NM) -> Masks:
    """The best-scored of each group; all coordinates of leaves that have no groups."""
    everywhere = jax.tree.map(lambda x: jnp.ones_like(x, dtype=bool), scores)
    nothing = jax.tree.map(jnp.logical_not, everywhere)
    return _fill(scores, nothing, _both(everywhere, live), structure)


def move(grads: Params, masks: Masks, live: Masks | None, rate: Any, key: jax.Array, sparsity: float) -> Masks:
    """The paper: drop exactly ``floor(r a)``, then grow as many among all that are off, those just dropped included."""
    kept = jnp.asarray(_kept(_size(masks, live), sparsity), jnp.int32)
    keep = kept - part(kept, rate)
    stay = select(jax.tree.map(jnp.abs, grads), count=keep, among=_both(masks, live), scope="global")
    grow = kept - _size(masks, stay)
    off = _both(jax.tree.map(jnp.logical_not, stay), live)
    return jax.tree.map(jnp.logical_or, stay, select(random_scores(key, masks), count=grow, among=off, scope="global"))


def move_in_groups(grads: Params, masks: Masks, live: Masks | None, rate: Any, key: jax.Array, structure: NM) -> Masks:
    """The same under N:M: every group is filled up again at random."""
    old = _both(masks, live)
    kept = jnp.asarray(_size(masks, old), jnp.int32)
    keep = kept - part(kept, rate)
    stay = select(jax.tree.map(jnp.abs, grads), count=keep, among=old, scope="global")
    off = _both(jax.tree.map(jnp.logical_not, stay), live)
    return _fill(random_scores(key, masks), stay, off, structure)


def move_as_released(
    grads: Params, masks: Masks, live: Masks | None, rate: Any, key: jax.Array, sparsity: float
) -> Masks:
    """The released code: two truncated counts, and growth only where the old mask was off."""
    size = jnp.asarray(_size(masks, live), jnp.float32)
    active = size * (1 - sparsity)
    keep = rounded_down(active * (1 - rate))
    grow = rounded_down(jnp.minimum(active * rate, size * sparsity))
    stay = select(jax.tree.map(jnp.abs, grads), count=keep, among=_both(masks, live), scope="global")
    off = _both(jax.tree.map(jnp.logical_not, masks), live)
    return jax.tree.map(jnp.logical_or, stay, select(random_scores(key, masks), count=grow, among=off, scope="global"))


def _fill(scores: Params, taken: Masks, among: Masks, structure: NM) -> Masks:
    """Fills each group with its best-scored eligible entries; leaves without groups take all that are eligible."""
    grouped = [x.ndim > 1 and -x.ndim <= structure.axis < x.ndim for x in jax.tree.leaves(scores)]
    shapes = {name: x.shape for name, x in by_name(scores).items()}
    check_fits(structure, {name: shape for (name, shape), g in zip(shapes.items(), grouped, strict=True) if g})
    treedef = jax.tree.structure(scores)
    columns = [treedef.flatten_up_to(tree) for tree in (scores, among, taken)]
    inside = [[leaf for leaf, group in zip(column, grouped, strict=True) if group] for column in columns]
    grown = iter(best_in_groups(inside[0], structure, inside[1], inside[2]))
    filled = [
        mask | (next(grown) if group else allowed)
        for allowed, mask, group in zip(columns[1], columns[2], grouped, strict=True)
    ]
    return treedef.unflatten(filled)


def _size(params: Params, live: Masks | None) -> int | jax.Array:
    """Coordinates to choose from: all, or the live weights."""
    if live is None:
        return sum(p.size for p in jax.tree.leaves(params))
    return sum((jnp.sum(m, dtype=jnp.int32) for m in jax.tree.leaves(live)), jnp.zeros((), jnp.int32))


def _kept(size: int | jax.Array, sparsity: float) -> Any:
    """``floor(d * (1 - s))``; on the device in float32."""
    return rounded_down((size if isinstance(size, int) else size.astype(jnp.float32)) * (1 - sparsity))


def _both(masks: Masks, live: Masks | None) -> Masks:
    return masks if live is None else jax.tree.map(jnp.logical_and, masks, live)

"""The state rule: what mirrors a parameter in an optimizer's state is zero wherever the parameter is pruned.

Leaves are matched by key path and shape; there is no list of known optimizers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.tree import path_keys
from s2sam_jax._base.types import Masks


class Unmasked(NamedTuple):
    """Marks a tree in an optimizer state that is meant to be non-zero on pruned weights."""

    tree: Any


def mask_mirrored(masks: Masks, state: Any) -> Any:
    """The state rule: zero, off the mask, every floating state leaf that mirrors a parameter."""
    return map_mirrored(lambda mask, leaf: jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)), masks, state)


def start_mirrored(grown: Masks, state: Any, fresh: Any) -> Any:
    """Newly grown weights get the optimizer's initial state: zero for most, the initial step size for Rprop."""
    return map_mirrored(lambda mask, leaf, start: jnp.where(mask, start.astype(leaf.dtype), leaf), grown, state, fresh)


def map_mirrored(fn: Callable[..., jax.Array], masks: Masks, state: Any, *rest: Any) -> Any:
    """``fn(mask, leaf, ...)`` on every floating state leaf that mirrors a parameter; the others stay.

    A subtree of the parameters' structure mirrors them leaf by leaf. Elsewhere, as in the cut trees of
    ``optax.masked``, a leaf mirrors the parameter whose key path is the longest suffix of its own. Shapes must agree.
    This holds for any optimizer, with no list of known states; ``Unmasked`` trees are left alone.
    """
    structure = jax.tree.structure(masks)
    by_keys = {path_keys(path): mask for path, mask in jax.tree_util.tree_leaves_with_path(masks)}

    def is_whole(node):
        return isinstance(node, Unmasked) or jax.tree.structure(node) == structure

    def one(mask, leaf, *others):
        if mask is None or mask.shape != jnp.shape(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return leaf
        return fn(mask, leaf, *others)

    def rule(path, node, *others):
        if isinstance(node, Unmasked):
            return node
        if jax.tree.structure(node) == structure:
            return jax.tree.map(one, masks, node, *others)
        keys = path_keys(path)
        suffixes = (keys[start:] for start in range(len(keys) + 1))
        return one(next((by_keys[suffix] for suffix in suffixes if suffix in by_keys), None), node, *others)

    return jax.tree_util.tree_map_with_path(rule, state, *rest, is_leaf=is_whole)

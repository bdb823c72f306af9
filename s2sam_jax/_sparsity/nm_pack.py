"""N:M weights as values and positions, the form that sparse matrix units read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.blocks import cut, join
from s2sam_jax._base.structure import NM, check_fits
from s2sam_jax._base.tree import check_same_leaves, leaf_name, map_named
from s2sam_jax._base.types import Masks, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMPacked:
    """A leaf with ``n`` of every ``m`` entries left.

    Attributes:
      values: of the leaf's shape, except that the axis of the groups has ``n`` entries per group.
      indices: uint8, shaped like ``values``: the position of each value in its group, ascending. An incomplete group
        may hold fewer than ``n`` weights; the rest are zeros, with positions beyond its end.
      length: length of that axis in the leaf.
      structure: the N:M structure of the groups.
    """

    values: jax.Array
    indices: jax.Array
    length: int = dataclasses.field(metadata={"static": True})
    structure: NM = dataclasses.field(metadata={"static": True})


def nm_pack(params: Params, masks: Masks, structure: NM) -> Any:
    """Packs N:M-sparse weights as values and their positions. Runs on the host, to export a trained network.

    2:4 weights take half the memory, plus one byte per value; hardware formats hold the same positions in two bits.

    Args:
      params: pytree of parameters, or one array.
      masks: their masks, as from ``get_masks(opt_state, params)``. Leaves whose mask is all true stay as they are.
      structure: the structure that the masks were trained under.

    Returns:
      The tree with an :class:`NMPacked` for every sparse leaf.

    Raises:
      ValueError: for masks that do not match, or do not have ``n`` weights in every group.
      TypeError: for a structure that is not ``NM``.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import NM, nm_pack, select
      >>> weights = jnp.array([[0.1], [-3.0], [2.0], [0.5]])
      >>> packed = nm_pack(weights, select(jnp.abs(weights), structure=NM(2, 4)), NM(2, 4))
      >>> print(packed.values.T, packed.indices.T)
      [[-3.  2.]] [[1 2]]
    """
    if not isinstance(structure, NM):
        raise TypeError(f"nm_pack needs structure=NM(n, m); got {structure!r}.")
    check_same_leaves(masks, params, "masks", "params")

    def pack(name: str, weights: jax.Array, mask: jax.Array) -> Any:
        if np.asarray(mask).all():
            return weights
        check_fits(structure, {name: weights.shape})
        values, indices, counts = _pack(weights, mask, structure)
        if (counts != structure.n).any():
            raise ValueError(
                f"nm_pack: the mask of {name!r} has groups of {counts.min()} to {counts.max()} weights; {structure} "
                f"has {structure.n} in each. Give the structure it was trained under."
            )
        axis = structure.axis % weights.ndim - weights.ndim  # from the end, so that what is packed may be stacked
        return NMPacked(values, indices, weights.shape[axis], dataclasses.replace(structure, axis=axis))

    return map_named(pack, params, masks)


def nm_unpack(packed: Any) -> tuple[Params, Masks]:
    """Undoes :func:`nm_pack`, exactly.

    Args:
      packed: the tree that it returned.

    Returns:
      The parameters, zero where they were pruned, and their masks.

    Raises:
      ValueError: if values and positions do not form whole groups of their structure.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import NM, nm_pack, nm_unpack, select
      >>> weights = jnp.array([[0.0], [-3.0], [2.0], [0.0]])
      >>> masks = select(jnp.abs(weights), structure=NM(2, 4))
      >>> print(nm_unpack(nm_pack(weights, masks, NM(2, 4)))[0].T)
      [[ 0. -3.  2.  0.]]
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(packed, is_leaf=lambda x: isinstance(x, NMPacked))
    pairs = [_unpack(leaf_name(path), leaf) for path, leaf in leaves]
    return treedef.unflatten([weights for weights, _ in pairs]), treedef.unflatten([mask for _, mask in pairs])


def _unpack(name: str, leaf: Any) -> tuple[jax.Array, jax.Array]:
    if not isinstance(leaf, NMPacked):
        return leaf, jnp.ones_like(leaf, dtype=bool)
    structure, shape = leaf.structure, leaf.values.shape
    axis = structure.axis % leaf.values.ndim
    groups = -(-leaf.length // structure.m)
    if leaf.indices.shape != shape or shape[axis] != groups * structure.n:
        raise ValueError(
            f"nm_unpack: {name!r} has values {shape} and indices {leaf.indices.shape}; under {structure} both have "
            f"{groups * structure.n} entries on axis {axis}."
        )
    return _scatter(leaf.values, leaf.indices, leaf.length, structure)


@functools.partial(jax.jit, static_argnums=2)
def _pack(weights: jax.Array, mask: jax.Array, structure: NM) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, indices, and the ones of each group; of one cut short, places beyond its end count until it has n."""
    axis = structure.axis % mask.ndim
    groups = cut(mask, axis, structure.m, False)
    place = np.arange(groups.shape[axis] * structure.m)
    beyond = (place >= mask.shape[axis]) & (place < place.size - structure.m + structure.n)
    others = [a for a in range(groups.ndim) if a not in (axis, axis + 1)]
    live = groups | np.expand_dims(beyond.reshape(-1, structure.m), others)
    places = jnp.argsort(~live, axis=axis + 1, stable=True)
    places = jax.lax.slice_in_dim(places, 0, structure.n, axis=axis + 1)
    values = jnp.take_along_axis(cut(weights, axis, structure.m), places, axis=axis + 1)
    return join(values, axis), join(places.astype(jnp.uint8), axis), live.sum(axis=axis + 1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scatter(values: jax.Array, indices: jax.Array, length: int, structure: NM) -> tuple[jax.Array, jax.Array]:
    """The leaf and its mask."""
    axis = structure.axis % values.ndim
    values, places = cut(values, axis, structure.n), cut(indices, axis, structure.n).astype(jnp.int32)
    shape = (*values.shape[: axis + 1], structure.m, *values.shape[axis + 2 :])
    weights = jnp.put_along_axis(jnp.zeros(shape, values.dtype), places, values, axis + 1, inplace=False)
    live = jnp.put_along_axis(jnp.zeros(shape, bool), places, True, axis + 1, inplace=False)
    return join(weights, axis, length), join(live, axis, length)

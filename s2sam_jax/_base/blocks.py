"""Arrays cut into blocks: one score for a block, a mask of blocks spread over their entries, the best of a block.

Axes are cut one at a time, which keeps an explicit sharding.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.structure import NM, Block, Channel, Shape
from s2sam_jax._base.tree import at_least_f32


def pool(x: jax.Array, structure: Block | Channel) -> jax.Array:
    """One score per block, in float32 or wider; the mean of an incomplete block is over the entries it has."""
    block = structure.block(x.shape)
    entries = tuple(range(1, 2 * x.ndim, 2))
    x = at_least_f32(x)
    if structure.pool == "max":
        return _cut_all(x, block, -math.inf).max(axis=entries)
    if structure.pool == "l2":
        return jnp.sqrt(jnp.square(_cut_all(x, block, 0.0)).sum(axis=entries))
    return _cut_all(x, block, 0.0).sum(axis=entries) / _sizes(x.shape, block)


def any_in_block(mask: jax.Array, structure: Block | Channel) -> jax.Array:
    return _cut_all(mask, structure.block(mask.shape), False).any(axis=tuple(range(1, 2 * mask.ndim, 2)))


def all_in_block(mask: jax.Array, structure: Block | Channel) -> jax.Array:
    return ~any_in_block(~mask, structure)


def spread(units: jax.Array, structure: Block | Channel, like: jax.Array) -> jax.Array:
    """The mask of blocks as a mask of the entries of ``like``, with its sharding."""
    for axis, (length, size) in enumerate(zip(like.shape, structure.block(like.shape), strict=True)):
        if size > 1:
            shape = (*units.shape[: axis + 1], size, *units.shape[axis + 1 :])
            units = join(jnp.broadcast_to(jnp.expand_dims(units, axis + 1), shape), axis, length)
    return units & jnp.ones_like(like, dtype=bool)  # an axis within blocks has no sharding of its own


def best_of_groups(images: jax.Array, structure: NM, taken: jax.Array) -> jax.Array:
    """In each group, the largest entries: ``n`` less those already ``taken``. Ties go by position; zeros never win.

    All pairs of a group are compared: m is small, and comparing is elementwise work.
    """
    axis = structure.axis % images.ndim
    groups = cut(images, axis, structure.m, 0)
    room = structure.n - cut(taken, axis, structure.m, False).sum(axis=axis + 1, keepdims=True, dtype=jnp.int32)
    own, other = jnp.expand_dims(groups, axis + 2), jnp.expand_dims(groups, axis + 1)
    place = np.arange(structure.m)
    others = [a for a in range(own.ndim) if a not in (axis + 1, axis + 2)]
    earlier = np.expand_dims(place[None, :] < place[:, None], others)
    rank = ((other > own) | ((other == own) & earlier)).sum(axis=axis + 2, dtype=jnp.int32)
    return join((rank < room) & (groups > 0), axis, images.shape[axis])


def _cut_all(x: jax.Array, block: Shape, fill: float | bool) -> jax.Array:
    """Every axis as two: the blocks along it, and the entries of one."""
    for axis in reversed(range(x.ndim)):
        x = cut(x, axis, block[axis], fill)
    return x


def cut(x: jax.Array, axis: int, size: int, fill: float | bool = 0) -> jax.Array:
    """An axis as two: the pieces, and the entries of one; an incomplete last piece is padded."""
    if short := -x.shape[axis] % size:
        x = jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)], constant_values=fill)
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def join(x: jax.Array, axis: int, length: int | None = None) -> jax.Array:
    """Undoes :func:`cut`; ``length`` entries are left."""
    whole = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return whole if length in (None, whole.shape[axis]) else jax.lax.slice_in_dim(whole, 0, length, axis=axis)


def _sizes(shape: Shape, block: Shape) -> jax.Array | int:
    """Entries of each block, shaped to be broadcast against one score a block."""
    total: jax.Array | int = 1
    for axis, (length, size) in enumerate(zip(shape, block, strict=True)):
        if length % size == 0:
            total = total * size
        else:
            along = np.diff(np.append(np.arange(0, length, size), length))
            total = total * jnp.asarray(np.expand_dims(along, [a for a in range(len(shape)) if a != axis]))
    return total

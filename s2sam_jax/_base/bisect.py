"""The largest entries of arrays of unsigned integers, found by counting: no sort, few passes.

The k-th largest value is found from its leading bits on, two per pass: one read of the data counts how many entries
reach each of three thresholds. Counting is elementwise work and a sum, so a sharded array keeps its sharding, and all
arrays share one loop. Arrays of equal shape come stacked, as XLA's compile time grows with the number of distinct ones.
"""

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BITS_A_PASS = 2  # 2**2 - 1 thresholds; with more of them, counting costs more than reading


class _Found(NamedTuple):
    """Per row, arrays of one length: the threshold, how many entries reach it, how many exceed it.

    If fewer than the requested number are eligible, the threshold is 0. If exactly the requested number reach the
    threshold, the search has stopped early, and ``above`` is only a lower bound.
    """

    at: jax.Array
    reached: jax.Array
    above: jax.Array


@jax.jit
def largest(stacks: list[jax.Array], counts: jax.Array, first_places: list[jax.Array]) -> list[jax.Array]:
    """Masks of the largest entries of every row, or of all rows together.

    Equal entries are taken in row-major order. Zeros are never taken.

    Args:
      stacks: unsigned integers of one type; the rows of a stack are what is ranked.
      counts: int32[rows of all stacks], how many to take of each; or int32[1], of all together.
      first_places: per stack uint32[rows], the place of a row's first entry, counted from the end: the size of the row,
        or what is left from it on if all are ranked together.
    """
    # Not a constant: in shard_map the counts differ between devices, as what is ranked does. XLA folds it away.
    counts = counts + sum(jnp.max(x, initial=0).astype(jnp.int32) & 0 for x in stacks)
    most = counts - counts + jnp.iinfo(jnp.int32).max
    found = _search(stacks, counts, stacks[0].dtype.itemsize * 8, most)

    def places() -> list[jax.Array]:
        """Computed at each use: kept in between, they would take one more array per stack."""
        return [_places(x, first) for x, first in zip(stacks, first_places, strict=True)]

    def last_place() -> jax.Array:
        """If more entries tie than there is room for: the place of the last one that has room."""
        tied = found.reached - found.above
        crowded = (found.reached > counts) & (found.at > 0)
        ties = [jnp.where(x == t, p, 0) for x, t, p in zip(stacks, _columns(found.at, stacks), places(), strict=True)]
        room = jnp.where(crowded, counts - found.above, tied)
        return _search(ties, room, sum(x.size for x in stacks).bit_length(), tied).at

    no_place = (counts - counts).astype(jnp.uint32)
    last = jax.lax.cond((found.reached > counts).any(), last_place, lambda: no_place)
    ends = zip(stacks, places(), _columns(found.at, stacks), _columns(last, stacks), strict=True)
    return [((x > t) | ((x == t) & (p >= e))) & (x > 0) for x, p, t, e in ends]


def _search(stacks: list[jax.Array], counts: jax.Array, bits: int, reached: jax.Array) -> _Found:
    """Per row, the largest threshold of so many bits that at least ``counts`` entries reach.

    ``reached`` is how many reach the threshold 0; where that is ``counts``, nothing is searched.
    """
    dtype = stacks[0].dtype
    digits = jnp.arange(1, 2**BITS_A_PASS, dtype=dtype)

    def unfinished(carry):
        shift, found = carry
        return (shift >= 0) & (found.reached != counts).any()

    def next_digit(carry):
        shift, found = carry
        hits = _count(stacks, found.at[:, None] + (digits << shift.astype(dtype))[None, :])
        fits = hits >= counts[:, None]
        return shift - BITS_A_PASS, _Found(
            at=found.at + (fits.sum(axis=1).astype(dtype) << shift.astype(dtype)),
            reached=jnp.where(fits, hits, found.reached[:, None]).min(axis=1),
            above=jnp.maximum(found.above, jnp.where(fits, 0, hits).max(axis=1)),
        )

    first_shift = jnp.array((bits - 1) // BITS_A_PASS * BITS_A_PASS, jnp.int32)
    start = _Found((counts - counts).astype(dtype), reached, counts - counts)
    return jax.lax.while_loop(unfinished, next_digit, (first_shift, start))[1]


def _count(stacks: list[jax.Array], thresholds: jax.Array) -> jax.Array:
    """How many entries of a row reach each of its thresholds, int32[rows, thresholds].

    One reduction of several operands reads the data once for all thresholds.
    """
    columns = [_columns(thresholds[:, digit], stacks) for digit in range(thresholds.shape[1])]

    def reach(x, *thresholds):
        hits = tuple((x >= t).astype(jnp.int32) for t in thresholds)
        zeros = (jnp.zeros((), jnp.int32),) * len(hits)
        return jnp.stack(jax.lax.reduce(hits, zeros, _add, range(1, x.ndim)), axis=1)

    hits = jnp.concatenate([reach(*each) for each in zip(stacks, *columns, strict=True)])
    return hits.sum(axis=0, keepdims=True, dtype=jnp.int32) if len(thresholds) == 1 else hits


def _add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """At module level: under ``jax.disable_jit`` a new function at each call would compile ``reduce`` each time."""
    return tuple(map(operator.add, a, b))


def _columns(values: jax.Array, stacks: list[jax.Array]) -> list[jax.Array]:
    """The values of each stack's rows, shaped to be compared with its entries; or the one of all rows."""
    if len(values) == 1:
        return [values[0]] * len(stacks)
    ends = np.cumsum([len(x) for x in stacks])
    return [jnp.expand_dims(v, range(1, x.ndim)) for v, x in zip(jnp.split(values, ends[:-1]), stacks, strict=True)]


def _places(x: jax.Array, first: jax.Array) -> jax.Array:
    """Every entry's place counted from the end, row-major, sharded as the entries are."""
    place = jnp.broadcast_to(jnp.expand_dims(first, range(1, x.ndim)), x.shape)
    for axis in range(1, x.ndim):
        position = jnp.arange(x.shape[axis], dtype=jnp.uint32) * jnp.uint32(math.prod(x.shape[axis + 1 :]))
        place = place - jnp.expand_dims(position, [a for a in range(x.ndim) if a != axis])
    return place

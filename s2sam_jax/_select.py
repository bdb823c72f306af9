"""Exact top-k masks without sorting: bisection on the integer image of the scores.

A floating number's bits, read as an integer (with negatives flipped), have the order of the numbers. So the
k-th largest score is found bit by bit: 32 counts for float32, each one elementwise comparison and one sum. There
is no sort and no reshape, so a sharded array keeps its sharding, and all leaves share one loop.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from s2sam_jax._tree import check_same_leaves, map_named, named_leaves
from s2sam_jax._types import Masks

Scope = Literal["leaf", "global"]


def select(
    scores: Any,
    *,
    count: Any = None,
    sparsity: Any = None,
    among: Masks | None = None,
    scope: Scope = "leaf",
) -> Masks:
    r"""Masks of the largest scores, with exactly the asked number of ones.

    .. math:: m_i = 1 \iff \#\{j : s_j > s_i\} + \#\{j < i : s_j = s_i\} < k

    Ties go to the lower index (row-major in a leaf; leaves in tree order). ``-0.0`` equals ``0.0``. NaN ranks
    below every number; under ``jax.experimental.checkify`` it is an error instead.

    Args:
      scores: pytree of floating arrays (bfloat16, float16, float32, float64), any shapes.
      count: how many to keep, ``0 <= count <= size``: a tree of integers like ``scores``, or one integer for all
        leaves; one integer in all for ``scope="global"``. Integers may be traced.
      sparsity: instead of ``count``, the fraction of zeros in ``[0, 1]``: keeps ``N - floor(sparsity * N)``.
      among: bool tree like ``scores``; only these entries may be chosen. If fewer than ``count`` are eligible, all
        of them are chosen.
      scope: rank within each leaf, or over all leaves together.

    Returns:
      Bool masks with the structure and shapes of ``scores``.

    Raises:
      ValueError: for neither or both of ``count`` and ``sparsity``, for values out of range, or a tree in ``among``
        that does not match.
      TypeError: for scores that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import select
      >>> print(select(jnp.array([0.5, 2.0, 2.0, -1.0, 2.0]), count=2))
      [False  True  True False False]
      >>> print(select({"a": jnp.array([1.0, 3.0]), "b": jnp.array([2.0, 0.0])}, sparsity=0.5, scope="global"))
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    if scope not in ("leaf", "global"):
        raise ValueError(f"scope must be 'leaf' or 'global'; got {scope!r}.")
    scores = jax.tree.map(jnp.asarray, scores)
    map_named(_check_scores, scores)
    if among is not None:
        check_same_leaves(among, scores, "among", "scores")
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        return scores
    counts = _counts(scores, count, sparsity, scope)
    allowed = (
        [jnp.ones_like(x, dtype=bool) for x in leaves]
        if among is None
        else [jnp.asarray(m, bool) for m in jax.tree.leaves(among)]
    )
    if scope == "global":
        leaves = [x.astype(jnp.result_type(*leaves)) for x in leaves]
    bits = max(jnp.finfo(x.dtype).bits for x in leaves)
    return treedef.unflatten(_top([_image(x, bits) for x in leaves], allowed, counts, scope))


def kept(size: int, sparsity: float) -> int:
    """``N - floor(S * N)``; the product is rounded first, so that 0.7 * 10 counts as 7."""
    return size - int(np.floor(round(sparsity * size, 6)))


def random_masks(key: jax.Array, counts: Any, like: Any, among: Masks | None = None) -> Masks:
    """Uniformly random masks with ``counts`` ones per leaf."""
    return select(random_scores(key, like), count=counts, among=among)


def random_scores(key: jax.Array, like: Any) -> Any:
    """Uniform [0, 1) float32 scores shaped (and sharded) like a tree."""
    leaves, treedef = jax.tree.flatten(like)
    if not leaves:
        return like
    shardings = [_explicit_sharding(leaf) for leaf in leaves]
    if any(sharding is not None for sharding in shardings):
        keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
        drawn = zip(keys, leaves, shardings, strict=True)
        return treedef.unflatten([jax.random.uniform(k, x.shape, jnp.float32, out_sharding=s) for k, x, s in drawn])
    # One draw, cut up: the generator takes long to compile, once for each shape.
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = jnp.split(jax.random.uniform(key, (sum(leaf.size for leaf in leaves),), jnp.float32), ends[:-1])
    return treedef.unflatten([piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)])


def _explicit_sharding(leaf: jax.Array) -> Any:
    """The sharding of an array, where it is part of its type; else ``None``."""
    sharding = jax.typeof(leaf).sharding
    return sharding if any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types) else None


def _check_scores(name: str, x: Any) -> None:
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
        raise TypeError(f"select needs floating scores; leaf {name!r} has dtype {jnp.asarray(x).dtype}.")


def _counts(scores: Any, count: Any, sparsity: Any, scope: Scope) -> list[jax.Array]:
    """The number to keep, per leaf; in global scope the same total for each."""
    if (count is None) == (sparsity is None):
        raise ValueError("select needs exactly one of count and sparsity.")
    sizes = {"/".join(path): x.size for path, x in named_leaves(scores).items()}
    given = sparsity if count is None else count
    if jax.tree.structure(given) == jax.tree.structure(0):
        values = [given] * len(sizes)
    elif scope == "global":
        raise ValueError(f"scope='global' needs one count or sparsity for all leaves; got {given!r}.")
    else:
        check_same_leaves(given, jax.tree.map(lambda _: 0, scores), "count", "scores")
        values = jax.tree.leaves(given)
    if scope == "global":
        sizes = dict.fromkeys(sizes, sum(sizes.values()))
    counts = [_count(v, size, name, count is None) for v, (name, size) in zip(values, sizes.items(), strict=True)]
    return [jnp.asarray(k, jnp.int32) for k in counts]


def _count(value: Any, size: int, name: str, is_sparsity: bool) -> Any:
    """A checked number to keep; a traced one cannot be checked, and a traced sparsity is multiplied in float32."""
    if isinstance(value, Tracer):
        return size - jnp.floor(value * size + 1e-4).astype(jnp.int32) if is_sparsity else value
    limit = 1 if is_sparsity else size
    if not 0 <= value <= limit:
        what = "sparsity" if is_sparsity else "count"
        raise ValueError(f"select needs 0 <= {what} <= {limit} (leaf {name!r}, {size} scores); got {value}.")
    if not is_sparsity and value != int(value):
        raise ValueError(f"select needs whole counts (leaf {name!r}); got {value}.")
    return kept(size, float(value)) if is_sparsity else int(value)


def _image(x: jax.Array, bits: int) -> jax.Array:
    """Unsigned integers of ``bits`` in the order of the floats; NaN becomes 0, which no number maps to."""
    checkify.debug_check(jnp.all(~jnp.isnan(x)), "select: NaN among the scores")
    own = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{own}")
    sign = jnp.asarray(1 << (own - 1), unsigned)
    raw = jax.lax.bitcast_convert_type(x, unsigned)
    # -0.0 becomes 0.0, on integers: as floats, XLA would flush subnormals to zero with it.
    raw = jnp.where(raw == sign, jnp.zeros((), unsigned), raw)
    ordered = jnp.where(jnp.isnan(x), jnp.zeros((), unsigned), jnp.where(raw >= sign, ~raw, raw | sign))
    return ordered.astype(f"uint{bits}") << (bits - own)


@functools.partial(jax.jit, static_argnames="scope")
def _top(images: list[jax.Array], allowed: list[jax.Array], counts: list, scope: Scope) -> list[jax.Array]:
    def totals(masks: list[jax.Array]) -> list[jax.Array]:
        """What each leaf's count is compared with: its own ones, or those of all leaves."""
        sums = [jnp.sum(m, dtype=jnp.int32) for m in masks]
        return sums if scope == "leaf" else [sum(sums[1:], sums[0])] * len(sums)

    def reached_scores(at):
        return totals([(i >= t) & m for i, t, m in zip(images, at, allowed, strict=True)])

    found = _bisect(reached_scores, counts, images[0].dtype)
    thresholds = found.at
    # Where more scores tie at the threshold than there is room for, the first ones in index order get it. They are the
    # largest complemented indices, so the same bisection finds the last of them. It runs only if it is needed.
    room = [k - n for k, n in zip(counts, found.above, strict=True)]
    needed = jnp.stack([n > k for n, k in zip(found.reached, counts, strict=True)]).any()
    backward = [~index for index in _indices(images, scope)]

    def reached_ties(at):
        ties = [(i == t) & m for i, t, m in zip(images, thresholds, allowed, strict=True)]
        return totals([tie & (b >= t) for tie, b, t in zip(ties, backward, at, strict=True)])

    last = _bisect(reached_ties, room, jnp.dtype(jnp.uint32), needed).at
    return [
        ((i > t) | ((i == t) & (b >= e) & (r > 0))) & m
        for i, t, b, e, r, m in zip(images, thresholds, backward, last, room, allowed, strict=True)
    ]


class _Bisection(NamedTuple):
    """Per leaf: the largest integer that ``count`` entries reach, how many reach it, how many pass it."""

    at: list[jax.Array]
    reached: list[jax.Array]
    above: list[jax.Array]


def _bisect(reached_at: Any, counts: list[jax.Array], dtype: Any, needed: jax.Array | bool = True) -> _Bisection:
    """Finds, bit by bit, the largest t with ``reached_at(t) >= count``; 0 where there is none, or if not needed."""
    bits, one = jnp.iinfo(dtype).bits, jnp.ones((), dtype)
    largest = jnp.full((), jnp.iinfo(jnp.int32).max, jnp.int32)

    def set_bit(carry):
        bit, (at, reached, above) = carry
        trial = [t | (one << bit.astype(dtype)) for t in at]
        hits = reached_at(trial)
        fits = [n >= k for n, k in zip(hits, counts, strict=True)]
        at = [jnp.where(f, new, t) for f, new, t in zip(fits, trial, at, strict=True)]
        reached = [jnp.where(f, n, old) for f, n, old in zip(fits, hits, reached, strict=True)]
        above = [jnp.where(f, old, n) for f, n, old in zip(fits, hits, above, strict=True)]
        return bit - 1, _Bisection(at, reached, above)

    zero = jnp.zeros((), jnp.int32)
    start = _Bisection([jnp.zeros_like(one)] * len(counts), [largest] * len(counts), [zero] * len(counts))
    return jax.lax.while_loop(lambda carry: (carry[0] >= 0) & needed, set_bit, (zero + bits - 1, start))[1]


def _indices(leaves: list[jax.Array], scope: Scope) -> list[jax.Array]:
    """Row-major index of every entry, sharded as its leaf; counted on through the leaves in global scope."""
    indices, offset = [], 0
    for leaf in leaves:
        index = jnp.full_like(leaf, offset, dtype=jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            stride = math.prod(leaf.shape[axis + 1 :])
            position = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(stride)
            index = index + jnp.expand_dims(position, [a for a in range(leaf.ndim) if a != axis])
        indices.append(index)
        offset += leaf.size if scope == "global" else 0
    return indices

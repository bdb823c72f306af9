"""Exact top-k masks without sorting: bisection on the integer image of the scores.

A floating number's bits, read as an integer (with negatives flipped), have the order of the numbers. So the
k-th largest score is found bit by bit: 32 counts for float32, each one elementwise comparison and one sum. There
is no sort and no reshape, so a sharded array keeps its sharding, and all leaves share one loop.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
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
    map_named(_check_scores, scores)
    if among is not None:
        check_same_leaves(among, scores, "among", "scores")
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        return scores
    counts = _counts(scores, count, sparsity, scope)
    allowed = [None] * len(leaves) if among is None else [m.astype(bool) for m in jax.tree.leaves(among)]
    images = [_image(x) for x in leaves]
    if scope == "global" and len({image.dtype for image in images}) > 1:
        images = [_image(x.astype(jnp.result_type(*leaves))) for x in leaves]
    return treedef.unflatten(_top(images, allowed, counts, scope))


def kept(size: int, sparsity: float) -> int:
    """``N - floor(S * N)``; the product is rounded first, so that 0.7 * 10 counts as 7."""
    return size - int(np.floor(round(sparsity * size, 6)))


def random_masks(key: jax.Array, counts: Any, like: Any, among: Masks | None = None) -> Masks:
    """Uniformly random masks with ``counts`` ones per leaf."""
    return select(random_scores(key, like), count=counts, among=among)


def random_scores(key: jax.Array, like: Any) -> Any:
    """Uniform [0, 1) float32 scores shaped (and sharded) like a tree, one key a leaf."""
    leaves, treedef = jax.tree.flatten(like)
    keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
    return treedef.unflatten([_uniform(k, x) for k, x in zip(keys, leaves, strict=True)])


def _uniform(key: jax.Array, like: jax.Array) -> jax.Array:
    sharding = jax.typeof(like).sharding
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
    return jax.random.uniform(key, like.shape, jnp.float32, out_sharding=sharding if explicit else None)


def _check_scores(name: str, x: Any) -> None:
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
        raise TypeError(f"select needs floating scores; leaf {name!r} has dtype {jnp.asarray(x).dtype}.")


def _counts(scores: Any, count: Any, sparsity: Any, scope: Scope) -> list[Any]:
    """One count per leaf, or a single one for the whole tree."""
    if (count is None) == (sparsity is None):
        raise ValueError("select needs exactly one of count and sparsity.")
    named = named_leaves(scores)
    sizes = {"/".join(path): x.size for path, x in named.items()}
    if scope == "global":
        sizes = {"": sum(sizes.values())}
    given = sparsity if count is None else count
    if jax.tree.structure(given) == jax.tree.structure(0):
        values = [given] * len(sizes)
    elif scope == "global":
        raise ValueError(f"scope='global' needs one count or sparsity for all leaves; got {given!r}.")
    else:
        check_same_leaves(
            jax.tree.map(jnp.zeros_like, given), jax.tree.map(lambda _: jnp.zeros(()), scores), "count", "scores"
        )
        values = jax.tree.leaves(given)
    return [_count(v, size, name, count is None) for v, (name, size) in zip(values, sizes.items(), strict=True)]


def _count(value: Any, size: int, name: str, is_sparsity: bool) -> Any:
    if not isinstance(value, int | float | np.number):
        return value
    limit = 1 if is_sparsity else size
    if not 0 <= value <= limit:
        what = "sparsity" if is_sparsity else "count"
        raise ValueError(f"select needs 0 <= {what} <= {limit} (leaf {name!r}, {size} scores); got {value}.")
    return kept(size, float(value)) if is_sparsity else int(value)


def _image(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats; NaN becomes 0, which no number maps to."""
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    checkify.debug_check(jnp.all(~jnp.isnan(x)), "select: NaN among the scores")
    nan = jnp.isnan(x)
    raw = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros((), x.dtype), x), unsigned)
    sign = jnp.asarray(1 << (bits - 1), unsigned)
    return jnp.where(nan, jnp.zeros((), unsigned), jnp.where(raw >= sign, ~raw, raw | sign))


def _top(images: list, allowed: list, counts: list, scope: Scope) -> list[jax.Array]:
    counts = [jnp.asarray(k, jnp.int32) for k in counts]
    floor = _bisect(
        lambda at: _totals([_at_least(i, m, t) for i, m, t in _each(images, allowed, at)], scope),
        [i.dtype for i in (images[:1] if scope == "global" else images)],
        counts,
    )
    threshold = list(floor) * (len(images) if scope == "global" else 1)
    above = [_among(i > t, m) for i, m, t in zip(images, allowed, threshold, strict=True)]
    ties = [_among(i == t, m) for i, m, t in zip(images, allowed, threshold, strict=True)]
    room = [k - n for k, n in zip(counts, _totals(above, scope), strict=True)]
    fits = jnp.stack([n <= r for n, r in zip(_totals(ties, scope), room, strict=True)]).all()
    chosen = jax.lax.cond(fits, lambda: ties, lambda: _lowest(ties, room, scope))
    return [a | c for a, c in zip(above, chosen, strict=True)]


def _each(images: list, allowed: list, at: list):
    return zip(images, allowed, at * (len(images) // len(at)), strict=True)


def _at_least(image: jax.Array, allowed: jax.Array | None, threshold: jax.Array) -> jax.Array:
    return _among(image >= threshold, allowed)


def _among(mask: jax.Array, allowed: jax.Array | None) -> jax.Array:
    return mask if allowed is None else mask & allowed


def _totals(masks: list[jax.Array], scope: Scope) -> list[jax.Array]:
    sums = [jnp.sum(m, dtype=jnp.int32) for m in masks]
    return [sum(sums[1:], sums[0])] if scope == "global" else sums


def _bisect(count_at_least, dtypes: list, counts: list) -> list[jax.Array]:
    """Per group, the largest integer t with ``count_at_least(t) >= count``; t = 0 counts everything."""
    bits = [jnp.iinfo(dtype).bits for dtype in dtypes]

    def body(step, at):
        trial = [
            t
            | jnp.where(
                step < b, jnp.asarray(1, t.dtype) << jnp.asarray(b - 1 - jnp.minimum(step, b - 1), t.dtype), 0
            ).astype(t.dtype)
            for t, b in zip(at, bits, strict=True)
        ]
        return [
            jnp.where(total >= k, new, old)
            for total, k, new, old in zip(count_at_least(trial), counts, trial, at, strict=True)
        ]

    return jax.lax.fori_loop(0, max(bits), body, [jnp.zeros((), dtype) for dtype in dtypes])


def _lowest(ties: list[jax.Array], room: list[jax.Array], scope: Scope) -> list[jax.Array]:
    """The first ``room`` true entries in index order: again a bisection, now on the index."""
    offset, indices = 0, []
    for tie in ties:
        indices.append(_index(tie) + jnp.uint32(offset))
        offset += tie.size if scope == "global" else 0
    # The largest reversed index t with at least `room` ties at or beyond it, i.e. the room-th tie from the front.
    backward = [~index for index in indices]
    groups = 1 if scope == "global" else len(ties)
    at = _bisect(
        lambda at: _totals([_at_least(b, t, a) for b, t, a in _each(backward, ties, at)], scope),
        [jnp.uint32] * groups,
        room,
    )
    return [
        (b >= a) & t & (r > 0)
        for b, t, a, r in zip(backward, ties, at * (len(ties) // groups), room * (len(ties) // groups), strict=True)
    ]


def _index(like: jax.Array) -> jax.Array:
    """Row-major index of every entry, sharded as the array itself."""
    index = jnp.zeros_like(like, jnp.uint32)
    for axis, stride in enumerate(np.cumprod([1, *like.shape[:0:-1]])[::-1][: like.ndim]):
        position = jnp.arange(like.shape[axis], dtype=jnp.uint32) * jnp.uint32(stride)
        index = index + jnp.expand_dims(position, [a for a in range(like.ndim) if a != axis])
    return index

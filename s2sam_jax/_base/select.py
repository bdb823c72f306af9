"""Exact top-k masks without sorting: bisection on the integer image of the scores.

A floating number's bits, read as an integer (with negatives flipped), have the order of the numbers, and the largest
of many integers are found by counting.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from s2sam_jax._base.bisect import largest
from s2sam_jax._base.blocks import all_in_block, best_of_groups, pool, spread
from s2sam_jax._base.counts import kept, rounded_down
from s2sam_jax._base.structure import NM, UNSTRUCTURED, Block, Channel, Structure, check_fits, check_structure, same
from s2sam_jax._base.tree import at_least_f32, by_name, check_same_leaves, explicit_sharding, map_named
from s2sam_jax._base.types import Masks

Scope = Literal["leaf", "global"]
LARGE = 1 << 22  # entries, 16 MiB of random scores


def select(
    scores: Any,
    *,
    count: Any = None,
    sparsity: Any = None,
    among: Masks | None = None,
    scope: Scope = "leaf",
    structure: Structure = UNSTRUCTURED,
) -> Masks:
    r"""Masks of the largest scores, with exactly the requested number of ones.

    .. math:: m_i = 1 \iff \#\{j : s_j > s_i\} + \#\{j < i : s_j = s_i\} < k

    Ties go to the lower index (row-major in a leaf; leaves in tree order). ``-0.0`` equals ``0.0``. NaN ranks
    below every number; under ``jax.experimental.checkify`` it is an error instead.

    Args:
      scores: pytree of floating arrays (bfloat16, float16, float32, float64), any shapes.
      count: how many to keep, ``0 <= count <= size``: a tree of integers like ``scores``, or one integer for every
        leaf; with ``scope="global"``, one integer for the total. Integers may be traced.
      sparsity: instead of ``count``, the fraction of zeros in ``[0, 1]``: keeps ``N - floor(sparsity * N)``.
      among: bool tree like ``scores``; only these entries may be chosen. If fewer than ``count`` are eligible, all
        of them are chosen.
      scope: rank within each leaf, or over all leaves together (in the widest of their types; casting to it may lose
        subnormals).
      structure: ``Block(...)`` or ``Channel(...)`` select whole units by their pooled scores, and count in units;
        a unit is eligible if all its entries are. ``NM(n, m)`` selects the best ``n`` of each group, which fixes the
        count: omit ``count``, ``sparsity`` and ``scope``.

    Returns:
      Bool masks with the structure and shapes of ``scores``.

    Raises:
      ValueError: for neither or both of ``count`` and ``sparsity``, for values out of range, a tree in ``among``
        that does not match, or leaves that the structure does not divide.
      TypeError: for scores that are not floating-point.

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
    check_structure(structure)
    check_fits(structure, {name: x.shape for name, x in by_name(scores).items()})
    if isinstance(structure, NM):
        _check_count_of_groups(structure, count, sparsity)
        everywhere = [jnp.ones_like(x, dtype=bool) for x in leaves]
        eligible = everywhere if among is None else jax.tree.leaves(among)
        return treedef.unflatten(best_in_groups(leaves, structure, eligible, taken=[~m for m in everywhere]))
    if isinstance(structure, Block | Channel):
        return _select_units(scores, structure, among, count=count, sparsity=sparsity, scope=scope)
    counts = _counts(scores, count, sparsity, scope)
    allowed = [None] * len(leaves) if among is None else [jnp.asarray(m, bool) for m in jax.tree.leaves(among)]
    if scope == "global":
        common = jnp.result_type(*(x.dtype for x in leaves))  # of the types alone: weak ones would be rounded
        leaves = [x.astype(common) for x in leaves]
    return treedef.unflatten(_largest(leaves, allowed, counts, scope))


def _select_units(scores: Any, structure: Block | Channel, among: Masks | None, **options: Any) -> Masks:
    """Masks of whole units, selected by their pooled scores."""
    leaves, treedef = jax.tree.flatten(scores)
    units = treedef.unflatten(map_alike(lambda x: pool(x, structure), leaves))
    if among is not None:
        among = treedef.unflatten(map_alike(lambda m: all_in_block(m, structure), jax.tree.leaves(among)))
    chosen = jax.tree.leaves(select(units, among=among, **options))
    return treedef.unflatten(map_alike(lambda m, x: spread(m, structure, x), chosen, leaves))


@partial(jax.jit, static_argnames="scope")  # for calls from Python, such as tx.init: one program, not several a shape
def _largest(leaves: list[Any], allowed: list[Any], counts: list[jax.Array], scope: Scope) -> list[jax.Array]:
    """Stacks leaves of one type, takes the largest of every row, and puts the masks back in order."""
    alike = _alike(leaves)
    order = [index for indices in alike for index in indices]
    bits = max(jnp.finfo(x.dtype).bits for x in leaves)
    # Stacked after conversion; the other way round, memory would hold both.
    images = [_image(x, mask, bits) for x, mask in zip(leaves, allowed, strict=True)]
    sizes = np.array([leaf.size for leaf in leaves], np.uint32)
    first = sizes if scope == "leaf" else np.cumsum(sizes[::-1], dtype=np.uint32)[::-1]
    chosen = largest(
        [_stack(images, indices) for indices in alike],
        jnp.stack(counts[:1] if scope == "global" else [counts[index] for index in order]),
        [jnp.asarray(first[indices]) for indices in alike],
    )
    # By index: iterating over an array would bring its rows to one device.
    masks = dict(zip(order, (stacked[row] for stacked in chosen for row in range(len(stacked))), strict=True))
    return [masks[index] for index in range(len(leaves))]


def keep_best(
    scores: list[jax.Array], count: int | jax.Array, at_least: list[int], among: list[jax.Array]
) -> list[jax.Array]:
    """The best ``count`` of all leaves together, after the best ``at_least`` of each leaf."""
    reserved = select(scores, count=at_least, among=among)
    others = [a & ~r for a, r in zip(among, reserved, strict=True)]
    rest = jnp.maximum(count - sum(ones(reserved)), 0)
    chosen = select(scores, count=rest, among=others, scope="global")
    return [jnp.logical_or(r, c) for r, c in zip(reserved, chosen, strict=True)]


def ones(masks: list[Any]) -> list[jax.Array]:
    """Ones per mask, int32[]."""
    return map_alike(lambda mask: jnp.sum(mask, dtype=jnp.int32), masks)


def best_in_groups(
    scores: list[jax.Array], structure: NM, among: list[jax.Array], taken: list[jax.Array]
) -> list[jax.Array]:
    """The best eligible entries of every group: ``n`` less those already taken there."""

    def best(x, allowed, taken):
        return best_of_groups(_image(x, allowed, jnp.finfo(x.dtype).bits), structure, taken)

    return map_alike(best, scores, among, taken)


def map_alike(fn: Callable[..., jax.Array], *columns: list[Any]) -> list[jax.Array]:
    """``fn`` on corresponding leaves of the columns; leaves of one type are stacked and mapped at once."""
    done: dict[int, jax.Array] = {}
    for indices in _alike(*columns):
        stacked = jax.vmap(fn)(*(_stack(column, indices) for column in columns))
        done |= {index: stacked[row] for row, index in enumerate(indices)}
    return [done[index] for index in range(len(columns[0]))]


def _alike(*columns: list[Any]) -> list[list[int]]:
    """Indices of leaves, grouped by type, so that what is stacked is compiled once for each type."""
    groups: dict[Any, list[int]] = {}
    for index, leaves in enumerate(zip(*columns, strict=True)):
        groups.setdefault(tuple(map(jax.typeof, leaves)), []).append(index)
    return list(groups.values())


def _stack(leaves: list[Any], indices: list[int]) -> jax.Array:
    return jnp.stack([leaves[index] for index in indices])


def random_scores(key: jax.Array, like: Any) -> Any:
    """Uniform [0, 1) float32 scores shaped (and sharded) like a tree; the same however it is sharded.

    Small leaves share one draw, since the generator takes long to compile for each shape. Pieces of a draw that is
    sharded have to be moved between devices, so large leaves get draws of their own.
    """
    leaves, treedef = jax.tree.flatten(like)
    small = [index for index, leaf in enumerate(leaves) if leaf.size < LARGE]
    pieces = dict(zip(small, _uniform(key, tuple(leaves[index].shape for index in small)), strict=True))

    def score(index, leaf):
        sharding = explicit_sharding(leaf)
        if index not in pieces:
            own = jax.random.fold_in(key, index)
            return jax.random.uniform(own, leaf.shape, jnp.float32, out_sharding=sharding)
        return pieces[index] if sharding is None else jax.sharding.reshard(pieces[index], sharding)

    return treedef.unflatten([score(index, leaf) for index, leaf in enumerate(leaves)])


@partial(jax.jit, static_argnames="shapes")
def _uniform(key: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """One draw, cut up."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = jnp.split(jax.random.uniform(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1]) if sizes else []
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _check_scores(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"select needs floating scores; leaf {name!r} has dtype {x.dtype}.")


def _check_count_of_groups(structure: NM, count: Any, sparsity: Any) -> None:
    given = jax.tree.leaves(sparsity)
    if count is not None or any(isinstance(s, Tracer) or not same(s, structure.sparsity) for s in given):
        raise ValueError(
            f"{structure} says how many to keep: leave count and sparsity out, or give "
            f"sparsity={structure.sparsity:g}; got count={count}, sparsity={sparsity}."
        )


def _counts(scores: Any, count: Any, sparsity: Any, scope: Scope) -> list[jax.Array]:
    """The number to keep, per leaf; in global scope the same total for each."""
    if (count is None) == (sparsity is None):
        raise ValueError("select needs exactly one of count and sparsity.")
    sizes = {name: x.size for name, x in by_name(scores).items()}
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
    if (size := max(sizes.values())) >= 2**31:
        raise ValueError(
            f"select counts in int32, and {size} scores are to be ranked together: rank leaf by leaf, or cut leaves up."
        )
    counts = [_count(v, size, name, count is None) for v, (name, size) in zip(values, sizes.items(), strict=True)]
    return [jnp.asarray(k, jnp.int32) for k in counts]


def _count(value: Any, size: int, name: str, is_sparsity: bool) -> Any:
    """A checked number to keep; a traced one cannot be checked, and a traced sparsity is at least float32."""
    what = "sparsity" if is_sparsity else "count"
    if jnp.ndim(value):
        raise ValueError(
            f"select needs one {what} for a leaf; that of {name!r} has shape {jnp.shape(value)}. To rank each column "
            "by itself, make the columns leaves: jnp.stack(select(list(scores.T), count=...), axis=-1)."
        )
    if isinstance(value, Tracer):
        return size - rounded_down(at_least_f32(value) * size) if is_sparsity else value
    limit = 1 if is_sparsity else size
    if not 0 <= value <= limit:
        raise ValueError(f"select needs 0 <= {what} <= {limit} (leaf {name!r}, {size} scores); got {value}.")
    if not is_sparsity and value != int(value):
        raise ValueError(f"select needs whole counts (leaf {name!r}); got {value}.")
    return kept(size, value) if is_sparsity else int(value)


def _image(x: jax.Array, allowed: jax.Array | None, bits: int) -> jax.Array:
    """Positive integers of ``bits`` in the order of the floats, NaN lowest; 0 where an entry may not be chosen."""
    checkify.debug_check(jnp.all(~jnp.isnan(x)), "select: NaN among the scores")
    own = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{own}")
    sign = jnp.asarray(1 << (own - 1), unsigned)
    raw = jax.lax.bitcast_convert_type(x, unsigned)
    # -0.0 becomes 0.0, on integers: as floats, XLA would flush subnormals to zero with it.
    raw = jnp.where(raw == sign, jnp.zeros((), unsigned), raw)
    ordered = jnp.where(jnp.isnan(x), jnp.ones((), unsigned), jnp.where(raw >= sign, ~raw, raw | sign))
    eligible = ordered if allowed is None else jnp.where(allowed, ordered, jnp.zeros((), unsigned))
    return eligible.astype(f"uint{bits}") << (bits - own)

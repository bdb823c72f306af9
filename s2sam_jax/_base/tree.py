"""Pytree helpers. Leaves of different trees are matched by key path, so wrappers and subsets need no special case."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax._base.types import Masks

T = TypeVar("T")

SMALL = 1 << 16  # entries; stacking large leaves takes memory, and moves data between devices if their shardings differ
BOXED = jax.tree_util.GetAttrKey("value")  # the one field of Flax's variables and boxes


def leaf_name(key_path: Any) -> str:
    """``"a/b/kernel"``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_nodes(tree: Any) -> list[tuple[str, Any]]:
    """The leaves with their names, and what stands for leaves that are elsewhere or hidden.

    A trailing ``.value``, which Flax's variables and boxes add, is left out of names; a field ``value`` beside others,
    as of attention, is not theirs.
    """
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_holds_nothing)
    fields: dict[Any, set[Any]] = {path[:-1]: set() for path, _ in nodes if path and path[-1] == BOXED}
    if fields:
        for path, _ in nodes:
            for depth, entry in enumerate(path):
                fields.get(path[:depth], set()).add(entry)
    return [(leaf_name(path[:-1] if fields.get(path[:-1]) == {BOXED} else path), node) for path, node in nodes]


def _holds_nothing(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in order.

    Raises:
      ValueError: if two leaves have the same name, as in ``{"a/b": x, "a": {"b": y}}``.
    """
    leaves = [(name, node) for name, node in named_nodes(tree) if not _holds_nothing(node)]
    found = dict(leaves)
    if len(found) < len(leaves):
        names = [name for name, _ in leaves]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"Leaves are told apart by their names, and several are called {twice}; rename them.")
    return found


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` whose function gets the leaf's name as its first argument."""
    treedef = jax.tree.structure(tree)
    named = (row for row in named_nodes(tree) if not _holds_nothing(row[1]))
    columns = map(treedef.flatten_up_to, rest)
    return treedef.unflatten([fn(*row, *others) for row, *others in zip(named, *columns, strict=True)])


def align(tree: Any, like: Any) -> Any:
    """``tree`` cut down to the leaves of ``like`` (which may lack some, as inside ``optax.masked``)."""
    leaves = by_name(tree)
    return map_named(lambda path, _: leaves[path], like)


def check_same_leaves(tree: Any, like: Any, name: str, like_name: str) -> None:
    """Raises a ``ValueError`` that lists every leaf in which two trees differ by path or shape."""
    check_same_named(by_name(tree), by_name(like), name, like_name)


def check_same_named(have: dict[str, Any], want: dict[str, Any], name: str, like_name: str) -> None:
    """As :func:`check_same_leaves`, for leaves by path."""
    problems = [f"{path}: missing in {name}" for path in want.keys() - have.keys()]
    problems += [f"{path}: not in {like_name}" for path in have.keys() - want.keys()]
    problems += [
        f"{path}: shape {jnp.shape(have[path])} in {name}, {jnp.shape(want[path])} in {like_name}"
        for path in want.keys() & have.keys()
        if jnp.shape(have[path]) != jnp.shape(want[path])
    ]
    if problems:
        raise ValueError(f"{name} must have the leaves of {like_name}, but:\n  " + "\n  ".join(sorted(problems)))


def find_states(tree: Any, kind: type[T] | tuple[type[T], ...]) -> list[T]:
    """All outermost states of a type, or of several, wherever wrappers have put them."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def map_states(fn: Callable[[T], Any], tree: Any, kind: type[T]) -> Any:
    """Replaces every state of a type by ``fn(state)``."""
    return jax.tree.map(lambda x: fn(x) if isinstance(x, kind) else x, tree, is_leaf=lambda x: isinstance(x, kind))


def explicit_sharding(leaf: jax.Array) -> Any:
    """The sharding of an array if it is part of its type, otherwise ``None``."""
    sharding = jax.typeof(leaf).sharding
    return sharding if any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types) else None


def check_real(params: Any, caller: str) -> None:
    """Raises a ``TypeError`` that names the complex leaves."""
    if wrong := [name for name, p in by_name(params).items() if jnp.iscomplexobj(p)]:
        raise TypeError(
            f"{caller}: these parameters are complex: {wrong}. Take their real and imaginary parts, as gradients of "
            "complex parameters point the other way."
        )


def scalar(x: Any) -> jax.Array:
    """The one array inside ``x``: a bare one, or one that Flax NNX has wrapped in a variable."""
    return jax.tree.leaves(x)[0]


def own_key(seed: int | jax.Array, purpose: str) -> jax.Array:
    """A typed key of the state's own: a caller's key would be lost when the state is donated.

    It is folded with ``purpose``, so that several users of one seed, or of one key, get independent keys.
    """
    if isinstance(seed, int | np.integer):
        seed = jax.random.key(int(seed))  # of any size, which an array's would not be
    elif not jnp.issubdtype(jnp.asarray(seed).dtype, jax.dtypes.prng_key):
        seed = jax.random.wrap_key_data(jnp.array(seed)) if jnp.ndim(seed) else jax.random.key(seed)
    return jax.random.fold_in(seed, zlib.crc32(purpose.encode()))


def fold_keys(tree: Any, index: int | jax.Array) -> Any:
    """A model state with its typed keys folded with ``index``: Flax NNX keeps the keys of dropout there."""

    def fold(x):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(x.reshape(-1), index).reshape(x.shape)

    return jax.tree.map(fold, tree)


def unfold_keys(tree: Any, folded: Any, before: Any) -> Any:
    """The model state with those keys as they were before folding that have come back as they were given."""

    def unfold(x, given, old):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        same = jax.random.key_data(x) == jax.random.key_data(given)
        return jnp.where(jnp.all(same, axis=tuple(range(x.ndim, same.ndim))), old, x)

    return jax.tree.map(unfold, tree, folded, before)


def at_least_f32(x: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32  # float8 promotes to nothing
    return x.astype(jnp.float32 if narrow else jnp.promote_types(x.dtype, jnp.float32))


def norm(tree: Any) -> jax.Array:
    """Global L2 norm, accumulated in float32 or wider. Its derivative at zero is zero, not NaN.

    Small leaves of one type are summed together: accelerators start a kernel or two for every sum.
    """
    alike: dict[Any, list[jax.Array]] = {}
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        alike.setdefault(jax.typeof(leaf) if leaf.size < SMALL else index, []).append(leaf)
    squares = (jnp.sum(jnp.square(jnp.abs(at_least_f32(jnp.stack(leaves))))) for leaves in alike.values())
    square = sum(squares, jnp.zeros((), jnp.float32))
    is_zero = square == 0  # not true of NaN
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def cond(due: bool | jax.Array, yes: Callable[[], T], no: Callable[[], T]) -> T:
    """``lax.cond``; decided in Python where the flag is static."""
    if isinstance(due, bool):
        return yes() if due else no()
    return jax.lax.cond(due, yes, no)


def where(condition: jax.Array, yes: T, no: T) -> T:
    """``jnp.where`` leaf by leaf; what is the very same in both, as a key, stays as it is."""
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(condition, x, y), yes, no)


def masked(masks: Masks, tree: Any) -> Any:
    """Zero where a mask is off. ``where``, not a product: a NaN behind a mask must not survive."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), masks, tree)


def path_keys(path: Any) -> tuple[Any, ...]:
    """Key entries, which tell a module named ``mu`` from Adam's field ``mu``."""
    return tuple(path[:-1] if path and path[-1] == BOXED else path)

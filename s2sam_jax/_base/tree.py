"""Pytree helpers. Leaves of different trees are matched by key path, so wrappers and subsets need no special case."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax._base.types import NEVER, Masks, Unmasked

Path = tuple[str, ...]
T = TypeVar("T")

# Wrappers that hold gradients back, which s2sam must not remember.
HOLDING_BACK = ((optax.MultiStepsState, "MultiSteps"), (optax.ApplyIfFiniteState, "apply_if_finite"))
NNX_VALUE = jax.tree_util.GetAttrKey("value")


def path_names(key_path: Any) -> Path:
    """Key path as strings, without the trailing ``.value`` that Flax NNX variables add."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in _keys(key_path))


def named_leaves(tree: Any) -> dict[Path, Any]:
    """The leaves of a tree by their path, in order."""
    return {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by ``"a/b/kernel"``, the name that users and messages give them, in order."""
    return {"/".join(path): leaf for path, leaf in named_leaves(tree).items()}


def map_paths(fn: Callable[[Path, Any], Any], tree: Any) -> Any:
    """``jax.tree.map`` whose function gets the leaf's path as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_names(path), leaf), tree)


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` whose function gets ``"a/b/kernel"`` as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn("/".join(path_names(path)), *leaves), tree, *rest)


def align(tree: Any, like: Any) -> Any:
    """``tree`` cut down to the leaves of ``like`` (which may lack some, as inside ``optax.masked``)."""
    leaves = named_leaves(tree)
    return map_paths(lambda path, _: leaves[path], like)


def check_same_leaves(tree: Any, like: Any, name: str, like_name: str) -> None:
    """Raises a ``ValueError`` that lists every leaf in which two trees differ by path or shape."""
    check_same_named(named_leaves(tree), named_leaves(like), name, like_name)


def check_same_named(have: dict[Path, Any], want: dict[Path, Any], name: str, like_name: str) -> None:
    """As :func:`check_same_leaves`, for leaves by path."""
    problems = [f"{'/'.join(path)}: missing in {name}" for path in want.keys() - have.keys()]
    problems += [f"{'/'.join(path)}: not in {like_name}" for path in have.keys() - want.keys()]
    problems += [
        f"{'/'.join(path)}: shape {jnp.shape(have[path])} in {name}, {jnp.shape(want[path])} in {like_name}"
        for path in want.keys() & have.keys()
        if jnp.shape(have[path]) != jnp.shape(want[path])
    ]
    if problems:
        raise ValueError(f"{name} must have the leaves of {like_name}, but:\n  " + "\n  ".join(sorted(problems)))


def check_state_of_tx(state: Any, expected: Any, like: str) -> None:
    """Raises a ``ValueError`` where an optimizer state has another structure than a fresh one; ``like`` names that."""
    want, have = jax.tree.structure(expected), jax.tree.structure(state)
    if want != have:
        raise ValueError(
            f"opt_state is not a state of this tx; restore checkpoints into the structure of {like}:\n"
            f"  expected {want}\n  got      {have}"
        )


def find_states(tree: Any, kind: type[T] | tuple[type[T], ...]) -> list[T]:
    """All outermost states of a type, or of several, wherever wrappers have put them."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def map_states(fn: Callable[[T], Any], tree: Any, kind: type[T]) -> Any:
    """Replaces every state of a type by ``fn(state)``."""
    return jax.tree.map(lambda x: fn(x) if isinstance(x, kind) else x, tree, is_leaf=lambda x: isinstance(x, kind))


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """As optax's own, which would keep them from an ``optax.MultiSteps`` that is passed as the object it is."""
    if isinstance(tx, optax.MultiSteps):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def check_nothing_hidden(params: Any, caller: str, advice: str) -> None:
    """Raises a ``TypeError`` where ``optax.masked`` and the like hide leaves from one who takes a gradient at all."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise TypeError(
            f"{caller} takes a gradient at all parameters, and optax.masked or multi_transform hides some from it; "
            f"take it out. {advice}"
        )


def explicit_sharding(leaf: jax.Array) -> Any:
    """The sharding of an array, where it is part of its type; else ``None``."""
    sharding = jax.typeof(leaf).sharding
    return sharding if any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types) else None


def scalar(x: Any) -> jax.Array:
    """The one array inside ``x``: a bare one, or one that Flax NNX has wrapped in a variable."""
    return jax.tree.leaves(x)[0]


def increment(step: jax.Array) -> jax.Array:
    """The next step; saturates, as a counter that wraps would fire its clocks again."""
    return jnp.minimum(step, NEVER - 1) + 1


def copy_key(seed: int | jax.Array, purpose: str) -> jax.Array:
    """A typed key of the state's own: a caller's key would be lost when the state is donated.

    One integer for several purposes, as the default 0, gives them independent keys; a key is taken as it is.
    """
    if isinstance(seed, int | np.integer):  # of any size, which an array's would not be
        return jax.random.fold_in(jax.random.key(int(seed)), zlib.crc32(purpose.encode()))
    if not jnp.issubdtype(jnp.asarray(seed).dtype, jax.dtypes.prng_key):
        if jnp.ndim(seed) == 0:
            return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
        return jax.random.wrap_key_data(jnp.array(seed))
    return jax.random.wrap_key_data(jnp.array(jax.random.key_data(seed)), impl=jax.random.key_impl(seed))


def at_least_f32(x: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32  # float8 promotes to nothing
    return x.astype(jnp.float32 if narrow else jnp.promote_types(x.dtype, jnp.float32))


def norm(tree: Any) -> jax.Array:
    """Global L2 norm, accumulated in float32 or wider. Its derivative at zero is zero, not NaN."""
    square = sum((jnp.sum(jnp.square(jnp.abs(at_least_f32(x)))) for x in jax.tree.leaves(tree)), jnp.zeros(()))
    is_zero = square == 0  # not true of NaN
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def cond(due: bool | jax.Array, yes: Callable[[], T], no: Callable[[], T]) -> T:
    """``lax.cond``; decided in Python where the flag is static."""
    if isinstance(due, bool):
        return yes() if due else no()
    return jax.lax.cond(due, yes, no)


def masked(masks: Masks, tree: Any) -> Any:
    """Zero where a mask is off. ``where``, not a product: a NaN behind a mask must not survive."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), masks, tree)


def mask_mirrored(masks: Masks, state: Any) -> Any:
    """The state rule: zero, off the mask, every floating state leaf that mirrors a parameter."""
    return map_mirrored(lambda mask, leaf: jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)), masks, state)


def start_mirrored(grown: Masks, state: Any, fresh: Any) -> Any:
    """What has just grown starts as the optimizer does: from zero, or for some, as the step sizes of Rprop, not."""
    return map_mirrored(lambda mask, leaf, start: jnp.where(mask, start.astype(leaf.dtype), leaf), grown, state, fresh)


def map_mirrored(fn: Callable[..., jax.Array], masks: Masks, state: Any, *rest: Any) -> Any:
    """``fn(mask, leaf, ...)`` on every floating state leaf that mirrors a parameter; the others stay.

    A subtree of the parameters' structure mirrors them leaf by leaf. Elsewhere, as in the cut trees of
    ``optax.masked``, a leaf mirrors the parameter whose key path is the longest suffix of its own. Shapes must agree.
    This holds for any optimizer, with no list of known states; ``Unmasked`` trees are left alone.
    """
    structure = jax.tree.structure(masks)
    by_keys = {_keys(path): mask for path, mask in jax.tree_util.tree_leaves_with_path(masks)}

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
        keys = _keys(path)
        suffixes = (keys[start:] for start in range(len(keys) + 1))
        return one(next((by_keys[suffix] for suffix in suffixes if suffix in by_keys), None), node, *others)

    return jax.tree_util.tree_map_with_path(rule, state, *rest, is_leaf=is_whole)


def _keys(path: Any) -> tuple[Any, ...]:
    """Key entries, which tell a module named ``mu`` from Adam's field ``mu``."""
    return tuple(path[:-1] if path and path[-1] == NNX_VALUE else path)

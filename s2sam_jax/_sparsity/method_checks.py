"""Checks of what a sparse method returns against what it promises."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from s2sam_jax._base.select import ones, select
from s2sam_jax._base.structure import NM
from s2sam_jax._base.tree import by_name, check_same_leaves
from s2sam_jax._base.types import Invariant, MaskInputs, MaskUpdate, Rank, SparseMethod
from s2sam_jax._sparsity.plan import sparse_leaves


def check_method(method: Any) -> None:
    if not isinstance(method, SparseMethod):
        raise TypeError(f"sparsify needs a SparseMethod, such as methods.rigl(); got {method!r}.")
    if method.invariant not in get_args(Invariant):
        raise ValueError(f"A SparseMethod's invariant is one of {get_args(Invariant)}; got {method.invariant!r}.")
    if method.ranks not in get_args(Rank):
        raise ValueError(f"A SparseMethod's ranks is one of {get_args(Rank)}; got {method.ranks!r}.")


def check_returned(new: Any, x: MaskInputs, caller: str) -> MaskUpdate:
    """What can be seen while it is traced: types, leaves and shapes."""
    if not isinstance(new, MaskUpdate):
        raise TypeError(f"A method's {caller} must return MaskUpdate(masks, state, ...); got a {type(new).__name__}.")
    for name, tree in (("masks", new.masks), ("restart", new.restart), ("values", new.values)):
        if tree is not None or name == "masks":
            check_same_leaves(tree, x.masks, f"the {name} of the method's {caller}", "params")
    for name, tree in (("masks", new.masks), ("restart", new.restart)):
        if wrong := {path: str(leaf.dtype) for path, leaf in by_name(tree).items() if leaf.dtype != jnp.bool_}:
            raise TypeError(f"The {name} of a method's {caller} must be bool; got {wrong}.")
    if new.values is not None:
        check_alike("values", new.values, x.params)
    if new.inner_state is not None:
        check_alike("inner_state", new.inner_state, x.inner_state)
    return new


def check_alike(name: str, new: Any, before: Any) -> None:
    """What a method replaces keeps its structure, shapes and types, or the next step would be another program."""
    want, got = (jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", t) for t in (before, new))
    told = f"A method's update must return a {name} like the one it is given"
    if jax.tree.structure(want) != jax.tree.structure(got):
        raise ValueError(f"{told}, {want}; got {got}.")
    pairs = zip(by_name(want).items(), jax.tree.leaves(got), strict=True)
    if wrong := [f"{path or name}: {is_now}, not {was}" for (path, was), is_now in pairs if is_now != was]:
        raise ValueError(f"{told}, but:\n  " + "\n  ".join(wrong))


def check_invariant(method: SparseMethod, x: MaskInputs, new: MaskUpdate) -> None:
    """Under ``checkify``, by the ones of each leaf: the invariant, and that what is planned to be dense stays so."""
    if method.invariant == "bounded":  # as of channel methods, which prune the scales of norms too
        return
    before, now = jnp.array(jax.tree.leaves(x.nnz), jnp.int32), jnp.array(ones(jax.tree.leaves(new.masks)), jnp.int32)
    planned = np.array(jax.tree.leaves(x.sparsities))
    sizes = np.array([mask.size for mask in jax.tree.leaves(new.masks)])
    counts = "ones of each leaf: {now}, before: {before}"
    dense = jnp.all((planned > 0) | (now == sizes) | (before != sizes))  # set_masks may have pruned it
    told = f"a method's update must leave the masks of dense leaves all true; {counts}"
    checkify.debug_check(dense, told, now=now, before=before)
    if method.invariant == "monotone" or not getattr(x.structure, "pad", False):  # else units differ in size
        told = f"a method's update broke its invariant {method.invariant!r}; {counts}"
        checkify.debug_check(_holds(method.invariant, x, new, before, now), told, now=now, before=before)
    if method.invariant == "per_layer" and isinstance(x.structure, NM):
        masks = sparse_leaves(x, new.masks)  # of a group that is too full, select leaves some behind
        fits = select([jnp.float32(m) for m in masks], structure=x.structure, among=masks)
        kept = jnp.array([jnp.array_equal(m, f) for m, f in zip(masks, fits, strict=True)], bool)
        checkify.debug_check(jnp.all(kept), f"a method's update left more weights in a group than {x.structure} allows")


def _holds(invariant: str, x: MaskInputs, new: MaskUpdate, before: jax.Array, now: jax.Array) -> jax.Array:
    if invariant == "per_layer":
        return jnp.all(now == before)
    if invariant == "total":
        return jnp.sum(now - before) == 0
    grown = jax.tree.map(lambda mask, was: jnp.any(mask & ~was), new.masks, x.masks)
    return ~jnp.any(jnp.array(jax.tree.leaves(grown), bool))

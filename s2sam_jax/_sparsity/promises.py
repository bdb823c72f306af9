"""What a sparse method returns, held against what it promises."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from s2sam_jax._base.structure import Unstructured
from s2sam_jax._base.tree import by_name, check_same_leaves
from s2sam_jax._base.types import Invariant, MaskInputs, MaskUpdate, SparseMethod


def check_method(method: Any) -> None:
    if not isinstance(method, SparseMethod):
        raise TypeError(f"sparsify needs a SparseMethod, such as methods.rigl(); got {method!r}.")
    if method.invariant not in get_args(Invariant):
        raise ValueError(f"A SparseMethod's invariant is one of {get_args(Invariant)}; got {method.invariant!r}.")


def check_returned(new: Any, x: MaskInputs, state: Any = None) -> MaskUpdate:
    """What can be seen while it is traced: types, leaves and shapes. ``state`` is that of before, after ``init``."""
    caller = "init" if state is None else "update"
    if not isinstance(new, MaskUpdate):
        raise TypeError(f"A method's {caller} must return MaskUpdate(masks, state, ...); got a {type(new).__name__}.")
    check_same_leaves(new.masks, x.masks, f"the masks of the method's {caller}", "params")
    if wrong := {name: str(mask.dtype) for name, mask in by_name(new.masks).items() if mask.dtype != jnp.bool_}:
        raise TypeError(f"The masks of a method's {caller} must be bool; got {wrong}.")
    if state is not None and jax.tree.structure(new.state) != jax.tree.structure(state):
        raise ValueError(
            f"A method's update must return a state like the one it is given, {jax.tree.structure(state)}; "
            f"got {jax.tree.structure(new.state)}."
        )
    return new


def check_kept(method: SparseMethod, x: MaskInputs, new: MaskUpdate, before: jax.Array, now: jax.Array) -> None:
    """Under ``checkify``, by the ones of each leaf: the invariant, and that what is planned to be dense stays so."""
    planned = np.array(jax.tree.leaves(x.sparsities))
    sizes = np.array([mask.size for mask in jax.tree.leaves(new.masks)])
    counts = "ones of each leaf: {now}, before: {before}"
    dense = jnp.all((planned > 0) | (now == sizes) | (before != sizes))  # set_masks may have pruned it
    told = f"a method's update must leave the masks of dense leaves all true; {counts}"
    checkify.debug_check(dense, told, now=now, before=before)
    if isinstance(x.structure, Unstructured):
        told = f"a method's update broke its invariant {method.invariant!r}; {counts}"
        checkify.debug_check(_holds(method.invariant, x, new, before, now), told, now=now, before=before)


def _holds(invariant: str, x: MaskInputs, new: MaskUpdate, before: jax.Array, now: jax.Array) -> jax.Array:
    if invariant == "per_layer":
        return jnp.all(now == before)
    if invariant == "total":
        return jnp.sum(now - before) == 0
    if invariant == "monotone":
        grown = jax.tree.map(lambda mask, was: jnp.any(mask & ~was), new.masks, x.masks)
        return ~jnp.any(jnp.array(jax.tree.leaves(grown), bool))
    return jnp.array(True)

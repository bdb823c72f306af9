"""Leaves that stack layers, as ``lax.scan`` takes them: distributions, methods and structures see single layers."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax._base.select import ones
from s2sam_jax._base.tree import by_name, map_named, named_nodes
from s2sam_jax._base.types import GradFn, MaskInputs, MaskUpdate, Params

Stacked = Mapping[str, int | tuple[int, ...]]  # the axis of the layers, or several axes, by path pattern
Axes = dict[str, tuple[int, ...]]  # the same by path of a leaf


def check_stacked(stacked: Any) -> Axes:
    """The axes by path pattern; none for ``None``."""
    if stacked is None:
        return {}
    if isinstance(stacked, Mapping) and all(isinstance(pattern, str) for pattern in stacked):
        axes = {pattern: axis if isinstance(axis, tuple) else (axis,) for pattern, axis in stacked.items()}
        if all(several and all(map(_is_axis, several)) for several in axes.values()):
            return axes
    raise TypeError(
        "stacked maps path patterns to the axis of the layers, as {'layers/*': 0}, or to several, as "
        f"{{'layers/experts/*': (0, 1)}}; got {stacked!r}."
    )


def _is_axis(axis: Any) -> bool:
    return isinstance(axis, int | np.integer) and not isinstance(axis, bool)


def layers_of(tree: Any, stacked: Axes) -> Any:
    """The tree with its stacks cut up: a dict by name, where layer 3 of ``a/kernel`` is ``a/3/kernel``.

    The number stands before the last part, which tells kernels from biases; of several axes, one number each.
    """
    if not stacked:
        return tree
    leaves = by_name(tree)
    axes = _axes(leaves, stacked)
    layers = _hidden(tree) | {name: leaf for name, leaf in leaves.items() if name not in axes}
    for name, own in axes.items():
        cut = jnp.moveaxis(leaves[name], own, range(len(own)))
        numbered = {_numbered(name, index): cut[index] for index in np.ndindex(cut.shape[: len(own)])}
        if twice := sorted(numbered.keys() & layers.keys()):
            raise ValueError(
                f"Layers of the stacked leaf {name!r} are called {twice}, and so are other leaves; rename one of the "
                "two, or put one into a dict of its own."
            )
        layers |= numbered
    return layers


def _hidden(tree: Any) -> dict[str, optax.MaskedNode]:
    """What stands where a wrapper hides a leaf, by which methods know of it."""
    return {name: node for name, node in named_nodes(tree) if isinstance(node, optax.MaskedNode)}


def inputs_in_layers(x: MaskInputs, stacked: Axes) -> MaskInputs:
    """What a method is given, layer by layer; the planned sparsities are so already."""
    if not stacked:
        return x
    masks = layers_of(x.masks, stacked)
    return x._replace(
        params=layers_of(x.params, stacked),
        masks=masks,
        grads=None if x.grads is None else layers_of(x.grads, stacked),
        nnz=jax.tree.unflatten(jax.tree.structure(masks), ones(jax.tree.leaves(masks))),
        grad_fn=None if x.grad_fn is None else _of_layers(x.grad_fn, x.params, stacked),
        inner_state=state_in_layers(x.inner_state, x.params, stacked),
    )


def state_in_layers(state: Any, like: Params, stacked: Axes) -> Any:
    """What a state has of the parameters' form, such as earlier weights or momentum, layer by layer."""
    return _each_like(like, state, lambda tree: layers_of(tree, stacked)) if stacked else state


def update_in_leaves(new: MaskUpdate, like: Any, stacked: Axes) -> MaskUpdate:
    """What a method returns, with its layers stacked again: states are then sharded and mapped over as parameters."""
    if not stacked:
        return new

    def restacked(tree):
        return _restacked(tree, like, stacked)

    trees = {"masks": new.masks, "restart": new.restart, "values": new.values}
    states = {"state": new.state, "inner_state": new.inner_state}
    whole = {name: None if tree is None else restacked(tree) for name, tree in trees.items()}
    return new._replace(**whole, **{name: _each_like(new.masks, state, restacked) for name, state in states.items()})


def _each_like(like: Any, state: Any, fn: Callable[[Any], Any]) -> Any:
    """``fn`` of every subtree with the structure and shapes of ``like``."""
    structure, shapes = jax.tree.structure(like), [jnp.shape(leaf) for leaf in jax.tree.leaves(like)]

    def alike(node):
        return jax.tree.structure(node) == structure and [jnp.shape(leaf) for leaf in jax.tree.leaves(node)] == shapes

    return jax.tree.map(lambda node: fn(node) if alike(node) else node, state, is_leaf=alike)


def _of_layers(grad_fn: GradFn, like: Params, stacked: Axes) -> GradFn:
    return lambda layers: layers_of(grad_fn(_restacked(layers, like, stacked)), stacked)


def _restacked(layers: dict[str, Any], like: Any, stacked: Axes) -> Any:
    axes = _axes(by_name(like), stacked)

    def whole(name, leaf):
        if name not in axes:
            return layers[name]
        lengths = [leaf.shape[axis] for axis in axes[name]]
        rows = jnp.stack([layers[_numbered(name, index)] for index in np.ndindex(*lengths)])
        return jnp.moveaxis(rows.reshape(*lengths, *rows.shape[1:]), range(len(lengths)), axes[name])

    return map_named(whole, like)


def _numbered(name: str, index: tuple[int, ...]) -> str:
    module, _, last = name.rpartition("/")
    return "/".join(part for part in (module, *map(str, index), last) if part)  # a bare array has no name


def _axes(leaves: Mapping[str, Any], stacked: Axes) -> Axes:
    """The axes of each stacked leaf; the first pattern that matches wins."""
    found: Axes = {}
    for pattern, axes in stacked.items():
        matches = fnmatch.filter(leaves, pattern)
        if leaves and not matches:
            raise ValueError(f"stacked[{pattern!r}] matches no leaf; they are {sorted(leaves)}.")
        names = [name for name in matches if name not in found]
        if wrong := {name: leaves[name].shape for name in names if not _has(leaves[name], axes)}:
            told = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
            raise ValueError(f"stacked[{pattern!r}] has the layers on {told}, which these leaves lack: {wrong}.")
        found |= dict.fromkeys(names, axes)
    return {name: own for name, own in found.items() if leaves[name].size}  # without layers, nothing to cut


def _has(leaf: Any, axes: tuple[int, ...]) -> bool:
    return all(-leaf.ndim <= a < leaf.ndim for a in axes) and len({a % leaf.ndim for a in axes}) == len(axes)

"""From a network with masked channels to a smaller one without them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from s2sam_jax._base.tree import by_name, check_same_leaves, map_named
from s2sam_jax._base.types import Masks, Params
from s2sam_jax._sparsity.channels import ChannelAxis, ChannelGroup, group_sizes

Cuts = dict[str, dict[int, np.ndarray]]  # by path and axis, the indices to keep
Shapes = Mapping[str, tuple[int, ...]]


class Materialized(NamedTuple):
    """What :func:`materialize` returns.

    Attributes:
      params: the remaining parameters.
      model_state: the model state with the remaining statistics.
      widths: remaining channels by group name, to rebuild the model with.
      masks: masks of the remaining parameters, which may still be sparse.
    """

    params: Params
    model_state: Any
    widths: dict[str, int]
    masks: Masks


def materialize(params: Params, model_state: Any, groups: Sequence[ChannelGroup], masks: Masks) -> Materialized:
    r"""Cuts dead channels out of all leaves, leaving a smaller network that computes the same.

    .. math:: \mathrm{dead}_G[i] = \bigwedge_{(l, a) \in D_G} \neg \bigvee_{j : j_a = i} m_{l,j}

    where :math:`D_G` are the scales and biases of the group: a norm in which they are zero outputs zeros, whatever the
    filters are. In a group without scales, they are its filters and biases. Removed channels must be zero for their
    readers in the sense of :class:`ChannelGroup`. That rules out LayerNorm and GroupNorm, which cannot be told from
    BatchNorm here: their statistics are over channels, so the small network would compute something else. A group keeps
    one channel even if all are dead.

    Runs on the host, as shapes depend on values. Leaves that lose nothing are returned as they are; others are on the
    default device.

    Args:
      params: any pytree of concrete arrays, zero off the masks.
      model_state: the rest of the model, with the statistics that the groups name.
      groups: the channels that may be removed.
      masks: bool tree like ``params``.

    Returns:
      A :class:`Materialized` with the small network's parameters, state, widths and masks.

    Warns:
      UserWarning: naming leaves that a group seems to have forgotten: with one entry per channel, and in one module
        with its filters or scales.

    Raises:
      ValueError: naming leaf and group, if groups do not fit, overlap, or have a norm without scales; if masks have
        other leaves or are not bool; if weights are not zero off their masks; and for traced arrays.

    Reference:
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, §3.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import ChannelGroup, ChannelAxis, materialize
      >>> params = {"a": jnp.array([[1.0, 0.0, 3.0]]), "b": jnp.array([[1.0], [2.0], [0.0]])}
      >>> group = ChannelGroup("hidden", filters=(ChannelAxis("a", -1),), inputs=(ChannelAxis("b", -2),))
      >>> masks = {"a": jnp.array([[True, False, True]]), "b": jnp.array([[True], [True], [False]])}
      >>> small = materialize(params, None, [group], masks)
      >>> print(small.params["a"], small.params["b"].T, small.masks["b"].T, small.widths)
      [[1. 3.]] [[1. 0.]] [[ True False]] {'hidden': 2}
    """
    _check_concrete(params, model_state, masks)
    check_same_leaves(masks, params, "masks", "params")
    group_sizes(params, groups, statistics=model_state)
    shapes, of_statistics = _shapes(params), _shapes(model_state)
    if problems := [*_group_problems(groups, shapes, of_statistics), *_mask_problems(params, masks)]:
        raise ValueError("materialize cannot remove channels:\n  " + "\n  ".join(problems))
    if forgotten := list(_forgotten(groups, shapes, of_statistics)):
        warnings.warn(
            "materialize leaves these whole, as no ChannelGroup names them, and they look as if they had an entry a "
            "channel:\n  " + "\n  ".join(forgotten),
            stacklevel=2,
        )
    live = {name: np.asarray(mask) for name, mask in by_name(masks).items()}
    kept = {group.name: _kept(group, live) for group in groups}
    of_params = _cuts(((part, kept[group.name]) for group in groups for part in group.parameters), shapes)
    of_state = _cuts(((part, kept[group.name]) for group in groups for part in group.statistics), of_statistics)
    return Materialized(
        _sliced(params, of_params),
        _sliced(model_state, of_state),
        {name: len(indices) for name, indices in kept.items()},
        _sliced(masks, of_params),
    )


def _kept(group: ChannelGroup, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Indices of the channels that live, or the first if none does."""
    deciding = (group.scales or group.filters) + group.biases
    by_channel = [np.moveaxis(masks[part.path], part.axis, 0) for part in deciding]
    alive = np.concatenate([mask.reshape(len(mask), -1) for mask in by_channel], axis=1).any(axis=1)
    return np.flatnonzero(alive) if alive.any() else np.zeros(1, int)


def _cuts(parts: Iterator[tuple[ChannelAxis, np.ndarray]], shapes: Shapes) -> Cuts:
    found: Cuts = {}
    for part, indices in parts:
        found.setdefault(part.path, {})[part.axis % len(shapes[part.path])] = indices
    return found


def _sliced(tree: Any, cuts: Cuts) -> Any:
    def cut(name: str, leaf: Any) -> Any:
        fewer = {axis: kept for axis, kept in cuts.get(name, {}).items() if len(kept) < leaf.shape[axis]}
        if not fewer:
            return leaf
        small = np.asarray(leaf)
        for axis, kept in fewer.items():
            small = np.take(small, kept, axis)
        return jnp.asarray(small) if isinstance(leaf, jax.Array) else small

    return map_named(cut, tree)


def _check_concrete(*trees: Any) -> None:
    traced = [name for tree in trees for name, leaf in by_name(tree).items() if isinstance(leaf, Tracer)]
    if traced:
        raise ValueError(
            f"materialize must be called outside jit, as shapes depend on the values of masks; traced: {traced}."
        )


def _shapes(tree: Any) -> Shapes:
    return {name: leaf.shape for name, leaf in by_name(tree).items()}


def _group_problems(groups: Sequence[ChannelGroup], shapes: Shapes, of_statistics: Shapes) -> Iterator[str]:
    owners: dict[tuple[bool, str, int], str] = {}
    for group in groups:
        if group.statistics and not group.scales:
            yield f"{group.name}: has statistics but no scales; without one, a norm of zeros puts out its running mean"
        parts = [(part, shapes) for part in group.parameters] + [(part, of_statistics) for part in group.statistics]
        for part, lengths in parts:
            axis = part.axis % len(lengths[part.path])
            owner = owners.setdefault((lengths is shapes, part.path, axis), group.name)
            if owner != group.name:
                yield f"{part.path}: axis {axis} is in two groups, {owner} and {group.name}"


def _forgotten(groups: Sequence[ChannelGroup], shapes: Shapes, of_statistics: Shapes) -> Iterator[str]:
    """Leaves without a group beside a filter or a scale, in one module, that are as long as the channels."""
    named = {part.path for group in groups for part in (*group.parameters, *group.statistics)}
    for group in groups:
        modules = {_module(part.path) for part in (*group.filters, *group.scales)} - {""}
        first = group.filters[0]
        size = shapes[first.path][first.axis]
        for name, shape in (*shapes.items(), *of_statistics.items()):
            # Statistics may lie in a collection of their own, as batch_stats/norm/mean.
            beside = any(f"/{_module(name)}".endswith(f"/{module}") for module in modules)
            if name not in named and shape == (size,) and beside:
                yield f"{name}, beside the group {group.name}"


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _mask_problems(params: Params, masks: Masks) -> Iterator[str]:
    weights = by_name(params)
    for name, mask in by_name(masks).items():
        if mask.dtype != np.bool_:
            yield f"{name}: its mask must be bool; got {mask.dtype}"
        elif stray := np.count_nonzero(np.asarray(weights[name])[~np.asarray(mask)]):
            yield f"{name}: {stray} weights are masked but not zero; call apply_masks(params, opt_state)"

"""Channels that live and die together: the filters that compute one, its norm, and the layers that read it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.tree import by_name, map_named
from s2sam_jax._base.types import Masks, Params


class ChannelAxis(NamedTuple):
    """An axis of a leaf that runs over channels: ``ChannelAxis("conv1/kernel", -1)`` is that of its filters."""

    path: str
    axis: int


class ChannelGroup(NamedTuple):
    """Slices of several leaves that share one channel index, so that a channel can be removed from all at once.

    Zeroing a channel's slices must make its activation exactly zero at every layer that consumes it: whatever lies in
    between must map zero to zero (ReLU, swish, pooling) and add nothing. Removing a channel must not change the others,
    so norms must keep statistics per channel, as BatchNorm does; LayerNorm, RMSNorm and GroupNorm average over channels
    and do not qualify. The residual stream, which every block consumes and adds to, is best left out.

    Attributes:
      name: the name of the group, as in the ``widths`` of :func:`materialize`.
      filters: kernels that compute the channels, along their output axis, and depthwise kernels in between; the first
        one is the leading filter.
      scales: scales of the norms that follow, with statistics per channel; may be empty.
      biases: biases of the norms, and of the layers before them; may be empty.
      inputs: kernels that read the channels, along their input axis. After a flatten that axis also runs over
        positions, which no group can name: use global pooling instead.
      statistics: leaves of the model state with one entry per channel: running means and variances.

    Example:
      >>> from s2sam_jax import ChannelGroup, ChannelAxis
      >>> group = ChannelGroup(
      ...     "conv1",
      ...     filters=(ChannelAxis("conv1/kernel", -1),),
      ...     scales=(ChannelAxis("norm1/scale", 0),),
      ...     biases=(ChannelAxis("norm1/bias", 0),),
      ...     inputs=(ChannelAxis("conv2/kernel", -2),),
      ...     statistics=(ChannelAxis("norm1/mean", 0), ChannelAxis("norm1/var", 0)),
      ... )
      >>> group.parameters[1]
      ChannelAxis(path='norm1/scale', axis=0)
    """

    name: str
    filters: tuple[ChannelAxis, ...]
    scales: tuple[ChannelAxis, ...] = ()
    biases: tuple[ChannelAxis, ...] = ()
    inputs: tuple[ChannelAxis, ...] = ()
    statistics: tuple[ChannelAxis, ...] = ()

    @property
    def parameters(self) -> tuple[ChannelAxis, ...]:
        return (*self.filters, *self.scales, *self.biases, *self.inputs)


def group_sizes(tree: Params, groups: Sequence[ChannelGroup], *, statistics: Any = None) -> dict[str, int]:
    """Channels of each group, by name.

    Raises:
      ValueError: listing every slice whose leaf or axis does not exist, or whose length is not that of its group.
    """
    shapes = {name: leaf.shape for name, leaf in by_name(tree).items()}
    running = {name: leaf.shape for name, leaf in by_name(statistics).items()}
    problems, sizes = [], {}
    for group in groups:
        if not group.filters:
            problems.append(f"{group.name}: has no filters")
            continue
        members = [(part, shapes) for part in group.parameters]
        members += [(part, running) for part in group.statistics] if statistics is not None else []
        lengths = {part: _length(part, among) for part, among in members}
        sizes[group.name] = lengths[group.filters[0]]
        for part, length in lengths.items():
            if length is None:
                problems.append(f"{group.name}: no leaf {part.path!r} with an axis {part.axis}")
            elif length != sizes[group.name]:
                problems.append(
                    f"{group.name}: {part.path!r} has {length} on axis {part.axis}, not {sizes[group.name]}"
                )
    names = [group.name for group in groups]
    problems += [f"{name}: named twice" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise ValueError("Channel groups do not fit the parameters:\n  " + "\n  ".join(problems))
    return sizes


def channel_masks(params: Params, groups: Sequence[ChannelGroup], alive: Mapping[str, jax.Array | np.ndarray]) -> Masks:
    r"""Masks that prune whole channels, in every leaf that holds a slice of one.

    .. math:: m_{l,i} = \bigwedge_{(l, a) \in G} \mathrm{alive}_G[i_a]

    Args:
      params: the parameters.
      groups: which slices share a channel index; a leaf may be in several.
      alive: bool[channels] by group name; groups that are missing keep all channels.

    Returns:
      Bool tree like ``params``.

    Raises:
      ValueError: if groups do not fit the parameters, or ``alive`` does not fit the groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import ChannelGroup, ChannelAxis, channel_masks
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> group = ChannelGroup("hidden", filters=(ChannelAxis("a", -1),), inputs=(ChannelAxis("b", -2),))
      >>> masks = channel_masks(params, [group], {"hidden": jnp.array([True, False])})
      >>> print(masks["a"], masks["b"].T)
      [[ True False]] [[ True False]]
    """
    sizes = group_sizes(params, groups)
    wrong = {name: x.shape for name, x in alive.items() if x.shape != (sizes.get(name),)}
    if wrong:
        raise ValueError(f"alive must hold bool[channels] by group, of {sizes}; these do not fit: {wrong}.")
    parts: dict[str, list[tuple[int, jax.typing.ArrayLike]]] = {}
    for group in groups:
        for part in group.parameters if group.name in alive else ():
            parts.setdefault(part.path, []).append((part.axis, alive[group.name]))

    def mask(name, leaf):
        whole = jnp.ones_like(leaf, dtype=bool)
        for axis, channels in parts.get(name, ()):
            others = [d for d in range(leaf.ndim) if d != axis % leaf.ndim]
            whole &= jnp.expand_dims(channels, others)
        return whole

    return map_named(mask, params)


def _length(part: ChannelAxis, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    shape = shapes.get(part.path, ())
    return shape[part.axis] if -len(shape) <= part.axis < len(shape) else None

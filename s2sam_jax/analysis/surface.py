"""The loss around a solution: directions that are comparable between networks, surfaces, roughness, barriers."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.tree import at_least_f32, check_same_leaves
from s2sam_jax._base.types import BatchLoss, Masks, Params, Progress
from s2sam_jax.analysis._batches import listed

EPS = 1e-10  # of the published normalisation


def filter_normalized_directions(
    params: Params, key: jax.Array, *, count: int = 2, masks: Masks | None = None, axis: int = -1
) -> list[Params]:
    r"""Random directions in which every filter has the norm of the network's own filter.

    .. math:: d_{l,i} \leftarrow \frac{d_{l,i}}{\|d_{l,i}\| + 10^{-10}}\, \|w_{l,i}\|, \qquad d \sim N(0, I)

    for filter :math:`i` of layer :math:`l`; leaves with fewer than two dimensions (biases, norms) do not move.
    A network and its copy with rescaled layers thus have the same surface.

    Args:
      params: the solution, clean weights.
      key: PRNG key.
      count: directions to draw.
      masks: as from ``get_masks``; if given, only live weights move, so that the surface is that of the sparse network.
        Without them pruned weights inside a live filter move as well, as in the published figures of sparse networks.
      axis: the axis that runs over filters: the last (outputs) in Flax, 0 in PyTorch's layout.

    Returns:
      A list of trees like ``params``, in float32 or wider.

    Raises:
      ValueError: for masks that do not fit.

    Reference:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, §4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax.analysis import filter_normalized_directions
      >>> params = {"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
      >>> (direction,) = filter_normalized_directions(params, jax.random.key(0), count=1)
      >>> print(jnp.linalg.norm(direction["w"], axis=0))
      [5. 0.]
    """
    if masks is not None:
        check_same_leaves(masks, params, "masks", "params")
    leaves, treedef = jax.tree.flatten(params)
    live = [None] * len(leaves) if masks is None else jax.tree.leaves(masks)

    def direction(key):
        keys = jax.random.split(key, max(len(leaves), 1))
        drawn = [_normalised(k, w, m, axis) for k, w, m in zip(keys, leaves, live, strict=False)]
        return treedef.unflatten(drawn)

    return [direction(k) for k in jax.random.split(key, count)]


def _normalised(key: jax.Array, w: jax.Array, mask: jax.Array | None, axis: int) -> jax.Array:
    w = at_least_f32(w)
    if w.ndim < 2:
        return jnp.zeros_like(w)
    return rescaled(jax.random.normal(key, w.shape, w.dtype), w, mask, axis)


def rescaled(d: jax.Array, w: jax.Array, mask: jax.Array | None = None, axis: int = -1) -> jax.Array:
    """Filters of ``d`` as long as those of ``w``."""
    d = d if mask is None else jnp.where(mask, d, jnp.zeros((), d.dtype))
    others = tuple(a for a in range(w.ndim) if a != axis % w.ndim)
    lengths = [jnp.sqrt(jnp.sum(jnp.square(x), axis=others, keepdims=True)) for x in (w, d)]
    return d * (lengths[0] / (lengths[1] + EPS))


def loss_surface(
    loss_fn: BatchLoss,
    params: Params,
    directions: Sequence[Params],
    batches: Iterable[Any],
    *,
    span: float = 1.0,
    n: int = 51,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    r"""The mean loss on a grid around a solution, along one, two or more directions.

    .. math:: z(\alpha, \beta) = \frac{1}{B} \sum_b L_b(w + \alpha \delta + \beta \eta), \qquad
              \alpha, \beta \in \{-s, \dots, s\}

    One program computes all points for a batch, with forward passes only.

    Args:
      loss_fn: ``(params, batch) -> loss[]``, in evaluation mode (stored BatchNorm statistics).
      params: the solution; numbers narrower than float32 are widened, here and in the directions.
      directions: trees like ``params``, one per dimension of the grid.
      batches: the data, in batches of equal shape, which are weighted equally.
      span: the grid runs from ``-span`` to ``span``.
      n: points along each direction; odd numbers include the solution.
      mesh: divides the points among its devices.
      progress: called with the number of losses (points times batches) that have been computed since its last call.

    Returns:
      float64 array of ``(n,) * len(directions)``; index 0 is ``-span``.

    Raises:
      ValueError: for directions that do not fit, no batches, ``n`` below 2, or a ``span`` not above 0 or not finite.

    Reference:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, §3.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax.analysis import loss_surface
      >>> loss_fn = lambda w, batch: jnp.sum(batch * w**2)
      >>> print(loss_surface(loss_fn, jnp.zeros(2), [jnp.array([1.0, 0.0])], [jnp.ones(2), 3 * jnp.ones(2)], n=3))
      [2. 0. 2.]
    """
    batches = listed(batches, "loss_surface")
    for index, direction in enumerate(directions):
        check_same_leaves(direction, params, f"directions[{index}]", "params")
    if not batches or not directions or n < 2:
        raise ValueError(
            f"loss_surface needs directions, batches and n >= 2; got {len(directions)}, {len(batches)} and n={n}."
        )
    if not 0 < span < math.inf:
        raise ValueError(f"loss_surface needs a finite span > 0; got {span}.")
    line = np.linspace(-span, span, n)
    points = np.stack(np.meshgrid(*[line] * len(directions), indexing="ij"), axis=-1).reshape(-1, len(directions))
    losses = _losses_along(loss_fn, mesh)
    total = np.zeros(len(points))
    for batch in batches:
        total += np.asarray(losses(params, list(directions), points, batch), np.float64)
        if progress is not None:
            progress(len(points))
    return (total / len(batches)).reshape((n,) * len(directions))


def _losses_along(loss_fn: BatchLoss, mesh: jax.sharding.Mesh | None) -> Callable[..., Any]:
    def at(params, directions, point, batch):
        def move(w, *ds):
            w, *ds = map(at_least_f32, (w, *ds))  # neighbours on the grid may be one number in bfloat16
            return w + sum(a.astype(w.dtype) * d for a, d in zip(point, ds, strict=True))

        return loss_fn(jax.tree.map(move, params, *directions), batch)

    def along(params, directions, points, batch):
        return jax.lax.map(lambda point: at(params, directions, point, batch), points)

    if mesh is None:
        return jax.jit(along)
    everywhere, divided = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(mesh.axis_names)
    mapped = jax.jit(
        jax.shard_map(
            along, mesh=mesh, in_specs=(everywhere, everywhere, divided, everywhere), out_specs=divided, check_vma=False
        )
    )

    def padded(params, directions, points, batch):
        missing = -len(points) % mesh.size
        filled = np.concatenate([points, np.zeros((missing, points.shape[1]))]).astype(jnp.result_type(float))
        shares = jax.device_put(filled, jax.sharding.NamedSharding(mesh, divided))
        return np.asarray(mapped(params, directions, shares, batch))[: len(points)]

    return padded


def roughness(surface: Any) -> float:
    r"""Ra: how far a surface lies from its mean height, on average.

    .. math:: R_a = \frac{1}{n} \sum_i |z_i - \bar z|

    It depends on the grid's span: compare only surfaces of equal span.

    Args:
      surface: heights, of any shape.

    Returns:
      A float, in the units of the loss; NaN if any height is not finite.

    Reference:
      Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse
      Training", NeurIPS 2024, figures 1 and 3.

    Example:
      >>> from s2sam_jax.analysis import roughness
      >>> roughness([[1.0, 2.0], [4.0, 9.0]])
      2.5
    """
    heights = np.asarray(surface, np.float64)
    return float(np.mean(np.abs(heights - heights.mean())))


def error_barrier(
    loss_fn: BatchLoss, first: Params, second: Params, batches: Iterable[Any], *, n: int = 11
) -> tuple[float, np.ndarray]:
    r"""How much the loss rises on the straight line between two solutions.

    .. math:: \max_\alpha \left[ L((1 - \alpha) a + \alpha b) - (1 - \alpha) L(a) - \alpha L(b) \right]

    0 means linearly connected. BatchNorm's statistics do not interpolate: let ``loss_fn`` recompute them, or use those
    of the batch.

    Args:
      loss_fn: ``(params, batch) -> loss[]``.
      first: a solution; numbers narrower than float32 are widened.
      second: another, of the same structure.
      batches: as in :func:`loss_surface`.
      n: points on the line, including the two solutions.

    Returns:
      The barrier, and the losses at the ``n`` points.

    Raises:
      ValueError: for solutions that do not match, no batches, or ``n`` below 2.

    Reference:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, with the chord in place
      of the mean, so that solutions of unequal loss can be compared.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax.analysis import error_barrier
      >>> barrier, _ = error_barrier(lambda w, _: (w**2 - 1) ** 2, jnp.array(-1.0), jnp.array(1.0), [None], n=3)
      >>> barrier
      1.0
    """
    check_same_leaves(second, first, "second", "first")
    batches = listed(batches, "error_barrier")
    if n < 2 or not batches:
        raise ValueError(f"error_barrier needs n >= 2 and batches; got n={n} and {len(batches)} batches.")
    losses, share = _losses_along(loss_fn, None), np.linspace(0.0, 1.0, n)
    origin, points = jax.tree.map(jnp.zeros_like, first), np.stack([1 - share, share], axis=1)  # both ends are exact
    rows = [np.asarray(losses(origin, [first, second], points, batch), np.float64) for batch in batches]
    heights = np.mean(rows, axis=0)
    chord = (1 - share) * heights[0] + share * heights[-1]
    return float(np.max(heights - chord)), heights

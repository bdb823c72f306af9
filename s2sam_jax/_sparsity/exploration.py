"""The building blocks of methods that explore whole channels: scores, widths, samples.

Everything is passed as a list with one entry per group, so that ties go to the groups in their given order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax.linalg import EighImplementation

from s2sam_jax._base.arguments import check_compat
from s2sam_jax._base.counts import kept
from s2sam_jax._base.select import ones, random_scores, select
from s2sam_jax._base.tree import at_least_f32, by_name
from s2sam_jax._base.types import Masks, Params
from s2sam_jax._sparsity.channels import ChannelAxis, ChannelGroup, channel_masks, group_sizes


def channels(tree: Any, parts: Sequence[ChannelAxis]) -> list[jax.Array]:
    """Each slice's leaf as a matrix, one row per channel."""
    leaves = by_name(tree)
    rows = [jnp.moveaxis(leaves[part.path], part.axis, 0) for part in parts]
    return [leaf.reshape(len(leaf), -1) for leaf in rows]


def filters(params: Params, groups: Sequence[ChannelGroup]) -> list[jax.Array]:
    """The leading filters of each group, one row per channel, in float32 or wider."""
    return [at_least_f32(rows) for rows in channels(params, [group.filters[0] for group in groups])]


def masks_of(params: Params, groups: Sequence[ChannelGroup], alive: list[jax.Array]) -> Masks:
    """The masks over all parameters when these channels live."""
    return channel_masks(params, groups, {group.name: live for group, live in zip(groups, alive, strict=True)})


def total_width(
    params: Params, groups: Sequence[ChannelGroup], sparsity: float, at_least: Sequence[int], method: str
) -> int:
    """How many channels survive in the end, ``N - floor(S N)``, after a check that every group gets its least."""
    sizes = group_sizes(params, groups)
    width = kept(sum(sizes.values()), sparsity)
    if width < sum(at_least):
        raise ValueError(
            f"{method}: a channel sparsity of {sparsity} leaves {width} of {sum(sizes.values())} channels, but the "
            f"groups keep at least {dict(zip(sizes, at_least, strict=True))}; ask for less sparsity."
        )
    return width


def check_groups(groups: Sequence[ChannelGroup], compat: str, method: str) -> tuple[ChannelGroup, ...]:
    """The groups, after a check of what all channel methods are given."""
    if not groups or not all(isinstance(group, ChannelGroup) for group in groups):
        raise ValueError(f"{method} needs a sequence of ChannelGroups, at least one; got {groups!r}.")
    check_compat(compat)
    return tuple(groups)


def shares(
    total: int | jax.Array, sizes: Sequence[int], taken: list[Any] | None = None, at_least: int = 0
) -> list[jax.Array]:
    """Whole numbers in proportion to the sizes that add up to ``total``, or to all there is room for.

    Sainte-Laguë's rule: seat i of a group of n is the better the smaller (i - 1/2) / n is. A group that has some of
    its channels ``taken`` has room for the others only.
    """
    seats = [np.arange(size) for size in sizes]
    scores = [jnp.asarray(np.where(s < at_least, np.inf, -(s + 0.5) / len(s)), jnp.float32) for s in seats]
    used = [0] * len(sizes) if taken is None else taken
    room = [jnp.asarray(s < s.size - u) for s, u in zip(seats, used, strict=True)]
    return ones(select(scores, count=total, among=room, scope="global"))


def leverage_scores(rows: jax.Array, count: int | jax.Array) -> jax.Array:
    r"""How much of the best subspace of ``count`` dimensions each channel spans.

    .. math:: \psi_j = \|[V_k]_{j,:}\|_2^2, \quad X = U \Sigma V^\top

    with the channels in the columns of X. If channels have fewer weights than there are channels, V cannot tell them
    apart, and the score is :math:`\|x_j\|_1`.
    """
    size, weights = rows.shape
    if weights < size:
        return jnp.sum(jnp.abs(rows), axis=1)
    _, vectors = _eigh(_gram(rows))
    return jnp.sum(jnp.where(jnp.arange(size) >= size - count, jnp.square(vectors), 0.0), axis=1)


def residuals(rows: jax.Array, keep: jax.Array) -> jax.Array:
    r"""What the kept channels cannot express of each channel: :math:`\|w_j - P w_j\|_2^2`, P their projector."""
    # Unit length leaves the projector as it is; else rows that are short beside the longest would pass for rounding.
    base = jnp.where(keep[:, None], rows, 0.0)
    length = jnp.linalg.norm(base, axis=1, keepdims=True)
    base = base / jnp.where(length > 0, length, 1.0)
    values, vectors = _eigh(_gram(base))
    # Below this an eigenvalue is rounding, as of the rows that are not kept, and of kept ones that span no more.
    noise = 10 * len(rows) * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.matmul(vectors / jnp.where(values > noise, values, jnp.inf), vectors.T, precision="highest")
    inside = jnp.linalg.multi_dot([rows, base.T, inverse, base], precision="highest")
    return jnp.sum(jnp.square(rows - inside), axis=1)


def sample(key: jax.Array, logits: list[jax.Array], count: list[jax.Array], among: list[jax.Array]) -> list[jax.Array]:
    """Per group, ``count`` channels drawn without replacement with the probabilities of a softmax.

    Taking the largest of logits with Gumbel noise is the same as drawing one after another.
    """
    noise = [-jnp.log(-jnp.log(u)) for u in random_scores(key, logits)]
    return select([x + n.astype(x.dtype) for x, n in zip(logits, noise, strict=True)], count=count, among=among)


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    On a TPU by Jacobi's rotations: what JAX takes there by default compiles for minutes from 512 channels on.
    """
    by_rotations = partial(jax.lax.linalg.eigh, implementation=EighImplementation.JACOBI)
    vectors, values = jax.lax.platform_dependent(x, tpu=by_rotations, default=jax.lax.linalg.eigh)
    return values, vectors


def _gram(rows: jax.Array) -> jax.Array:
    return jnp.matmul(rows, rows.T, precision="highest")

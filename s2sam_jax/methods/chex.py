"""CHEX: whole channels are pruned by column subset selection and regrown by importance sampling."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from s2sam_jax._base.counts import kept, rounded_down
from s2sam_jax._base.schedules import cosine
from s2sam_jax._base.select import keep_best, map_alike, ones, select
from s2sam_jax._base.tree import by_name
from s2sam_jax._base.types import Compat, MaskInputs, MaskUpdate, Params, SparseMethod
from s2sam_jax._sparsity.channels import ChannelGroup
from s2sam_jax._sparsity.exploration import (
    channels,
    check_groups,
    filters,
    leverage_scores,
    masks_of,
    residuals,
    sample,
    shares,
    total_width,
)
from s2sam_jax._sparsity.plan import first_and_last


def chex(groups: Sequence[ChannelGroup], *, explore: float = 0.2, compat: Compat = "paper") -> SparseMethod:
    r"""Prunes whole channels and regrows others, fewer each time, until the planned fraction is removed.

    .. math:: \text{widths } \kappa_l = \#\{j \in \mathrm{top}_K |\gamma|\}, \quad
              \text{kept} = \mathrm{top}_{\kappa_l} \|[V_{\kappa_l}]_{j,:}\|_2^2, \quad
              \text{regrown} \sim \mathrm{softmax}\, \|w_j - P w_j\|_2^2, \quad
              \delta_t = \tfrac{\delta}{2} (1 + \cos(\pi t / T))

    At each update the groups first share :math:`K = N - \lfloor S N \rfloor` live channels, of N in all, by the largest
    norm scales (of the leading norm); each group gets at least one. Each group then prunes to its share by the leverage
    scores of its leading filters X (V holds the right singular vectors; L1 norms if a filter has fewer weights than
    there are filters). Then :math:`\lfloor \delta_t N \rfloor` channels regrow, shared in proportion to the groups'
    sizes as far as there is room, and drawn without replacement by the part of each that the kept filters (projector P)
    cannot express. The live total is thus exact after every update, and K at the last firing T, where
    :math:`\delta_T = 0`. The first masks hold :math:`K + \lfloor \delta N \rfloor` channels, shared by size, those of
    the largest L1 norm. Shares are rounded by Sainte-Laguë's rule; ties go to the lower index, and to the group given
    first.

    ``sparsify(sparsity=...)`` is the fraction S of *channels* to remove, over all groups. A removed channel is masked
    in all its slices, even in leaves that are planned dense; leaves in no group stay dense. It becomes zero and loses
    its optimizer state. A regrown channel returns with its most recent weights, without optimizer state. No step is
    skipped. Running statistics of norms are in the model state, out of reach, and do not return with a regrown
    channel: call ``recalibrate_batch_stats`` before evaluating.

    Args:
      groups: the channels that may be removed; every group needs scales.
      explore: :math:`\delta` in ``[0, S]``, the fraction of all channels explored at first.
      compat: ``"authors"`` follows the released ImageNet code: scales must exceed the threshold, so that one more
        channel is removed, and counts are truncated; as many regrow as pass the threshold at :math:`S - \delta_t`, so
        that widths only shrink; norms are not squared, which changes only the sampling.

    Returns:
      A method that needs ``when`` with an ``end``, and a start after some training: initial scales are all equal, so
      that the groups given last would lose most. The paper, for half of ResNet-50: every 2 epochs up to epoch 180 of
      250, S = 0.5, explore 0.2. The method keeps a copy of the parameters.

    Raises:
      ValueError: for groups that do not fit or lack scales, a sparsity that leaves some group no channel or differs
        between the leading filters, ``explore`` out of range, or a clock without an end.

    Reference:
      Hou et al., "CHEX: CHannel EXploration for CNN Model Compression", CVPR 2022.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import ChannelGroup, Every, ChannelAxis, methods, sparsify
      >>> group = ChannelGroup("conv", filters=(ChannelAxis("kernel", -1),), scales=(ChannelAxis("scale", 0),))
      >>> tx = sparsify(optax.sgd(0.1), methods.chex([group]), sparsity=0.5, when=Every(2, 2, 180))
      >>> state = tx.init({"kernel": jnp.ones((3, 3, 4, 10)), "scale": jnp.ones(10)})
      >>> int(state.masks["scale"].sum())  # 5 for good, and 2 to explore
      7
    """
    groups = check_groups(groups, compat, "chex")
    if without := [group.name for group in groups if not group.scales]:
        raise ValueError(f"chex shares channels by the scales of the norms, but these groups have none: {without}.")
    authors = compat == "authors"

    def init(x: MaskInputs) -> MaskUpdate:
        first_and_last(x, "chex")
        if not jax.tree.leaves(x.params):  # optax.tree.map_params calls it without leaves
            return MaskUpdate(x.masks, x.params)
        sparsity, width = _plan(x, groups, explore)
        norms = [jnp.sum(jnp.abs(rows), axis=1) for rows in filters(x.params, groups)]
        sizes = [norm.size for norm in norms]
        if authors:
            first = [max(1, int(size * (1 - (sparsity - explore)))) for size in sizes]
        else:
            explored = sum(sizes) - kept(sum(sizes), explore)
            first = shares(width + explored, sizes, at_least=1)
        alive = select(norms, count=first)
        return MaskUpdate(masks_of(x.params, groups, alive), x.params)

    def update(x: MaskInputs, state: Params) -> MaskUpdate:
        sparsity, width = _plan(x, groups, explore)
        _, last = first_and_last(x, "chex")
        fraction = jnp.where(x.step >= last, 0.0, cosine(explore, x.step, last))
        scale_parts = [group.scales[0] for group in groups]
        live = [jnp.any(mask, axis=1) for mask in channels(x.masks, scale_parts)]
        scales = [jnp.sum(jnp.abs(scale), axis=1) for scale in channels(x.params, scale_parts)]
        sizes = [scale.size for scale in scales]

        best = keep_best(scales, width, [1] * len(groups), among=live)
        down = _widths_above(scales, sparsity) if authors else ones(best)
        scores = map_alike(leverage_scores, filters(x.params, groups), down)
        keep = select(scores, count=down, among=live)

        recent = jax.tree.map(jnp.where, x.masks, x.params, state)
        outside = map_alike(residuals, filters(recent, groups), keep)
        if authors:
            outside = [jnp.sqrt(r) for r in outside]
            up = _widths_above(scales, sparsity - fraction)
            regrown = [more - less for more, less in zip(up, down, strict=True)]
        else:
            regrown = shares(rounded_down(fraction * sum(sizes)), sizes, taken=ones(keep))
        grown = sample(x.key, outside, regrown, [~k for k in keep])
        masks = masks_of(x.params, groups, [k | g for k, g in zip(keep, grown, strict=True)])
        return MaskUpdate(masks, recent, values=recent)

    return SparseMethod(init=init, update=update, invariant="bounded", ranks="global")


def _plan(x: MaskInputs, groups: Sequence[ChannelGroup], explore: float) -> tuple[float, int]:
    """The channel sparsity, and how many channels it leaves."""
    planned = by_name(x.sparsities)
    sparsities = {group.filters[0].path: planned.get(group.filters[0].path, 0.0) for group in groups if group.filters}
    sparsity = max(sparsities.values(), default=0.0)
    width = total_width(x.params, groups, sparsity, [1] * len(groups), "chex")
    if min(sparsities.values()) != sparsity:
        raise ValueError(
            "chex takes the sparsity planned for the leading filters as the fraction of channels over all groups, so "
            f"it must be the same for all; got {sparsities}. Use distribution='uniform', without overrides for them."
        )
    if not 0 <= explore <= sparsity:
        raise ValueError(f"chex needs 0 <= explore <= sparsity; got explore={explore} at sparsity {sparsity}.")
    return sparsity, width


def _widths_above(scales: list[jax.Array], sparsity: float | jax.Array) -> list[jax.Array]:
    """The released code's widths: scales above the one at ``sparsity`` of the sorted list, cut to whole numbers."""
    ranked = jnp.sort(jnp.concatenate(scales))
    threshold = ranked[jnp.clip(rounded_down(jnp.asarray(ranked.size * sparsity)), 0, ranked.size - 1)]
    above = [jnp.sum(scale > threshold) for scale in scales]
    sizes = [scale.size for scale in scales]
    # The code goes by the ratio of pruned channels and back again, which may come out below a whole number.
    cut = [jnp.asarray([max(1, int(n * (1 - (n - k) / n))) for k in range(n + 1)]) for n in sizes]
    return [table[count] for table, count in zip(cut, above, strict=True)]

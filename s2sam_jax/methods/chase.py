"""Chase: dynamic sparse training over all leaves together, which also removes whole channels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import check_fractions, check_sparsity
from s2sam_jax._base.counts import part, rounded_down, rounded_up
from s2sam_jax._base.schedules import cosine
from s2sam_jax._base.select import keep_best, ones, select
from s2sam_jax._base.types import Compat, MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.channels import ChannelGroup, group_sizes
from s2sam_jax._sparsity.exploration import check_groups, filters, masks_of, total_width
from s2sam_jax._sparsity.growth import restarted
from s2sam_jax._sparsity.plan import (
    first_and_last,
    planned_counts,
    random_init,
    replace_sparse,
    sparse_leaves,
    sparse_size,
)


class ChaseState(NamedTuple):
    """State of :func:`chase`.

    Attributes:
      alive: bool[channels] per group, in the order of the groups; false where a channel has been removed.
    """

    alive: list[jax.Array]


def chase(
    groups: Sequence[ChannelGroup],
    *,
    channel_sparsity: float = 0.5,
    channel_every: int = 1,
    min_width: float = 0.5,
    removal_end: float = 130 / 160,
    extra: float = 0.05,
    exploration_end: float = 130 / 160,
    drop_fraction: float = 0.5,
    final_fraction: float = 0.005,
    compat: Compat = "paper",
) -> SparseMethod:
    r"""Moves weights to the largest gradients over all leaves, and removes channels of the smallest mean magnitude.

    .. math:: c_t = C - \lfloor (1 - (1 - q)^3) \lfloor S_c C \rfloor \rfloor,\ q = \frac{t - t_0}{T_c - t_0}, \quad
              \text{alive} = \mathrm{top}_{c_t}\Big(\tfrac{1}{n} \textstyle\sum_{i \le n} |w_i|\Big), \quad
              \text{kept} = \mathrm{top}_{a_t}(|w|\ \text{in alive}), \quad
              m \leftarrow \text{kept} \cup \mathrm{top}_{b_t - |\text{kept}|}(|\nabla_w L|\ \text{in alive, off kept})

    Channels go first. Each removal, from the first call :math:`t_0` of the clock to the last removal at :math:`T_c`,
    leaves :math:`c_t` of the C channels of all groups: those with the largest mean magnitude over all n entries of
    their leading filter, zeros included, ranked over all groups. A group keeps at least ``min_width`` of what a uniform
    cut would leave it, and at least one channel. A removed channel is masked in all its slices, even in leaves that are
    planned dense, and never comes back. The budget of the sparse leaves stays as planned, :math:`n_0`: their weights
    move to the remaining channels, and fill these up if there are too few.

    While exploring, until :math:`T_e`, :math:`a_t = n_0` and :math:`b_t = n_0 + \lfloor p_t N \rfloor`, where N counts
    all weights of the sparse leaves and :math:`p_t = \tfrac{p}{2}(1 + \cos(\pi t / T_e))`: a soft memory bound, as the
    network is denser than planned between updates. From then on a fraction :math:`f_t` of the n live weights is
    dropped, :math:`a_t = \min(n_0, n - \lceil f_t n \rceil)`, :math:`b_t = n_0`, with :math:`f_t` following a cosine
    over the whole clock.

    All counts are exact; ties go to the lower index, and to the group given first. A dropped weight becomes zero and
    loses its optimizer state. A grown weight starts from zero, even if it was dropped in the same update; it then
    keeps its optimizer state, while a truly new one has none. No step is skipped.

    Args:
      groups: the channels that may be removed.
      channel_sparsity: :math:`S_c`, the fraction of channels that are removed in the end, in ``[0, 1)``.
      channel_every: firings from one removal to the next.
      min_width: in ``[0, 1]``; the paper calls it beta.
      removal_end: when removal ends, as a fraction of the clock's last call; the last removal no later than that, at
        :math:`T_c`, reaches :math:`S_c`.
      extra: p, the fraction of all weights that may be live beyond the budget while exploring; 0 for a hard bound.
      exploration_end: :math:`T_e` as a fraction of the clock's last call.
      drop_fraction: :math:`f_0` in ``[0, 1]``.
      final_fraction: :math:`f_T` in ``[0, 1]``.
      compat: ``"authors"`` uses the thresholds of the released code: weights equal to the largest one to be dropped
        stay (without ties, one more in all), and growth takes only gradients above the smallest to be grown (one
        fewer), and none that are zero. That code also chooses channels at random among ties, and one more; here their
        choice is exact in either form.

    Returns:
      A method that needs ``when`` with an ``end``: the end of training. The paper: every 1000 steps; on CIFAR-100
      ``channel_every=8, min_width=0.2`` for VGG-19, 1 and 0.5 for ResNet-50.

    Raises:
      ValueError: for groups that do not fit, options out of range, a channel sparsity beyond what the groups must keep,
        or a clock without an end or without time for a removal.

    Reference:
      Yin et al., "Dynamic Sparsity Is Channel-Level Sparsity Learner", NeurIPS 2023. Its code removes channels half an
      interval after weights have moved; its ImageNet script moves them within layers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import ChannelGroup, Every, ChannelAxis, methods, sparsify
      >>> group = ChannelGroup("conv", filters=(ChannelAxis("kernel", -1),))
      >>> tx = sparsify(optax.sgd(0.1), methods.chase([group]), sparsity=0.9, when=Every(0, 1000, 80_000))
      >>> print(tx.init({"kernel": jnp.ones((3, 3, 4, 10))}).nnz)
      [36]
    """
    groups = check_groups(groups, compat, "chase")
    check_sparsity(channel_sparsity, "channel_sparsity")
    check_fractions(
        "chase", min_width=min_width, removal_end=removal_end, extra=extra, exploration_end=exploration_end,
        drop_fraction=drop_fraction, final_fraction=final_fraction,
    )  # fmt: skip
    if channel_every < 1:
        raise ValueError(f"chase needs channel_every >= 1; got {channel_every}.")
    drop, grow = (_drop_below, _grow_above) if compat == "authors" else (_exact, _exact)

    def init(x: MaskInputs) -> MaskUpdate:
        interval, count = removals(x)
        if channel_sparsity and not count:
            raise ValueError(
                f"chase has no time to remove channels: the first removal comes {interval} calls after the start, "
                f"later than removal_end={removal_end:g} of the clock allows. Lower channel_every={channel_every}."
            )
        if not jax.tree.leaves(x.params):  # optax.tree.map_params calls it without leaves
            return MaskUpdate(x.masks, ChaseState([jnp.ones(0, bool) for _ in groups]))
        widths(x)
        alive = [jnp.ones(size, bool) for size in group_sizes(x.params, groups).values()]
        return MaskUpdate(random_init(x).masks, ChaseState(alive))

    def removals(x: MaskInputs) -> tuple[int, int]:
        """Calls between two removals, and how many removals there are."""
        first, last = first_and_last(x, "chase")
        when: Any = x.when  # there is one: first_and_last has checked that
        interval = when.every * channel_every
        return interval, max(rounded_down(removal_end * last) - first, 0) // interval

    def widths(x: MaskInputs) -> tuple[int, list[int]]:
        """The final number of channels, and how many each group keeps at least."""
        sizes = group_sizes(x.params, groups).values()
        at_least = [max(1, rounded_down(size * (1 - channel_sparsity) * min_width)) for size in sizes]
        return total_width(x.params, groups, channel_sparsity, at_least, "chase"), at_least

    def remove(x: MaskInputs, alive: list[jax.Array]) -> list[jax.Array]:
        """The channels that are left. Between removals the count stays what it was, and so does the choice."""
        interval, count = removals(x)
        width, at_least = widths(x)
        done = (x.step - first_and_last(x, "chase")[0]) // interval
        remaining = 1.0 - jnp.clip(done / max(count, 1), 0.0, 1.0)
        doomed = sum(live.size for live in alive) - width
        # Counted down from the end, where it is exact in float32.
        left = width + rounded_up(doomed * remaining**3)
        scores = [jnp.mean(jnp.abs(rows), axis=1) for rows in filters(x.params, groups)]
        return keep_best(scores, left, at_least, among=alive)

    def counts(x: MaskInputs, live: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How many weights to prune to and to grow to."""
        _, last = first_and_last(x, "chase")
        budget, end = sum(planned_counts(x)), rounded_up(exploration_end * last)
        exploring = x.step < end
        more = rounded_down(cosine(extra, x.step, end) * sparse_size(x))
        fraction = cosine(drop_fraction, x.step, last, final_fraction)
        left = live - part(live, fraction, rounded_up)
        return jnp.where(exploring, budget, jnp.minimum(budget, left)), budget + jnp.where(exploring, more, 0)

    def update(x: MaskInputs, state: ChaseState) -> MaskUpdate:
        alive = remove(x, state.alive)
        within = masks_of(x.params, groups, alive)
        places, weights = sparse_leaves(x, within), sparse_leaves(x, x.params)
        live = [m & p for m, p in zip(sparse_leaves(x, x.masks), places, strict=True)]
        lower, upper = counts(x, jnp.asarray(sum(ones(live)), jnp.int32))
        keep = drop([jnp.abs(w) for w in weights], lower, live)
        free = [p & ~k for p, k in zip(places, keep, strict=True)]
        slopes = [jnp.abs(g) for g in sparse_leaves(x, x.grads)]
        grown = grow(slopes, jnp.maximum(upper - sum(ones(keep)), 0), free)
        masks = replace_sparse(x, within, [k | g for k, g in zip(keep, grown, strict=True)])
        return MaskUpdate(masks, ChaseState(alive), restart=restarted(x, keep))

    return SparseMethod(init=init, update=update, invariant="bounded")


def _exact(scores: list[jax.Array], count: jax.Array, among: list[jax.Array]) -> list[jax.Array]:
    return select(scores, count=count, among=among, scope="global")


def _drop_below(weights: list[jax.Array], count: jax.Array, live: list[jax.Array]) -> list[jax.Array]:
    """The released code keeps the largest weight that was to be dropped, and all that equal it."""
    threshold = _smallest(weights, _exact(weights, count + 1, live))
    return [a & (w >= threshold) for w, a in zip(weights, live, strict=True)]


def _grow_above(slopes: list[jax.Array], count: jax.Array, free: list[jax.Array]) -> list[jax.Array]:
    """The released code leaves out the smallest gradient that was to be grown, and all that equal it."""
    sloping = [f & (g > 0) for g, f in zip(slopes, free, strict=True)]
    threshold = _smallest(slopes, _exact(slopes, count, sloping))
    return [f & (g > threshold) for g, f in zip(slopes, sloping, strict=True)]


def _smallest(scores: list[jax.Array], among: list[jax.Array]) -> jax.Array:
    smallest = [jnp.min(s, where=a, initial=jnp.inf) for s, a in zip(scores, among, strict=True)]
    return jnp.min(jnp.array([jnp.inf, *smallest]))  # there may be no sparse leaf

"""DSR: one adaptive threshold prunes all leaves, and weights move to where more of them survive."""

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.select import ones, random_scores, select
from s2sam_jax._base.types import MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.growth import grow
from s2sam_jax._sparsity.plan import planned_counts, random_init, sparse_leaves


def dsr(target: float | int = 0.1, *, threshold: float = 1e-3) -> SparseMethod:
    r"""Prunes all weights below one threshold and grows as many at random, more where more have survived.

    .. math:: K_l = \#\{|w| < H\},\ R_l = \|m_l\|_0 - K_l, \quad
              G_l = \mathrm{round}\Big(\tfrac{R_l}{\sum R} \sum K\Big), \quad
              H \leftarrow \begin{cases} H / 2 & \sum K > 1.1\, N_p \\ 2 H & \sum K < 0.9\, N_p \\ H \end{cases}

    Leaves drift from their planned counts; the total never changes. Each leaf keeps its largest weight. A leaf grows
    no more weights than it has room for; what this or rounding leaves over is shared again, and the last few weights go
    to the leaves that follow a random one. Growth avoids the positions just pruned, unless nothing else is free.

    A pruned weight becomes zero and loses its optimizer state. A grown weight starts from zero, without state; only one
    that is regrown in the same update, for lack of any other free position, keeps both. No gradient step is skipped.
    The paper's code lets the momentum of pruned weights decay; here it is zero.

    Args:
      target: :math:`N_p`, how many weights an update should prune: an integer, or a float in ``(0, 1)`` as a fraction
        of all live weights. The paper: 20 000 for WRN-28-2, 400 000 for ResNet-50, each about a tenth.
      threshold: the initial :math:`H`.

    Returns:
      A method that needs ``when``. The paper on CIFAR-10: every 100 steps, later less and less often.

    Raises:
      ValueError: for a target or threshold out of range.

    Reference:
      Mostafa and Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
      Reparameterization", ICML 2019, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.dsr(20_000), sparsity=0.9, when=Every(0, 100))
      >>> print(tx.init({"kernel": jnp.ones((1000, 1000))}).nnz)
      [100000]
    """
    is_fraction = isinstance(target, float | np.floating)
    if not (0 < target < 1 if is_fraction else target >= 1):
        raise ValueError(f"dsr needs a target count >= 1, or a fraction of the live weights in (0, 1); got {target}.")
    if threshold <= 0:
        raise ValueError(f"dsr needs threshold > 0; got {threshold}.")

    def init(x: MaskInputs) -> MaskUpdate:
        live = sum(planned_counts(x))
        if not live and jax.tree.leaves(x.params):  # optax.tree.map_params calls it without leaves
            raise ValueError("dsr has no sparse weights to move; give a sparsity above 0, or leave it out.")
        if target >= live > 0:
            raise ValueError(f"dsr cannot prune target={target} of {live} live weights at a time; give less.")
        return random_init(x)._replace(state=jnp.asarray(threshold, jnp.float32))

    def update(x: MaskInputs, state: jax.Array) -> MaskUpdate:
        magnitudes, old = [jnp.abs(w) for w in sparse_leaves(x, x.params)], sparse_leaves(x, x.masks)
        if not old:
            return MaskUpdate(x.masks, state)
        live = jnp.stack(ones(old))
        survivors = jnp.stack(ones([m & (w >= state) for m, w in zip(old, magnitudes, strict=True)]))
        survivors = jnp.maximum(survivors, jnp.minimum(live, 1))
        pruned = live - survivors
        keep = select(magnitudes, count=list(survivors), among=old)

        score_key, leaf_key = jax.random.split(x.key)
        first = jax.random.randint(leaf_key, (), 0, len(old))
        free = jnp.asarray([m.size for m in old]) - live
        grown = _share(jnp.sum(pruned), survivors, free, first)
        grown = grown + _fill(jnp.sum(pruned) - jnp.sum(grown), pruned, first)
        # Scores lie in [0, 1): below them all come the positions just pruned.
        scores = [s - m.astype(s.dtype) for s, m in zip(random_scores(score_key, magnitudes), old, strict=True)]
        masks = grow(x, keep, list(grown), scores)

        wanted = target * jnp.sum(live.astype(jnp.float32)) if is_fraction else target
        return MaskUpdate(masks, _adapt(state, jnp.sum(pruned).astype(jnp.float32) / wanted))

    return SparseMethod(init=init, update=update, invariant="total")


def _share(total: jax.Array, weights: jax.Array, room: jax.Array, first: jax.Array) -> jax.Array:
    """Integers that add up to ``min(total, sum(room))``: rounded shares by weight, none above its room."""

    def again(_, taken: jax.Array) -> jax.Array:
        entitled = jnp.where(taken < room, weights, 0).astype(jnp.float32)
        left = (total - jnp.sum(taken)).astype(jnp.float32)
        part = jnp.round(left * entitled / jnp.maximum(jnp.sum(entitled), 1.0)).astype(jnp.int32)
        return jnp.clip(taken + part, 0, room)

    # Each round fills a leaf, or leaves nothing but what rounding has missed.
    taken = jax.lax.fori_loop(0, len(room), again, jnp.zeros_like(room))
    left = total - jnp.sum(taken)
    return taken + _fill(left, room - taken, first) - _fill(-left, taken, first)


def _fill(amount: jax.Array, room: jax.Array, first: jax.Array) -> jax.Array:
    """Hands out an amount leaf by leaf, from ``first`` on and round, each up to its room."""
    room = jnp.roll(room, -first)
    return jnp.roll(jnp.clip(amount - (jnp.cumsum(room) - room), 0, room), first)


def _adapt(threshold: jax.Array, ratio: jax.Array) -> jax.Array:
    """Halved or doubled if a tenth too many or too few were pruned; never 0 or infinity, where it would stay."""
    factor = jnp.where(ratio > 1.1, 0.5, jnp.where(ratio < 0.9, 2.0, 1.0))
    limits = jnp.finfo(jnp.float32)
    return jnp.clip(threshold * factor.astype(jnp.float32), limits.tiny, limits.max)

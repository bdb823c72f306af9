"""MEST: prune a little further than needed and grow back at random, or train a little denser than needed."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.counts import kept
from s2sam_jax._base.select import ones, random_scores, select
from s2sam_jax._base.structure import NM
from s2sam_jax._base.tree import by_name
from s2sam_jax._base.types import MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.growth import grow, restarted
from s2sam_jax._sparsity.plan import first_and_last, magnitude_init, sparse_leaves

Phases = Sequence[tuple[float, float]]


def mest(
    extra: Phases = ((0.0, 0.02), (100 / 160, 0.01), (130 / 160, 0.0)),
    *,
    soft_bound: bool = False,
    lam: float = 0.0,
) -> SparseMethod:
    r"""Prunes each leaf by :math:`|w| + \lambda |\nabla_w L|` and grows at random, within an elastic budget.

    .. math:: \text{kept} = \mathrm{top}_{n(L)}(|w| + \lambda |\nabla_w L|), \quad
              m_l \leftarrow \text{kept} \cup \mathrm{random}_{n(U) - n(L)}(\text{off kept}), \quad
              n(s) = N_l - \lfloor s N_l \rfloor

    Elastic mutation (EM) prunes to :math:`L = S_l + p_t` and grows to :math:`U = S_l`: the network is never denser than
    planned. With a soft memory bound (EM&S) it prunes to :math:`L = S_l` and grows to :math:`U = S_l - p_t`: denser
    between updates. In a phase with :math:`p_t = 0`, as always at the last update, no weights are exchanged; only those
    above the planned number are pruned. The first masks hold the planned number of the largest initial weights.

    Every grown weight starts from zero, even if it was pruned in the same update; it then keeps its optimizer state,
    while a truly new one has none. A pruned weight becomes zero and loses its state. No step is skipped.

    Args:
      extra: :math:`p_t` by phases ``(from, p)``: from that fraction of the clock's last call on, ``p`` more zeros
        (EM) or fewer (EM&S). The default, with the clock over 160 epochs, is that of S2-SAM's code for EM at 95 %,
        changing at epochs 100 and 130; MEST's own has the same amounts for 90 %, changing at 90 and 120. For EM&S at
        90 and 95 %: ``((0.0, 0.05), (90 / 160, 0.025), (120 / 160, 0.0))``.
      soft_bound: EM&S instead of EM.
      lam: :math:`\lambda`, the weight of the dense gradient in the score; 0, as in the released code, scores by
        magnitude.

    Returns:
      A method that needs ``when`` with an ``end``. The paper: every 5 epochs.

    Raises:
      ValueError: for a leaf that would lose all its weights, EM&S under N:M, phases that do not start at 0.0, do not
        ascend or lie outside ``[0, 1]``, a negative ``lam``, or a clock without an end.

    Reference:
      Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", NeurIPS 2021. Its
      code prunes by percentile and truncates, so that counts are off by one; here they are exact.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.mest(), sparsity=0.95, when=Every(0, 5, 160))
      >>> print(tx.init({"kernel": jnp.ones((10, 10))}).nnz)
      [5]
    """
    _check(extra, lam)

    def init(x: MaskInputs) -> MaskUpdate:
        first_and_last(x, "mest")
        if soft_bound and isinstance(x.structure, NM):
            raise ValueError(f"mest(soft_bound=True) grows beyond {x.structure}; use mest(), which stays within.")
        if not soft_bound:
            _check_room(x, max(p for _, p in extra))
        return magnitude_init(x)

    def update(x: MaskInputs, state: Any) -> MaskUpdate:
        weights = sparse_leaves(x, x.params)
        lower, upper = _bounds(x, weights)
        scores = [jnp.abs(w) for w in weights]
        if lam:
            scores = [s + lam * jnp.abs(g) for s, g in zip(scores, sparse_leaves(x, x.grads), strict=True)]
        keep = select(scores, count=lower, among=sparse_leaves(x, x.masks))
        added = [n - k for n, k in zip(upper, ones(keep), strict=True)]
        masks = grow(x, keep, added, random_scores(x.key, weights))
        return MaskUpdate(masks, state, restart=restarted(x, keep))

    def _bounds(x: MaskInputs, weights: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Per leaf, how many weights to prune to and to grow to at this step."""
        _, last = first_and_last(x, "mest")
        begins = [min(round(start * last, 6), last) for start, _ in extra] + [last]
        amounts = [p for _, p in extra] + [0.0]
        phase = jnp.sum(x.step >= jnp.asarray([math.ceil(begin) for begin in begins], jnp.int32)) - 1

        def counts(sign: int) -> list[jax.Array]:
            planned = zip(weights, sparse_leaves(x, x.sparsities), strict=True)
            return [
                jnp.asarray([kept(w.size, min(max(s + sign * p, 0.0), 1.0)) for p in amounts])[phase]
                for w, s in planned
            ]

        return (counts(0), counts(-1)) if soft_bound else (counts(1), counts(0))

    return SparseMethod(init=init, update=update, invariant="bounded", structured=True)


def _check_room(x: MaskInputs, most: float) -> None:
    """A leaf pruned to nothing would start from nothing at every update."""
    sparsities = {name: s for name, s in by_name(x.sparsities).items() if s > 0}
    if emptied := [name for name, s in sparsities.items() if s + most >= 1]:
        raise ValueError(
            f"mest would prune all of {emptied}: their sparsity and p={most} reach 1; give smaller p in "
            "extra=((from, p), ...), or a lower sparsity."
        )


def _check(extra: Phases, lam: float) -> None:
    begins = [begin for begin, _ in extra]
    if not begins or begins[0] != 0.0 or begins[-1] > 1 or any(a >= b for a, b in pairwise(begins)):
        raise ValueError(f"mest needs extra=((from, p), ...) with from = 0.0 first, ascending, up to 1; got {extra}.")
    if not all(0 <= p < 1 for _, p in extra):
        raise ValueError(f"mest needs 0 <= p < 1 in every phase of extra=((from, p), ...); got {extra}.")
    if lam < 0:
        raise ValueError(f"mest needs lam >= 0; got {lam}.")

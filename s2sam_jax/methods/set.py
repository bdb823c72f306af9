"""SET: drop the weights closest to zero on either side, grow at random."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import check_fractions
from s2sam_jax._base.counts import part
from s2sam_jax._base.select import ones, random_scores, select
from s2sam_jax._base.types import MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.growth import grow
from s2sam_jax._sparsity.plan import random_init, sparse_leaves


def set(drop_fraction: float | Callable[[jax.Array], Any] = 0.3, *, by_sign: bool = True) -> SparseMethod:
    r"""Drops the weights of each leaf that are closest to zero and grows as many at random.

    .. math:: \text{kept} = \mathrm{top}_{n_+ - \lfloor \zeta n_+ \rfloor}(w \ge 0) \cup
              \mathrm{top}_{n_- - \lfloor \zeta n_- \rfloor}(-w > 0), \quad
              m_l \leftarrow \text{kept} \cup \mathrm{random}_{\|m_l\|_0 - |\text{kept}|}(\text{off kept})

    with :math:`n_\pm` live weights of each sign; a live weight that is exactly zero counts as positive. The count of
    each leaf never changes. A dropped weight becomes zero and loses its optimizer state. A weight that is dropped and
    regrown in one update keeps both. A newly grown weight starts from zero, without momentum. No gradient step is
    skipped.

    Args:
      drop_fraction: :math:`\zeta` in ``[0, 1]``, the same at every update; or a function of the step that gives it.
      by_sign: drop the fraction among positive and among negative weights separately; ``False`` drops the
        :math:`\lfloor \zeta \|m_l\|_0 \rfloor` smallest magnitudes, like SET in the RigL code. Blocks and channels
        have no sign.

    Returns:
      A method that needs ``when``. The paper: once an epoch.

    Raises:
      ValueError: for a fraction outside ``[0, 1]``.

    Reference:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", Nature
      Communications 2018, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.set(0.3), sparsity=0.9, when=Every(0, 500))
      >>> print(tx.init({"kernel": jnp.ones((10, 10))}).nnz)
      [10]
    """
    check_fractions("set", drop_fraction=drop_fraction)

    def update(x: MaskInputs, state: Any) -> MaskUpdate:
        fraction = drop_fraction(x.step) if callable(drop_fraction) else drop_fraction
        weights, old = sparse_leaves(x, x.params), sparse_leaves(x, x.masks)
        groups = _by_sign(weights, old) if by_sign else [old]
        among = [mask for group in groups for mask in group]
        live = ones(among) if by_sign else sparse_leaves(x, x.nnz)
        dropped = [part(n, fraction) for n in live]
        chosen = select(
            [jnp.abs(w) for w in weights] * len(groups),
            count=[n - k for n, k in zip(live, dropped, strict=True)],
            among=among,
        )
        leaves = range(len(weights))
        keep = [functools.reduce(operator.or_, chosen[i :: len(weights)]) for i in leaves]
        moved = [sum(dropped[i :: len(weights)]) for i in leaves]
        return MaskUpdate(grow(x, keep, moved, random_scores(x.key, weights)), state)

    return SparseMethod(init=random_init, update=update, invariant="per_layer", structured=True)


def _by_sign(weights: list[jax.Array], masks: list[jax.Array]) -> list[list[jax.Array]]:
    negative = [m & (w < 0) for w, m in zip(weights, masks, strict=True)]
    return [[m & ~n for m, n in zip(masks, negative, strict=True)], negative]

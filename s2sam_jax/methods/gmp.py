"""Gradual magnitude pruning: from dense to sparse along a cubic."""

from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.counts import rounded_up
from s2sam_jax._base.select import Scope, ones, select
from s2sam_jax._base.structure import NM
from s2sam_jax._base.types import MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.plan import (
    first_and_last,
    global_count,
    planned_counts,
    replace_sparse,
    sparse_leaves,
    sparse_size,
)


def gmp(scope: Scope = "leaf") -> SparseMethod:
    r"""Starts dense and prunes the smallest live weights, fast at first and slowly towards the end.

    .. math:: z_l(t) = \left\lfloor \left(1 - (1 - p)^3\right) z_l \right\rfloor, \quad
              p = \frac{t - t_0}{t_n - t_0}, \quad z_l = \lfloor S_l N_l \rfloor

    is the number of zeros at call :math:`t`, from the first call :math:`t_0` of the clock to its last, :math:`t_n`,
    where it is exactly :math:`z_l`. Masks only shrink. A pruned weight becomes zero, loses its optimizer state and
    never comes back; the others train on undisturbed, and no gradient step is skipped. Under N:M the best n of each
    group are never pruned, so that the last update leaves exactly these.

    Args:
      scope: rank within each leaf (``"leaf"``), or over all sparse leaves together (``"global"``): the cubic then holds
        for the total, and a leaf may lose all its weights.

    Returns:
      A method that needs ``when`` with an ``end``. In RigL's comparison on ImageNet: ``Every(10_000, 1_000,
      25_000)`` of 32 000 steps.

    Raises:
      ValueError: for an unknown scope, or a clock without an end.

    Reference:
      Zhu and Gupta, "To prune, or not to prune", 2017, equation 1 with initial sparsity 0. Their code ranks the raw
      weights each time, so that a pruned one may return; here the masks are monotone.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, get_masks, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.gmp(), sparsity=0.75, when=Every(0, 1, 2))
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     print(int(get_masks(state)["kernel"].sum()))
      16
      6
      4
    """
    if scope not in ("leaf", "global"):
        raise ValueError(f"gmp needs scope 'leaf' or 'global'; got {scope!r}.")

    def init(x: MaskInputs) -> MaskUpdate:
        first_and_last(x, "gmp")
        return MaskUpdate(x.masks)

    def update(x: MaskInputs, state: Any) -> MaskUpdate:
        weights, masks = sparse_leaves(x, x.params), sparse_leaves(x, x.masks)
        first, last = first_and_last(x, "gmp")
        remaining = jnp.clip((last - x.step) / max(last - first, 1), 0.0, 1.0)

        def live(size: int, final: int) -> jax.Array:
            # Counted down from the end, where it is exact in float32.
            return final + rounded_up((size - final) * remaining**3)

        if scope == "leaf":
            count = [live(w.size, final) for w, final in zip(weights, planned_counts(x), strict=True)]
        else:
            count = live(sparse_size(x), global_count(x))
        scores = [jnp.abs(w) for w in weights]
        if isinstance(x.structure, NM):
            new = _largest_beside_groups(scores, count, masks, x.structure)
        else:
            new = select(scores, count=count, among=masks, scope=scope)
        return MaskUpdate(replace_sparse(x, x.masks, new), state)

    return SparseMethod(init=init, update=update, invariant="monotone", ranks=scope, structured=scope == "leaf")


def _largest_beside_groups(
    scores: list[jax.Array], count: Any, masks: list[jax.Array], structure: NM
) -> list[jax.Array]:
    """The best n of each group, and the largest others up to the count: groups shrink, but never below n."""
    stay = select(scores, among=masks, structure=structure)
    more = [k - n for k, n in zip(count, ones(stay), strict=True)]
    others = select(scores, count=more, among=[m & ~s for m, s in zip(masks, stay, strict=True)])
    return [jnp.logical_or(s, o) for s, o in zip(stay, others, strict=True)]

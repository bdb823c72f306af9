"""ITOP: SET or RigL with rare updates, and a record of the weights explored over time."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import check_fractions
from s2sam_jax._base.counts import part, rounded_up
from s2sam_jax._base.schedules import cosine
from s2sam_jax._base.select import random_scores
from s2sam_jax._base.tree import find_states
from s2sam_jax._base.types import MaskInputs, Masks, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.growth import move_smallest
from s2sam_jax._sparsity.plan import first_and_last, random_init, replace_sparse, sparse_leaves


class ITOPState(NamedTuple):
    """State of :func:`itop`.

    Attributes:
      explored: bool tree like the parameters; true where a weight (a unit, under blocks and channels) of a sparse leaf
        has ever been active, false on leaves that stay dense.
    """

    explored: Masks


def itop(
    growth: Literal["random", "gradient"] = "random", *, drop_fraction: float = 0.5, final_fraction: float = 0.005
) -> SparseMethod:
    r"""Drops and grows like SET or RigL, but rarely, so that new weights can train first, until the end of training.

    .. math:: k_l = \lceil f_t\, \|m_l\|_0 \rceil, \quad
              f_t = f_T + \tfrac{f_0 - f_T}{2}(1 + \cos(\pi t / T)), \quad
              \text{kept} = \mathrm{top}_{\|m_l\|_0 - k_l}(|w|), \quad
              m_l \leftarrow \text{kept} \cup \mathrm{top}_{k_l}(u\ \text{off kept})

    with :math:`u` uniformly random or :math:`|\nabla_w L|`. The count of each leaf never changes. A dropped weight
    becomes zero and loses its optimizer state. A weight that is dropped and regrown in one update keeps both. A newly
    grown weight starts from zero, without momentum. No gradient step is skipped. :func:`explored_fraction` gives the
    fraction of weights that have ever been active.

    Args:
      growth: ``"random"``, as in SET, or ``"gradient"``, by the dense gradient, as in RigL.
      drop_fraction: :math:`f_0` in ``[0, 1]``.
      final_fraction: :math:`f_T` in ``[0, 1]``, reached at :math:`T`, the last call of the clock.

    Returns:
      A method that needs ``when`` with an ``end``: the end of training. The paper on CIFAR: every 1500 steps with
      random growth, every 4000 with gradient growth, at batch size 128.

    Raises:
      ValueError: for an unknown growth, a fraction outside ``[0, 1]``, or a clock without an end.

    Reference:
      Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training",
      ICML 2021. Its code draws random growth weight by weight, so that counts drift; here they are exact.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.itop("gradient"), sparsity=0.9, when=Every(4000, 4000, 88_000))
      >>> print(tx.init({"kernel": jnp.ones((10, 10))}).nnz)
      [10]
    """
    if growth not in ("random", "gradient"):
        raise ValueError(f"itop needs growth 'random' or 'gradient'; got {growth!r}.")
    check_fractions("itop", drop_fraction=drop_fraction, final_fraction=final_fraction)

    def init(x: MaskInputs) -> MaskUpdate:
        first_and_last(x, "itop")
        masks = random_init(x).masks
        explored = replace_sparse(x, jax.tree.map(jnp.zeros_like, masks), sparse_leaves(x, masks))
        return MaskUpdate(masks, ITOPState(explored))

    def update(x: MaskInputs, state: ITOPState) -> MaskUpdate:
        fraction = cosine(drop_fraction, x.step, first_and_last(x, "itop")[1], final_fraction)
        moved = [part(n, fraction, rounded_up) for n in sparse_leaves(x, x.nnz)]
        if growth == "random":
            scores = random_scores(x.key, sparse_leaves(x, x.params))
        else:
            scores = [jnp.abs(g) for g in sparse_leaves(x, x.grads)]
        masks = move_smallest(x, moved, scores)
        seen = zip(*(sparse_leaves(x, tree) for tree in (state.explored, x.masks, masks)), strict=True)
        explored = [before | m | new for before, m, new in seen]
        return MaskUpdate(masks, ITOPState(replace_sparse(x, state.explored, explored)))

    return SparseMethod(init=init, update=update, invariant="per_layer", structured=True)


def explored_fraction(opt_state: Any) -> jax.Array:
    r"""The in-time over-parameterization rate: the fraction of weights that :func:`itop` has ever had active.

    .. math:: R_s = \|m_1 \cup \dots \cup m_t\|_0 / N

    over the sparse leaves; under blocks and channels, in units. The first masks count even if others were set before
    training.

    Args:
      opt_state: an optimizer state that contains :func:`itop`, at any depth.

    Returns:
      float32[], from the density (nothing explored yet) to 1; 0 if every leaf is dense.

    Raises:
      ValueError: if there is no such state.

    Reference:
      Liu et al., "Do We Actually Need Dense Over-Parameterization?", ICML 2021, §3.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.itop(), sparsity=0.75, when=Every(0, 10, 100))
      >>> print(methods.explored_fraction(tx.init({"kernel": jnp.ones((4, 4))})))
      0.25
    """
    states = find_states(opt_state, ITOPState)
    if not states:
        raise ValueError("explored_fraction found no state of methods.itop() in opt_state.")
    counts = [(jnp.sum(m, dtype=jnp.int32).astype(jnp.float32), m.size) for m in jax.tree.leaves(states)]
    size = sum((jnp.where(active > 0, jnp.float32(size), 0.0) for active, size in counts), jnp.zeros((), jnp.float32))
    return sum((active for active, _ in counts), jnp.zeros((), jnp.float32)) / jnp.maximum(size, 1.0)

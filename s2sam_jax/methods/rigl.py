"""RigL: drop the smallest weights, grow where the dense gradient is largest."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import check_fractions
from s2sam_jax._base.counts import part
from s2sam_jax._base.schedules import cosine
from s2sam_jax._base.types import MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.growth import move_smallest
from s2sam_jax._sparsity.plan import random_init, sparse_leaves


def rigl(drop_fraction: float | Callable[[jax.Array], Any] = 0.3, *, skip_step: bool = True) -> SparseMethod:
    r"""Drops the smallest weights of each leaf and grows as many where the dense gradient is largest.

    .. math:: k_l = \lfloor f_t\, \|m_l\|_0 \rfloor, \quad f_t = \tfrac{\alpha}{2}(1 + \cos(\pi t / T)), \quad
              \text{kept} = \mathrm{top}_{\|m_l\|_0 - k_l}(|w|), \quad
              m_l \leftarrow \text{kept} \cup \mathrm{top}_{k_l}(|\nabla_w L|\ \text{off kept})

    The count of each leaf never changes. A dropped weight becomes zero and loses its optimizer state. A weight that is
    dropped and regrown in one update keeps both. A newly grown weight starts from zero, without momentum.

    Args:
      drop_fraction: :math:`\alpha` in ``[0, 1]``, annealed by the cosine with :math:`T` = ``when.end``; or a function
        of the step that gives :math:`f_t` itself.
      skip_step: take no gradient step on the calls that change the masks, as in the paper's code.

    Returns:
      A method that needs ``when`` (with an ``end``, for the cosine). The paper: every 100 steps over the first three
      quarters of training.

    Warns:
      UserWarning: from ``init``, if ``skip_step`` and a clock that fires at every call leave no gradient step.

    Raises:
      ValueError: for a fraction outside ``[0, 1]``, or a cosine and a clock without an end.

    Reference:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, Algorithm 1. Its code adds noise of
      1e-5 to the magnitudes to break ties; here ties go to the lower index.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.rigl(0.3), sparsity=0.9, when=Every(0, 100, 25_000))
      >>> print(tx.init({"kernel": jnp.ones((10, 10))}).nnz)
      [10]
    """
    check_fractions("rigl", drop_fraction=drop_fraction)

    def fraction(x: MaskInputs) -> Any:
        if callable(drop_fraction):
            return drop_fraction(x.step)
        if x.when is None or x.when.end is None:
            raise ValueError("rigl anneals its drop fraction to the end of the clock: give when=Every(..., end=...).")
        return cosine(drop_fraction, x.step, x.when.end)

    def init(x: MaskInputs) -> MaskUpdate:
        fraction(x)
        if skip_step and x.when is not None and x.when.every == 1:
            warnings.warn(
                f"rigl takes no gradient step on the calls that change masks, and {x.when} changes them at every call, "
                "so that nothing is trained until its end. Give a larger every, or rigl(skip_step=False).",
                stacklevel=2,
            )
        return random_init(x)

    def update(x: MaskInputs, state: Any) -> MaskUpdate:
        share = fraction(x)
        moved = [part(n, share) for n in sparse_leaves(x, x.nnz)]
        masks = move_smallest(x, moved, [jnp.abs(g) for g in sparse_leaves(x, x.grads)])
        return MaskUpdate(masks, state, skip=skip_step)

    return SparseMethod(init=init, update=update, invariant="per_layer", structured=True)

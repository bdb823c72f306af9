"""One-shot magnitude pruning of trained weights."""

import jax.numpy as jnp

from s2sam_jax._base.select import Scope, select
from s2sam_jax._base.types import MaskInputs, MaskUpdate, SparseMethod
from s2sam_jax._sparsity.plan import global_count, magnitude_init, replace_sparse, sparse_leaves


def magnitude(scope: Scope = "leaf") -> SparseMethod:
    r"""Prunes once, at ``tx.init``, keeping the largest weights of the given parameters, usually pre-trained.

    .. math:: m_l = \mathrm{top}_{N_l - \lfloor S_l N_l \rfloor}(|w_l|)

    or, with ``scope="global"``, one ranking over all sparse leaves, with :math:`N = \sum_l N_l` and
    :math:`S = \sum_l S_l N_l / N`. Pruned weights become zero with ``apply_masks``, never come back, and have no
    optimizer state.

    Args:
      scope: rank within each leaf (``"leaf"``), or over all of them together (``"global"``), where a leaf may lose all
        its weights.

    Returns:
      A method whose masks never change; ``sparsify`` needs no ``when``.

    Raises:
      ValueError: for an unknown scope.

    Reference:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.magnitude(), sparsity=0.5)
      >>> print(tx.init({"kernel": jnp.array([[0.5, -2.0], [1.0, 0.1]])}).masks["kernel"])
      [[False  True]
       [ True False]]
    """
    if scope not in ("leaf", "global"):
        raise ValueError(f"magnitude needs scope 'leaf' or 'global'; got {scope!r}.")

    def init(x: MaskInputs) -> MaskUpdate:
        if scope == "leaf":
            return magnitude_init(x)
        scores = [jnp.abs(w) for w in sparse_leaves(x, x.params)]
        return MaskUpdate(replace_sparse(x, x.masks, select(scores, count=global_count(x), scope="global")))

    within = scope == "leaf"
    return SparseMethod(init, None, "per_layer" if within else "total", ranks=scope, structured=within)

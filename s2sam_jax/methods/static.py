"""Static sparse training: a random mask, drawn once."""

from s2sam_jax._base.types import SparseMethod
from s2sam_jax._sparsity.plan import random_init


def static() -> SparseMethod:
    r"""A uniformly random mask with exactly the planned count per leaf, which never changes.

    .. math:: \|m_l\|_0 = N_l - \lfloor S_l N_l \rfloor

    Returns:
      A method whose masks never change; ``sparsify`` needs no ``when``.

    Reference:
      Evci et al., "Rigging the Lottery", ICML 2020, §4 ("Static").

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.9)
      >>> print(tx.init({"kernel": jnp.ones((10, 10))}).nnz)
      [10]
    """
    return SparseMethod(init=random_init, update=None, invariant="per_layer", structured=True)

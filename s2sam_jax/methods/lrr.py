"""LRR: iterative magnitude pruning with learning-rate rewinding."""

from s2sam_jax._base.types import SparseMethod
from s2sam_jax._sparsity.rewind import rewinding


def lrr(prune_fraction: float = 0.2, *, rounds: int | None = None) -> SparseMethod:
    r"""Trains, prunes a fraction of the remaining weights by magnitude over all leaves, and retrains from there.

    .. math:: n_{i+1} = \max(n_{target},\ n_i - \lceil p\, n_i \rceil), \qquad w \leftarrow m \odot w, \quad
              \text{optimizer state} \leftarrow \text{that of step } k

    Like :func:`lottery`, but the weights keep their trained values: only the optimizer goes back to step
    ``when.start`` = k, and with it the learning rate schedule and the momentum (for k = 0, a fresh start). Calls on
    which the clock fires take no gradient step, so with rounds of L steps ``when = Every(start=k, every=L - k + 1)``.
    Pruned weights stay zero.

    Args:
      prune_fraction: p in ``(0, 1)``, the fraction of the remaining weights that a round prunes.
      rounds: number of prunings, only to check it against ``sparsify(sparsity=...)``, which decides; the last round
        prunes exactly to that sparsity.

    Returns:
      A method that needs ``when``. It keeps a copy of the optimizer state.

    Raises:
      ValueError: for a fraction out of range, rounds that disagree with the sparsity, or a clock that ends before them.

    Reference:
      Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020. Its code prunes
      convolutions only, below a percentile.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.lrr(0.2), sparsity=0.9, when=Every(0, 1001))
      >>> print(tx.init({"kernel": jnp.ones((10, 10))}).nnz)  # the first round is dense
      [100]
    """
    return rewinding(prune_fraction, rounds, "lrr", rewind_weights=False)

"""Lottery tickets: iterative magnitude pruning with weight rewinding."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.tree import masked
from s2sam_jax._base.types import MaskInputs, Masks, Params, SparseMethod
from s2sam_jax._sparsity.distributions import Prunable, is_kernel, same_everywhere
from s2sam_jax._sparsity.plan import global_count, sparse_size
from s2sam_jax._sparsity.pruning import keep_largest
from s2sam_jax._sparsity.rewind import remaining_weights, rewinding


def lottery(prune_fraction: float = 0.2, *, rounds: int | None = None) -> SparseMethod:
    r"""Trains, prunes a fraction of the remaining weights by magnitude over all leaves, rewinds, and repeats.

    .. math:: n_{i+1} = \max(n_{target},\ n_i - \lceil p\, n_i \rceil), \qquad w \leftarrow m \odot w_k, \quad
              \text{optimizer state} \leftarrow \text{that of step } k

    All rounds run inside one transformation. The clock's first firing, ``when.start`` = k, saves weights and optimizer
    state; every later one ends a round: it prunes and restores both. Firings take no gradient step, so with rounds of
    L steps ``when = Every(start=k, every=L - k + 1)``. The learning rate schedule is in the optimizer state, so it
    rewinds too. Pruned weights stay zero; survivors get back the value and the moments of step k (the value up to
    rounding, as an optax update is a difference). What lies outside of parameters and optimizer, such as BatchNorm's
    statistics and the order of the data, does not rewind; :func:`recalibrate_batch_stats` re-estimates the statistics.

    Args:
      prune_fraction: p in ``(0, 1)``, the fraction of the remaining weights that a round prunes.
      rounds: number of prunings, only to check it against ``sparsify(sparsity=...)``, which decides; the last round
        prunes exactly to that sparsity.

    Returns:
      A method that needs ``when``. It keeps a copy of parameters and optimizer state.

    Raises:
      ValueError: for a fraction out of range, rounds that disagree with the sparsity, or a clock that ends before them.

    Reference:
      Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Frankle et al., "Linear Mode Connectivity and the
      Lottery Ticket Hypothesis", ICML 2020, for k > 0. The published open_lth code prunes one more weight each round.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import Every, methods, sparsify
      >>> tx = sparsify(optax.sgd(0.1), methods.lottery(0.2, rounds=11), sparsity=0.9, when=Every(0, 1001))
      >>> print(tx.init({"kernel": jnp.ones((25, 40))}).nnz)  # the first round is dense
      [1000]
    """
    return rewinding(prune_fraction, rounds, "lottery", rewind_weights=True)


class Round(NamedTuple):
    """One round of :func:`lottery_rounds`.

    Attributes:
      number: 0 for the dense round.
      masks: bool tree like the parameters.
      remaining: weights left in the pruned leaves.
      params: the parameters after training.
    """

    number: int
    masks: Masks
    remaining: int
    params: Params


def lottery_rounds(
    train: Callable[[Params, Masks, int], Params],
    params: Params,
    *,
    sparsity: float,
    prune_fraction: float = 0.2,
    rewind: bool = True,
    prunable: Prunable = is_kernel,
) -> Iterator[Round]:
    """The rounds of :func:`lottery` (or ``lrr``), for loops that run and save each round themselves.

    Args:
      train: ``(params, masks, number) -> trained params``; install the masks with ``set_masks`` over
        ``methods.static``.
      params: the weights to rewind to, those of step k.
      sparsity: fraction of zeros to end at, in ``[0, 1)``.
      prune_fraction: the fraction of the remaining weights that a round prunes.
      rewind: ``False`` continues from the trained weights, as learning-rate rewinding does.
      prunable: ``(path, leaf) -> bool``.

    Yields:
      A :class:`Round` after each training, the dense one first.

    Raises:
      ValueError: for a fraction or sparsity out of range, or when nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import methods
      >>> train = lambda params, masks, number: params
      >>> rounds = methods.lottery_rounds(train, {"kernel": jnp.arange(100.0).reshape(10, 10)}, sparsity=0.4)
      >>> [(r.number, r.remaining) for r in rounds]
      [(0, 100), (1, 80), (2, 64), (3, 60)]
    """
    if not 0 < prune_fraction < 1:
        raise ValueError(f"lottery_rounds needs 0 < prune_fraction < 1; got {prune_fraction}.")
    plan = same_everywhere(params, sparsity, prunable)
    masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    x, weights = MaskInputs(params, masks, plan), params
    for number, count in enumerate(remaining_weights(sparse_size(x), global_count(x), prune_fraction)):
        if number:
            masks = keep_largest(x._replace(masks=masks), jax.tree.map(jnp.abs, weights), count)
        weights = train(masked(masks, params if rewind else weights), masks, number)
        yield Round(number, masks, count, weights)

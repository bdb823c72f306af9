"""BatchNorm statistics for the weights that are evaluated."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._train import Batch, LossFn, ModelState
from s2sam_jax._types import Params


def recalibrate_batch_stats(
    loss_fn: LossFn, params: Params, model_state: ModelState, batches: Iterable[Batch], *, seed: int = 0
) -> ModelState:
    r"""Re-estimates running statistics at given weights, as the plain average over some batches.

    .. math:: \bar s = \frac{1}{B} \sum_{b=1}^{B} s_b(w)

    S2-SAM gathers its statistics at perturbed weights and is evaluated at clean ones; this closes the gap. It works
    for any statistic kept as a moving average :math:`r \leftarrow \mu r + (1 - \mu) s_b`, whatever :math:`\mu` is: the
    first batch is seen twice, from ``r = 0`` and from ``r = 1``, which gives :math:`\mu`. Other leaves are kept.

    Args:
      loss_fn: the training loss of :func:`make_train_step`, in training mode.
      params: the weights to be evaluated; ``eval_params(...)`` of them where a wrapper is in use.
      model_state: the state to replace.
      batches: batches as in training; a handful is enough.
      seed: for dropout and the like.

    Returns:
      A model state with new statistics, of the same structure.

    Raises:
      ValueError: when there is no batch.

    Reference:
      Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, §3 (precise BatchNorm).

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import recalibrate_batch_stats
      >>> def loss_fn(params, mean, batch, key):
      ...     return batch.sum(), (0.9 * mean + 0.1 * batch.mean(), {})
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
      >>> print(recalibrate_batch_stats(loss_fn, None, jnp.array(0.0), batches).round(3))
      4.0
    """

    @jax.jit
    def forward(model_state, batch, index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return loss_fn(params, model_state, batch, key)[1][0]

    zeros = _filled(model_state, 0.0)
    total: Any = None
    momentum: Any = None
    count = 0
    for batch in batches:
        seen = forward(zeros, batch, count)
        if momentum is None:
            ones = forward(_filled(model_state, 1.0), batch, count)
            momentum = jax.tree.map(jnp.subtract, *_floats(ones, seen))
        total = _floats(seen)[0] if total is None else jax.tree.map(jnp.add, total, _floats(seen)[0])
        count += 1
    if count == 0:
        raise ValueError("recalibrate_batch_stats needs at least one batch; got none.")
    averages = iter(
        jnp.where(mu < 1, t / count / jnp.where(mu < 1, 1 - mu, 1), old)
        for t, mu, old in zip(total, momentum, _floats(model_state)[0], strict=True)
    )
    return jax.tree.map(lambda x: next(averages).astype(x.dtype) if _is_float(x) else x, model_state)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _filled(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, value) if _is_float(x) else x, tree)


def _floats(*trees: Any) -> list[list[jax.Array]]:
    return [[x for x in jax.tree.leaves(tree) if _is_float(x)] for tree in trees]

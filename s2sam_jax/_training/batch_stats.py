"""BatchNorm statistics for the weights that are evaluated."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from s2sam_jax._base.tree import at_least_f32, by_name, fold_keys, own_key
from s2sam_jax._base.types import Params
from s2sam_jax._training.train_step import Batch, LossFn, ModelState


def recalibrate_batch_stats(
    loss_fn: LossFn,
    params: Params,
    model_state: ModelState,
    batches: Iterable[Batch],
    *,
    seed: int | jax.Array = 0,
) -> ModelState:
    r"""Re-estimates running statistics at given weights, as the plain average over some batches.

    .. math:: \bar s = \frac{1}{B} \sum_{b=1}^{B} s_b(w)

    S2-SAM gathers its statistics at perturbed weights and is evaluated at clean ones; this closes the gap. It works
    for any statistic kept as a moving average :math:`r \leftarrow \mu r + (1 - \mu) s_b`, for any :math:`\mu`: the
    first batch is run from three values of ``r``, which give :math:`\mu`, one per leaf, and tell whether a leaf is such
    an average at all. Others are kept, and named in a warning: the vectors of spectral norms, and statistics that
    depend on these or on each other, as when running averages are used to normalize in training mode too. A moving
    average of the weights does become the weights: put it back.

    Each call compiles the forward pass anew, as a loss may close over values that have changed.

    Args:
      loss_fn: the training loss of :func:`make_train_step`, in training mode.
      params: the weights to be evaluated; with :func:`s2sam_wrapper`, those that :func:`eval_params` returns.
      model_state: the state to replace.
      batches: batches as in training, which are weighted equally; a handful is enough.
      seed: integer or PRNG key for dropout and the like; each batch gets a key of its own, and typed keys in
        ``model_state``, as Flax NNX keeps them there, are folded with the number of the batch.

    Returns:
      A model state with new statistics, of the same structure.

    Raises:
      ValueError: if there is no batch.

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
    key = own_key(seed, "recalibrate_batch_stats")
    statistics = jax.jit(lambda *args: [x for x in jax.tree.leaves(loss_fn(*args)[1][0]) if _is_float(x)])

    def forward(values, batch, index):
        return statistics(params, fold_keys(at(values), index), batch, jax.random.fold_in(key, index))

    def at(values):
        """The model state with other floating leaves, in float32 or wider."""
        values = iter(values)
        return jax.tree.map(lambda x: next(values) if _is_float(x) else x, model_state)

    old = [at_least_f32(x) for x in jax.tree.leaves(model_state) if _is_float(x)]
    start, rest = [jnp.zeros_like(x) for x in old], [jnp.ones_like(x) for x in old]
    averaged: list[jax.Array] = []
    total, count = start, 0
    for batch in batches:
        if count == 0:
            momentum = _momentum(partial(forward, batch=batch, index=0), old)
            averaged = [mu < 1 - 1e-5 for mu in momentum]  # else nothing of the batch gets in; never for NaN
            start = [jnp.where(a, 0, x) for a, x in zip(averaged, old, strict=True)]
            rest = [jnp.where(a, 1 - mu, 1) for a, mu in zip(averaged, momentum, strict=True)]
        seen = forward(start, batch, count)
        total = [t + at_least_f32(s) for t, s in zip(total, seen, strict=True)]
        count += 1
    if count == 0:
        raise ValueError("recalibrate_batch_stats needs at least one batch; got none.")
    _warn_of_kept(averaged, model_state)
    averages = [jnp.where(a, t / count / r, x) for a, t, r, x in zip(averaged, total, rest, old, strict=True)]
    return jax.tree.map(lambda new, x: new.astype(x.dtype) if _is_float(x) else x, at(averages), model_state)


def _momentum(forward: Callable[[list[jax.Array]], list[jax.Array]], old: list[jax.Array]) -> list[jax.Array]:
    """The momentum of each moving average; NaN for what does not move like one.

    From zero, ``r`` moves to ``(1 - mu) s``; from any other value, to ``mu r`` more. The second run starts from values
    on the scale of what was seen, so that the difference does not cancel; the third, from the old values plus a share
    of those, is the test.
    """
    dtypes = [x.dtype for x in jax.eval_shape(forward, old)]

    def wide(values):
        return [at_least_f32(x) for x in forward(values)]

    seen = wide([jnp.zeros_like(x) for x in old])
    probes = [jnp.full_like(x, 1 + jnp.max(jnp.abs(x), initial=0)) for x in seen]
    shares = np.random.default_rng(0).uniform(0.2, 0.8, len(old)).tolist()  # for each leaf another, lest they agree
    test = [x + u * p for x, u, p in zip(old, shares, probes, strict=True)]
    found = []
    looks = zip(seen, wide(probes), probes, wide(test), test, dtypes, strict=True)
    for zero, moved, probe, again, x, dtype in looks:
        mu = jnp.median((moved - zero) / probe)
        deviation = jnp.max(jnp.abs(again - (mu * x + zero)), initial=0)
        scale = jnp.max(jnp.abs(again), initial=0) + jnp.max(jnp.abs(mu * x), initial=0)
        is_average = deviation <= 0.02 * scale  # bfloat16 rounds by less
        known = 1 - mu >= 10 * jnp.finfo(dtype).eps  # else rounding of what is returned decides about 1 - mu
        found.append(jnp.where(is_average & known, mu, jnp.nan))
    return found


def _warn_of_kept(averaged: list[jax.Array], model_state: ModelState) -> None:
    if any(isinstance(a, Tracer) for a in averaged):  # nobody to tell inside a program
        return
    names = [name for name, x in by_name(model_state).items() if _is_float(x)]
    if kept := [name for name, a in zip(names, averaged, strict=True) if not a]:
        warnings.warn(
            f"recalibrate_batch_stats kept {kept}: they are no moving averages of the batch alone, as statistics that "
            "depend on each other or on a spectral norm; or too little of the batch gets in to be told from rounding, "
            "as in bfloat16 with a momentum near 1.",
            stacklevel=3,
        )


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)

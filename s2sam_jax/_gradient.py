"""The gradient of a loss with everything that comes along, averaged over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._types import Params

Batch = Any  # a pytree whose leaves have the examples along their leading axis
ModelState = Any
Metrics = dict[str, jax.Array]
Gradient = tuple[Params, jax.Array, ModelState, Metrics]  # with the loss, at one point
LossFn = Callable[[Params, ModelState, Batch, jax.Array], tuple[jax.Array, tuple[ModelState, Metrics]]]


def averaged_gradient(
    loss_fn: LossFn, model_state: ModelState, batch: Batch, key: jax.Array, parts: int
) -> Callable[[Params], Gradient]:
    """The gradient at a point and what comes with it, averaged over micro-batches."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def one(params, model_state, batch, key):
        (loss, (model_state, metrics)), grads = value_and_grad(params, model_state, batch, key)
        metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.result_type(float)), metrics)
        return (grads, loss, metrics), model_state

    def single(params):
        (grads, loss, metrics), new = one(params, model_state, batch, key)
        return grads, loss, new, metrics

    if parts == 1:
        return single
    micro = jax.tree.map(lambda x: _split(x, parts), batch)

    def averaged(params):
        first = jax.eval_shape(one, params, model_state, jax.tree.map(lambda x: x[0], micro), key)[0]

        def body(carry, index_and_batch):
            total, model_state = carry
            index, part = index_and_batch
            out, model_state = one(params, model_state, part, jax.random.fold_in(key, index))
            return (jax.tree.map(lambda t, x: t + x / parts, total, out), model_state), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        # Unrolled on CPU, where XLA is slow at convolution gradients inside loops.
        unroll = parts if jax.default_backend() == "cpu" else 1
        (total, new), _ = jax.lax.scan(body, (zeros, model_state), (jnp.arange(parts), micro), unroll=unroll)
        grads, loss, metrics = total
        return grads, loss, new, metrics

    return averaged


def _split(x: jax.Array, parts: int) -> jax.Array:
    if x.ndim == 0 or x.shape[0] % parts:
        raise ValueError(f"accumulate={parts} does not divide a batch leaf of shape {x.shape} along its first axis.")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

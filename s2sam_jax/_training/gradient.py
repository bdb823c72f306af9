"""The gradient of a loss with everything that comes along: of a batch, of its parts, of its sharpest examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.tree import at_least_f32, find_states, fold_keys, leaf_name, unfold_keys
from s2sam_jax._base.types import Params
from s2sam_jax._sharpness.esam import sharpest_examples
from s2sam_jax._sharpness.trajectory import TrajectoryBuffer
from s2sam_jax._training.batches import Batch, replicated, shard_like, split_batch, take_examples

ModelState = Any
Metrics = dict[str, jax.Array]
# Metrics of any type: a dict[str, float] is no dict[str, jax.Array], although both will do.
LossFn = Callable[[Params, ModelState, Batch, jax.Array], tuple[jax.Array, tuple[ModelState, dict[str, Any]]]]
ExampleLossFn = Callable[[Params, ModelState, Batch, jax.Array], jax.Array]


class Gradient(NamedTuple):
    """A gradient with what comes along.

    Attributes:
      grads: the gradient.
      loss: at the same point.
      model_state: after the forward pass.
      metrics: those of the loss.
      by_part: the gradients of the parts of the batch, stacked, if it is cut up for the sharpness; else ``None``.
    """

    grads: Params
    loss: jax.Array
    model_state: ModelState
    metrics: Metrics
    by_part: Params | None = None


def averaged_gradient(
    loss_fn: LossFn, model_state: ModelState, batch: Batch, key: jax.Array, parts: int
) -> Callable[[Params], Gradient]:
    """The gradient at a point, averaged over micro-batches, one after another."""
    one = _gradient_of(loss_fn)

    def single(params):
        (grads, loss, metrics), new = one(params, model_state, batch, key)
        return Gradient(grads, loss, new, metrics)

    if parts == 1:
        return single
    micro = split_batch(batch, parts, "accumulate", strided=True)

    def averaged(params):
        first = jax.eval_shape(one, params, model_state, jax.tree.map(lambda x: x[0], micro), key)[0]

        def body(carry, index_and_batch):
            total, model_state = carry
            index, part = index_and_batch
            out, model_state = one(params, model_state, part, jax.random.fold_in(key, index))
            return (jax.tree.map(lambda t, x: t + x.astype(t.dtype) / parts, total, out), model_state), None

        # In float32 or wider: in bfloat16 many small parts would be lost beside their sum.
        zeros = jax.tree.map(lambda x: at_least_f32(jnp.zeros(x.shape, x.dtype)), first)
        # Unrolled on CPU, where XLA is slow at convolution gradients inside loops.
        unroll = parts if jax.default_backend() == "cpu" else 1
        (total, new), _ = jax.lax.scan(body, (zeros, model_state), (jnp.arange(parts), micro), unroll=unroll)
        grads, loss, metrics = jax.tree.map(lambda t, x: t.astype(x.dtype), total, first)
        return Gradient(grads, loss, new, metrics)

    return averaged


def gradient_by_part(
    loss_fn: LossFn, model_state: ModelState, batch: Batch, key: jax.Array, parts: int
) -> Callable[[Callable[[Any], Params], Any], Gradient]:
    """The gradients of the parts of a batch, side by side: if it is sharded across devices, each has its own.

    The function returned takes ``point``, a function to where a part's gradient is taken, and a tree with one entry
    per part, which ``point`` is called with. Everything is averaged over the parts, batch statistics too.

    Raises:
      ValueError: for a ``TrajectoryBuffer`` in the model state, of which each part records rows of its own.
    """
    if find_states(model_state, TrajectoryBuffer):
        raise ValueError(
            f"sharpness_parts={parts} averages the model state over the parts, and recorded logits are no averages: "
            "model_state has a TrajectoryBuffer. Take sharpness_parts=1 (accumulate keeps every row), or leave the "
            "buffer out."
        )
    one, pieces = _gradient_of(loss_fn), split_batch(batch, parts, "sharpness_parts", strided=False)

    def averaged(point, entries):
        def of_part(entry, part, index):
            folded = fold_keys(model_state, index)
            out, new = one(point(entry), folded, part, jax.random.fold_in(key, index))
            return out, unfold_keys(new, folded, model_state)

        indices = shard_like(pieces, jnp.arange(parts))
        (by_part, loss, metrics), new = jax.vmap(of_part)(shard_like(pieces, entries), pieces, indices)
        return Gradient(_mean(by_part), jnp.mean(loss), _mean(new), _mean(metrics), by_part)

    return averaged


def gradient_of_sharpest(
    loss_fn: LossFn,
    example_loss_fn: ExampleLossFn,
    model_state: ModelState,
    batch: Batch,
    key: jax.Array,
    fraction: float,
    clean: Params,
) -> Callable[[Params], Params]:
    """The gradient at a point, on only the examples whose loss has risen most from the clean parameters.

    One key throughout, so that an example has the same noise before and after; in the smaller batch too, if the noise
    depends on the example and not on its position.
    """

    def gradient(params):
        before, after = (example_loss_fn(at, model_state, batch, key) for at in (clean, params))
        chosen = sharpest_examples(replicated(before), replicated(after), fraction)
        part = take_examples(batch, chosen, "sharpest_fraction")
        return averaged_gradient(loss_fn, model_state, part, key, 1)(params).grads

    return gradient


def _gradient_of(loss_fn: LossFn) -> Callable[..., Any]:
    def checked(params, model_state, batch, key):
        out = loss_fn(params, model_state, batch, key)
        _check_returned(out, model_state)
        return out

    value_and_grad = jax.value_and_grad(checked, has_aux=True)

    def one(params, model_state, batch, key):
        (loss, (new, metrics)), grads = value_and_grad(params, model_state, batch, key)
        metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.result_type(float)), metrics)
        return (grads, loss, metrics), new

    return one


def _check_returned(out: Any, before: ModelState) -> None:
    match out:
        case (_, (new, dict())):
            pass
        case _:
            got = jax.tree.map(jnp.shape, out)
            raise TypeError(
                "loss_fn must return (loss, (model_state, metrics)), metrics a dict, and () for a model without state; "
                f"got, with shapes in place of arrays, {got}."
            )
    if jax.tree.structure(new) != jax.tree.structure(before):
        raise ValueError(
            f"loss_fn returns a model state {jax.tree.structure(new)}, but the train state holds "
            f"{jax.tree.structure(before)}; begin with one like it: TrainState.create(params, tx, model_state=...)."
        )
    for (path, x), old in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(before), strict=True):
        got, want = jax.typeof(x), jax.typeof(old)
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"loss_fn turns {leaf_name(path)!r} of the model state from {want.str_short()} into {got.str_short()}; "
                "it must return the shapes and dtypes that it is given."
            )


def _mean(stacked: Any) -> Any:
    """Over the parts; what cannot be averaged, such as a counter, is that of the first."""
    return jax.tree.map(lambda x: jnp.mean(x, axis=0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0], stacked)

"""Recalibrated statistics are plain averages, whatever the momentum; what is no average is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from misfits import two_kernels
from moving_mean import BATCHES, DRAW, loss_fn

from s2sam_jax import recalibrate_batch_stats


def test_statistics_that_are_no_averages_are_kept_from_fresh_zeros_too():
    def depending(params, stats, batch, key):
        off = batch - stats["first"]
        first, second = (0.9 * s + 0.1 * x.mean(0) for s, x in ((stats["first"], batch), (stats["second"], off)))
        return batch.mean(), ({"first": first, "second": second}, {})

    batches = [jnp.full((4, 2), 3.0), jnp.full((4, 2), 5.0)]
    zeros = {"first": jnp.zeros(2), "second": jnp.zeros(2)}
    with pytest.warns(UserWarning, match=r"kept \['second'\]"):
        found = recalibrate_batch_stats(depending, None, zeros, batches)
    np.testing.assert_allclose(found["first"], 4.0, rtol=1e-5)
    np.testing.assert_array_equal(found["second"], 0.0)

    def maximum(params, stats, batch, key):
        return batch.mean(), (jnp.maximum(stats, jnp.abs(batch).max(0)), {})

    with pytest.warns(UserWarning, match="kept"):
        np.testing.assert_array_equal(recalibrate_batch_stats(maximum, None, jnp.zeros(2), batches), 0.0)


def two_kernel_loss(params, model_state, batch, key):
    return jnp.mean(batch @ params["a"]["kernel"] @ params["b"]["kernel"] + params["a"]["bias"]), (model_state, {})


def test_recalibration_needs_a_batch():
    with pytest.raises(ValueError, match=r"at least one batch; got none"):
        recalibrate_batch_stats(two_kernel_loss, two_kernels(), jnp.zeros(2), [])


@pytest.mark.parametrize(("momentum", "kept"), [(0.9, False), (0.99, True), (0.999, True)])
def test_statistics_of_which_rounding_hides_the_momentum_are_kept(momentum, kept):
    """In bfloat16, of which one step near 1 is 0.8 %."""
    batches = [jnp.full((2, 1), x) for x in (1.0, 2.0, 3.0)]

    def with_mean(params, mean, batch, key):
        return batch.sum(), ((momentum * mean + (1 - momentum) * batch.mean()).astype(jnp.bfloat16), {})

    mean = jnp.array(5.0, jnp.bfloat16)
    if kept:
        with pytest.warns(UserWarning, match="too little of the batch gets in"):
            assert recalibrate_batch_stats(with_mean, None, mean, batches) == 5.0
    else:
        np.testing.assert_allclose(np.float32(recalibrate_batch_stats(with_mean, None, mean, batches)), 2.0, rtol=0.05)


@pytest.mark.filterwarnings("ignore:recalibrate_batch_stats kept .'fixed'.")
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_recalibration_is_the_plain_average_whatever_the_momentum(momentum):
    def loss(params, model_state, batch, key):
        out = batch @ params
        new = {
            "mean": momentum * model_state["mean"] + (1 - momentum) * out.mean(0),
            "var": momentum * model_state["var"] + (1 - momentum) * out.var(0),
            "calls": model_state["calls"] + 1,
            "fixed": model_state["fixed"],
        }
        return out.sum(), (new, {})

    params = jnp.asarray(DRAW.normal(size=(3, 4)), jnp.float32)
    old = {"mean": jnp.full(4, 7.0), "var": jnp.full(4, 9.0), "calls": jnp.int32(5), "fixed": jnp.array([1.0, 2.0])}
    new = recalibrate_batch_stats(loss, params, old, BATCHES)
    outs = [np.asarray(batch @ params, np.float64) for batch in BATCHES]
    np.testing.assert_allclose(new["mean"], np.mean([o.mean(0) for o in outs], 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["var"], np.mean([o.var(0) for o in outs], 0), rtol=1e-4)
    assert int(new["calls"]) == 5
    np.testing.assert_array_equal(new["fixed"], [1.0, 2.0])


def test_recalibration_draws_anew_for_each_batch():
    """The mean of 64 uniform numbers has a deviation of 0.036; a single one has 0.29."""

    def loss(params, mean, batch, key):
        return batch.sum(), (0.9 * mean + 0.1 * jax.random.uniform(key, mean.shape), {})

    batches = [jnp.zeros(1)] * 64
    found = recalibrate_batch_stats(loss, None, jnp.zeros(16), batches)
    np.testing.assert_allclose(found, 0.5, atol=0.2)
    of_keys = [recalibrate_batch_stats(loss, None, jnp.zeros(16), batches, seed=jax.random.key(s)) for s in (0, 0, 1)]
    np.testing.assert_array_equal(of_keys[0], of_keys[1])
    assert (of_keys[0] != of_keys[2]).all()


@pytest.mark.parametrize("keys", [jax.random.key(0), jax.random.split(jax.random.key(0), (2, 3))], ids=["one", "split"])
def test_recalibration_draws_anew_from_keys_in_the_model_state(keys):
    """As Flax NNX keeps them there, beside counts that belong to the state, and so do not advance."""

    def loss(params, state, batch, key):
        used = jax.random.fold_in(state["keys"].reshape(-1)[-1], state["count"])
        mean = 0.9 * state["mean"] + 0.1 * jax.random.uniform(used, (16,))
        return batch.sum(), ({"mean": mean, "keys": state["keys"], "count": state["count"] + 1}, {})

    state = {"mean": jnp.zeros(16), "keys": keys, "count": jnp.uint32(7)}
    found = recalibrate_batch_stats(loss, None, state, [jnp.zeros(1)] * 64)
    np.testing.assert_allclose(found["mean"], 0.5, atol=0.2)
    assert found["count"] == 7
    assert (found["keys"] == keys).all()


def test_recalibration_without_batches_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_stats(loss_fn, None, {"mean": jnp.zeros(2)}, [])


@pytest.mark.parametrize("value", [1e-6, 1.0, 1e8])
def test_recalibration_does_not_cancel_at_any_scale(value):
    def loss(params, mean, batch, key):
        return batch.sum(), (0.99 * mean + 0.01 * batch.mean(), {})

    batches = [jnp.full(4, value), jnp.full(4, 3 * value)]
    np.testing.assert_allclose(recalibrate_batch_stats(loss, None, jnp.float32(5), batches), 2 * value, rtol=1e-3)
    low = recalibrate_batch_stats(loss, None, jnp.bfloat16(5), batches)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(low), 2 * value, rtol=1e-2)


def test_what_is_no_moving_average_survives_recalibration():
    """A spectral norm's vector, and the factor that follows from it, beside a mean and a key."""

    def step(params, state, batch, key):
        vector = batch.T @ (batch @ state["vector"])
        vector /= jnp.linalg.norm(vector) + 1e-12
        factor = jnp.linalg.norm(batch @ vector)
        mean = 0.9 * state["mean"] + 0.1 * jnp.mean(batch / state["factor"])
        return jnp.sum(batch), ({"vector": vector, "factor": factor, "mean": mean, "key": state["key"]}, {})

    draw = np.random.default_rng(0)
    batches = [jnp.asarray(draw.normal(size=(6, 3)) + 1, jnp.float32) for _ in range(4)]
    state = {"vector": jnp.array([1.0, 0.0, 0.0]), "factor": jnp.float32(2), "mean": jnp.float32(0.3)}
    with pytest.warns(UserWarning, match="kept .*'factor', .*'vector'"):
        found = recalibrate_batch_stats(step, None, state | {"key": jax.random.key(1)}, batches)
    np.testing.assert_array_equal(found["vector"], state["vector"])
    assert float(found["factor"]) == 2
    assert found["key"] == jax.random.key(1)


def test_recalibrating_traces_once_a_call_and_names_what_it_keeps():
    traces = []

    def loss(params, state, batch, key):
        traces.append(1)
        vector = jnp.tanh(params * state["vector"])
        h = batch / jnp.sum(vector)
        return jnp.sum(params), ({"vector": vector, "mean": 0.9 * state["mean"] + 0.1 * jnp.mean(h)}, {})

    state = {"vector": jnp.full(3, 0.3), "mean": jnp.zeros(())}
    with pytest.warns(UserWarning, match=r"recalibrate_batch_stats kept \['mean', 'vector'\]"):
        recalibrate_batch_stats(loss, 2 * jnp.ones(3), state, [jnp.ones(3), jnp.zeros(3)])
    assert len(traces) == 1

"""Steps that are not finite: frozen, skipped or taken, and always told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moving_mean import BATCHES, loss_fn, start

from s2sam_jax import Every, TrainState, make_train_step, methods, s2sam, sam, sparsify

PARAMS = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def loss_with_mean(params, model_state, batch, key):
    """Its statistic is the batch's own mean."""
    mean = jnp.mean(batch)
    return jnp.sum(params["kernel"] ** 2) * mean, (0.5 * model_state + 0.5 * mean, {})


def start_at_one(tx, params=PARAMS):
    return TrainState.create(jax.tree.map(jnp.array, params), tx, model_state=jnp.ones(()))


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: optax.apply_if_finite(tx, 5),
        lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite).gradient_transformation(),
    ],
    ids=["apply_if_finite", "skip_not_finite"],
)
def test_a_step_that_the_optimizer_passes_over_leaves_no_trace(outer):
    tx = outer(optax.chain(s2sam(0.1), optax.sgd(0.01)))
    step, state, seen = make_train_step(loss_with_mean, tx), start_at_one(tx), []
    for value in (2.0, 2.0, jnp.nan, 3.0):
        state, _ = step(state, jnp.full(4, value))
        seen.append((float(state.model_state), np.array(state.params["kernel"])))
    assert int(state.first_bad_step) == -1
    assert [statistic for statistic, _ in seen] == [1.5, 1.75, 1.75, 2.375]
    np.testing.assert_array_equal(seen[2][1], seen[1][1])
    assert (seen[3][1] < seen[2][1]).all()


@pytest.mark.parametrize("kind", ["sgd", "sam", "s2sam"])
def test_a_non_finite_step_freezes_everything_and_is_named(kind):
    tx = optax.chain({"sgd": optax.identity, "sam": sam, "s2sam": s2sam}[kind](), optax.sgd(0.1, momentum=0.9))
    tx = sparsify(tx, methods.rigl(0.3), sparsity=0.5, when=Every(0, 2, 100))
    step, state = make_train_step(loss_fn, tx), start(tx)
    for index in range(3):
        state, _ = step(state, BATCHES[index])
    assert int(state.first_bad_step) == -1
    kept = jax.tree.map(jnp.array, (state.params, state.model_state, state.opt_state.masks))
    state, metrics = step(state, BATCHES[3].at[0, 0].set(jnp.nan))
    assert not np.isfinite(metrics["loss"])
    state, metrics = step(state, BATCHES[4])
    assert np.isnan(metrics["loss"])
    assert metrics["update_norm"] == 0
    assert int(state.first_bad_step) == 3
    assert int(state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.model_state, state.opt_state.masks), kept)


def test_a_healthy_step_has_no_nan_to_find():
    tx = optax.sgd(0.1)
    with jax.debug_nans(True), jax.disable_jit():
        _, metrics = make_train_step(loss_fn, tx)(start(tx), BATCHES[0])
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("kind", ["sgd", "s2sam"])
def test_without_the_freeze_a_bad_step_is_taken_and_told(kind):
    inner = optax.chain({"sgd": optax.identity, "s2sam": s2sam}[kind](), optax.sgd(0.1, momentum=0.9))
    tx = sparsify(inner, methods.rigl(0.3), sparsity=0.5, when=Every(0, 2, 100))
    steps = make_train_step(loss_fn, tx), make_train_step(loss_fn, tx, freeze=False)
    for bad in (None, 1):  # no step of a mask update, which takes no gradient in
        states = [start(tx), start(tx)]
        for index in range(4):
            batch = BATCHES[index].at[0, 0].set(jnp.nan) if index == bad else BATCHES[index]
            states = [step(state, batch)[0] for step, state in zip(steps, states, strict=True)]
        if bad is None:
            np.testing.assert_array_equal(*(state.params["kernel"] for state in states))
    assert [int(state.first_bad_step) for state in states] == [1, 1]
    finite = [bool(jnp.isfinite(state.params["kernel"]).all()) for state in states]
    assert finite == [True, False]


def test_a_bad_gradient_behind_a_mask_does_not_stop_training():
    def root_loss(params, model_state, batch, key):
        return jnp.sum(jnp.sqrt(jnp.abs(params["kernel"]))), (model_state, {"largest": jnp.inf})

    tx = sparsify(optax.sgd(0.01), methods.static(), sparsity=0.5)
    step = make_train_step(root_loss, tx)
    state, metrics = step(TrainState.create({"kernel": jnp.ones((4, 4))}, tx), jnp.ones(2))
    assert int(metrics["first_bad_step"]) == -1
    assert np.isfinite(metrics["loss"])  # not the metric of that name
    np.testing.assert_allclose(float(state.params["kernel"].sum()), 8 * 0.995, rtol=1e-5)


def test_apply_if_finite_skips_a_bad_batch_and_goes_on():
    tx = optax.apply_if_finite(optax.sgd(0.1), 5)
    step, state = make_train_step(loss_fn, tx), start(tx)
    state, _ = step(state, BATCHES[0].at[0, 0].set(jnp.nan))
    before = jnp.array(state.params["kernel"])
    state, metrics = step(state, BATCHES[1])
    assert int(metrics["first_bad_step"]) == -1
    assert float(jnp.abs(state.params["kernel"] - before).max()) > 0

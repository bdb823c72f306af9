"""The train step: model state, metrics, micro-batches, noise, and calls from other programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moving_mean import BATCHES, loss_fn, start

from s2sam_jax import Every, TrainState, make_train_step, methods, perturb, s2sam, s2sam_wrapper, sam, sparsify, ssam


def test_model_state_is_that_of_the_first_pass():
    """SAM: the clean weights; S2-SAM: the perturbed ones, its only pass."""
    tx = optax.chain(sam(0.5), optax.sgd(0.1))
    state = start(tx)
    clean = jnp.array(state.params["kernel"])
    state, _ = make_train_step(loss_fn, tx)(state, BATCHES[0])
    np.testing.assert_array_equal(state.model_state["seen"], clean)

    tx = optax.chain(s2sam(0.5), optax.sgd(0.1))
    step = make_train_step(loss_fn, tx)
    state, _ = step(start(tx), BATCHES[0])
    point = perturb(state.params, state.opt_state)["kernel"]
    assert float(jnp.abs(point - state.params["kernel"]).max()) > 0.1
    state, _ = step(state, BATCHES[1])
    np.testing.assert_allclose(state.model_state["seen"], point, rtol=1e-6)


def test_the_step_passes_for_a_function():
    tx = optax.sgd(0.1)
    step, state = make_train_step(loss_fn, tx), start(tx)
    assert step.__name__ == "train_step"
    assert "@jit_train_step" in step.lower(state, BATCHES[0]).as_text()
    wrapped = functools.wraps(step)(lambda state, batch: step(state, batch))
    expected = step(start(tx), BATCHES[0])[1]["loss"]
    for transformed in (jax.jit(step), jax.jit(wrapped)):
        np.testing.assert_allclose(transformed(state, BATCHES[0])[1]["loss"], expected, rtol=1e-6)
    both = jax.vmap(step, in_axes=(None, 0))(state, jnp.stack([BATCHES[0]] * 2))[1]["loss"]
    np.testing.assert_allclose(both, jnp.stack([expected] * 2), rtol=1e-6)


def test_metrics():
    inner = optax.chain(s2sam(rho=lambda step: 0.1 * (step + 1.0)), optax.sgd(0.1))
    tx = sparsify(inner, methods.static(), sparsity=0.5)
    step, state = make_train_step(loss_fn, tx), start(tx)
    for index in range(3):
        before = jax.tree.map(jnp.array, state)
        state, metrics = step(state, BATCHES[index])
        point = perturb(before.params, before.opt_state)
        grads = jax.grad(lambda p: loss_fn(p, before.model_state, BATCHES[index], None)[0])(point)
        np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(grads["kernel"]), rtol=1e-5)
        np.testing.assert_allclose(metrics["rho"], 0.1 * (index + 1), rtol=1e-6)
        np.testing.assert_allclose(metrics["sparsity"], 0.5)
        moved = jnp.linalg.norm(state.params["kernel"] - before.params["kernel"])
        np.testing.assert_allclose(metrics["update_norm"], moved, rtol=1e-5)
        assert "largest" in metrics


def test_radius_under_the_wrapper():
    tx = s2sam_wrapper(optax.sgd(0.1), rho=lambda step: 0.1 * (step + 1.0))
    step, state = make_train_step(loss_fn, tx), start(tx)
    for index in range(3):
        state, metrics = step(state, BATCHES[index])
        np.testing.assert_allclose(metrics["rho"], 0.1 * (index + 1), rtol=1e-6)


def test_create_copies_so_that_donation_leaves_the_callers_arrays():
    params, key = {"kernel": jnp.ones((3, 4))}, jax.random.key(3)
    tx = sparsify(optax.chain(s2sam(), optax.sgd(0.1)), methods.static(), sparsity=0.5, seed=key)
    state = TrainState.create(params, tx, model_state={"seen": jnp.zeros((3, 4)), "mean": jnp.zeros(4)}, seed=key)
    make_train_step(loss_fn, tx)(state, BATCHES[0])
    assert float(params["kernel"].sum()) == 12.0
    assert jax.random.key_data(key).shape == (2,)


def test_states_that_keep_the_parameters_can_be_donated():
    tx = optax.contrib.prodigy()
    before = start(tx).params["kernel"]
    state, _ = make_train_step(loss_fn, tx)(start(tx), BATCHES[0])
    assert int(state.first_bad_step) == -1
    assert not np.array_equal(state.params["kernel"], before)


def test_integer_metrics_are_averaged_over_micro_batches():
    def counting(params, model_state, batch, key):
        loss, (model_state, _) = loss_fn(params, model_state, batch, key)
        return loss, (model_state, {"positive": jnp.sum(batch[:, 0] > 0)})

    tx = optax.sgd(0.1)
    step = make_train_step(counting, tx, accumulate=2)
    _, metrics = step(start(tx), BATCHES[0])
    np.testing.assert_allclose(metrics["positive"], float((BATCHES[0][:, 0] > 0).sum()) / 2)


def test_fisher_information_is_of_the_first_examples_at_the_model_state_before():
    """Example i has a gradient at coordinate i alone, as large as the model state is there; the loss turns that."""

    def loss(params, model_state, batch, key):
        return jnp.mean(batch @ (model_state * params["w"])), (model_state[::-1], {})

    tx = optax.chain(ssam(0.1, mask="fisher", sparsity=0.75), optax.sgd(0.1))
    step = make_train_step(loss, tx, fisher_examples=2)
    for rows, model_state, chosen in (([3, 2, 1, 0], [9.0, 9, 1, 2], 3), ([2, 3, 0, 1], [9.0, 1, 2, 1], 2)):
        state = TrainState.create({"w": jnp.ones(4)}, tx, model_state=jnp.array(model_state))
        state, _ = step(state, jnp.eye(4)[jnp.array(rows)])
        np.testing.assert_array_equal(state.opt_state[0].perturb_masks["w"], np.arange(4) == chosen)


@pytest.mark.parametrize("option", ["accumulate", "sharpness_parts"])
def test_every_step_and_every_part_of_a_batch_has_noise_of_its_own(option):
    """Of equal numbers the mean square is the square of the mean."""

    def loss(params, model_state, batch, key):
        noise = jax.random.uniform(key)
        return noise * (params["w"] @ batch.sum(0)), (model_state, {"noise": noise, "square": noise**2})

    tx, batch = optax.chain(sam(0.1), optax.sgd(0.1)), jnp.ones((4, 2))
    step, state, means = make_train_step(loss, tx, **{option: 4}), TrainState.create({"w": jnp.ones(2)}, tx), []
    for _ in range(2):
        state, metrics = step(state, batch)
        assert metrics["square"] - metrics["noise"] ** 2 > 1e-3
        means.append(float(metrics["noise"]))
    assert means[0] != means[1]


def test_a_micro_batch_has_every_kth_example():
    """Of 0, 1, 2, 3 the means of (0, 2) and (1, 3); of neighbours, 0.5 and 2.5."""

    def recording(params, model_state, batch, key):
        mean = jnp.mean(batch)
        return params * mean, (mean, {"squared": mean**2})

    tx = optax.sgd(0.1)
    state = TrainState.create(jnp.ones(()), tx, model_state=jnp.zeros(()))
    state, metrics = make_train_step(recording, tx, accumulate=2)(state, jnp.arange(4.0))
    assert (float(metrics["loss"]), float(metrics["squared"]), float(state.model_state)) == (1.5, 2.5, 2.0)


def test_a_traced_batch_is_enough_for_a_pure_function():
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.5), sparsity=0.5, when=Every(0, 2, 100))
    step, state = make_train_step(loss_fn, tx), start(tx)
    traced = jax.jit(lambda batch: step(state, batch))
    _, metrics = traced(BATCHES[0])
    inside_of_another_trace = []
    jax.vmap(lambda x: inside_of_another_trace.append(step(state, BATCHES[0])) or x)(jnp.ones(2))
    assert state.params["kernel"].is_deleted()  # compiled and donated, as outside
    np.testing.assert_allclose(metrics["loss"], inside_of_another_trace[0][1]["loss"], rtol=1e-6)


def test_a_step_that_has_run_can_be_sent_to_another_process():
    """As Ray does, by cloudpickle, which takes functions along; the clock's arrays belong to this process."""
    cloudpickle = pytest.importorskip("cloudpickle")
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.5), sparsity=0.5, when=Every(0, 2, 100))
    step = make_train_step(loss_fn, tx)
    state, _ = step(start(tx), BATCHES[0])
    sent = cloudpickle.loads(cloudpickle.dumps(step))
    there, _ = sent(jax.tree.map(jnp.array, state), BATCHES[1])
    here, _ = step(state, BATCHES[1])
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)


@pytest.mark.parametrize("vmap", [False, True])
def test_a_step_can_be_lowered_ahead_of_time(vmap):
    """From shapes alone, to one program whose state takes the place of the old one."""
    tx = sparsify(optax.chain(s2sam(0.1), optax.sgd(0.1)), methods.rigl(0.5), sparsity=0.5, when=Every(0, 2, 100))
    step, state, batch = make_train_step(loss_fn, tx, vmap=vmap), start(tx), BATCHES[0]
    if vmap:
        state, batch = jax.tree.map(lambda x: jnp.stack([x, x]), (state, batch))
    compiled = step.lower(jax.eval_shape(lambda: state), jax.ShapeDtypeStruct(batch.shape, batch.dtype)).compile()
    assert compiled.cost_analysis()["flops"] > 0
    donated = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state.masks)))
    assert compiled.memory_analysis().alias_size_in_bytes >= donated
    for _ in range(2):
        expected = step(jax.tree.map(jnp.array, state), batch)[0].params["kernel"]
        state, _ = compiled(state, batch)
        np.testing.assert_allclose(state.params["kernel"], expected, rtol=1e-6)
    with pytest.raises(TypeError, match="needs a TrainState; got a dict"):
        step.lower({}, batch)


def test_weak_types_are_traced_once():
    traces = []

    def loss_fn(params, model_state, batch, key):
        traces.append(1)
        return jnp.sum(params["g"] * batch), (model_state, {})

    tx = optax.sgd(0.1)
    state = TrainState.create({"g": jnp.full((4,), 1e-4)}, tx, model_state={"c": 0.0})
    step = make_train_step(loss_fn, tx)
    for _ in range(3):
        state, _ = step(state, jnp.ones(4))
    assert len(traces) == 1


def test_many_small_parts_add_up_in_bfloat16():
    def mean_loss(params, model_state, batch, key):
        return jnp.mean(batch @ params["w"]), (model_state, {})

    step = make_train_step(mean_loss, optax.sgd(1.0), accumulate=512)
    state = TrainState.create({"w": jnp.zeros(1, jnp.bfloat16)}, optax.sgd(1.0))
    new, _ = step(state, jnp.ones((512, 1), jnp.bfloat16))
    assert new.params["w"].dtype == jnp.bfloat16
    assert float(new.params["w"][0]) == -1.0


PARAMS = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def scaled_squares(params, model_state, batch, key):
    return jnp.sum(params["kernel"] ** 2) * jnp.mean(batch), (model_state, {})


def test_multisteps_as_an_object_keeps_extra_arguments():
    tx = optax.MultiSteps(sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.5), 1)
    step, state = make_train_step(scaled_squares, tx), TrainState.create(PARAMS, tx)
    state, _ = step(state, jnp.ones(4))
    assert int((state.params["kernel"] == 0).sum()) == 50

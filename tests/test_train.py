"""The train step: BatchNorm statistics, non-finite steps, the host's clocks, recalibration."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    Every,
    TrainState,
    get_masks,
    make_train_step,
    methods,
    perturb,
    recalibrate_batch_stats,
    s2sam,
    s2sam_wrapper,
    sam,
    sparsify,
    ssam,
)
from s2sam_jax._training import host_clock

DRAW = np.random.default_rng(0)
BATCHES = [jnp.asarray(DRAW.normal(size=(8, 3)) + 1, jnp.float32) for _ in range(8)]


def loss_fn(params, model_state, batch, key):
    """A linear layer whose model state records the weights it was run at and a moving mean."""
    del key
    out = batch @ params["kernel"]
    new = {"seen": params["kernel"], "mean": 0.9 * model_state["mean"] + 0.1 * out.mean(0)}
    return jnp.mean((out - 1.0) ** 2), (new, {"largest": out.max()})


def start(tx):
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)}
    model_state = {"seen": jnp.zeros((3, 4)), "mean": jnp.zeros(4)}
    return TrainState.create(params, tx, model_state=model_state)


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
    state, _ = step(state, BATCHES[4])
    assert int(state.first_bad_step) == 3
    assert int(state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.model_state, state.opt_state.masks), kept)


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


def test_host_clock_equals_the_clock_in_the_state():
    """Flags from the host and ``lax.cond`` from the state give the same run, also when a state is taken up again."""
    inner = optax.chain(ssam(0.1, mask="dynamic", update_every=3, total_steps=30), optax.sgd(0.1, momentum=0.9))
    tx = sparsify(inner, methods.rigl(0.5), sparsity=0.5, when=Every(1, 2, 20))
    hosted = make_train_step(loss_fn, tx)
    pure = jax.jit(lambda state, batch: hosted(state, batch))
    a, b = start(tx), start(tx)
    for index, batch in enumerate(BATCHES):
        if index == 5:
            a = jax.tree.map(jnp.array, a)  # a copy, as after a restore: the host must read the clocks again
        a, _ = hosted(a, batch)
        b, _ = pure(b, batch)
        jax.tree.map(np.testing.assert_array_equal, a.opt_state.masks, b.opt_state.masks)
        perturb_masks = [s.opt_state.inner_state[0].perturb_masks for s in (a, b)]
        jax.tree.map(np.testing.assert_array_equal, *perturb_masks)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a.params, b.params)


def test_create_copies_so_that_donation_leaves_the_callers_arrays():
    params, key = {"kernel": jnp.ones((3, 4))}, jax.random.key(3)
    tx = sparsify(optax.chain(s2sam(), optax.sgd(0.1)), methods.static(), sparsity=0.5, seed=key)
    state = TrainState.create(params, tx, model_state={"seen": jnp.zeros((3, 4)), "mean": jnp.zeros(4)}, seed=key)
    make_train_step(loss_fn, tx)(state, BATCHES[0])
    assert float(params["kernel"].sum()) == 12.0
    assert jax.random.key_data(key).shape == (2,)


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


def test_states_that_keep_the_parameters_can_be_donated():
    tx = optax.contrib.prodigy()
    before = start(tx).params["kernel"]
    state, _ = make_train_step(loss_fn, tx)(start(tx), BATCHES[0])
    assert int(state.first_bad_step) == -1
    assert not np.array_equal(state.params["kernel"], before)


def test_host_clock_notices_a_replaced_optimizer_state():
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.5), sparsity=0.5, when=Every(0, 10, 100))
    step, state = make_train_step(loss_fn, tx), start(tx)
    for index in range(3):
        state, _ = step(state, BATCHES[index])
    state = state._replace(opt_state=tx.init(state.params))
    assert int(state.opt_state.next_update) == 0
    state, _ = step(state, BATCHES[3])
    assert int(state.opt_state.next_update) == 10


def test_the_host_reads_a_count_only_where_masks_change(monkeypatch):
    """Each reading waits for the device."""
    read, seen = host_clock._newest, []
    monkeypatch.setattr(host_clock, "_newest", lambda count: seen.append(read(count)) or seen[-1])
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.5), sparsity=0.5, when=Every(2, 4, 100))
    step, state = make_train_step(loss_fn, tx), start(tx)
    for index in range(8):
        state, _ = step(state, BATCHES[index])
    # The step and the next update: at first, and before and after each update.
    assert seen == [0, 2, 2, 2, 3, 6, 6, 6, 7, 10]


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


def test_the_clock_is_left_to_the_state_where_a_wrapper_leaves_calls_out():
    """Masks from Python calls equal those of the step inside jit, though two of three calls never reach sparsify."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)), jnp.float32)}
    inner = sparsify(optax.sgd(0.1), methods.set(0.5), sparsity=0.5, when=Every(3, 5, 1000))
    tx = optax.transforms.conditionally_transform(inner, lambda step, **_: step % 3 == 0)

    def loss_fn(params, model_state, batch, key):
        return jnp.sum((params["kernel"] - batch) ** 2), (model_state, {})

    step, batch = make_train_step(loss_fn, tx), jnp.ones((6, 6))
    called = traced = TrainState.create(params, tx)
    called = jax.tree.map(jnp.array, called)
    jitted = jax.jit(lambda state: step(state, batch)[0])
    for _ in range(40):
        called, traced = step(called, batch)[0], jitted(traced)
        np.testing.assert_array_equal(get_masks(called.opt_state)["kernel"], get_masks(traced.opt_state)["kernel"])


def counted_calls(fn):
    """Calls of the library's own Python functions."""
    calls = []

    def count(frame, event, _):
        if event == "call" and "s2sam_jax" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        fn()
    finally:
        sys.setprofile(before)
    return len(calls)


def test_the_work_of_the_host_does_not_grow_with_the_leaves():
    def sum_loss(params, model_state, batch, key):
        return sum(jnp.sum(p * batch) for p in jax.tree.leaves(params)), (model_state, {})

    counts = []
    for leaves in (2, 30):
        tx = sparsify(optax.chain(s2sam(), optax.adam(1e-3)), methods.static(), sparsity=0.5)
        step, batch = make_train_step(sum_loss, tx), jnp.ones(())
        state = TrainState.create({f"{i}/kernel": jnp.ones((2, 2)) for i in range(leaves)}, tx)
        for _ in range(2):
            state, _ = step(state, batch)
        counts.append(counted_calls(lambda step=step, state=state, batch=batch: step(state, batch)))
    assert counts[0] == counts[1] < 100


def test_a_traced_batch_is_enough_for_a_pure_function():
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.5), sparsity=0.5, when=Every(0, 2, 100))
    step, state = make_train_step(loss_fn, tx), start(tx)
    traced = jax.jit(lambda batch: step(state, batch))
    _, metrics = traced(BATCHES[0])
    inside_of_another_trace = []
    jax.vmap(lambda x: inside_of_another_trace.append(step(state, BATCHES[0])) or x)(jnp.ones(2))
    assert state.params["kernel"].is_deleted()  # compiled and donated, as outside
    np.testing.assert_allclose(metrics["loss"], inside_of_another_trace[0][1]["loss"], rtol=1e-6)


def test_one_host_clock_serves_states_of_several_structures():
    inner = optax.sgd(0.1), optax.adam(0.1), optax.sgd(0.1)
    sparse = [sparsify(tx, methods.rigl(), sparsity=0.5, when=Every(n, 9, 100)) for n, tx in enumerate(inner)]
    txs = [tx for one in sparse for tx in (optax.chain(optax.adam(0.1), one), optax.sgd(0.1))]
    clock = host_clock.HostClock()
    due = [clock.flags(tx.init({"kernel": jnp.ones((4, 4))}), jnp.int32(-1)) for tx in txs]
    assert due == [(("refresh_masks", True),), (), (("refresh_masks", False),), (), (("refresh_masks", False),), ()]


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

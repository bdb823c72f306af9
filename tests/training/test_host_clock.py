"""The clocks that the host keeps are those in the state."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from moving_mean import BATCHES, loss_fn, start

from s2sam_jax import Every, TrainState, get_masks, make_train_step, methods, s2sam, sparsify, ssam
from s2sam_jax._training import host_clock

PARAMS = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def loss_with_mean(params, model_state, batch, key):
    """Its statistic is the batch's own mean."""
    mean = jnp.mean(batch)
    return jnp.sum(params["kernel"] ** 2) * mean, (0.5 * model_state + 0.5 * mean, {})


def start_at_one(tx, params=PARAMS):
    return TrainState.create(jax.tree.map(jnp.array, params), tx, model_state=jnp.ones(()))


def test_a_freeze_that_is_lifted_moves_no_clock():
    tx = sparsify(optax.sgd(1e-3), methods.lottery(0.2), sparsity=0.9, when=Every(0, 10), distribution="uniform")
    good, bad = jnp.ones(4), jnp.full(4, jnp.nan)

    def alive(batches):
        step, state, counts = make_train_step(loss_with_mean, tx), start_at_one(tx), []
        for batch in batches:
            state, _ = step(state, batch)
            if int(state.first_bad_step) >= 0:
                state = state._replace(first_bad_step=jnp.int32(-1))
            else:
                counts.append(int(get_masks(state.opt_state)["kernel"].sum()))
        return counts

    assert alive([good] * 3 + [bad] * 4 + [good] * 20) == alive([good] * 23)


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


def test_one_host_clock_serves_states_of_several_structures():
    inner = optax.sgd(0.1), optax.adam(0.1), optax.sgd(0.1)
    sparse = [sparsify(tx, methods.rigl(), sparsity=0.5, when=Every(n, 9, 100)) for n, tx in enumerate(inner)]
    txs = [tx for one in sparse for tx in (optax.chain(optax.adam(0.1), one), optax.sgd(0.1))]
    clock = host_clock.HostClock()
    due = [clock.flags(tx.init({"kernel": jnp.ones((4, 4))}), jnp.int32(-1)) for tx in txs]
    assert due == [(("refresh_masks", True),), (), (("refresh_masks", False),), (), (("refresh_masks", False),), ()]


def scaled_squares(params, model_state, batch, key):
    return jnp.sum(params["kernel"] ** 2) * jnp.mean(batch), (model_state, {})


def skip_spikes(inner, most):
    """A wrapper as users write them, which leaves everything as it was where the gradient is large."""
    inner = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, **extra_args):
        updates, new = inner.update(grads, state, params, **extra_args)
        bad = optax.tree.norm(grads) > most
        updates = jax.tree.map(lambda u: jnp.where(bad, 0 * u, u), updates)
        return updates, jax.tree.map(lambda before, after: jnp.where(bad, before, after), state, new)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def test_the_clock_on_the_host_waits_for_a_users_wrapper():
    tx = skip_spikes(sparsify(optax.sgd(1e-3), methods.set(0.5), sparsity=0.5, when=Every(5, 5, 20)), most=100.0)
    step, state, fired = make_train_step(scaled_squares, tx), TrainState.create(PARAMS, tx), []
    for call in range(20):
        before = np.asarray(get_masks(state.opt_state)["kernel"])
        state, _ = step(state, jnp.full(4, 1e6 if call in (1, 3) else 1.0))
        if (np.asarray(get_masks(state.opt_state)["kernel"]) != before).any():
            fired.append(call)
    assert fired == [7, 12, 17]  # two calls later than without the two that were skipped

"""When masks change: counted in calls, restored, held back, set by hand, and at the ends of int32."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    Every,
    TrainState,
    apply_masks,
    get_masks,
    looksam,
    make_train_step,
    methods,
    s2sam,
    s2sam_wrapper,
    sam,
    sparsify,
    ssam,
)

STEPS, WHEN = 9, Every(1, 3, 7)
PARAMS = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32), "b": jnp.ones(5)}


GRADS = [
    jax.tree.map(lambda p, s=s: jnp.asarray(np.random.default_rng(s).normal(size=p.shape), jnp.float32), PARAMS)
    for s in range(1, STEPS + 1)
]


# Two networks' own: beside the clock, twice in a row, and the first call.
FLAGS = np.array([[0, 1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1, 0, 0]], bool)


def sparse(method):
    return lambda seed: sparsify(optax.sgd(0.1, momentum=0.9), method(), sparsity=0.5, when=WHEN, seed=seed)


MAKE = {
    "rigl": (sparse(lambda: methods.rigl(0.5)), "refresh_masks"),
    "set": (sparse(lambda: methods.set(0.5)), "refresh_masks"),
    "ssam": (lambda seed: ssam(sparsity=0.6, update_every=3, total_steps=40, seed=seed), "refresh_perturbation"),
    "looksam": (lambda seed: looksam(every=3), "refresh_sam"),
}


def grad_fn(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p), params)


@pytest.mark.parametrize(("name", "told"), [("set", True), ("rigl", False), ("ssam", True), ("looksam", True)])
def test_traced_flags_and_clocks_are_those_of_a_loop(name, told):
    """Seeds side by side in a scan, each with flags of its own; the loop gets Python's, worked out by hand."""
    make, keyword = MAKE[name]
    clock = WHEN if keyword == "refresh_masks" else Every(0, 3)

    def take(params, state, grads, flag):
        flags = {} if flag is None else {keyword: flag}
        updates, state = make(0).update(grads, state, params, grad_fn=grad_fn, **flags)
        return optax.apply_updates(params, updates), state

    @jax.jit
    @jax.vmap
    def together(seed, flags):
        def step(carry, grads_and_flag):
            grads, flag = grads_and_flag
            return take(*carry, grads, flag if told else None), ()

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)
        return jax.lax.scan(step, (PARAMS, make(seed).init(PARAMS)), (stacked, flags))[0]

    several, update = together(jnp.arange(2), FLAGS), jax.jit(take, static_argnums=3)
    for seed, flags in enumerate(FLAGS):
        carry, due = (PARAMS, make(seed).init(PARAMS)), clock.start
        for step, (grads, flag) in enumerate(zip(GRADS, flags.tolist(), strict=True)):
            fires = flag if told else step == due
            carry = update(*carry, grads, fires)
            later = [c for c in range(clock.start, (clock.end or 99) + 1, clock.every) if c > step]
            due = (later[0] if later else np.iinfo(np.int32).max) if fires else due
        assert (int(carry[1].step), int(carry[1].next_update)) == (STEPS, due)
        one = jax.tree.map(lambda x, seed=seed: x[seed], several)
        for got, want in zip(*map(jax.tree.leaves, (one, carry)), strict=True):
            if jnp.issubdtype(want.dtype, jnp.floating):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
            else:
                assert (got == want).all()


LEAVES = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


@pytest.mark.parametrize(
    ("clock", "step", "expected"),
    [
        (Every(100, 2**31 - 2), 100, 100),
        (Every(100, 2**31 - 2), 101, 2**31 - 1),
        (Every(1_000_000, 2_147_000_000), 1_000_001, 2**31 - 1),
        (Every(3, 2**31 - 2, 5), 4, 2**31 - 1),
        (Every(0, 2**30), 2**30 + 1, 2**31 - 1),
    ],
)
def test_clocks_stay_in_int32(clock, step, expected):
    assert int(clock.at_or_after(step)) == expected


def test_a_clock_that_has_ended_stays_so():
    """If it fired, RigL would take no gradient step any more."""
    tx = sparsify(optax.sgd(0.1), methods.rigl(), sparsity=0.5, when=Every(0, 100, 1000))
    state = tx.init(LEAVES)
    params = apply_masks(LEAVES, state)
    state = state._replace(step=jnp.int32(2**31 - 3), next_update=jnp.int32(2**31 - 1))
    for _ in range(4):
        updates, state = tx.update(LEAVES, state, params)
        assert float(optax.tree.norm(updates)) > 0


def test_every_counts_in_integers():
    with pytest.raises(TypeError, match="Every counts calls in integers"):
        Every(0, 2.5)


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def start(tx, params=KERNEL):
    return TrainState.create(jax.tree.map(jnp.array, params), tx, model_state=jnp.ones(()))


def test_a_numpy_flag_skips_as_pythons_does():
    from s2sam_jax import MaskUpdate, SparseMethod

    def method(flag):
        def update(x, state):
            return MaskUpdate(x.masks, state, skip=flag)

        return SparseMethod(methods.static().init, update, invariant="per_layer")

    for flag in (True, np.bool_(True)):
        tx = sparsify(optax.sgd(0.1), method(flag), sparsity=0.5, when=Every(0, 1))
        state = start(tx)
        updates, _ = tx.update(state.params, state.opt_state, state.params, refresh_masks=True)
        assert not any(u.any() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("clock", [Every(0, 100, 1000), Every(0, 100)])
def test_counters_that_end_fire_no_clock(clock):
    """Counters stop below 2**31 - 1, when a clock that has ended is due: masks would change at every step for good."""
    params, last = {"kernel": jnp.arange(16.0).reshape(4, 4)}, 2**31 - 1
    tx = sparsify(optax.sgd(0.1), methods.set(), sparsity=0.5, when=clock)
    step = make_train_step(lambda params, state, batch, key: (jnp.sum(params["kernel"]), (state, {})), tx)
    train = TrainState.create(params, tx)
    sparse = train.opt_state._replace(step=jnp.int32(last - 3), next_update=clock.at_or_after(last - 3))
    train = train._replace(step=jnp.int32(last - 3), opt_state=sparse)
    masks = np.asarray(train.opt_state.masks["kernel"])
    for _ in range(6):
        train, _ = step(train, jnp.zeros(()))
        np.testing.assert_array_equal(train.opt_state.masks["kernel"], masks)
    assert int(train.step) > last - 3


def loss_fn(params, model_state, batch, key):
    return jnp.sum(params["kernel"] ** 2) * jnp.mean(batch), (model_state, {})


@pytest.mark.parametrize("jitted", [False, True])
def test_a_restored_state_fires_as_planned_and_then_by_the_new_clock(jitted):
    def tx(every):
        return sparsify(optax.sgd(0.0), methods.set(0.5), sparsity=0.5, when=Every(0, every, 100))

    def fired(tx, state, calls):
        step = make_train_step(loss_fn, tx)
        step, found = jax.jit(step) if jitted else step, []
        for _ in range(calls):
            now, before = int(state.opt_state.step), np.array(get_masks(state.opt_state)["kernel"])
            state, _ = step(state, jnp.ones(4))
            found += [now] if (before != get_masks(state.opt_state)["kernel"]).any() else []
        return state, found

    state, first = fired(tx(4), TrainState.create(KERNEL, tx(4)), 3)
    _, later = fired(tx(3), state, 8)
    assert (first, later) == ([0], [4, 6, 9])


@pytest.mark.parametrize("jitted", [False, True])
def test_a_firing_that_was_held_back_comes_when_it_may(jitted):
    """By the clock on the host, and by the one in the program."""
    tx = sparsify(optax.sgd(0.0), methods.set(0.5), sparsity=0.5, when=Every(0, 2, 100))
    state = TrainState.create(KERNEL, tx)
    _, opt_state = tx.update(state.params, state.opt_state, state.params, refresh_masks=False)
    _, opt_state = tx.update(state.params, opt_state, state.params, refresh_masks=False)
    assert (opt_state.masks["kernel"] == state.opt_state.masks["kernel"]).all()
    step, before = make_train_step(loss_fn, tx), np.array(opt_state.masks["kernel"])
    step = jax.jit(step) if jitted else step
    state, _ = step(state._replace(opt_state=opt_state), jnp.ones(4))
    assert (before != state.opt_state.masks["kernel"]).any()
    assert int(state.opt_state.next_update) == 4


@pytest.mark.parametrize(
    "make",
    [lambda k: ssam(0.1, mask="dynamic", update_every=k, total_steps=99), lambda k: looksam(0.1, every=k)],
    ids=["ssam", "looksam"],
)
def test_so_do_the_clocks_of_perturbations(make):
    params = {"kernel": jnp.ones((3, 3))}
    state = make(5).init(params)
    for _ in range(3):
        _, state = make(5).update(params, state, params, grad_fn=lambda p: p)
    planned = []
    for _ in range(5):
        _, state = make(2).update(params, state, params, grad_fn=lambda p: p)
        planned.append(int(state.next_update))
    assert planned == [5, 5, 6, 8, 8]


def test_numbers_of_numpy():
    assert Every(np.int64(0), np.int32(100), np.int64(200)) == Every(0, 100, 200)
    with pytest.raises(TypeError, match=r"Every counts calls in integers; got 0, 1\.5"):
        Every(0, 1.5)
    with pytest.raises(TypeError, match=r"when=Every\(start, every, end\), .* got 100"):
        sparsify(optax.sgd(0.1), methods.set(), sparsity=0.5, when=100)
    for make in (s2sam, sam):
        with pytest.raises(ValueError, match="rho must be"):
            make(np.float32(-1))
    with pytest.raises(ValueError, match=r"grad_dtype must be a floating type.* got int8"):
        s2sam(grad_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"clean_dtype must be a floating type.* got int32"):
        s2sam_wrapper(optax.sgd(0.1), clean_dtype=jnp.int32)


def test_options_of_numpy_and_large_seeds_and_ends():
    tx = sparsify(optax.sgd(0.1), methods.set(), sparsity=np.float32(0.8), when=Every(1, 2, sys.maxsize), seed=2**40)
    state = jax.jit(tx.update)(KERNEL, tx.init(KERNEL), KERNEL)[1]
    assert int(state.nnz[0]) == 20
    assert TrainState.create(KERNEL, tx, seed=2**32 - 1).key.shape == ()
    with pytest.raises(ValueError, match=r"start and every must be below 2\*\*31 - 1"):
        Every(2**31)


def test_a_clock_that_was_set_by_hand_is_heard():
    tx = sparsify(optax.sgd(0.1), methods.set(0.5), sparsity=0.5, when=Every(50, 50, 100))
    state, step = TrainState.create(KERNEL, tx), make_train_step(loss_fn, tx)
    for _ in range(3):
        state, _ = step(state, jnp.ones(2))
    state = state._replace(opt_state=state.opt_state._replace(next_update=jnp.int32(3)))
    before = jax.device_get(get_masks(state.opt_state)["kernel"])
    state, _ = step(state, jnp.ones(2))
    assert int(state.opt_state.next_update) == 50
    assert (before != get_masks(state.opt_state)["kernel"]).any()


CLOCKS = {
    "rigl": lambda: sparsify(optax.sgd(0.1), methods.rigl(), sparsity=0.5, when=WHEN),
    "ssam": lambda: optax.chain(ssam(update_every=3, total_steps=STEPS), optax.sgd(0.1)),
    "looksam": lambda: optax.chain(looksam(every=3), optax.sgd(0.1)),
}


@pytest.mark.parametrize("tx", [make() for make in CLOCKS.values()], ids=CLOCKS)
def test_outside_jit_a_clock_decides_in_python(tx, monkeypatch):
    """There ``lax.cond`` would compile both branches at every call; the run is the same."""

    def run(update):
        params, state, seen = PARAMS, tx.init(PARAMS), []
        for grads in GRADS:
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            seen.append(params)
        return seen

    def update(grads, state, params):
        return tx.update(grads, state, params, grad_fn=lambda point: point)

    jitted = run(jax.jit(update))
    monkeypatch.setattr(jax.lax, "cond", None)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), run(update), jitted)

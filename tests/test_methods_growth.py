"""Methods that prune, or drop and grow, against their equations in NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_growth
import pytest

from s2sam_jax import Every, get_masks, methods, set_masks, sparsify
from s2sam_jax._base.select import random_scores
from s2sam_jax.methods.dsr import _share

WHEN = Every(1, 1, 21)
LAST = 21
LR, MOMENTUM = 0.1, 0.9


def prunable(path, leaf):
    return "bias" not in path


def start():
    draw = np.random.default_rng(0)
    return {
        "a": jnp.asarray(draw.normal(size=(3, 2, 12)), jnp.float32),
        "bias": jnp.ones(5),
        "one": jnp.asarray([[0.7]]),
        "ties": jnp.asarray(draw.integers(-2, 3, size=(6, 5)), jnp.float32),
        "zeros": jnp.zeros((4, 6)),
    }


def gradient(step):
    """None on the leaves of ties and of zeros, so that they stay what they are."""
    draw = np.random.default_rng(step + 1)
    still = ("ties", "zeros")
    return {
        name: jnp.zeros_like(p) if name in still else jnp.asarray(draw.normal(size=p.shape), jnp.float32)
        for name, p in start().items()
    }


def optimizer(method, sparsity=0.6, distribution="uniform", when=WHEN, **kwargs):
    inner = optax.sgd(LR, momentum=MOMENTUM)
    return sparsify(inner, method, sparsity=sparsity, distribution=distribution, when=when, prunable=prunable, **kwargs)


def sparse(tree):
    return [np.asarray(leaf) for name, leaf in tree.items() if name != "bias"]


def check_trajectory(tx, expected):
    """20 updates: the masks against ``expected(state, weights, grads)``, weights and momentum by the state rule.

    Momentum is zero off the old mask and off the new one, so a pruned weight loses it and a new one has none. A weight
    off the mask is zero. ``expected`` may say which weights kept their value; if not, those on the old mask did.
    """
    params = start()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(LAST + 2):
        grads = gradient(step)
        weights = [w * m for w, m in zip(sparse(params), sparse(state.masks), strict=True)]
        momenta = sparse(state.inner_state[0].trace)
        want, values = sparse(state.masks), weights
        if WHEN.start <= step <= LAST:
            want, kept = expected(state, weights, sparse(grads))
            values = [np.where(k, w, 0) for k, w in zip(kept, weights, strict=True)] if kept else weights
        updates, new = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for mask, m in zip(sparse(new.masks), want, strict=True):
            np.testing.assert_array_equal(mask, m)
        momenta = [(MOMENTUM * v + g) * m for v, g, m in zip(momenta, sparse(grads), want, strict=True)]
        for got, v in zip(sparse(new.inner_state[0].trace), momenta, strict=True):
            np.testing.assert_allclose(got, v, rtol=1e-5, atol=1e-6)
        for got, w, v, m in zip(sparse(params), values, momenta, want, strict=True):
            np.testing.assert_allclose(got, (w - LR * v) * m, rtol=1e-5, atol=1e-6)
        assert bool(new.masks["bias"].all())
        yield state, new
        state = new


def exhaust(trajectory):
    return list(trajectory)[-1][1]


def draws(state, weights):
    key = jax.random.fold_in(state.key, state.step)
    return [np.asarray(s) for s in random_scores(key, [jnp.asarray(w) for w in weights])]


def ones(masks):
    return [int(m.sum()) for m in sparse(masks)]


# Magnitude and GMP

SPARSITIES = [0.6, 0.6, 0.6, 0.9]  # a, one, ties, zeros
SCOPES = pytest.mark.parametrize("scope", ["leaf", "global"])


@SCOPES
def test_magnitude_keeps_the_largest_given_weights(scope):
    tx = optimizer(methods.magnitude(scope), overrides={"zeros": 0.9})
    want = oracles_growth.magnitude(sparse(start()), SPARSITIES, scope)
    for got, mask in zip(sparse(tx.init(start()).masks), want, strict=True):
        np.testing.assert_array_equal(got, mask)


@SCOPES
def test_gmp_equals_its_equations_over_a_trajectory(scope):
    tx = optimizer(methods.gmp(scope), overrides={"zeros": 0.9})

    def expected(state, weights, grads):
        step = int(state.step)
        return oracles_growth.gmp(weights, sparse(state.masks), SPARSITIES, scope, step, WHEN.start, LAST), None

    assert all(bool(m.all()) for m in jax.tree.leaves(tx.init(start()).masks))
    last = exhaust(check_trajectory(tx, expected))
    if scope == "leaf":
        assert ones(last.masks) == [72 - 43, 1, 30 - 18, 24 - 21]
    assert sum(ones(last.masks)) == {"leaf": 45, "global": 127 - int(0.6 * 103 + 0.9 * 24)}[scope]


def test_gmp_follows_the_published_cubic():
    tx = sparsify(optax.sgd(0.0), methods.gmp(), sparsity=0.9, when=Every(100, 10, 205))
    params = {"kernel": jnp.ones((100, 100))}
    state = tx.init(params)
    zeros = []
    update = jax.jit(functools.partial(tx.update, refresh_masks=True))
    for step in [0, *range(100, 201, 10), 1000]:
        _, state = update(params, state._replace(step=jnp.int32(step)), params)
        zeros.append(10_000 - int(state.masks["kernel"].sum()))
    # The last firing, at 200, is the end: 205 is never reached.
    assert zeros == [0, 0, 2439, 4392, 5913, 7056, 7875, 8424, 8757, 8928, 8991, 9000, 9000]


# SET and ITOP


@pytest.mark.parametrize("by_sign", [True, False])
def test_set_equals_its_equations_over_a_trajectory(by_sign):
    def expected(state, weights, grads):
        leaves = zip(weights, sparse(state.masks), draws(state, weights), strict=True)
        return [oracles_growth.set_update(w, m, s, 0.3, by_sign) for w, m, s in leaves], None

    assert ones(exhaust(check_trajectory(optimizer(methods.set(0.3, by_sign=by_sign)), expected)).masks) == [
        29,
        1,
        12,
        10,
    ]


def test_set_drops_either_sign_and_takes_a_schedule():
    weights = jnp.asarray([0.1, 0.4, 0.6, 0.9, -0.2, -0.3, -0.8, -1.0] + [0.0] * 200)
    tx = sparsify(
        optax.sgd(0.0),
        methods.set(lambda step: 0.5 * (step < 1)),
        sparsity=0.5,
        when=Every(0, 1),
        prunable=lambda *_: True,
    )
    params = {"kernel": weights}
    state = set_masks(tx.init(params), {"kernel": weights != 0})
    _, state = tx.update(params, state, params)
    mask = np.asarray(get_masks(state)["kernel"])
    assert mask.sum() == 8
    np.testing.assert_array_equal(mask[[2, 3, 6, 7]], True)
    assert mask[[0, 1, 4, 5]].sum() < 4  # they may come back, but hardly all among 204
    _, later = tx.update(params, state, params)
    np.testing.assert_array_equal(later.masks["kernel"], mask)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_itop_equals_its_equations_over_a_trajectory(growth):
    def expected(state, weights, grads):
        scores = draws(state, weights) if growth == "random" else [np.abs(g) for g in grads]
        leaves = zip(weights, sparse(state.masks), scores, strict=True)
        step = int(state.step)
        return [oracles_growth.itop_update(w, m, s, 0.5, 0.005, step, LAST) for w, m, s in leaves], None

    explored = None
    for old, new in check_trajectory(optimizer(methods.itop(growth)), expected):
        explored = sparse(old.masks) if explored is None else explored
        explored = [e | m for e, m in zip(explored, sparse(new.masks), strict=True)]
        rate = sum(int(e.sum()) for e in explored) / sum(e.size for e in explored)
        np.testing.assert_allclose(methods.explored_fraction((optax.EmptyState(), new)), rate, rtol=1e-6)
    assert ones(new.masks) == [29, 1, 12, 10]
    assert rate > 0.6


# DSR


def dsr_draws(state, weights):
    scores, leaf = jax.random.split(jax.random.fold_in(state.key, state.step))
    first = int(jax.random.randint(leaf, (), 0, len(weights)))
    return [np.asarray(s) for s in random_scores(scores, [jnp.asarray(w) for w in weights])], first


@pytest.mark.parametrize(("sparsity", "target", "threshold"), [(0.6, 0.1, 0.3), (0.6, 5, 1.0), (0.1, 0.3, 0.6)])
def test_dsr_equals_its_equations_over_a_trajectory(sparsity, target, threshold):
    """At sparsity 0.1 there is no room for all that is pruned, but where it was."""

    def expected(state, weights, grads):
        scores, first = dsr_draws(state, weights)
        masks, thresholds[int(state.step) + 1] = oracles_growth.dsr_update(
            weights, sparse(state.masks), scores, float(state.method_state), target, first
        )
        return masks, None

    thresholds, counts, moved = {}, [], 0
    for old, new in check_trajectory(optimizer(methods.dsr(target, threshold=threshold), sparsity=sparsity), expected):
        if int(new.step) in thresholds:
            assert float(new.method_state) == np.float32(thresholds[int(new.step)])
        moved += sum(int((a != b).sum()) for a, b in zip(sparse(old.masks), sparse(new.masks), strict=True))
        counts.append(ones(new.masks))
    assert len({sum(c) for c in counts}) == 1
    assert len({tuple(c) for c in counts}) > 1
    assert all(min(c) >= 1 for c in counts)
    assert moved > 0
    assert len({*thresholds.values()}) > 1


def test_dsr_worked_example():
    """K = (2, 1), R = (2, 5): of the 3 to grow the first leaf gets 0.857 and the second 2.143."""
    params = {
        "a": jnp.asarray([[0.5, 0.0004, 0.002, -0.0008] + [0.0] * 4]),
        "b": jnp.asarray([[0.01, -0.02, 0.03, 0.0005, 0.6, 0.7] + [0.0] * 6]),
    }
    tx = sparsify(optax.sgd(0.0), methods.dsr(3), sparsity=0.5, distribution="uniform", when=Every(0, 1))
    state = set_masks(tx.init(params), jax.tree.map(lambda p: p != 0, params))
    _, state = tx.update(params, state, params)
    assert {name: int(mask.sum()) for name, mask in state.masks.items()} == {"a": 3, "b": 7}
    a, b = (np.asarray(state.masks[name][0]) for name in "ab")
    np.testing.assert_array_equal(a[:4], [True, False, True, False])
    np.testing.assert_array_equal(b[:6], [True, True, True, False, True, True])
    assert float(state.method_state) == np.float32(1e-3)


def test_dsr_takes_a_fraction_of_any_float_type():
    when = Every(0, 1)
    results = []
    for target in (0.25, np.float64(0.25), np.float32(0.25)):
        tx = sparsify(optax.sgd(0.1), methods.dsr(target, threshold=0.5), sparsity=0.5, when=when)
        params = {"kernel": jnp.linspace(-1, 1, 40).reshape(5, 8)}
        results.append(tx.update(params, tx.init(params), params)[1].masks["kernel"])
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_dsr_threshold_neither_vanishes_nor_overflows():
    params = {"kernel": jnp.zeros((4, 4))}
    tx = sparsify(optax.sgd(0.0), methods.dsr(1, threshold=1e-37), sparsity=0.5, when=Every(0, 1))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(5):
        _, state = update(params, state, params)
    assert 0 < float(state.method_state) < 1e-37
    large = {"kernel": jnp.full((4, 4), 3e38)}
    state = state._replace(method_state=jnp.float32(3e38))
    for _ in range(5):
        _, state = update(params, state, large)
    assert np.isfinite(state.method_state)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    st.integers(0, 200),
    st.lists(st.integers(0, 60), min_size=5, max_size=5),
    st.lists(st.integers(0, 60), min_size=5, max_size=5),
    st.integers(0, 4),
)
def test_dsr_shares_add_up_for_any_leaves(total, survivors, free, first):
    got = np.asarray(jax.jit(_share)(jnp.int32(total), jnp.asarray(survivors), jnp.asarray(free), jnp.int32(first)))
    assert got.sum() == min(total, sum(free))
    assert (got >= 0).all()
    assert (got <= free).all()
    wanted = oracles_growth.dsr_shares(total, survivors, free, first, quotients := [])
    hypothesis.assume(all(abs(q % 1 - 0.5) > 1e-4 for q in quotients))  # a half may be rounded either way in float32
    assert got.tolist() == wanted


# MEST

PHASES = ((0.0, 0.2), (0.5, 0.1))  # over 21 calls: to 10, to 20, and nothing at 21


def amount(step):
    return 0.0 if step >= LAST else 0.2 if step < 10.5 else 0.1


@pytest.mark.parametrize(("soft_bound", "lam"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_mest_equals_its_equations_over_a_trajectory(soft_bound, lam):
    def expected(state, weights, grads):
        p = amount(int(state.step))
        lower, upper = (0.6, 0.6 - p) if soft_bound else (0.6 + p, 0.6)
        leaves = zip(weights, grads, sparse(state.masks), draws(state, weights), strict=True)
        results = [
            oracles_growth.mest_update(np.abs(w) + np.float32(lam) * np.abs(g), m, s, lower, upper)
            for w, g, m, s in leaves
        ]
        return [mask for mask, _ in results], [kept for _, kept in results]

    plan = [29, 1, 12, 10]
    tx = optimizer(methods.mest(PHASES, soft_bound=soft_bound, lam=lam))
    for got, mask in zip(
        sparse(tx.init(start()).masks), oracles_growth.magnitude(sparse(start()), [0.6] * 4, "leaf"), strict=True
    ):
        np.testing.assert_array_equal(got, mask)
    for old, new in check_trajectory(tx, expected):
        if soft_bound and WHEN.start <= int(old.step) < LAST:
            assert sum(ones(new.masks)) > sum(plan)
            assert all(n >= k for n, k in zip(ones(new.masks), plan, strict=True))
        else:
            assert ones(new.masks) == plan


def test_mest_default_is_the_released_profile_at_95_percent():
    """Over 160 epochs: 97 %, 96 % from epoch 100 on, 95 % from 130 on, where nothing moves any more."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(96, 96)), jnp.float32)}
    tx = sparsify(optax.sgd(0.0), methods.mest(), sparsity=0.95, when=Every(0, 5, 160))
    update = jax.jit(functools.partial(tx.update, refresh_masks=True))
    ranked = np.sort(np.abs(params["kernel"]).ravel())[::-1]
    for step, left in [(0, 277), (95, 277), (100, 369), (125, 369), (130, 461), (160, 461)]:
        state = tx.init(params)._replace(step=jnp.int32(step))
        updates, state = update(params, state, params)
        # What was pruned is zero, wherever it may have grown again.
        values = np.abs(optax.apply_updates(params, updates)["kernel"])
        assert int((values > 1e-6).sum()) == left
        assert values[values > 1e-6].min() == ranked[left - 1]
        assert int(state.masks["kernel"].sum()) == 461


@pytest.mark.parametrize(
    ("options", "sparsity", "size", "counts"),
    [
        (dict(extra=((0.0, 0.1),)), 0.8, 20, (2, 4)),
        (dict(extra=((0.0, 0.02),)), 0.9, 9216, (738, 922)),
        (dict(extra=((0.0, 0.05),), soft_bound=True), 0.9, 9216, (922, 1383)),
    ],
)
def test_mest_worked_counts(options, sparsity, size, counts):
    """Exact where the released code, which truncates twice, has 921 and 1382."""
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(4, size // 4)), jnp.float32)}
    tx = sparsify(optax.sgd(0.0), methods.mest(**options), sparsity=sparsity, when=Every(0, 1, 10))
    updates, state = tx.update(params, tx.init(params), params)
    kept = np.abs(optax.apply_updates(params, updates)["kernel"]) > 1e-6
    assert (int(kept.sum()), int(state.masks["kernel"].sum())) == counts


# All of them

RANDOM = {
    "set": lambda: methods.set(0.3),
    "dsr": lambda: methods.dsr(threshold=0.5),
    "itop": methods.itop,
    "mest": lambda: methods.mest(PHASES),
}


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_under_vmap_of_scan_equal_single_runs(name):
    def run(seed):
        tx = optimizer(RANDOM[name](), seed=seed)
        params = start()

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
        return state.masks

    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[gradient(step) for step in range(5)])
    together = jax.jit(jax.vmap(run))(jnp.arange(3))
    one = jax.jit(run)(1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), together, one)
    a = np.asarray(together["a"]).reshape(3, -1)
    assert len({row.tobytes() for row in a}) == 3
    if name != "dsr":
        assert set(a.sum(axis=1).tolist()) == {29}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: methods.magnitude("layer"), "magnitude needs scope 'leaf' or 'global'; got 'layer'"),
        (lambda: methods.gmp("layer"), "gmp needs scope 'leaf' or 'global'; got 'layer'"),
        (lambda: methods.set(1.5), "set needs 0 <= drop_fraction <= 1; got 1.5"),
        (lambda: methods.itop("momentum"), "itop needs growth 'random' or 'gradient'; got 'momentum'"),
        (lambda: methods.itop(final_fraction=-1), "itop needs 0 <= final_fraction <= 1; got -1"),
        (lambda: methods.dsr(0), "dsr needs a target count >= 1, or a fraction .* got 0"),
        (lambda: methods.dsr(1.5), "dsr needs a target count >= 1, or a fraction .* got 1.5"),
        (lambda: methods.dsr(threshold=0.0), "dsr needs threshold > 0; got 0.0"),
        (lambda: methods.mest(()), "mest needs extra=.* got \\(\\)"),
        (lambda: methods.mest(((0.5, 0.1),)), "from = 0.0 first"),
        (lambda: methods.mest(((0.0, 0.1), (0.0, 0.2))), "ascending"),
        (lambda: methods.mest(((0.0, 1.0),)), "mest needs 0 <= p < 1"),
        (lambda: methods.mest(lam=-1.0), "mest needs lam >= 0; got -1.0"),
        (lambda: optimizer(methods.dsr(1000)).init(start()), "dsr cannot prune target=1000 of 52 live weights"),
        (lambda: optimizer(methods.dsr(), sparsity=0.0).init(start()), "dsr has no sparse weights to move; give a"),
        (lambda: optimizer(methods.gmp(), when=Every()).init(start()), "gmp follows the clock to its end: give when="),
        (lambda: optimizer(methods.itop(), when=Every()).init(start()), "itop follows the clock to its end"),
        (lambda: optimizer(methods.mest(), when=Every()).init(start()), "mest follows the clock to its end"),
        (
            lambda: methods.explored_fraction(optimizer(methods.set()).init(start())),
            "explored_fraction found no state",
        ),
    ],
)
def test_bad_input_is_told_what_was_expected(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_mest_refuses_to_empty_a_leaf():
    params = {"kernel": jnp.ones((100, 100))}
    whole = sparsify(optax.sgd(0.1), methods.mest(), sparsity=0.98, distribution="uniform", when=Every(0, 1, 10))
    with pytest.raises(ValueError, match=r"mest would prune all of \['kernel'\]: their sparsity and p=0.02 reach 1"):
        whole.init(params)
    part = sparsify(
        optax.sgd(0.1),
        methods.mest(extra=((0.0, 0.002),)),
        sparsity=0.98,
        distribution="uniform",
        when=Every(0, 1, 10),
    )
    state = part.init(params)
    updates, state = part.update(params, state, params)
    assert int(state.masks["kernel"].sum()) == 200
    assert int((optax.apply_updates(params, updates)["kernel"] != 0).sum()) > 0


def test_rigl_without_any_gradient_step_says_so():
    """At every call it changes masks, and there it takes none."""
    for when, method in ((Every(0, 2, 10), methods.rigl()), (Every(0, 1, 10), methods.rigl(skip_step=False))):
        sparsify(optax.sgd(0.1), method, sparsity=0.5, when=when).init({"kernel": jnp.ones((4, 4))})
    tx = sparsify(optax.sgd(0.1), methods.rigl(), sparsity=0.5, when=Every(0, 1, 10))
    with pytest.warns(UserWarning, match=r"rigl takes no gradient step .*every=1, end=10\) changes them"):
        tx.init({"kernel": jnp.ones((4, 4))})

"""GMP, SET and ITOP against their equations in NumPy; seeds and bad input of all that prune or grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_growth
import pytest
from growing import LAST, WHEN, check_trajectory, draws, exhaust, gradient, ones, optimizer, sparse, start

from s2sam_jax import Every, get_masks, methods, set_masks, sparsify

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


PHASES = ((0.0, 0.2), (0.5, 0.1))  # over 21 calls: to 10, to 20, and nothing at 21


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


def test_rigl_without_any_gradient_step_says_so():
    """At every call it changes masks, and there it takes none."""
    for when, method in ((Every(0, 2, 10), methods.rigl()), (Every(0, 1, 10), methods.rigl(skip_step=False))):
        sparsify(optax.sgd(0.1), method, sparsity=0.5, when=when).init({"kernel": jnp.ones((4, 4))})
    tx = sparsify(optax.sgd(0.1), methods.rigl(), sparsity=0.5, when=Every(0, 1, 10))
    with pytest.warns(UserWarning, match=r"rigl takes no gradient step .*every=1, end=10\) changes them"):
        tx.init({"kernel": jnp.ones((4, 4))})

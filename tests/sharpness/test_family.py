"""Momentum-SAM, LookSAM, GSAM and ESAM: float64 trajectories, worked numbers, what reduces to what."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import oracles_family
import pytest
from quadratics import COUPLED, DIAGONAL, EXACT, MASK, PRINTED, START, first_leaf, joined, quadratic, sgd, split, train

from s2sam_jax import (
    apply_masks,
    esam,
    gsam,
    looksam,
    methods,
    msam,
    perturb,
    rho_from_learning_rate,
    sam,
    set_masks,
    sharpest_examples,
    sparsify,
)

pytestmark = pytest.mark.usefixtures("float64")
STEPS, BETA = 12, 0.6


def coupled(w):
    return COUPLED @ w


def drawn(steps, seed=3):
    """The coordinates of the leaves that esam draws: two of the one leaf, one of the other."""
    own = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"esam"))
    keys = [jax.random.fold_in(own, step) for step in range(steps)]
    chosen = np.array([jax.random.bernoulli(key, BETA, (2,)) for key in keys])
    assert 0 < chosen.mean(0).min() <= chosen.mean(0).max() < 1, "pick another seed"
    return np.repeat(chosen, [2, 1], axis=1)


def falling(step):
    return 0.1 / (1.0 + step)


def rising(step):
    return 0.2 + 0.05 * step


FAMILY = {
    "msam": (lambda: msam(rho=0.3), lambda **o: oracles_family.msam_trajectory(coupled, START, STEPS, rho=0.3, **o)),
    "msam_schedule": (
        lambda: msam(rho=falling), lambda **o: oracles_family.msam_trajectory(coupled, START, STEPS, rho=falling, **o)
    ),
    "looksam": (
        lambda: looksam(rho=0.1, every=3, alpha=0.4),
        lambda **o: oracles_family.looksam_trajectory(coupled, START, STEPS, rho=0.1, every=3, alpha=0.4, **o),
    ),
    "looksam_schedules": (
        lambda: looksam(rho=falling, every=3, alpha=rising),
        lambda **o: oracles_family.looksam_trajectory(
            coupled, START, STEPS, rho=falling, every=3, alpha=rising, **o
        ),
    ),
    "gsam": (
        lambda: gsam(rho=0.1, alpha=0.5),
        lambda **o: oracles_family.gsam_trajectory(coupled, START, STEPS, rho=0.1, alpha=0.5, **o),
    ),
    "gsam_schedules": (
        lambda: gsam(rho=falling, alpha=rising),
        lambda **o: oracles_family.gsam_trajectory(coupled, START, STEPS, rho=falling, alpha=rising, **o),
    ),
    "esam": (
        lambda: esam(rho=0.1, beta=BETA, seed=jax.random.key(3)),
        lambda **o: oracles_family.esam_trajectory(
            coupled, START, STEPS, rho=0.1, beta=BETA, drawn=drawn(STEPS), **o
        ),
    ),
    "esam_schedule": (
        lambda: esam(rho=falling, beta=BETA, seed=jax.random.key(3)),
        lambda **o: oracles_family.esam_trajectory(
            coupled, START, STEPS, rho=falling, beta=BETA, drawn=drawn(STEPS), **o
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_dense_trajectories(name):
    (build, oracle), optimizer = FAMILY[name], dict(momentum=0.9, decay=5e-4)
    path, _ = train(optax.chain(build(), sgd(**optimizer)), COUPLED, STEPS, perturbs=name.startswith("msam"))
    np.testing.assert_allclose(path, oracle(lr=0.1, **optimizer), **EXACT)


def on_mask(build, steps, **options):
    tx = sparsify(optax.chain(build(), sgd(0.9)), methods.static(), sparsity=0.0, prunable=first_leaf, **options)
    params = split(START)
    state = set_masks(tx.init(params), {"a": jnp.ones((2, 1), bool), "b": jnp.zeros(1, bool)})
    return train(tx, COUPLED, steps, apply_masks(params, state), state, perturbs="MSAMState" in str(state))


@pytest.mark.parametrize("name", ["msam", "looksam", "gsam", "esam"])
def test_trajectories_under_a_mask(name):
    build, oracle = FAMILY[name]
    path, _ = on_mask(build, STEPS)
    np.testing.assert_allclose(path, oracle(lr=0.1, momentum=0.9, mask=MASK), **EXACT)


def test_msam_stays_on_the_mask_where_the_momentum_does_not():
    path, state = on_mask(lambda: msam(rho=0.3), 2, mask_grads=False)
    momentum = joined(state.inner_state[1][1][0].trace)
    assert momentum[2] != 0.0
    point = joined(perturb(split(path[-1]), state))
    np.testing.assert_allclose(point, path[-1] - oracles.ascent(momentum * MASK, 0.3), **EXACT)


def test_msam_worked_numbers():
    tx = optax.chain(msam(rho=0.3), sgd(0.9))
    path, _ = train(tx, DIAGONAL, 3, perturbs=True)
    worked = [(0.9, -1.6, 0.3), (0.7265465, -0.9723723, 0.0523723), (0.5052532, -0.2670882, -0.148787)]
    np.testing.assert_allclose(path, worked, **PRINTED)
    first, state = train(tx, DIAGONAL, 1, perturbs=True)
    point = perturb(split(first[0]), state)
    np.testing.assert_allclose(joined(point), (0.8345346, -1.3381385, 0.1690693), **PRINTED)
    np.testing.assert_allclose(joined(quadratic(DIAGONAL)(point)), (0.8345346, -2.6762771, 0.6762771), **PRINTED)


def test_looksam_worked_numbers():
    tx, grad_fn = optax.chain(looksam(rho=0.1, every=2, alpha=0.7), optax.identity()), quadratic(DIAGONAL)
    params = split(START)
    updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(joined(updates), (1.0218218, -4.1745743, 2.1745743), **PRINTED)
    g_v = joined(state[0].g_v)
    np.testing.assert_allclose(g_v, (-0.0290957, 0.0290957, 0.0727393), **PRINTED)
    assert abs(g_v @ joined(grad_fn(params))) < 1e-14
    params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    np.testing.assert_allclose(joined(updates), (0.0500363, -2.3173036, 3.2496241), **PRINTED)
    np.testing.assert_allclose(joined(params) - 0.1 * joined(updates), (0.8928142, -1.3508122, -0.0424198), **PRINTED)


def test_gsam_worked_numbers():
    tx, grad_fn, params = gsam(rho=0.1, alpha=0.5), quadratic(DIAGONAL), split(START)
    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(joined(updates), (1.0078324, -4.1601334, 2.2088704), **PRINTED)
    np.testing.assert_allclose(START - 0.1 * joined(updates), (0.8992168, -1.5839867, 0.279113), **PRINTED)
    perturbed = np.array([1.0218218, -4.1745743, 2.1745743])
    np.testing.assert_allclose(
        (perturbed - joined(updates)) / 0.5, (0.0279787, -0.0288818, -0.0685921), rtol=0, atol=2e-7
    )


def test_gsam_radius_moves_with_the_learning_rate():
    rate = optax.join_schedules([optax.linear_schedule(0.0, 0.4, 4), optax.linear_schedule(0.4, 0.1, 6)], [4])
    rho = rho_from_learning_rate(rate, rho_max=0.6, rho_min=0.1, lr_max=0.4, lr_min=0.1)
    for step in range(11):
        share = (float(rate(step)) - 0.1) / 0.3
        np.testing.assert_allclose(rho(step), 0.1 + 0.5 * max(share, 0.0), rtol=1e-6)


def test_sharpest():
    before, after = np.array([0.2, 1, 0.5, 0.7]), np.array([0.5, 1.05, 0.9, 1.4])
    assert sharpest_examples(before, after, 0.5).tolist() == [3, 2]
    assert sharpest_examples(before, after, 0.01).tolist() == [3], "at least one"
    assert sharpest_examples(before, after, 1.0).tolist() == [3, 2, 0, 1]
    ties = jax.jit(sharpest_examples, static_argnums=2)(jnp.zeros(7), jnp.array([1.0, 0, 1, 2, 1, 0, 1]), 0.6)
    assert ties.tolist() == [3, 0, 2, 4]
    assert ties.dtype == jnp.int32
    assert len(sharpest_examples(jnp.zeros(100), jnp.zeros(100), 0.29)) == 29, "0.29 * 100 is a little less than 29"
    draw = np.random.default_rng(0)
    for _ in range(20):
        before, after = draw.integers(0, 4, size=(2, 12)).astype(float)
        assert sharpest_examples(before, after, 0.5).tolist() == oracles_family.sharpest(before, after, 6)


REDUCTIONS = {
    "gsam": (lambda: gsam(0.1, alpha=0.0), lambda: sam(0.1)),
    "looksam": (lambda: looksam(0.1, every=1), lambda: sam(0.1)),
    "esam": (lambda: esam(0.1, beta=1.0, eps=1e-12), lambda: sam(0.1)),
    "msam": (lambda: msam(0.0), optax.identity),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name):
    ours, theirs = (optax.chain(build(), sgd(0.9, 5e-4)) for build in REDUCTIONS[name])
    path, _ = train(ours, COUPLED, 6, perturbs=name == "msam")
    want, _ = train(optax.with_extra_args_support(theirs), COUPLED, 6)
    np.testing.assert_allclose(path, want, **EXACT)


@pytest.mark.parametrize("build", [msam, lambda: looksam(every=2), gsam, esam], ids=["msam", "looksam", "gsam", "esam"])
def test_zero_gradient_gives_no_nan(build):
    tx = optax.chain(build(), sgd(0.9))
    path, _ = train(tx, 0.0 * COUPLED, 3, perturbs="MSAMState" in str(tx.init(split(START))))
    np.testing.assert_array_equal(path, [START] * 3)


def test_looksam_asks_for_a_second_gradient_when_it_is_told_to():
    tx, params, calls = looksam(0.1, every=2), split(START), []

    def grad_fn(params):
        calls.append(1)
        return quadratic(COUPLED)(params)

    grads, states = quadratic(COUPLED)(params), [tx.init(params)] * 2
    for step in range(4):
        by_flag, flagged = tx.update(grads, states[0], params, grad_fn=grad_fn, refresh_sam=step % 2 == 0)
        assert len(calls) == step // 2 + 1
        by_clock, clocked = tx.update(grads, states[1], params, grad_fn=quadratic(COUPLED))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), by_flag, by_clock)
        states = [flagged, clocked]
    assert int(states[0].next_update) == 4
    traced = jax.jit(lambda due: tx.update(grads, states[0], params, grad_fn=quadratic(COUPLED), refresh_sam=due)[0])
    np.testing.assert_allclose(joined(traced(jnp.array(False))), joined(by_flag), **EXACT)


def test_esam_seeds():
    """Integers, keys and traced seeds; a seed is a draw of its own."""
    params = split(START)
    keys = jax.vmap(lambda seed: esam(seed=seed).init(params).key)(jnp.arange(3))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 3
    forms = (7, jax.random.key(7), jax.random.PRNGKey(7))
    same = [jax.random.key_data(esam(seed=seed).init(params).key) for seed in forms]
    assert len(np.unique(same, axis=0)) == 1


GRADS = {"a": jnp.ones((2, 1)), "b": jnp.ones(1)}


def momentum(**labels):
    groups = {"x": optax.chain(msam(), optax.sgd(0.1)), "y": optax.sgd(0.1, momentum=0.9)}
    return perturb(GRADS, optax.multi_transform(groups, labels).init(GRADS))

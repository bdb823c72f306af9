"""Lottery tickets and learning-rate rewinding against explicit loops."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from s2sam_jax import Every, methods, perturb, s2sam, set_masks, sparsify
from s2sam_jax._sparsity.rewind import remaining_weights

DRAW = np.random.default_rng(0)


PARAMS = {
    "a": {"kernel": jnp.asarray(DRAW.normal(size=(3, 3, 2, 4)), jnp.float32), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.asarray(DRAW.normal(size=(16, 10)), jnp.float32)},
}


SIZE = 72 + 160


def random_grads(seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), PARAMS)


def test_remaining_weights_is_the_exact_integer_sequence():
    assert remaining_weights(1000, 100, 0.2) == [1000, 800, 640, 512, 409, 327, 261, 208, 166, 132, 105, 100]
    assert [len(remaining_weights(10**6, 10**5, p)) - 1 for p in (0.2, 0.3, 0.4)] == [11, 7, 5]
    assert remaining_weights(10, 10, 0.2) == [10]
    assert remaining_weights(10, 8, 1e-9) == [10, 9, 8]


@pytest.mark.parametrize("name", ["lottery", "lrr"])
@pytest.mark.parametrize("k", [0, 2])
def test_rounds_against_an_explicit_loop(name, k):
    """Rounds of L = 5 steps with momentum and a decaying rate: masks, weights, momentum, schedule, step by step."""
    length, p, sparsity = 5, 0.3, 0.6
    rate = np.array([0.1, 0.08, 0.05, 0.03, 0.01, 0.005, 0.001])
    inner = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(lambda count: jnp.asarray(rate)[count]))
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(DRAW.normal(size=(6, 5)))}
        tx = sparsify(inner, getattr(methods, name)(p), sparsity=sparsity, when=Every(k, length - k + 1))
        state, update = tx.init(params), jax.jit(tx.update)

        w, v, count = np.asarray(params["kernel"]), np.zeros((6, 5)), 0
        mask, saved, left, ended = np.ones((6, 5), bool), None, remaining_weights(30, 12, p), 0
        for call in range(length * (len(left) + 2)):
            g = DRAW.normal(size=(6, 5))
            fires = call >= k and (call - k) % (length - k + 1) == 0
            updates, state = update({"kernel": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            if fires and saved is None:
                saved = (w.copy(), v.copy(), count)
            elif fires and ended < len(left) - 1:
                ended += 1
                mask = oracles.top_mask(np.abs(w), left[ended], mask)
                w = (saved[0] if name == "lottery" else w) * mask
                v, count = saved[1] * mask, saved[2]
            else:
                fires = False
            if not fires:
                v = (0.9 * v + g) * mask
                w, count = w - rate[min(count, 6)] * v, count + 1
            np.testing.assert_array_equal(state.masks["kernel"], mask)
            np.testing.assert_allclose(params["kernel"], w, rtol=1e-12, atol=1e-14)
            assert int((params["kernel"] == 0).sum()) == 30 - left[ended]
        assert ended == len(left) - 1


@pytest.mark.parametrize("name", ["lottery", "lrr"])
@pytest.mark.parametrize("shape", [(25, 40), (1000, 4964)])
def test_rounds_and_sparsity_must_agree(name, shape):
    method, params = getattr(methods, name)(0.2, rounds=4), {"kernel": jnp.ones(shape)}
    tx = sparsify(optax.sgd(0.1), method, sparsity=0.9, when=Every(0, 10))
    with pytest.raises(ValueError, match=r"rounds=4 and the sparsity disagree.* in 11 rounds") as error:
        tx.init(params)
    advised = re.search(r"give the sparsity that 4 rounds reach, ([\d.]+)\.$", str(error.value))
    assert float(advised[1]) == pytest.approx(1 - 0.8**4, abs=3e-3)
    sparsify(optax.sgd(0.1), method, sparsity=float(advised[1]), when=Every(0, 10)).init(params)


def test_no_sparsity_is_advised_where_no_such_number_of_rounds_can_be():
    tx = sparsify(optax.sgd(0.1), methods.lottery(0.2, rounds=200), sparsity=0.9, when=Every(0, 10))
    with pytest.raises(ValueError, match=r"in 11 rounds\. Leave rounds out\.$"):
        tx.init({"kernel": jnp.ones((25, 40))})


def test_lottery_survives_donation():
    """What is saved are copies: a donated state must not take the rewind point with it."""
    tx = sparsify(optax.chain(s2sam(), optax.adam(0.1)), methods.lottery(0.5), sparsity=0.8, when=Every(0, 3))
    start = jax.tree.map(jnp.array, PARAMS)
    params, state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)

    @jax.jit
    def plain(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(plain, donate_argnums=(0, 1))
    for seed in range(7):
        perturb(params, state)  # finds the one state in use, not the saved one
        params, state = donating(params, state, random_grads(seed))
        if seed in (3, 6):
            jax.tree.map(
                lambda p, s, m: np.testing.assert_allclose(p, jnp.where(m, s, 0), rtol=1e-6, atol=1e-7),
                params, start, state.masks,
            )  # fmt: skip
    assert int(state.nnz.sum()) == SIZE // 4 + 4


def test_lottery_rounds_equals_the_transformation():
    """Driven from outside: the same masks and the same final weights."""

    def stepper(tx):
        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    static = sparsify(optax.sgd(0.1, momentum=0.9), methods.static(), sparsity=0.6)

    plain = stepper(static)

    def train(params, masks, number):
        state = set_masks(static.init(params), masks)
        for seed in range(4):
            params, state = plain(params, state, random_grads(seed))
        return params

    driven = list(methods.lottery_rounds(train, PARAMS, sparsity=0.6, prune_fraction=0.3))
    tx = sparsify(optax.sgd(0.1, momentum=0.9), methods.lottery(0.3), sparsity=0.6, when=Every(0, 5))
    params, state, order, rewinding = PARAMS, tx.init(PARAMS), [], stepper(tx)
    for _ in driven:
        for seed in (99, 0, 1, 2, 3):  # the first call of each round saves or rewinds, whatever its gradient
            params, state = rewinding(params, state, random_grads(seed))
        order.append((state.masks, params))
    for outside, (masks, weights) in zip(driven, order, strict=True):
        jax.tree.map(np.testing.assert_array_equal, outside.masks, masks)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), outside.params, weights)


@pytest.mark.parametrize("name", ["lottery", "lrr"])
def test_a_clock_that_ends_before_the_sparsity_is_reached_is_refused(name):
    """By ceil(0.2 n) of n weights: 100 80 64 51 40 32 25 20 16 12 10; the tenth pruning is the eleventh firing."""
    params = {"kernel": jnp.arange(100.0).reshape(10, 10)}

    def start(end):
        tx = sparsify(optax.sgd(0.1), getattr(methods, name)(0.2), sparsity=0.9, when=Every(5, 10, end))
        return tx.init(params)

    with pytest.raises(ValueError, match=r"after 10 prunings, .* at call 105, .* ends at 104: .* end=105"):
        start(104)
    start(105)


TREE = {"bias": jnp.array([9.0, 8.0]), "deep": jnp.arange(1.0, 7.0).reshape(2, 3), "stem": jnp.full((2, 3), 10.0)}


def not_stem(path, leaf):
    return leaf.ndim > 1 and path != "stem"


def test_lottery_rounds_without_rewinding_go_on_from_trained_weights():
    started = []

    def train(params, masks, number):
        started.append(np.asarray(params["deep"]))
        return jax.tree.map(lambda p: -2 * p, params)

    rounds = list(
        methods.lottery_rounds(train, TREE, sparsity=0.5, prune_fraction=0.5, rewind=False, prunable=not_stem)
    )
    assert [(one.number, one.remaining) for one in rounds] == [(0, 6), (1, 3)]
    np.testing.assert_array_equal(started[1], [[0, 0, 0], [-8, -10, -12]])
    assert rounds[1].masks["stem"].all()

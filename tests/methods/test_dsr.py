"""DSR against its equations in NumPy and a worked example."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_growth
import pytest
from growing import check_trajectory, ones, optimizer, sparse

from s2sam_jax import Every, methods, set_masks, sparsify
from s2sam_jax._base.select import random_scores
from s2sam_jax.methods.dsr import _share


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

"""MEST against its equations in NumPy, its published profile and worked counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_growth
import pytest
from growing import LAST, WHEN, check_trajectory, draws, ones, optimizer, sparse, start

from s2sam_jax import Every, methods, sparsify

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

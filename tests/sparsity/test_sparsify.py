"""sparsify: what it passes on, which states it starts and masks, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import KERNELS, RHO, SPARSITY, find, labels, loss_fn, make_params, named, norm, rigl, run, s2sgd

from s2sam_jax import (
    Every,
    TrainState,
    apply_masks,
    check_masks,
    checked,
    get_masks,
    looksam,
    methods,
    msam,
    perturb,
    s2sam,
    sparsify,
    ssam,
)


def test_sparsify_on_a_subset_of_leaves():
    tx = optax.chain(optax.masked(rigl(s2sgd()), lambda p: jax.tree.map(lambda x: x == "right", labels(p))))
    for step in run(tx, make_params()):
        masks = named(get_masks(step.opt_state, step.params))
        assert masks["a/kernel"].all()
        assert not masks["kernel"].all()
        assert all((named(step.params)[name][~mask] == 0.0).all() for name, mask in masks.items())
        check_masks(step.params, step.opt_state)


def test_two_sparsify_on_disjoint_leaves():
    def build(rho):
        return rigl(s2sgd(rho), seed=int(10 * rho))

    tx = optax.multi_transform({"left": build(0.1), "right": build(0.3)}, labels)
    for step in run(tx, make_params()):
        masks = named(get_masks(step.opt_state, step.params))
        assert all((named(step.params)[name][~mask] == 0.0).all() for name, mask in masks.items())
        assert not any(masks[name].all() for name in KERNELS)
        check_masks(step.params, step.opt_state)


@pytest.mark.parametrize("field", ["mu", "nu"])
def test_a_module_named_like_a_state_field_is_not_confused(field):
    """``state.mu["kernel"]`` belongs to ``kernel``, also where there is a module ``mu`` with a kernel."""
    params = {field: {"kernel": jnp.ones((8, 8))}, "kernel": jnp.full((8, 8), 2.0)}
    history = run(rigl(optax.chain(s2sam(RHO), optax.adam(0.05))), params)
    for step in history:
        adam, masks = find(step.opt_state, optax.ScaleByAdamState), get_masks(step.opt_state)
        for moment in (adam.mu, adam.nu):
            for leaf, mask in zip(jax.tree.leaves(moment), jax.tree.leaves(masks), strict=True):
                assert (leaf[~mask] == 0.0).all()
    used = jax.tree.map(lambda m, v: bool((v[m] != 0).any()), masks, adam.nu)
    assert all(jax.tree.leaves(used))


def test_growing_without_skipping_starts_momentum_from_the_gradient():
    tx = sparsify(s2sgd(), methods.rigl(0.5, skip_step=False), sparsity=SPARSITY, when=Every(2, 2, 100))
    history = run(tx, make_params())
    trace, old, new = (
        named(find(history[2].opt_state, optax.TraceState).trace),
        named(get_masks(history[1].opt_state)),
        named(get_masks(history[2].opt_state)),
    )
    grown = {name: new[name] & ~old[name] for name in KERNELS}
    assert all(grown[name].any() for name in KERNELS)
    for name in KERNELS:
        np.testing.assert_allclose(trace[name][grown[name]], named(history[2].grads)[name][grown[name]], 1e-6)
        np.testing.assert_allclose(named(history[2].params)[name][grown[name]], -0.1 * trace[name][grown[name]], 1e-6)


def test_inner_optimizer_sees_live_gradients_only():
    """The norm that clipping divides by is that of the masked gradient."""
    tx = sparsify(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)), methods.static(), sparsity=SPARSITY)
    params = make_params()
    opt_state = tx.init(params)
    params = apply_masks(params, opt_state)
    updates, _ = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    np.testing.assert_allclose(norm(jax.tree.leaves(updates)), 0.1, 1e-5)


LEAVES = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


def in_groups(**groups):
    return optax.multi_transform(groups, {"enc": "used", "head": "used"})


def test_a_group_that_no_leaf_is_in():
    tx = in_groups(
        used=optax.chain(msam(0.1), optax.sgd(0.1, momentum=0.9)), other=optax.chain(msam(), optax.sgd(0.1, 0.9))
    )
    state = tx.init(LEAVES)
    _, state = tx.update(LEAVES, state, LEAVES)
    assert float(optax.tree.norm(optax.tree.sub(perturb(LEAVES, state), LEAVES))) == pytest.approx(0.1, rel=1e-5)
    every = checked(in_groups(used=s2sam(0.1), other=s2sam(0.1)))
    every.update(LEAVES, every.init(LEAVES), LEAVES)
    moving = sparsify(optax.sgd(0.1), methods.dsr(0.1), sparsity=0.5, when=Every(0, 1, 9))
    both = in_groups(used=moving, other=moving)
    _, state = both.update(LEAVES, both.init(LEAVES), LEAVES)
    assert int(sum(mask.sum() for mask in get_masks(state, LEAVES).values())) == 16


@pytest.mark.parametrize(
    "options",
    [
        {"method": methods.static(), "overrides": {"head": 0.0}},
        {"method": methods.lottery(0.5, rounds=1), "when": Every(0, 5)},
        {"method": methods.lrr(0.5, rounds=1), "when": Every(0, 5)},
    ],
    ids=["overrides", "lottery", "lrr"],
)
def test_a_state_is_mapped_over_by_optax(options):
    tx = sparsify(optax.sgd(0.1, momentum=0.9), **options, sparsity=0.5)
    state = tx.init(LEAVES)
    doubled = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_leaves_of_one_name_are_refused():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"several are called \['a/b'\]; rename them"):
        sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params)


WITH_GAIN = {"dense": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}, "gain": jnp.ones(4)}
SGD = optax.sgd(0.1, momentum=0.9)


def test_a_traced_sparsity_is_refused_by_name():
    def nnz(sparsity):
        return sparsify(SGD, methods.static(), sparsity=sparsity).init(WITH_GAIN).nnz

    with pytest.raises(TypeError, match=r"sparsity must be a number.* got a traced"):
        jax.jit(nnz)(0.5)


@pytest.mark.parametrize(
    ("make", "options", "static"),
    [(looksam, {}, "every"), (ssam, {"total_steps": 9}, ("sparsity", "update_every", "total_steps"))],
    ids=["looksam", "ssam"],
)
def test_what_inject_hyperparams_must_not_trace_is_told(make, options, static):
    options |= {"rho": optax.linear_schedule(0.0, 0.1, 9)}
    tx = optax.inject_hyperparams(make)(**options)
    weights = jnp.ones(4)
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(functools.partial(tx.update, grad_fn=lambda w: w))(weights, tx.init(weights), weights)
    tx = optax.inject_hyperparams(make, static_args=static)(**options)
    jax.jit(functools.partial(tx.update, grad_fn=lambda w: w))(weights, tx.init(weights), weights)


TWO_LAYERS = {"kernel": jnp.arange(1.0, 33.0).reshape(4, 8), "head": jnp.ones((8, 4))}


def test_two_sparsify_of_the_same_leaves_are_refused():
    one, other = (sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"two sparsify have masks of \['head', 'kernel'\]"):
        TrainState.create(TWO_LAYERS, optax.chain(one, other))


def test_grown_weights_start_as_their_optimizer_starts():
    """Rprop's steps shrink and grow by factors, so a step size of zero would stay zero."""
    tx = sparsify(optax.rprop(0.01), methods.rigl(0.5, skip_step=False), sparsity=0.5, when=Every(3, 100, 100))
    params, target = {"kernel": jnp.zeros((8, 8))}, jnp.where(jnp.arange(64).reshape(8, 8) % 3 == 0, 1.0, -2.0)
    state = tx.init(params)
    update, first = jax.jit(tx.update), get_masks(tx.init(params))["kernel"]
    for _ in range(20):
        updates, state = update({"kernel": params["kernel"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    grown = get_masks(state)["kernel"] & ~first
    assert int(grown.sum()) > 0
    assert float(jnp.abs(params["kernel"])[grown].min()) > 0.1


def test_one_seed_is_not_one_key():
    """Growth by SET, SSAM's first coordinates and a dropout of weights, all by default, have nothing in common."""
    params = {"kernel": jnp.ones((100, 100))}
    tx = sparsify(ssam(0.1, mask="dynamic", sparsity=0.5, total_steps=10), methods.static(), sparsity=0.5)
    state = TrainState.create(params, tx)
    keys = [state.key, state.opt_state.key, state.opt_state.inner_state.key]
    draws = [np.ravel(jax.random.uniform(key, (10_000,))) for key in keys]
    correlations = np.corrcoef(draws)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.05

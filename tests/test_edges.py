"""Corners that users reach: zero gradients, empty groups, unusual trees, other settings of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    ChannelAxis,
    ChannelGroup,
    Every,
    TrainState,
    apply_masks,
    checked,
    esam,
    eval_params,
    get_masks,
    gsam,
    looksam,
    make_train_step,
    materialize,
    methods,
    msam,
    perturb,
    recalibrate_batch_stats,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    set_masks,
    sparsify,
    ssam,
    trajectory_loss,
)

PARAMS = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


# Perturbations


@pytest.mark.parametrize("rho", [0.0, 1e-6, optax.linear_schedule(0.0, 0.05, 1000)], ids=["zero", "tiny", "warm-up"])
def test_looksam_reuses_no_rounding(rho):
    weights, curvature = jax.random.normal(jax.random.key(0), (1000,)), jax.random.uniform(jax.random.key(1), (1000,))
    grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(curvature * w**2))
    tx = looksam(rho=rho, every=5)
    state = tx.init(weights)
    for _ in range(3):
        grads = grad_fn(weights)
        updates, state = tx.update(grads, state, weights, grad_fn=grad_fn)
        np.testing.assert_allclose(updates, grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "make", [sam, gsam, looksam, esam, lambda **o: ssam(sparsity=0.5, mask="dynamic", total_steps=9, **o)]
)
def test_a_zero_gradient_without_eps_moves_nothing(make):
    tx, weights = make(rho=0.1, eps=0.0), jnp.ones(4)
    updates, _ = tx.update(jnp.zeros(4), tx.init(weights), weights, grad_fn=lambda w: w)
    np.testing.assert_array_equal(updates, weights)


@pytest.mark.parametrize("compat", ["paper", "authors"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_first_step_without_eps_moves_nothing(adaptive, compat):
    weights = jnp.ones(2)
    np.testing.assert_array_equal(
        perturb(weights, s2sam(0.1, eps=0.0, adaptive=adaptive, compat=compat).init(weights)), 1
    )
    by_momentum = optax.chain(msam(0.1, eps=0.0), optax.sgd(0.1, momentum=0.9))
    np.testing.assert_array_equal(perturb(weights, by_momentum.init(weights)), 1)
    wrapped = s2sam_wrapper(optax.sgd(0.1), eps=0.0)
    np.testing.assert_array_equal(wrapped.update(jnp.zeros(2), wrapped.init(weights), weights)[0], 0)
    for tx in (optax.chain(s2sam(0.1, eps=0.0, adaptive=adaptive, compat=compat), optax.sgd(0.1)), by_momentum):
        checked(tx).update(weights, tx.init(weights), weights)  # raises at a fault


def test_gradients_whose_squares_vanish_are_no_direction():
    tx, weights = s2sam(0.1, eps=1e-30), jnp.ones(2)
    _, state = tx.update(jnp.full(2, 1e-25), tx.init(weights), weights)
    np.testing.assert_allclose(perturb(weights, state), 1)
    checked(tx).update(weights, state, weights)


def test_a_nan_in_the_last_gradient_is_not_hidden():
    tx, weights = s2sam(0.1), jnp.ones(2)
    _, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(weights), weights)
    assert np.isnan(perturb(weights, state)).all()


def test_a_narrow_wrapper_fits_into_apply_if_finite():
    params = jnp.ones(4, jnp.bfloat16)
    tx = optax.apply_if_finite(s2sam_wrapper(optax.sgd(0.1), rho=0.1, clean_dtype=jnp.float32), 3)
    state, clean = tx.init(params), np.ones(4)
    for _ in range(3):
        grads = params
        clean = clean - 0.1 * np.asarray(grads, np.float32)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert updates.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(params, np.float32), clean + 0.1 * 0.5, rtol=1e-2)
    np.testing.assert_allclose(np.asarray(eval_params(params, state), np.float32), clean, rtol=1e-2)


# Clocks


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
    state = tx.init(PARAMS)
    params = apply_masks(PARAMS, state)
    state = state._replace(step=jnp.int32(2**31 - 3), next_update=jnp.int32(2**31 - 1))
    for _ in range(4):
        updates, state = tx.update(PARAMS, state, params)
        assert float(optax.tree.norm(updates)) > 0


# Groups and trees


def in_groups(**groups):
    return optax.multi_transform(groups, {"enc": "used", "head": "used"})


def test_a_group_that_no_leaf_is_in():
    tx = in_groups(
        used=optax.chain(msam(0.1), optax.sgd(0.1, momentum=0.9)), other=optax.chain(msam(), optax.sgd(0.1, 0.9))
    )
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert float(optax.tree.norm(optax.tree.sub(perturb(PARAMS, state), PARAMS))) == pytest.approx(0.1, rel=1e-5)
    every = checked(in_groups(used=s2sam(0.1), other=s2sam(0.1)))
    every.update(PARAMS, every.init(PARAMS), PARAMS)
    moving = sparsify(optax.sgd(0.1), methods.dsr(0.1), sparsity=0.5, when=Every(0, 1, 9))
    both = in_groups(used=moving, other=moving)
    _, state = both.update(PARAMS, both.init(PARAMS), PARAMS)
    assert int(sum(mask.sum() for mask in get_masks(state, PARAMS).values())) == 16


def test_masks_of_one_sparse_group_are_set_by_a_whole_tree():
    sparse = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    tx = optax.multi_transform({"sparse": sparse, "dense": optax.sgd(0.1)}, {"enc": "sparse", "head": "dense"})
    wanted = {"enc": PARAMS["enc"] > 8, "head": PARAMS["head"] > 0}
    state = set_masks(tx.init(PARAMS), wanted)
    jax.tree.map(np.testing.assert_array_equal, get_masks(state, PARAMS), wanted)
    with pytest.raises(ValueError, match="enc: missing in masks"):
        set_masks(tx.init(PARAMS), {"head": wanted["head"]})


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
    state = tx.init(PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_leaves_of_one_name_are_refused():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"several are called \['a/b'\]; rename them"):
        sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params)


def test_the_momentum_of_a_train_state_is_the_optimizers():
    tx = optax.chain(msam(0.1), optax.sgd(0.1, momentum=0.9))
    looks_like = optax.ScaleByAdamState(jnp.zeros(()), jnp.ones(3), jnp.ones(3))  # has a field mu
    state = TrainState.create(PARAMS, tx, model_state=looks_like)
    jax.tree.map(np.testing.assert_array_equal, perturb(state.params, state), perturb(state.params, state.opt_state))


def test_channels_that_two_groups_name():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "gamma": jnp.ones(3), "delta": jnp.ones(3)}
    masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    groups = [
        ChannelGroup(
            "g1", (ChannelAxis("a", -1),), scales=(ChannelAxis("gamma", 0),), statistics=(ChannelAxis("m", 0),)
        ),
        ChannelGroup(
            "g2", (ChannelAxis("b", -1),), scales=(ChannelAxis("delta", 0),), statistics=(ChannelAxis("m", -1),)
        ),
    ]
    with pytest.raises(ValueError, match="m: axis 0 is in two groups, g1 and g2"):
        materialize(params, {"m": jnp.ones(3)}, groups, masks)


def test_an_axis_that_a_group_names_twice_is_cut_once():
    params = {"a": jnp.array([[1.0, 0.0, 3.0]])}
    group = ChannelGroup("g", (ChannelAxis("a", -1), ChannelAxis("a", 1)))
    small = materialize(params, None, [group], {"a": params["a"] != 0})
    np.testing.assert_array_equal(small.params["a"], [[1.0, 3.0]])


# Arguments


def test_a_sparsity_may_be_an_array():
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.3), sparsity=jnp.float32(0.5), when=Every(0, 2, 9))
    by_array = sparsify(optax.sgd(0.1), methods.static(), sparsity=jnp.float32(0.9))
    assert int(by_array.init({"kernel": jnp.ones((25, 40))}).nnz[0]) == 100
    step = make_train_step(lambda p, m, b, k: (jnp.sum(p["enc"] * b), (m, {})), tx)
    state, _ = step(TrainState.create({"enc": PARAMS["enc"]}, tx), jnp.ones((4, 4)))
    assert int(state.opt_state.nnz[0]) == 8
    assert int(select(jnp.arange(1000.0), sparsity=np.float32(0.9)).sum()) == 100


@pytest.mark.parametrize("method", ["leaf", "global"])
def test_too_many_scores_are_refused_before_they_are_counted(method):
    shape = {"w": jax.ShapeDtypeStruct((50_000, 50_000), jnp.float32)}
    with pytest.raises(ValueError, match="counts in int32, and 2500000000 scores"):
        jax.eval_shape(lambda s: select(s, sparsity=0.1, scope=method), shape)


def test_fisher_examples_must_be_some():
    with pytest.raises(ValueError, match="fisher_examples >= 1; got 0"):
        make_train_step(lambda p, m, b, k: (p, (m, {})), optax.sgd(0.1), fisher_examples=0)


def test_weak_types_are_traced_once():
    traces = []

    def loss_fn(params, model_state, batch, key):
        traces.append(1)
        return jnp.sum(params["g"] * batch), (model_state, {})

    tx = optax.sgd(0.1)
    state = TrainState.create({"g": jnp.full((4,), 1e-4)}, tx, model_state={"c": 0.0})
    step = make_train_step(loss_fn, tx)
    for _ in range(3):
        state, _ = step(state, jnp.ones(4))
    assert len(traces) == 1


def test_masked_classes_add_nothing():
    logits = jnp.array([[1.0, 2.0, -jnp.inf]])
    with_class = trajectory_loss(logits, logits + jnp.array([[0.5, 0.0, 0.0]]))
    np.testing.assert_allclose(with_class, trajectory_loss(logits[:, :2], jnp.array([[1.5, 2.0]])), rtol=1e-6)


# Statistics


def test_statistics_that_are_no_averages_are_kept_from_fresh_zeros_too():
    def depending(params, stats, batch, key):
        off = batch - stats["first"]
        first, second = (0.9 * s + 0.1 * x.mean(0) for s, x in ((stats["first"], batch), (stats["second"], off)))
        return batch.mean(), ({"first": first, "second": second}, {})

    batches = [jnp.full((4, 2), 3.0), jnp.full((4, 2), 5.0)]
    zeros = {"first": jnp.zeros(2), "second": jnp.zeros(2)}
    with pytest.warns(UserWarning, match=r"kept \['second'\]"):
        found = recalibrate_batch_stats(depending, None, zeros, batches)
    np.testing.assert_allclose(found["first"], 4.0, rtol=1e-5)
    np.testing.assert_array_equal(found["second"], 0.0)

    def maximum(params, stats, batch, key):
        return batch.mean(), (jnp.maximum(stats, jnp.abs(batch).max(0)), {})

    with pytest.warns(UserWarning, match="kept"):
        np.testing.assert_array_equal(recalibrate_batch_stats(maximum, None, jnp.zeros(2), batches), 0.0)


# Settings of JAX


@pytest.mark.parametrize("method", [methods.dsr(0.1), methods.rigl(0.3), methods.mest()], ids=["dsr", "rigl", "mest"])
def test_strict_promotion(method):
    tx = checked(sparsify(optax.chain(s2sam(0.1), optax.sgd(0.1)), method, sparsity=0.5, when=Every(0, 1, 9)))
    perturbing = ssam(rho=0.1, mask="dynamic", total_steps=9)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(PARAMS)
        tx.update(PARAMS, state, apply_masks(PARAMS, state))
        perturbing.update(PARAMS, perturbing.init(PARAMS), PARAMS, grad_fn=lambda p: p)

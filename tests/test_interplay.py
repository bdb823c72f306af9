"""Wrappers and precisions between which state, clock and statistics could part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    Every,
    TrainState,
    empirical_fisher,
    eval_params,
    get_masks,
    make_train_step,
    methods,
    s2sam,
    s2sam_wrapper,
    sam,
    sparsify,
)
from s2sam_jax._base.counts import rounded_down, rounded_up

PARAMS = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def loss_fn(params, model_state, batch, key):
    """Its statistic is the batch's own mean."""
    mean = jnp.mean(batch)
    return jnp.sum(params["kernel"] ** 2) * mean, (0.5 * model_state + 0.5 * mean, {})


def start(tx, params=PARAMS):
    return TrainState.create(jax.tree.map(jnp.array, params), tx, model_state=jnp.ones(()))


def test_a_freeze_that_is_lifted_moves_no_clock():
    tx = sparsify(optax.sgd(1e-3), methods.lottery(0.2), sparsity=0.9, when=Every(0, 10), distribution="uniform")
    good, bad = jnp.ones(4), jnp.full(4, jnp.nan)

    def alive(batches):
        step, state, counts = make_train_step(loss_fn, tx), start(tx), []
        for batch in batches:
            state, _ = step(state, batch)
            if int(state.first_bad_step) >= 0:
                state = state._replace(first_bad_step=jnp.int32(-1))
            else:
                counts.append(int(get_masks(state.opt_state)["kernel"].sum()))
        return counts

    assert alive([good] * 3 + [bad] * 4 + [good] * 20) == alive([good] * 23)


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: optax.apply_if_finite(tx, 5),
        lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite).gradient_transformation(),
    ],
    ids=["apply_if_finite", "skip_not_finite"],
)
def test_a_step_that_the_optimizer_passes_over_leaves_no_trace(outer):
    tx = outer(optax.chain(s2sam(0.1), optax.sgd(0.01)))
    step, state, seen = make_train_step(loss_fn, tx), start(tx), []
    for value in (2.0, 2.0, jnp.nan, 3.0):
        state, _ = step(state, jnp.full(4, value))
        seen.append((float(state.model_state), np.array(state.params["kernel"])))
    assert int(state.first_bad_step) == -1
    assert [statistic for statistic, _ in seen] == [1.5, 1.75, 1.75, 2.375]
    np.testing.assert_array_equal(seen[2][1], seen[1][1])
    assert (seen[3][1] < seen[2][1]).all()


@pytest.mark.parametrize("inner", [lambda tx: optax.apply_if_finite(tx, 5), lambda tx: optax.MultiSteps(tx, 2)])
def test_the_wrapper_refuses_what_belongs_outside(inner):
    held_back = inner(optax.sgd(0.1))
    held_back = optax.GradientTransformation(held_back.init, held_back.update)
    with pytest.raises(ValueError, match=r"put optax\.(MultiSteps|apply_if_finite) outside, optax\."):
        s2sam_wrapper(held_back).init(PARAMS)


def test_the_wrapper_takes_sparsity_of_some_leaves():
    params = {"a": jnp.arange(1.0, 17.0).reshape(4, 4), "b": {"bias": jnp.ones(4)}}
    sparse = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    tx = s2sam_wrapper(optax.multi_transform({"s": sparse, "d": optax.sgd(0.1)}, {"a": "s", "b": "d"}))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    masks = get_masks(state, params)
    assert int(masks["a"].sum()) == 8
    assert bool(masks["b"]["bias"].all())
    for tree in (params, eval_params(params, state)):
        assert bool((tree["a"][~masks["a"]] == 0).all())
    # the perturbation lies on the live weights alone: rho long
    moved = jax.tree.map(jnp.subtract, params, eval_params(params, state))
    np.testing.assert_allclose(optax.tree.norm(moved), 0.05, rtol=1e-5)


def test_sam_outside_sparsify_is_refused_and_inside_is_not():
    outside = optax.chain(sam(0.5), sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5))
    with pytest.raises(ValueError, match=r"outside sparsify would perturb pruned weights"):
        make_train_step(loss_fn, outside)(start(outside), jnp.ones(4))
    inside = sparsify(optax.chain(sam(0.5), optax.sgd(0.1)), methods.static(), sparsity=0.5)
    make_train_step(loss_fn, inside)(start(inside), jnp.ones(4))


def test_sam_that_sees_some_leaves_says_so():
    tx = optax.masked(sam(0.1), {"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"sam takes a gradient at all parameters, and optax\.masked .* hides some"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p: p)


def test_grasp_that_sees_some_leaves_says_so():
    sparse = sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.5, prunable=lambda path, leaf: True)
    tx = optax.partition({"some": sparse, "rest": optax.sgd(0.1)}, {"a": "some", "b": "rest"})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"grasp takes a gradient at all parameters, and optax\.masked .* hides some"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p: {"a": p["b"], "b": p["a"]})


def test_many_small_parts_add_up_in_bfloat16():
    def mean_loss(params, model_state, batch, key):
        return jnp.mean(batch @ params["w"]), (model_state, {})

    step = make_train_step(mean_loss, optax.sgd(1.0), accumulate=512)
    state = TrainState.create({"w": jnp.zeros(1, jnp.bfloat16)}, optax.sgd(1.0))
    new, _ = step(state, jnp.ones((512, 1), jnp.bfloat16))
    assert new.params["w"].dtype == jnp.bfloat16
    assert float(new.params["w"][0]) == -1.0


def test_fisher_information_of_small_half_precision_gradients_is_not_lost():
    fisher = empirical_fisher(lambda w, x: jnp.dot(w, x))
    found = fisher(jnp.zeros(2, jnp.float16), jnp.tile(jnp.array([1e-4, 2e-4], jnp.float16), (64, 1)))
    expected = 64 * np.square(np.array([1e-4, 2e-4], np.float16).astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "fraction", "up", "down"),
    [(100, 0.3, 30, 30), (100, 0.6, 60, 60), (100, 0.53, 53, 53), (7, 0.5, 4, 3), (10_007, 0.25, 2502, 2501)]
    + [(n, 1.0, n, n) for n in (1, 2**16 - 1, 2**21 + 1, 10_000_001, 2**24 - 1)],
)
def test_counts_lose_nothing_to_rounding(size, fraction, up, down):
    """In float32 0.3 * 100 lies above 30 and 0.53 * 100 below 53; a slack relative to a large count is more than 1."""
    product = jnp.float32(size) * jnp.float32(fraction)
    assert (int(rounded_up(product)), int(rounded_down(product))) == (up, down)
    assert (rounded_up(size * fraction), rounded_down(size * fraction)) == (up, down)


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

"""s2sam_wrapper: the points it walks along, its clean weights, and what it may stand around."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import MOMENTUM, RHO, SPARSITY, STEPS, assert_trees_close, loss_fn, make_params, named, rigl, s2sgd
from misfits import SGD, two_kernels
from plain import plain

from s2sam_jax import (
    Every,
    TrainState,
    apply_masks,
    eval_params,
    get_masks,
    methods,
    msam,
    perturb,
    s2sam,
    s2sam_wrapper,
    sam,
    sparsify,
)


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


@pytest.mark.parametrize(
    "tx",
    [optax.chain(s2sam_wrapper(SGD), s2sam_wrapper(SGD)), s2sam_wrapper(s2sam_wrapper(SGD))],
    ids=["beside", "inside"],
)
def test_two_wrappers(tx):
    state = tx.init(two_kernels())
    with pytest.raises(ValueError, match=r"s2sam_wrapper is in opt_state more than once"):
        eval_params(two_kernels(), state)


def test_s2sam_around_sparsify_and_inside_the_wrapper():
    tx = optax.chain(s2sam(), sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5))
    with pytest.raises(ValueError, match=r"s2sam\(\) stands outside sparsify\(\)"):
        perturb(two_kernels(), tx.init(two_kernels()))
    for inner in (s2sam(), optax.chain(msam(), optax.sgd(0.1, momentum=0.9)), optax.chain(sam(), optax.sgd(0.1))):
        with pytest.raises(ValueError, match="would perturb twice"):
            s2sam_wrapper(inner).init(two_kernels())


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


@pytest.mark.parametrize("inner", [lambda tx: optax.apply_if_finite(tx, 5), lambda tx: optax.MultiSteps(tx, 2)])
def test_the_wrapper_refuses_what_belongs_outside(inner):
    held_back = inner(optax.sgd(0.1))
    held_back = optax.GradientTransformation(held_back.init, held_back.update)
    with pytest.raises(ValueError, match=r"put optax\.(MultiSteps|apply_if_finite) outside, optax\."):
        s2sam_wrapper(held_back).init(KERNEL)


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


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rigl"])
def test_wrapper_walks_along_the_perturbed_points(sparse):
    """Where a mask update is no gradient step, S2-SAM has no new gradient either; so masks change without skipping."""

    def build(inner):
        method = methods.rigl(0.5, skip_step=False)
        return sparsify(inner, method, sparsity=SPARSITY, when=Every(0, 3, 10)) if sparse else inner

    start = make_params()
    if sparse:
        start = apply_masks(start, build(MOMENTUM()).init(start))
    split, split_state = plain(build(s2sgd()), start, steps=STEPS, point=perturb)
    for steps in (1, 3, STEPS):
        wrapped, state = plain(s2sam_wrapper(build(MOMENTUM()), RHO), start, steps=steps)
        assert_trees_close(eval_params(wrapped[-1][0], state), split[steps - 1][0], 1e-5, 1e-5)
        if steps < STEPS:
            assert_trees_close(wrapped[-1][0], split[steps][1], 1e-5, 1e-5)
    assert_trees_close(wrapped[-1][0], perturb(split[-1][0], split_state), 1e-5, 1e-5)


def test_wrapper_keeps_a_wide_copy_of_narrow_parameters():
    def narrow(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    def narrow_perturb(params, opt_state):
        return narrow(perturb(params, opt_state))

    start = narrow(make_params())
    wrapped, state = plain(s2sam_wrapper(MOMENTUM(), RHO, clean_dtype=jnp.float32), start)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    tx, params = s2sgd(), wide
    want = tx.init(params)
    for _ in range(5):
        grads = jax.jit(jax.grad(loss_fn))(narrow_perturb(params, want))
        updates, want = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), want, params)
        params = optax.apply_updates(params, updates)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(wrapped[-1][0]))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.clean))
    assert_trees_close(state.clean, params, 2e-2, 2e-2)
    assert_trees_close(wrapped[-1][0], perturb(params, want), 3e-2, 3e-2)


def test_wrapper_around_sparsify_is_sparse_from_the_first_moment():
    state = TrainState.create(make_params(), s2sam_wrapper(rigl(MOMENTUM()), RHO))
    evaluated = named(eval_params(state.params, state.opt_state))
    assert all((evaluated[name][~mask] == 0.0).all() for name, mask in named(get_masks(state.opt_state)).items())


TWO_LAYERS = {"kernel": jnp.arange(1.0, 33.0).reshape(4, 8), "head": jnp.ones((8, 4))}


def test_eval_params_of_a_state_without_types_are_refused():
    """As from a checkpoint that was restored without a structure."""
    state = s2sam_wrapper(optax.sgd(0.1)).init(TWO_LAYERS)
    with pytest.raises(ValueError, match="the state of s2sam_wrapper as a plain dict"):
        eval_params(TWO_LAYERS, [state._asdict()])


def test_a_wrapper_of_some_leaves_has_their_clean_weights():
    tx = optax.partition({"w": s2sam_wrapper(optax.sgd(0.1), rho=0.5), "s": optax.sgd(0.1)}, {"a": "w", "b": "s"})
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    clean = eval_params(params, state)
    np.testing.assert_allclose(clean["a"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(params["a"], 0.9 + 0.5 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(clean["b"], params["b"])

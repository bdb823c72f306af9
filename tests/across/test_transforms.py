"""Training under vmap, scan, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import KERNELS, MOMENTUM, STEPS, assert_trees_close, loss_fn, make_params, named, planned, rigl, s2sgd

from s2sam_jax import TrainState, apply_masks, get_masks, methods, perturb, s2sam, sparsify, ssam


def test_vmap_over_keys_gives_different_masks():
    def train(seed):
        tx = rigl(s2sgd(), seed=seed)
        params = make_params()
        opt_state = tx.init(params)
        params = apply_masks(params, opt_state)
        for _ in range(2):
            grads = jax.grad(loss_fn)(perturb(params, opt_state))
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return get_masks(opt_state), params

    masks, params = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 4))
    for name, count in planned(make_params()).items():
        rows, weights = named(masks)[name], named(params)[name]
        assert (rows.reshape(4, -1).sum(1) == count).all()
        assert (weights[~rows] == 0.0).all()
        if name in KERNELS:
            assert len(np.unique(rows.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize("kind", ["sparsify", "ssam"])
def test_vmap_over_integer_seeds_gives_different_masks(kind):
    def masks(seed):
        if kind == "ssam":
            return ssam(total_steps=9, sparsity=0.6, seed=seed).init(make_params()).perturb_masks
        return get_masks(sparsify(MOMENTUM(), methods.static(), sparsity=0.6, seed=seed).init(make_params()))["kernel"]

    leaves = jax.tree.leaves(jax.jit(jax.vmap(masks))(jnp.arange(4)))
    flat = np.concatenate([np.asarray(m).reshape(4, -1) for m in leaves], axis=1)
    assert len(np.unique(flat, axis=0)) == 4
    assert (flat.sum(1) == {"ssam": 45, "sparsify": 15}[kind]).all()  # of 114 and of 36, at 60 %


@pytest.mark.parametrize("seed", [0, jax.random.key(0)], ids=["integer", "key"])
def test_one_seed_for_all_gives_each_draws_of_its_own(seed):
    tx = sparsify(optax.chain(ssam(total_steps=9, seed=seed), MOMENTUM()), methods.static(), sparsity=0.5, seed=seed)
    state = TrainState.create(make_params(), tx, seed=seed)
    keys = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert len(keys) == 3
    assert len(np.unique([jax.random.key_data(key) for key in keys], axis=0)) == 3


def test_no_key_is_used_twice():
    """By JAX's own check; that of Sparse SAM stays as it is where RigL skips a step."""
    tx = rigl(optax.chain(ssam(total_steps=9, update_every=2), MOMENTUM()))
    params = make_params()

    @jax.jit
    def step(params, opt_state):
        grad_fn = jax.grad(loss_fn)
        updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    with jax.debug_key_reuse(True):
        opt_state = tx.init(params)
        for _ in range(3):
            params, opt_state = step(params, opt_state)
    assert not all(mask.all() for mask in jax.tree.leaves(get_masks(opt_state)))


def test_scan_equals_a_python_loop():
    tx = rigl(s2sgd())
    params = make_params()
    opt_state = tx.init(params)
    start = (apply_masks(params, opt_state), opt_state)

    def step(carry, _):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss_fn)(perturb(params, opt_state)), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS)[0])(start)
    looped = start
    for _ in range(STEPS):
        looped, _ = jax.jit(step)(looped, None)
    assert_trees_close(scanned[0], looped[0])
    assert_trees_close(get_masks(scanned[1]), get_masks(looped[1]), 0, 0)


def test_derivatives_of_training_are_the_same_forwards_and_backwards():
    tx = optax.chain(s2sam(0.1), optax.sgd(0.1))

    def trained(w):
        def body(carry, _):
            w, state = carry
            grads = jax.grad(lambda w: jnp.sum(w**4))(perturb(w, state))
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(body, (w, tx.init(w)), None, length=3)
        return jnp.sum(w**4)

    start = jnp.array([0.3, 0.4, 0.5, 0.6])
    backwards = jax.grad(trained)(start)
    assert jnp.isfinite(backwards).all()
    np.testing.assert_allclose(jax.jacfwd(trained)(start), backwards, rtol=1e-5)

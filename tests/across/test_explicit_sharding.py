"""Selection and training under explicit sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import MOMENTUM, RHO, SPARSITY, assert_trees_close, rigl, s2sgd

from s2sam_jax import Every, apply_masks, get_masks, methods, perturb, select, sparsify, ssam


@pytest.fixture
def mesh():
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        yield mesh


def sharded_params(mesh):
    spec = {"a": jax.P("x", "y"), "b": jax.P(None, "y"), "c": jax.P("x")}
    shape = {"a": (8, 8), "b": (4, 8), "c": (8,)}
    keys = dict(zip(shape, jax.random.split(jax.random.key(1), 3), strict=True))
    plain = {name: np.asarray(jax.random.normal(keys[name], shape[name])) for name in shape}
    placed = {name: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec[name])) for name, x in plain.items()}
    return plain, placed


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_select_under_explicit_sharding(mesh, scope):
    plain, placed = sharded_params(mesh)
    plain, placed = jax.tree.map(np.round, plain), jax.tree.map(jnp.round, placed)  # so that there are ties
    masks = jax.jit(lambda x: select(x, sparsity=0.5, scope=scope))(placed)
    for name, mask in masks.items():
        assert jax.typeof(mask).sharding.spec == jax.typeof(placed[name]).sharding.spec
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        want = jax.jit(lambda x: select(x, sparsity=0.5, scope=scope))(plain)
    assert_trees_close(masks, want, 0, 0)


def test_random_masks_and_growth_are_those_of_one_device(mesh):
    plain, placed = sharded_params(mesh)
    tx = sparsify(optax.sgd(0.1), methods.set(0.5), sparsity=SPARSITY, when=Every(0, 1))

    def masks(params):
        first = tx.init(params)
        _, then = jax.jit(tx.update)(params, first, params)
        return [get_masks(first), get_masks(then)]

    got = masks(placed)
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        want = masks(plain)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (got[0]["a"] != got[1]["a"]).any()


def quadratic(params):
    return sum(jnp.sum(jnp.square(p - 1.5)) for p in jax.tree.leaves(params))


SHARDED = {
    "s2sam": s2sgd,
    "s2sam_rigl": lambda: rigl(s2sgd()),
    "ssam_static": lambda: sparsify(
        optax.chain(ssam(RHO, total_steps=9, update_every=2), MOMENTUM()), methods.static(), sparsity=SPARSITY
    ),
}


def short_run(build, params):
    tx = optax.with_extra_args_support(build())
    kinds = str(jax.eval_shape(tx.init, params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        point = perturb(params, opt_state) if "S2SAMState" in kinds else params
        updates, opt_state = tx.update(jax.grad(quadratic)(point), opt_state, params, grad_fn=jax.grad(quadratic))
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init)(params)
    if "SparseState" in kinds:
        params = apply_masks(params, opt_state)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    return params, get_masks(opt_state) if "SparseState" in kinds else params


@pytest.mark.parametrize("build", SHARDED.values(), ids=SHARDED.keys())
def test_training_under_explicit_sharding(mesh, build):
    plain, placed = sharded_params(mesh)
    shardings = {name: jax.typeof(x).sharding for name, x in placed.items()}
    params, masks = short_run(build, placed)
    assert {name: jax.typeof(x).sharding for name, x in params.items()} == shardings
    assert {name: jax.typeof(x).sharding for name, x in masks.items()} == shardings
    assert all(len(x.addressable_shards[0].data) * 2 == len(x) for x in (masks["a"], masks["c"]))
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        want = short_run(build, jax.tree.map(jnp.array, plain))
    assert_trees_close((params, masks), want, 1e-5, 1e-5)

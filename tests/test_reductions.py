"""What must reduce to what, and vmap, scan and explicit sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    KERNELS,
    MOMENTUM,
    RHO,
    SPARSITY,
    STEPS,
    assert_trees_close,
    loss_fn,
    make_params,
    named,
    planned,
    rigl,
    s2sgd,
    squared,
)

from s2sam_jax import (
    Every,
    TrainState,
    apply_masks,
    eval_params,
    get_masks,
    methods,
    perturb,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    sparsify,
    ssam,
)


def plain(tx, params, steps=5, point=lambda params, state: params, loss=loss_fn):
    """A loop that knows nothing: the parameters after each step, and the last state."""
    tx = optax.with_extra_args_support(tx)
    opt_state, path = tx.init(params), []

    @jax.jit
    def step(params, opt_state):
        at = point(params, opt_state)
        updates, opt_state = tx.update(
            jax.grad(loss)(at), opt_state, params, grad_fn=jax.grad(loss),
            fisher_fn=lambda p: squared(jax.grad(loss)(p)),
        )  # fmt: skip
        return optax.apply_updates(params, updates), opt_state, at

    for _ in range(steps):
        params, opt_state, at = step(params, opt_state)
        path.append((params, at))
    return path, opt_state


def without_radius(rho=0.0):
    return {
        "s2sam": (optax.chain(s2sam(rho), MOMENTUM()), perturb),
        "s2sam_adaptive": (optax.chain(s2sam(rho, adaptive=True), MOMENTUM()), perturb),
        "sam": (optax.chain(sam(rho), MOMENTUM()), lambda p, s: p),
        "asam": (optax.chain(sam(rho, adaptive=True), MOMENTUM()), lambda p, s: p),
        "ssam_dynamic": (optax.chain(ssam(rho, total_steps=10), MOMENTUM()), lambda p, s: p),
        "ssam_fisher": (optax.chain(ssam(rho, mask="fisher"), MOMENTUM()), lambda p, s: p),
        "s2sam_wrapper": (s2sam_wrapper(MOMENTUM(), rho), lambda p, s: p),
    }


@pytest.mark.parametrize("name", without_radius())
def test_zero_radius_is_the_inner_optimizer(name):
    tx, point = without_radius()[name]
    (path, opt_state), (want, _) = plain(tx, make_params(), point=point), plain(MOMENTUM(), make_params())
    assert_trees_close(eval_params(path[-1][0], opt_state), want[-1][0])


@pytest.mark.parametrize("name", without_radius())
def test_zero_gradient_gives_no_nan(name):
    tx, point = without_radius(0.5)[name]
    path, _ = plain(tx, make_params(), point=point, loss=lambda p: 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(p)))
    assert_trees_close(path[-1], (make_params(), make_params()), 0, 0)


@pytest.mark.parametrize("method", [methods.static(), methods.rigl(0.5, skip_step=False)], ids=["static", "rigl"])
def test_zero_sparsity_is_the_inner_optimizer(method):
    tx = sparsify(optax.adamw(0.05), method, sparsity=0.0, when=Every(0, 2, 10))
    path, opt_state = plain(tx, make_params())
    assert_trees_close(path[-1][0], plain(optax.adamw(0.05), make_params())[0][-1][0])
    assert all(m.all() for m in jax.tree.leaves(get_masks(opt_state)))


@pytest.mark.parametrize("name", ["s2sam", "s2sam_adaptive", "s2sam_wrapper"])
def test_first_step_of_s2sam_is_the_inner_optimizer(name):
    tx, point = without_radius(0.5)[name]
    path, opt_state = plain(tx, make_params(), steps=1, point=point)
    assert_trees_close(eval_params(path[0][0], opt_state), plain(MOMENTUM(), make_params(), steps=1)[0][0][0])
    assert_trees_close(path[0][1], make_params(), 0, 0)


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

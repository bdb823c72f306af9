"""Precision: drift over many steps, bfloat16 beside float32 masters, radii and norms at the ends of the range."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from s2sam_jax import eval_params, gsam, methods, msam, perturb, s2sam, s2sam_wrapper, sam, sparsify, ssam
from s2sam_jax._base.counts import rounded_down, rounded_up
from s2sam_jax._base.tree import norm

STEPS = 20_000


SHARPNESS = {
    "sgd": optax.identity,
    "s2sam": lambda: s2sam(0.05),
    "sam": lambda: sam(0.05),
    "ssam": lambda: ssam(0.05, mask="dynamic", sparsity=0.5, update_every=500, total_steps=STEPS),
    "msam": lambda: msam(0.05),
    "gsam": lambda: gsam(0.05),
}


def problem(dtype):
    """Noisy least squares: strongly convex, so that rounding is forgotten and not amplified."""
    rng = np.random.default_rng(0)
    inputs, target = rng.normal(size=(64, 16)), rng.normal(size=(16, 4))
    return jnp.asarray(inputs, dtype), jnp.asarray(inputs @ target + 0.1 * rng.normal(size=(64, 4)), dtype)


def gradient_on(inputs, outputs, rows):
    return jax.grad(lambda w: 0.5 * jnp.mean(jnp.sum((inputs[rows] @ w - outputs[rows]) ** 2, axis=1)))


def descend(tx, dtype, steps, point, start=None):
    """The loop's parameters and the state, after so many steps on batches of 8."""
    inputs, outputs = problem(dtype)
    params = jnp.zeros((16, 4), dtype) if start is None else start

    def step(carry, number):
        params, state = carry
        grad_fn = gradient_on(inputs, outputs, (8 * number + jnp.arange(8)) % 64)
        updates, state = tx.update(grad_fn(point(params, state)), state, params, grad_fn=grad_fn, value=jnp.zeros(()))
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[0])((params, tx.init(params)))


@pytest.mark.parametrize("name", SHARPNESS)
def test_float32_stays_beside_float64_for_20000_steps(name):
    """Of weights of up to 3.6 no more than 4e-6 was lost; 1e-6 was after the first thousand."""

    def run(dtype):
        # Masks from a seed are those of either precision; random draws are not.
        mask = jnp.arange(64).reshape(16, 4) % 3 > 0
        inner = optax.chain(SHARPNESS[name](), optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9))
        tx = sparsify(inner, fixed(mask), sparsity=0.5)
        point = perturb if name in ("s2sam", "msam") else lambda params, state: params
        return descend(tx, dtype, STEPS, point)[0]

    narrow = run(jnp.float32)
    with jax.enable_x64(True):
        wide = run(jnp.float64)
        assert wide.dtype == jnp.float64
    assert narrow.dtype == jnp.float32
    assert np.abs(wide).max() > 0.5
    np.testing.assert_array_equal(np.asarray(narrow) == 0, np.asarray(wide) == 0)
    assert np.abs(np.asarray(narrow, np.float64) - np.asarray(wide)).max() < 1e-5


def fixed(mask):
    """Static masks, given."""
    method = methods.static()
    return method._replace(init=lambda inputs: method.init(inputs)._replace(masks=mask))


def test_bfloat16_parameters_train_on_float32_masters():
    """Steps that bfloat16 cannot hold add up in the clean copy, and are lost without it."""
    rate, steps = optax.sgd(1e-3), 4000

    def error(params):
        return float(jnp.linalg.norm(params.astype(jnp.float32) - best))

    best = descend(rate, jnp.float32, steps, lambda params, state: params)[0]
    start = jnp.zeros((16, 4), jnp.bfloat16)
    masters = s2sam_wrapper(rate, rho=1e-3, clean_dtype=jnp.float32)
    params, state = descend(masters, jnp.bfloat16, steps, lambda params, state: params, start)
    assert (params.dtype, state.clean.dtype) == (jnp.bfloat16, jnp.float32)
    assert eval_params(params, state).dtype == jnp.bfloat16
    alone = descend(rate, jnp.bfloat16, steps, lambda params, state: params, start)[0]
    assert error(state.clean) < 0.02 * float(jnp.linalg.norm(best))
    assert error(alone) > 5 * error(state.clean)


@pytest.mark.parametrize("rho", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("build", [s2sam, sam, msam, gsam, lambda rho: s2sam(rho, adaptive=True)])
def test_radii_at_the_ends_of_the_range(build, rho):
    """No NaN; a radius that float32 cannot add leaves weights as they are, and a huge one is as long as it says."""
    params, grads = jnp.array([3.0, -4.0]), jnp.array([0.6, -0.8])
    tx = optax.chain(build(rho), optax.sgd(0.1, momentum=0.9))
    seen = []

    def grad_fn(point):
        seen.append(point)
        return grads

    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn, value=jnp.float32(1))
        assert np.isfinite(updates).all()
    (point,) = seen[-1:] or [perturb(params, state)]
    if rho < 1:
        np.testing.assert_array_equal(point, params)
    else:
        assert np.isfinite(point).all()
        assert np.linalg.norm(np.asarray(point, np.float64)) > 0.99e30


@pytest.mark.parametrize(
    ("size", "eps", "length"),
    [(1e18, 1e-12, 0.5), (1e-10, 1e-12, 0.495), (1e-18, 0.0, 0.5), (1e-30, 1e-12, 0.0), (1e30, 1e-12, 0.0)],
)
def test_gradients_at_the_ends_of_the_range(size, eps, length):
    """Exact where squares fit into float32, shorter where eps counts, and zero, not NaN, where squares overflow."""
    params, grads = jnp.array([3.0, -4.0]), size * jnp.array([0.6, -0.8])
    tx = s2sam(0.5, eps=eps)
    _, state = tx.update(grads, tx.init(params), params)
    epsilon = np.asarray(perturb(params, state) - params)
    np.testing.assert_allclose(epsilon, length * np.array([0.6, -0.8]), rtol=2e-3)


def test_leaves_without_entries():
    params = {"kernel": jnp.ones((4, 4)), "none": jnp.zeros((0, 4)), "scalar": jnp.ones(())}
    tx = sparsify(optax.chain(s2sam(0.1), optax.adam(0.1)), methods.static(), sparsity=0.5)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert params["none"].shape == (0, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, perturb(params, state))))


def test_a_chain_of_roundings_costs_no_weight():
    """A thousand weights times the cube of k tenths is k**3, as in gradual pruning."""
    tenths = np.arange(1, 10)
    cubes = jnp.float32(1000) * (jnp.arange(1, 10, dtype=jnp.float32) / 10) ** 3
    np.testing.assert_array_equal(rounded_up(cubes), tenths**3)
    np.testing.assert_array_equal(rounded_down(cubes), tenths**3)


def test_a_norm_sums_small_leaves_of_one_type_together():
    rng = np.random.default_rng(0)
    shapes = [(7,)] * 30 + [(3, 5)] * 4 + [(2**18,)] * 2 + [()]
    tree = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    tree += [jnp.asarray(rng.normal(size=7), jnp.bfloat16), jnp.zeros(0)]
    want = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in tree))
    np.testing.assert_allclose(float(norm(tree)), want, rtol=1e-6)
    assert jax.jit(norm).lower(tree).as_text().count("stablehlo.reduce(") == 7  # one a type, but of each large leaf
    assert float(norm([])) == 0
    assert float(norm([jnp.full(1000, 300.0, jnp.float16)])) == pytest.approx(300 * np.sqrt(1000), rel=1e-6)


def test_a_norm_stacks_only_leaves_that_are_sharded_alike():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    leaves = [jnp.full((8, 8), value) for value in (1.0, 2.0, 3.0)]
    specs = (PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("a"))
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs, strict=True)]
    with jax.set_mesh(mesh):
        assert float(jax.jit(norm)(placed)) == pytest.approx(8 * np.sqrt(14))

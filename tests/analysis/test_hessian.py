"""Eigenvalues, densities and traces against closed forms and dense Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadratic import EIGENVALUES, HESSIAN, ROTATION, batches, quadratic, start

from s2sam_jax import analysis
from s2sam_jax.analysis import _lanczos

RNG = np.random.default_rng(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def network(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["one"]) @ params["two"]
    return jnp.mean(jnp.square(hidden - targets))


def network_case():
    params = {"one": jnp.asarray(RNG.normal(size=(3, 4))), "two": jnp.asarray(RNG.normal(size=(4, 2)))}
    data = [(jnp.asarray(RNG.normal(size=(5, 3))), jnp.asarray(RNG.normal(size=(5, 2)))) for _ in range(2)]
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    dense = np.mean([jax.hessian(lambda w, b=b: network(unravel(w), b))(flat) for b in data], axis=0)
    return params, data, dense


def test_top_eigenvalues_of_a_quadratic(x64):
    values, bounds = analysis.top_eigenvalues(quadratic, start(), jax.random.key(0), batches(), k=5, steps=8)
    np.testing.assert_allclose(values, [8, 3.5, 2, 1, 0.3], atol=1e-6)
    assert (np.abs(bounds) < 1e-6).all()


def test_an_eigenvalue_of_several_dimensions_is_found_once(x64):
    curvatures = jnp.array([1.0, 1.0, 2.0, 2.0, 5.0, 5.0])
    values, _ = analysis.top_eigenvalues(
        lambda w, batch: 0.5 * jnp.sum(batch * w**2), jnp.zeros(6), jax.random.key(0), [curvatures], k=5, steps=6
    )
    np.testing.assert_allclose(values, [5, 2, 1], atol=1e-9)


def test_bounds_hold_before_lanczos_has_converged(x64):
    values, bounds = analysis.top_eigenvalues(quadratic, start(), jax.random.key(1), batches(), k=3, steps=4)
    distance = np.abs(values[:, None] - EIGENVALUES).min(axis=1)
    assert (distance <= bounds + 1e-9).all()
    assert bounds.max() > 1e-3


def test_bounds_are_the_lengths_of_the_residuals(x64):
    """Of the Ritz vectors in the Krylov space of three vectors, made by QR."""
    values, bounds = analysis.top_eigenvalues(quadratic, start(), jax.random.key(1), batches(), k=3, steps=3)
    first = np.asarray(jax.random.normal(jax.random.key(1), (8,), jnp.float64))
    basis, _ = np.linalg.qr(np.stack([first, HESSIAN @ first, HESSIAN @ HESSIAN @ first], axis=1))
    ritz, inner = np.linalg.eigh(basis.T @ HESSIAN @ basis)
    residuals = np.linalg.norm(HESSIAN @ basis @ inner - basis @ inner * ritz, axis=0)
    np.testing.assert_allclose(values, ritz[::-1], rtol=1e-9)
    np.testing.assert_allclose(bounds, residuals[::-1], rtol=1e-9)


def test_spectrum_of_a_quadratic(x64):
    key = jax.random.key(2)
    found = analysis.hessian_spectrum(quadratic, start(), key, batches(), steps=50, runs=3)
    assert found.nodes.shape == (3, 8)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, atol=1e-9)
    for run, run_key in enumerate(jax.random.split(key, 3)):
        vector = np.asarray(jax.random.rademacher(run_key, (8,), jnp.float64))
        np.testing.assert_allclose(found.nodes[run], EIGENVALUES, atol=1e-6)
        np.testing.assert_allclose(found.weights[run], (ROTATION.T @ vector) ** 2 / 8, atol=1e-6)
    grid = np.linspace(-30, 30, 20001)
    assert np.trapezoid(found.density(grid, sigma=0.5), grid) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("last", "width"), [(9.0, 9.0), (0.5, 1.0)])
def test_density_is_as_narrow_as_the_range_of_the_live_nodes_says(last, width):
    found = analysis.Spectrum(np.array([[0.0, last, 50.0]]), np.array([[0.25, 0.75, 0.0]]))
    heights = np.array([0.25, 0.75, 0.0]) / np.sqrt(2 * np.pi * 1e-5 * width)
    np.testing.assert_allclose(found.density([0.0, last, 50.0]), heights, rtol=1e-12)


def test_reference_example_of_lanczos(x64):
    """H = diag(1, 2, 5) from the vector of ones: the numbers of PyHessian's recurrence."""
    from s2sam_jax.analysis._lanczos import _lanczos

    matrix = jnp.diag(jnp.array([1.0, 2.0, 5.0]))
    alphas, betas = _lanczos(lambda v: matrix @ v, jnp.ones(3), 3)
    np.testing.assert_allclose(alphas, [2.6667, 3.5641, 1.7692], atol=1e-4)
    np.testing.assert_allclose(betas[:2], [1.6997, 0.7994], atol=1e-4)


def test_lanczos_ends_where_the_space_is_complete(x64):
    found = analysis.hessian_spectrum(
        lambda w, c: 0.5 * jnp.sum(c * w**2), jnp.zeros(6), jax.random.key(0), [jnp.array([1.0, 1, 1, 4, 4, 4])]
    )
    live = found.weights[0] > 0
    np.testing.assert_allclose(found.nodes[0][live], [1, 4], atol=1e-9)
    np.testing.assert_allclose(found.weights[0][live], [0.5, 0.5], atol=1e-9)


def test_trace(x64):
    estimate, error = analysis.hessian_trace(quadratic, start(), jax.random.key(3), batches(), samples=400)
    assert abs(estimate - EIGENVALUES.sum()) < 4 * error
    assert error < 0.5
    exact = analysis.hessian_trace(lambda w, c: 0.5 * jnp.sum(c * w**2), jnp.zeros(3), jax.random.key(0), [jnp.ones(3)])
    assert exact == (3.0, 0.0)


def test_the_error_of_a_trace_is_of_the_sample_deviation():
    """Of [[0, 1], [1, 0]] every product is 2 or -2, so that the mean tells their squared deviations."""
    samples = 5
    mean, error = analysis.hessian_trace(
        lambda w, _: w[0] * w[1], jnp.zeros(2), jax.random.key(0), [None], samples=samples
    )
    assert 0 < abs(mean) < 2
    assert error == pytest.approx(np.sqrt((4 - mean**2) / (samples - 1)))


def test_network_against_its_dense_hessian(x64):
    params, data, dense = network_case()
    vector = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape)), params)
    product = np.mean(
        [jax.flatten_util.ravel_pytree(analysis.hvp(network, params, vector, b))[0] for b in data], axis=0
    )
    np.testing.assert_allclose(product, dense @ jax.flatten_util.ravel_pytree(vector)[0], atol=1e-12)
    values, _ = analysis.top_eigenvalues(network, params, jax.random.key(0), data, k=3, steps=20)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:3], atol=1e-6)


def test_masked_hessian_is_that_of_the_live_weights(x64):
    params, data, dense = network_case()
    masks = jax.tree.map(lambda p: jnp.asarray(RNG.random(p.shape) < 0.5), params)
    live = np.asarray(jax.flatten_util.ravel_pytree(masks)[0], bool)
    small = dense[np.ix_(live, live)]
    values, _ = analysis.top_eigenvalues(network, params, jax.random.key(0), data, k=2, steps=30, masks=masks)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(small)[::-1][:2], atol=1e-6)
    found = analysis.hessian_spectrum(network, params, jax.random.key(0), data, masks=masks)
    assert found.nodes.shape == (1, live.sum())
    assert found.nodes.min() >= np.linalg.eigvalsh(small)[0] - 1e-9


def test_bounds_take_rounding_in():
    """Once Lanczos has converged nothing but rounding is left, which exact arithmetic would call zero."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 300)))
    spectrum = np.concatenate([[100.0, 50, 20, 10, 5], np.linspace(0, 1, 295)])
    matrix = jnp.asarray((rotation * spectrum) @ rotation.T, jnp.float32)

    def loss_fn(w, matrix):
        return 0.5 * w @ jnp.matmul(matrix, w, precision="highest")

    values, bounds = analysis.top_eigenvalues(loss_fn, jnp.zeros(300), jax.random.key(0), [matrix])
    exact = np.linalg.eigvalsh(np.asarray(matrix, np.float64))[::-1][:5]
    errors = np.abs(values - exact)
    assert errors.max() > 0
    assert (errors <= 3 * bounds).all()
    assert bounds.max() < 1e-4


def test_lanczos_multiplies_in_full_precision():
    """With factors rounded to TF32, the default of recent GPUs, errors were 60 times the bounds. CPUs do not round."""
    text = jax.jit(_lanczos._orthogonal).lower(jnp.zeros((4, 9)), jnp.zeros(9), 0).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 5
    assert all(line.count("HIGHEST") == 2 for line in products)


def test_a_masked_product_with_the_hessian():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(5, 5))
    hessian, vector, live = half + half.T, rng.normal(size=5), np.array([True, False, True, True, False])
    found = analysis.hvp(
        lambda w, batch: 0.5 * w @ batch @ w, jnp.ones(5), jnp.float32(vector), hessian, masks=jnp.asarray(live)
    )
    np.testing.assert_allclose(found, live * (hessian @ (live * vector)), rtol=1e-5, atol=1e-6)


def test_eigenvalues_of_bfloat16_weights_are_those_of_float32():
    curvature = jnp.concatenate([jnp.array([100.0, 5, 4, 3, 2]), jnp.linspace(0, 1, 95)])

    def loss(w, batch):
        return 0.5 * jnp.sum(batch * w.astype(jnp.float32) ** 2)

    values, bounds = analysis.top_eigenvalues(
        loss, jnp.ones(100, jnp.bfloat16), jax.random.key(0), [curvature], steps=60
    )
    np.testing.assert_allclose(values, [100, 5, 4, 3, 2], rtol=1e-4)
    assert (bounds < 1e-2).all()

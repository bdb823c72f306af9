"""Surfaces, curvature and sharpness against closed forms, dense Hessians and worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2sam_jax import analysis
from s2sam_jax.analysis import _lanczos, surface

RNG = np.random.default_rng(0)
EIGENVALUES = np.array([-0.5, 0.0, 0.1, 0.3, 1.0, 2.0, 3.5, 8.0])
ROTATION = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
HESSIAN = ROTATION @ np.diag(EIGENVALUES) @ ROTATION.T


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def split(flat):
    return {"a": flat[:6].reshape(2, 3), "b": flat[6:]}


def quadratic(params, matrix):
    flat = jnp.concatenate([params["a"].ravel(), params["b"]])
    return 0.5 * flat @ matrix @ flat


def batches():
    """Two whose mean is the Hessian."""
    noise = RNG.normal(size=(8, 8))
    noise = noise + noise.T
    return [jnp.asarray(HESSIAN + noise), jnp.asarray(HESSIAN - noise)]


def start():
    return split(jnp.asarray(RNG.normal(size=8)))


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


def test_directions_of_the_worked_example():
    d = jnp.array([[1.0, 1], [2, -2], [1, 2]])
    w = jnp.array([[3.0, 4], [0, 2], [0, 0]])
    expected = [[3.5355, 3.5355], [1.4142, -1.4142], [0, 0]]
    np.testing.assert_allclose(surface.rescaled(d, w, axis=0), expected, atol=1e-4)


def test_directions_have_filters_as_long_as_the_network():
    params = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), "bias": jnp.ones(4)}
    mask = {"conv": jax.random.bernoulli(jax.random.key(1), 0.5, (3, 3, 2, 4)), "bias": jnp.ones(4, bool)}
    sparse = {"conv": params["conv"] * mask["conv"], "bias": params["bias"]}
    first, second = analysis.filter_normalized_directions(sparse, jax.random.key(2), masks=mask)
    for direction in (first, second):
        lengths = jnp.linalg.norm(direction["conv"].reshape(-1, 4), axis=0)
        np.testing.assert_allclose(lengths, jnp.linalg.norm(sparse["conv"].reshape(-1, 4), axis=0), rtol=1e-5)
        assert (direction["conv"][~mask["conv"]] == 0).all()
        assert (direction["bias"] == 0).all()
    assert not np.allclose(first["conv"], second["conv"])
    (alike,) = analysis.filter_normalized_directions([sparse["conv"]] * 2, jax.random.key(2), count=1)
    assert not np.allclose(*alike)
    (dense,) = analysis.filter_normalized_directions(sparse, jax.random.key(2), count=1)
    assert (dense["conv"][~mask["conv"]] != 0).all()


def surface_case():
    scale = jnp.array([1.0, 2.0, 3.0])
    directions = [jnp.array([1.0, 0, 1]), jnp.array([0.0, 1, 0])]
    return jnp.array([0.5, -1, 2]), directions, [scale, 3 * scale]


def test_surface_of_a_quadratic():
    w, directions, data = surface_case()

    def loss_fn(w, scale):
        return jnp.sum(scale * w**2)

    counts = []
    found = analysis.loss_surface(loss_fn, w, directions, data, span=2.0, n=5, progress=counts.append)
    line = np.linspace(-2, 2, 5)
    points = np.asarray(w) + line[:, None, None] * np.array(directions[0]) + line[None, :, None] * directions[1]
    np.testing.assert_allclose(found, (2 * np.asarray(data[0]) * points**2).sum(axis=-1), rtol=1e-6)
    assert counts == [25, 25]
    mesh = jax.make_mesh((8,), ("points",))
    divided = analysis.loss_surface(loss_fn, w, directions, data, span=2.0, n=5, mesh=mesh)
    np.testing.assert_allclose(divided, found, rtol=1e-6)
    line_only = analysis.loss_surface(loss_fn, w, directions[:1], data, span=2.0, n=5)
    np.testing.assert_allclose(line_only, found[:, 2], rtol=1e-6)


def test_roughness_of_a_known_grid():
    assert analysis.roughness([1, 2, 4, 9]) == 2.5
    assert analysis.roughness(np.full((3, 3), 7.0)) == 0.0
    assert np.isnan(analysis.roughness([1.0, np.nan]))


def test_error_barrier():
    def loss_fn(w, height):
        return height * (w**2 - 1) ** 2 + 0.5 * w

    barrier, losses = analysis.error_barrier(loss_fn, jnp.array(-1.0), jnp.array(1.0), [0.5, 1.5], n=5)
    np.testing.assert_allclose(losses, [-0.5, 0.5625 - 0.25, 1.0, 0.5625 + 0.25, 0.5], rtol=1e-6)
    assert barrier == pytest.approx(1.0)
    assert analysis.error_barrier(lambda w, b: w**2, jnp.array(-1.0), jnp.array(2.0), [None])[0] == 0.0


def test_ratio_of_the_toy_problem():
    """L = |w|^2 / 2 scaled: SAM's gradient differs by rho H g / |g|."""
    grads, sam = jnp.array([1.0, -2.0, 4.0]), jnp.array([1.1, -2.0, 8.0])
    ratios = analysis.gradient_difference_ratio(grads, sam, masks=jnp.array([True, True, True]))
    np.testing.assert_allclose(ratios, [np.log(0.1), -np.inf, 0.0], rtol=1e-5)
    masked = analysis.gradient_difference_ratio(grads, sam, masks=jnp.array([True, False, True]))
    assert np.isnan(masked).tolist() == [False, True, False]


def test_sharpness():
    scale = jnp.array([1.0, 10.0])

    def loss_fn(w, c):
        return 0.5 * jnp.sum(c * w**2)

    w, rho = np.array([1.0, 0.01]), 0.1
    g = np.array([1.0, 0.1])
    point = w + rho * g / np.linalg.norm(g)
    expected = 0.5 * (np.array(scale) * (point**2 - w**2)).sum()
    one = analysis.sam_sharpness(loss_fn, jnp.asarray(w), [scale], rho=rho)
    assert one == pytest.approx(expected, rel=1e-5)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    circle = w + rho * np.stack([np.cos(angles), np.sin(angles)], -1)
    best = (0.5 * np.array(scale) * circle**2).sum(-1).max() - 0.5 * (np.array(scale) * w**2).sum()
    many = analysis.sam_sharpness(loss_fn, jnp.asarray(w), [scale], rho=rho, steps=100)
    assert one < many <= best * (1 + 1e-5)
    assert many == pytest.approx(best, rel=1e-3)
    live = analysis.sam_sharpness(loss_fn, jnp.asarray(w), [scale], rho=rho, masks=jnp.array([True, False]))
    assert live == pytest.approx(0.5 * (1.1**2 - 1), rel=1e-5)


@pytest.mark.parametrize(("peak", "highest"), [(0.95, 1.0), (0.7, 2 / 3)])
def test_sharpness_is_that_of_the_highest_point_on_the_way(peak, highest):
    """From 0 to the radius, beyond the peak, and a third of it back."""
    rise = analysis.sam_sharpness(lambda w, _: -((w - peak) ** 2), jnp.zeros(()), [None], rho=1.0, steps=2)
    assert rise == pytest.approx(peak**2 - (highest - peak) ** 2, rel=1e-5)


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


def narrow(size):
    """Weights in bfloat16, and what they are in float64."""
    weights = jnp.asarray(RNG.normal(size=size) * 0.05, jnp.bfloat16)
    return weights, np.asarray(weights, np.float64)


def as_f32(loss_fn):
    return lambda w, batch: loss_fn(w.astype(jnp.float32), batch)


@pytest.mark.parametrize("rho", [0.001, 0.005])
def test_sharpness_of_bfloat16_weights(rho):
    """L = c w^2 / 2 at w + rho g / |g|, g = c w, by hand."""
    weights, exact = narrow(2000)
    curvature = RNG.random(2000)
    g = curvature * exact
    rise = rho * np.linalg.norm(g) + 0.5 * rho**2 * np.sum(curvature * g**2) / np.sum(g**2)
    loss_fn = as_f32(lambda w, c: 0.5 * jnp.sum(c * w**2))
    found = analysis.sam_sharpness(loss_fn, weights, [jnp.float32(curvature)], rho=rho)
    assert found == pytest.approx(rise, rel=1e-2)


def test_a_small_rise_over_many_batches():
    losses = jnp.asarray(RNG.normal(size=3000) + 3, jnp.float32)
    found = analysis.sam_sharpness(lambda w, loss: loss + jnp.sum(w), jnp.zeros(4), losses, rho=1e-4)
    assert found == pytest.approx(2e-4, rel=1e-3)


def test_surface_and_directions_of_bfloat16_weights():
    weights, exact = narrow((50, 4))
    (direction,) = analysis.filter_normalized_directions(weights, jax.random.key(0), count=1)
    lengths = np.linalg.norm(np.asarray(direction, np.float64), axis=0)
    np.testing.assert_allclose(lengths, np.linalg.norm(exact, axis=0), rtol=1e-5)
    along = jnp.ones_like(weights)  # in bfloat16 as well
    found = analysis.loss_surface(as_f32(lambda w, _: jnp.sum(w)), weights, [along], [None], span=1e-4, n=5)
    np.testing.assert_allclose(found, exact.sum() + 200 * np.linspace(-1e-4, 1e-4, 5), atol=1e-5)


def test_barrier_in_bfloat16_and_between_ends_of_unlike_size():
    (first, a), (second, b) = narrow(50), narrow(50)
    _, losses = analysis.error_barrier(as_f32(lambda w, _: jnp.sum(w)), first, second, [None], n=11)
    np.testing.assert_allclose(losses, [((1 - s) * a + s * b).sum() for s in np.linspace(0, 1, 11)], atol=1e-5)
    _, losses = analysis.error_barrier(lambda w, _: w, jnp.array(1e8), jnp.array(1.0), [None])
    assert (losses[0], losses[-1]) == (1e8, 1.0)  # a + (b - a) would be 0


@pytest.mark.parametrize(
    ("loss_fn", "weights", "what"),
    [
        (lambda w, b: -jnp.sum(jnp.log(w)), [0.01, 1.0], "the loss is nan"),  # beyond the radius
        (lambda w, b: jnp.linalg.norm(w), [0.0, 0.0], "the gradient's norm is nan"),
        (lambda w, b: jnp.sum(jnp.abs(w)) * 1e30, [1.0, 1.0], "the gradient's norm is inf"),
    ],
    ids=["loss", "gradient", "overflow"],
)
def test_sharpness_is_no_zero_where_something_is_not_finite(loss_fn, weights, what):
    with pytest.raises(FloatingPointError, match=what):
        analysis.sam_sharpness(loss_fn, jnp.array(weights), [None])


LOOKS = {
    "sharpness": analysis.sam_sharpness,
    "surface": lambda loss_fn, w, data: analysis.loss_surface(loss_fn, w, [w], data, n=3),
    "barrier": lambda loss_fn, w, data: analysis.error_barrier(loss_fn, w, -w, data, n=3)[1],
    "spectrum": lambda loss_fn, w, data: analysis.hessian_spectrum(loss_fn, w, jax.random.key(0), data).nodes,
    "eigenvalues": lambda loss_fn, w, data: analysis.top_eigenvalues(loss_fn, w, jax.random.key(0), data)[0],
    "trace": lambda loss_fn, w, data: analysis.hessian_trace(loss_fn, w, jax.random.key(0), data, samples=2)[0],
}


@pytest.mark.parametrize("look", ["spectrum", "eigenvalues", "trace"])
def test_a_hessian_that_is_not_finite_is_an_error(look):
    with pytest.raises(FloatingPointError, match="product with the Hessian is not finite"):
        LOOKS[look](lambda w, batch: jnp.sum(jnp.abs(w) ** 1.5), jnp.zeros(2), [None])


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_batches_may_be_a_stacked_array_or_a_generator(look):
    data, weights = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([1.0, -2.0])

    def loss_fn(w, batch):
        return jnp.sum(batch * w**2)

    expected = look(loss_fn, weights, [data[0], data[1]])
    np.testing.assert_allclose(look(loss_fn, weights, data), expected)
    np.testing.assert_allclose(look(loss_fn, weights, (row for row in data)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.loss_surface(quadratic, start(), [], batches()), "needs directions"),
        (lambda: analysis.loss_surface(quadratic, start(), [{"a": jnp.ones(6)}], batches()), r"directions\[0\]"),
        (lambda: analysis.error_barrier(quadratic, start(), {}, batches()), "second"),
        (lambda: analysis.error_barrier(quadratic, start(), start(), batches(), n=1), "n >= 2"),
        (lambda: analysis.hessian_spectrum(quadratic, start(), jax.random.key(0), []), "needs batches"),
        (lambda: analysis.hessian_spectrum(quadratic, start(), jax.random.key(0), batches(), steps=0), "steps >= 1"),
        (lambda: analysis.top_eigenvalues(quadratic, start(), jax.random.key(0), batches(), k=9, steps=3), "k=9"),
        (lambda: analysis.hessian_trace(quadratic, start(), jax.random.key(0), batches(), samples=1), "samples >= 2"),
        (lambda: analysis.sam_sharpness(quadratic, start(), batches(), steps=0), "steps >= 1"),
        (lambda: analysis.filter_normalized_directions(start(), jax.random.key(0), masks={}), "masks"),
        (lambda: analysis.gradient_difference_ratio(start(), {}), "sam_grads"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

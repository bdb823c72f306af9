"""SAM's sharpness and error barriers against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from s2sam_jax import analysis

RNG = np.random.default_rng(0)


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

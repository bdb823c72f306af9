"""Analyses of sparse networks: curvature of the live weights alone, and directions where there is little to move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2sam_jax import analysis

CURVATURE, LIVE = jnp.array([1.0, 2.0, 5.0, 7.0]), jnp.array([True, False, True, False])


def bowl(sign):
    """With a product of a live and a pruned weight, which is no part of the Hessian of the live ones."""
    return lambda w, c: sign * 0.5 * jnp.sum(c * w**2) + 3 * w[0] * w[1]


def test_trace_is_that_of_the_live_weights():
    found = analysis.hessian_trace(bowl(1), jnp.ones(4), jax.random.key(0), [CURVATURE], samples=3, masks=LIVE)
    assert found == (6.0, 0.0)


def test_pruned_weights_add_no_curvature_of_zero():
    """Where all of it is negative, zero would be the largest."""
    options = {"steps": 4, "masks": LIVE}
    values, _ = analysis.top_eigenvalues(bowl(-1), jnp.ones(4), jax.random.key(0), [CURVATURE], k=4, **options)
    np.testing.assert_allclose(values, [-1, -5], rtol=1e-5)
    spectrum = analysis.hessian_spectrum(bowl(-1), jnp.ones(4), jax.random.key(0), [CURVATURE], **options)
    np.testing.assert_allclose(spectrum.nodes, [[-5, -1]], rtol=1e-5)
    np.testing.assert_allclose(spectrum.weights, [[0.5, 0.5]], rtol=1e-5)


def test_a_product_is_of_the_live_part_of_a_vector():
    vector = jnp.array([1.0, 1.0, 1.0, 1.0])
    found = analysis.hvp(bowl(1), jnp.ones(4), vector, CURVATURE, masks=LIVE)
    np.testing.assert_allclose(found, [1, 0, 5, 0])


@pytest.mark.parametrize("axis", [0, -1])
def test_directions_of_scalars_vectors_and_dead_filters_are_zero(axis):
    """The others are as long as the filters, whichever axis counts these."""
    rng = np.random.default_rng(0)
    kernel, mask = rng.normal(size=(4, 3, 4)), rng.random((4, 3, 4)) < 0.6
    np.moveaxis(mask, axis, 0)[2] = False
    params = {"scalar": jnp.float32(2), "vector": jnp.ones(3), "kernel": jnp.float32(kernel * mask)}
    masks = {"scalar": jnp.array(True), "vector": jnp.ones(3, bool), "kernel": jnp.asarray(mask)}
    (found,) = analysis.filter_normalized_directions(params, jax.random.key(0), count=1, masks=masks, axis=axis)
    assert found["scalar"] == 0
    np.testing.assert_array_equal(found["vector"], np.zeros(3))
    got, own = (np.moveaxis(np.float64(x), axis, 0).reshape(4, -1) for x in (found["kernel"], params["kernel"]))
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(own, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(got[own == 0], 0)
    assert np.all(got[own != 0])

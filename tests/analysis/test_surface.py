"""Loss surfaces, their directions and roughness, against closed forms and worked examples."""

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax import analysis
from s2sam_jax.analysis import surface

RNG = np.random.default_rng(0)


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


def narrow(size):
    """Weights in bfloat16, and what they are in float64."""
    weights = jnp.asarray(RNG.normal(size=size) * 0.05, jnp.bfloat16)
    return weights, np.asarray(weights, np.float64)


def as_f32(loss_fn):
    return lambda w, batch: loss_fn(w.astype(jnp.float32), batch)


def test_surface_and_directions_of_bfloat16_weights():
    weights, exact = narrow((50, 4))
    (direction,) = analysis.filter_normalized_directions(weights, jax.random.key(0), count=1)
    lengths = np.linalg.norm(np.asarray(direction, np.float64), axis=0)
    np.testing.assert_allclose(lengths, np.linalg.norm(exact, axis=0), rtol=1e-5)
    along = jnp.ones_like(weights)  # in bfloat16 as well
    found = analysis.loss_surface(as_f32(lambda w, _: jnp.sum(w)), weights, [along], [None], span=1e-4, n=5)
    np.testing.assert_allclose(found, exact.sum() + 200 * np.linspace(-1e-4, 1e-4, 5), atol=1e-5)


def test_directions_along_another_axis():
    """Each filter has the length of the weights' filter, which may lie along the first axis."""
    weights = jax.random.normal(jax.random.key(0), (4, 3))
    for axis, others in ((0, 1), (-1, 0)):
        (direction,) = analysis.filter_normalized_directions(weights, jax.random.key(1), count=1, axis=axis)
        lengths = [np.linalg.norm(np.asarray(x), axis=others) for x in (direction, weights)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)

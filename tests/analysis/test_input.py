"""What the analyses take: batches in any form, and losses that change; bad input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadratic import batches, quadratic, start

from s2sam_jax import analysis

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


ANALYSES = {
    "hessian": lambda loss, w, batches: analysis.hessian_trace(loss, w, jax.random.key(0), batches, samples=2)[0],
    "sharpness": lambda loss, w, batches: analysis.sam_sharpness(loss, w, batches, rho=0.1),
    "surface": lambda loss, w, batches: analysis.loss_surface(loss, w, [w], batches, n=3).max(),
}


@pytest.mark.parametrize("look", ANALYSES.values(), ids=ANALYSES.keys())
def test_a_loss_that_closes_over_other_values_is_another_loss(look):
    """As one in evaluation mode does over BatchNorm statistics. A call is one program for all its batches."""
    stats, traces = {"scale": 1.0}, []

    def loss(w, batch):
        traces.append(1)
        return stats["scale"] * jnp.sum(batch * w**2)

    batches = [jnp.ones(3)] * 4
    first, traced = look(loss, jnp.ones(3), batches), len(traces)
    stats["scale"] = 10.0
    np.testing.assert_allclose(look(loss, jnp.ones(3), batches), 10 * first, rtol=1e-5)
    assert len(traces) == 2 * traced < 8


def test_analyses_say_what_is_wrong_with_their_input():
    key, one = jax.random.key(0), [jnp.ones(3)]
    with pytest.raises(FloatingPointError, match="product with the Hessian is not finite"):
        analysis.top_eigenvalues(lambda w, b: jnp.sum(jnp.sqrt(w - b)), jnp.ones(3), key, one, k=1)
    with pytest.raises(ValueError, match="needs weights that are live"):
        analysis.hessian_spectrum(lambda w, b: jnp.sum(w**2), jnp.ones(3), key, one, masks=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="rho must be"):
        analysis.sam_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(3), one, rho=-0.1)
    exact = analysis.sam_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(3), one, rho=0.5)
    assert analysis.sam_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(3), one, rho=jnp.float32(0.5)) == exact

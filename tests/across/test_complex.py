"""Complex parameters: trained as their parts, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import TrainState, analysis, gsam, looksam, s2sam, sharpness_metrics


@pytest.mark.parametrize("make", [gsam, lambda rho: looksam(rho, every=2)], ids=["gsam", "looksam"])
def test_complex_parameters_train_as_their_parts(make):
    matrix = jax.random.normal(jax.random.key(0), (4, 4))

    def loss(parts):
        return jnp.sum(jnp.square(matrix @ parts)) + jnp.sum(parts[0] ** 3)

    def joined(z):
        return jnp.stack([z.real[0], z.imag[0], z.real[1], z.imag[1]])

    parts, whole, tx = (
        jnp.array([1.0, -0.5, 0.3, 2.0]),
        jnp.array([1 - 0.5j, 0.3 + 2j]),
        optax.chain(make(rho=0.1), optax.sgd(0.01)),
    )
    of_parts, of_whole = tx.init(parts), tx.init(whole)
    real, conjugated = jax.grad(loss), lambda z: jnp.conj(jax.grad(lambda z: loss(joined(z)))(z))
    for _ in range(3):
        updates, of_parts = tx.update(real(parts), of_parts, parts, grad_fn=real)
        parts = optax.apply_updates(parts, updates)
        updates, of_whole = tx.update(conjugated(whole), of_whole, whole, grad_fn=conjugated)
        whole = optax.apply_updates(whole, updates)
        np.testing.assert_allclose(joined(whole), parts, rtol=1e-5, atol=1e-6)


def test_analyses_refuse_complex_parameters():
    def loss(w, batch):
        return jnp.sum(jnp.abs(w) ** 2)

    z = jnp.array([3 + 4j])
    state = s2sam().init(z)
    for look in (
        lambda: analysis.sam_sharpness(loss, z, [None]),
        lambda: analysis.top_eigenvalues(loss, z, jax.random.key(0), [None], k=1),
        lambda: sharpness_metrics(z, state, compute_dtype="bfloat16"),
    ):
        with pytest.raises(TypeError, match="these parameters are complex"):
            look()


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"these parameters are complex: \['a/b'\]"):
        TrainState.create({"a": {"b": jnp.ones(2, jnp.complex64)}}, optax.sgd(0.1))

"""A quadratic loss whose Hessian has known eigenvalues."""

import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
EIGENVALUES = np.array([-0.5, 0.0, 0.1, 0.3, 1.0, 2.0, 3.5, 8.0])
ROTATION = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
HESSIAN = ROTATION @ np.diag(EIGENVALUES) @ ROTATION.T


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

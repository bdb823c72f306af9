"""Lanczos with full re-orthogonalisation, for any product with a symmetric matrix.

Accelerators multiply float32 in fewer bits unless told otherwise, which would leave vectors far from orthogonal.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Product = Callable[[jax.Array], jax.Array]
exact = functools.partial(jnp.matmul, precision="highest")


def ritz(product: Product, start: jax.Array, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ritz values, ascending, eigenvectors of the tridiagonal matrix as columns, and its next off-diagonal entry."""
    alphas, betas = _lanczos(product, start, steps)
    tridiagonal = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    values, vectors = np.linalg.eigh(tridiagonal)
    return values, vectors, betas[-1]


def _lanczos(product: Product, start: jax.Array, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal; ends early where the Krylov space is complete."""
    basis = jnp.zeros((steps, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    tiny = 10 * float(jnp.finfo(start.dtype).eps)
    alphas: list[float] = []
    betas: list[float] = []
    for index in range(steps):
        image = product(basis[index])
        alpha, beta, rest = _orthogonal(basis, image, index)
        alphas.append(float(alpha))
        betas.append(float(beta))
        if betas[-1] <= tiny * max(map(abs, alphas + betas)):
            break
        if index + 1 < steps:
            basis = _with_row(basis, rest / beta, index + 1)
    return alphas, betas


@functools.partial(jax.jit, donate_argnames="basis")
def _with_row(basis: jax.Array, row: jax.Array, index: int) -> jax.Array:
    return basis.at[index].set(row)


@jax.jit
def _orthogonal(basis: jax.Array, image: jax.Array, index: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The image's part along the last vector, and the length and direction of what is orthogonal to all."""
    alpha = exact(basis[index], image)
    rest = image
    for _ in range(2):  # once leaves rounding errors behind
        rest = rest - exact(basis.T, exact(basis, rest))
    return alpha, jnp.linalg.norm(rest), rest

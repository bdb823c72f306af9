"""Curvature without the Hessian: products with vectors, spectrum, largest eigenvalues, trace.

XLA on CPU is slow at gradients of convolutions inside loops, so the loops here are Python's, around one compiled
program.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from s2sam_jax._base.tree import at_least_f32, check_real, check_same_leaves, masked
from s2sam_jax._base.types import BatchLoss, Masks, Params, Progress
from s2sam_jax.analysis._batches import listed
from s2sam_jax.analysis._lanczos import Product, exact, ritz


def hvp(loss_fn: BatchLoss, params: Params, vector: Params, batch: Any, *, masks: Masks | None = None) -> Params:
    r"""The Hessian of the loss times a vector, by forward- over reverse-mode differentiation.

    .. math:: H v = \frac{\partial}{\partial t} \nabla L(w + t v) \Big|_{t=0}

    Args:
      loss_fn: ``(params, batch) -> loss[]``.
      params: the point.
      vector: tree like ``params``.
      batch: the data.
      masks: if given, the Hessian of the live weights only: :math:`M H M v`.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax.analysis import hvp
      >>> print(hvp(lambda w, batch: jnp.sum(batch * w**3) / 6, jnp.array([1.0, 2.0]), jnp.ones(2), jnp.ones(2)))
      [1. 2.]
    """
    if masks is not None:
        vector = masked(masks, vector)
    product = jax.jvp(jax.grad(lambda w: loss_fn(w, batch)), (params,), (vector,))[1]
    return product if masks is None else masked(masks, product)


class Spectrum(NamedTuple):
    """A spectrum estimated by stochastic Lanczos quadrature: nodes with weights, for each random start.

    Attributes:
      nodes: float64[runs, steps], Ritz values, ascending; steps that were not needed have weight 0.
      weights: float64[runs, steps], which sum to 1 in each run.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def density(self, grid: Any, sigma: float | None = None) -> np.ndarray:
        """The density, smoothed by a Gaussian, at each ``x`` of the grid.

        It is the mean over runs of ``sum_i weights_i N(x; nodes_i, sigma**2)``, by default with
        ``sigma**2 = 1e-5 max(1, largest - smallest node)``.
        """
        live = self.nodes[self.weights > 0]
        if sigma is None:
            sigma = float(np.sqrt(1e-5 * max(1.0, live.max() - live.min())))
        distance = (np.asarray(grid, np.float64)[:, None, None] - self.nodes) / sigma
        bells = np.exp(-0.5 * distance**2) / (sigma * np.sqrt(2 * np.pi))
        return (bells * self.weights).sum(axis=-1).mean(axis=-1)


def hessian_spectrum(
    loss_fn: BatchLoss,
    params: Params,
    key: jax.Array,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    runs: int = 1,
    masks: Masks | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \phi(\lambda) \approx \frac{1}{R} \sum_r \sum_i \tau_{r,i}^2\, \delta(\lambda - \theta_{r,i})

    with Ritz values :math:`\theta` and the first components :math:`\tau` of the tridiagonal matrix's eigenvectors.
    Every new vector is orthogonalised against all before it, twice, which takes memory for ``steps`` copies of the
    parameters.

    Args:
      loss_fn: ``(params, batch) -> loss[]``, in evaluation mode.
      params: the solution.
      key: PRNG key for the Rademacher starts.
      batches: the data, in batches of equal size; the loss is their mean.
      steps: Lanczos steps, each a product over all batches; at most as many as there are weights are used.
      runs: random starts.
      masks: if given, the spectrum of the live weights only. Without them pruned weights count as well: the loss is
        curved in those directions too, though training never takes them.
      progress: called with 1 after every product.

    Returns:
      A :class:`Spectrum`.

    Raises:
      ValueError: for masks that do not fit, no batches, or fewer than one step or run.
      FloatingPointError: if a product with the Hessian is not finite.

    Reference:
      Ghorbani et al., "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", ICML 2019.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax.analysis import hessian_spectrum
      >>> loss_fn = lambda w, curvature: 0.5 * jnp.sum(curvature * w**2)
      >>> found = hessian_spectrum(loss_fn, jnp.zeros(3), jax.random.key(0), [jnp.array([1.0, 2.0, 5.0])])
      >>> print(found.nodes.round(4), found.weights.round(4))
      [[1. 2. 5.]] [[0.3333 0.3333 0.3333]]
    """
    if steps < 1 or runs < 1:
        raise ValueError(f"hessian_spectrum needs steps >= 1 and runs >= 1; got {steps} and {runs}.")
    product, size, live = _product(loss_fn, params, batches, masks, progress)
    steps = min(steps, size)
    nodes, weights = np.zeros((runs, steps)), np.zeros((runs, steps))
    for run, run_key in enumerate(jax.random.split(key, runs)):
        theta, vectors, _ = ritz(product, jax.random.rademacher(run_key, live.shape, live.dtype) * live, steps)
        nodes[run, : len(theta)], weights[run, : len(theta)] = theta, vectors[0] ** 2
        nodes[run, len(theta) :] = theta[-1]
    return Spectrum(nodes, weights)


def top_eigenvalues(
    loss_fn: BatchLoss,
    params: Params,
    key: jax.Array,
    batches: Iterable[Any],
    *,
    k: int = 5,
    steps: int = 60,
    masks: Masks | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""The ``k`` largest eigenvalues of the Hessian, by Lanczos with full re-orthogonalisation.

    .. math:: |\lambda - \theta_i| \le \beta_m |s_{m,i}| + \varepsilon \max_j |\theta_j|

    bounds how far a Ritz value may be from an eigenvalue. The first term is a bound in exact arithmetic; the second,
    with the machine epsilon, is the scale of rounding errors, which may be a few times as large. A multiple eigenvalue
    is found once.

    Args:
      loss_fn: ``(params, batch) -> loss[]``, in evaluation mode.
      params: the solution.
      key: PRNG key for the start.
      batches: as in :func:`hessian_spectrum`.
      k: how many; fewer are returned if Lanczos ends early (for lack of distinct eigenvalues, or of weights).
      steps: Lanczos steps, at least ``k``; several times ``k`` for good bounds.
      masks: if given, the eigenvalues for the live weights only.
      progress: called with 1 after every product.

    Returns:
      Eigenvalues, descending, and their bounds, both float64[k]. SSAM's sharpness measure λ1/λ5 is
      ``values[0] / values[4]``.

    Raises:
      ValueError: for masks that do not fit, no batches, or ``steps`` below ``k``.
      FloatingPointError: if a product with the Hessian is not finite.

    Reference:
      Parlett, "The Symmetric Eigenvalue Problem", §13.2, for the bound.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax.analysis import top_eigenvalues
      >>> loss_fn = lambda w, curvature: 0.5 * jnp.sum(curvature * w**2)
      >>> values, _ = top_eigenvalues(loss_fn, jnp.zeros(3), jax.random.key(0), [jnp.array([1.0, 2.0, 5.0])], k=2)
      >>> print(values.round(4))
      [5. 2.]
    """
    if steps < k or k < 1:
        raise ValueError(f"top_eigenvalues needs 1 <= k <= steps; got k={k} and steps={steps}.")
    product, size, live = _product(loss_fn, params, batches, masks, progress)
    start = jax.random.normal(key, live.shape, live.dtype) * live
    theta, vectors, beta = ritz(product, start, min(steps, size))
    rounding = float(jnp.finfo(live.dtype).eps) * np.abs(theta).max()
    return theta[::-1][:k], np.abs(beta * vectors[-1])[::-1][:k] + rounding


def hessian_trace(
    loss_fn: BatchLoss,
    params: Params,
    key: jax.Array,
    batches: Iterable[Any],
    *,
    samples: int = 100,
    masks: Masks | None = None,
    progress: Progress | None = None,
) -> tuple[float, float]:
    r"""The trace of the Hessian, by Hutchinson's estimator.

    .. math:: \mathrm{tr}\, H \approx \frac{1}{n} \sum_j v_j^\top H v_j, \qquad v_j \in \{-1, 1\}^d

    Args:
      loss_fn: ``(params, batch) -> loss[]``, in evaluation mode.
      params: the solution.
      key: PRNG key.
      batches: as in :func:`hessian_spectrum`.
      samples: number of random vectors, with one product each; at least 2.
      masks: if given, the trace over the live weights only.
      progress: called with 1 after every product.

    Returns:
      The estimate and its standard error.

    Raises:
      ValueError: for masks that do not fit, no batches, or fewer than two samples.
      FloatingPointError: if a product with the Hessian is not finite.

    Reference:
      Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax.analysis import hessian_trace
      >>> loss_fn = lambda w, curvature: 0.5 * jnp.sum(curvature * w**2)
      >>> hessian_trace(loss_fn, jnp.zeros(3), jax.random.key(0), [jnp.array([1.0, 2.0, 5.0])], samples=2)
      (8.0, 0.0)
    """
    if samples < 2:
        raise ValueError(f"hessian_trace needs samples >= 2; got {samples}.")
    product, _, live = _product(loss_fn, params, batches, masks, progress)
    starts = (jax.random.rademacher(k, live.shape, live.dtype) * live for k in jax.random.split(key, samples))
    found = np.array([float(exact(v, product(v))) for v in starts])
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(samples))


def _product(
    loss_fn: BatchLoss, params: Params, batches: Iterable[Any], masks: Masks | None, progress: Progress | None
) -> tuple[Product, int, jax.Array]:
    """A function for products of flat vectors with the Hessian, the number of live weights, and ones at these."""
    batches = listed(batches, "The Hessian of a mean loss")
    if not batches:
        raise ValueError("The Hessian of a loss needs batches; got none.")
    check_real(params, "The Hessian")
    params = jax.tree.map(at_least_f32, params)  # in bfloat16 Lanczos would soon see nothing new beside an outlier
    flat, _ = ravel_pytree(params)
    if masks is None:
        live = jnp.ones_like(flat)
    else:
        check_same_leaves(masks, params, "masks", "params")
        live = ravel_pytree(masks)[0].astype(flat.dtype)
    if not live.any():
        raise ValueError("The Hessian needs weights that are live: these masks, or params, leave none.")

    @jax.jit
    def flat_hvp(params, live, vector, batch):
        return live * ravel_pytree(hvp(loss_fn, params, ravel_pytree(params)[1](live * vector), batch))[0]

    def product(vector):
        total = functools.reduce(jnp.add, (flat_hvp(params, live, vector, batch) for batch in batches))
        if not jnp.isfinite(total).all():
            raise FloatingPointError("A product with the Hessian is not finite: the loss, or one of its derivatives.")
        if progress is not None:
            progress(1)
        return total / len(batches)

    return product, int(live.sum()), live

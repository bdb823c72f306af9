"""A smooth non-convex problem whose constants are known, and a bound on the gradients that optimizers meet on it."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import perturb, s2sam, sam, ssam

OPTIMIZERS = ("sgd", "sam", "ssam, fixed mask", "ssam, refreshed masks", "s2sam")
ROWS, DIMENSION, BATCH = 200, 4, 1
RATE = 0.25  # The first learning rate: as large as the bound allows.
# Of the loss of any batch: |x| = 1, and 1 - exp(-z^2 / 2) has slopes up to exp(-1/2) and curvatures in [-0.45, 1].
SMOOTHNESS, LARGEST_GRADIENT, VARIANCE = 1.0, math.exp(-0.5), math.exp(-1) / BATCH


class Problem(NamedTuple):
    """Rows of length 1, and targets."""

    x: jax.Array
    y: jax.Array


def problem(seed: int) -> Problem:
    """A regression with noise of standard deviation 0.7 on the targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, DIMENSION))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = 2 * x @ rng.normal(size=DIMENSION) + 0.7 * rng.normal(size=ROWS)
    return Problem(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


def loss(w: jax.Array, rows: Problem) -> jax.Array:
    """Welsch's robust loss, which saturates at 1: not convex where many rows are far off."""
    return jnp.mean(1 - jnp.exp(-((rows.x @ w - rows.y) ** 2) / 2))


def optimizer(name: str, rho: jax.typing.ArrayLike, steps: int, key: jax.Array) -> optax.GradientTransformation:
    """SGD on what the optimizer makes of the gradient, with the schedules of the Sparse SAM paper."""

    def radius(step):
        return rho / jnp.sqrt(step + 1.0)

    sharpness = {
        "sgd": optax.identity,
        "sam": partial(sam, radius),
        "ssam, fixed mask": partial(ssam, radius, update_every=steps, total_steps=steps, drop_fraction=0.0, seed=key),
        "ssam, refreshed masks": partial(ssam, radius, update_every=10, total_steps=steps, seed=key),
        "s2sam": partial(s2sam, radius),
    }
    return optax.chain(sharpness[name](), optax.sgd(lambda step: RATE / jnp.sqrt(step + 1.0)))


@partial(jax.jit, static_argnames=("name", "steps"))
def squared_gradients(
    rows: Problem, key: jax.Array, rho: jax.typing.ArrayLike, *, name: str, steps: int
) -> tuple[jax.Array, jax.Array]:
    """The squared norm of the gradient of the whole loss at each of ``w_1 .. w_steps``, and the last weights."""
    keys = jax.random.split(key, steps)
    tx = optax.with_extra_args_support(optimizer(name, rho, steps, key))

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        w, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, len(rows.y))

        def grad_fn(w: jax.Array) -> jax.Array:
            return jax.grad(loss)(w, Problem(rows.x[chosen], rows.y[chosen]))

        grads = grad_fn(perturb(w, state) if name == "s2sam" else w)
        updates, state = tx.update(grads, state, w, grad_fn=grad_fn)
        return (optax.apply_updates(w, updates), state), jnp.sum(jax.grad(loss)(w, rows) ** 2)

    start = jnp.zeros(rows.x.shape[1])
    (w, _), squares = jax.lax.scan(step, (start, tx.init(start)), keys)
    return squares, w


def gradient_bound(steps: np.ndarray, first_loss: float, rho: float) -> np.ndarray:
    """**Gradients.** Steps η_t = η₀/√t, radii ρ_t = ρ₀/√t, L η₀ ≤ 1/4, and f ≥ 0. If f is L-smooth and batch gradients
    are unbiased with variance at most σ², then S2-SAM, and if the loss of each batch is L-smooth as well, SAM and SSAM
    with any masks, satisfy

        (1/T) Σ E|∇f(w_t)|² ≤ (1/√T) [ 2 f(w₁)/η₀ + 2 L σ² η₀ (1 + ln T) + 2 ζ(3/2) L² ρ₀² (1 + L η₀) ].

    *Derivation (ours).* Let h_t be the gradient that steps are taken along: w_{t+1} = w_t − η_t h_t.

    1. h_t = ∇f(w_t) + ξ_t + δ_t with E[ξ_t | past] = 0, E|ξ_t|² ≤ σ² and |δ_t| ≤ L ρ_t. SAM and SSAM perturb by the
       gradient of the batch itself, which is not independent of it: take ξ_t as its noise at w_t, and δ_t as how much
       its gradient changes over a distance of at most ρ_t. S2-SAM's ε_t is known before its batch is drawn: take ξ_t as
       the noise at w_t + ε_t, and δ_t = ∇f(w_t + ε_t) − ∇f(w_t).
    2. −⟨∇f, E h_t⟩ ≤ −|∇f|² + |∇f| L ρ_t ≤ −¾|∇f|² + L² ρ_t², and E|h_t|² ≤ 2(|∇f|² + σ²) + 2 L² ρ_t².
    3. Smoothness, E f(w_{t+1}) ≤ f(w_t) − η_t ⟨∇f, E h_t⟩ + ½ L η_t² E|h_t|², with L η_t ≤ 1/4 leaves
       ½ η_t |∇f(w_t)|² ≤ f(w_t) − E f(w_{t+1}) + L σ² η_t² + L² η_t ρ_t² (1 + L η_t).
    4. Sum over t; η_t ≥ η₀/√T on the left; Σ 1/t ≤ 1 + ln T and Σ t^(−3/2) ≤ ζ(3/2) = 2.612… on the right.

    Only the length of ε_t enters. So the stale direction of S2-SAM adds no term, and asks less of the batches; and so
    the bound tells nothing of what a direction is good for.
    """
    terms = 2 * first_loss / RATE + 2 * SMOOTHNESS * VARIANCE * RATE * (1 + np.log(steps))
    perturbation = 2 * 2.612376 * (SMOOTHNESS * rho) ** 2 * (1 + SMOOTHNESS * RATE)
    return (terms + perturbation) / np.sqrt(steps)


def paper_bound(steps: np.ndarray, first_loss: float, rho: float) -> np.ndarray:
    """**The theorem of the Sparse SAM paper** (Theorem 1, as far as the copy at hand can be read) has C₁/√T + C₂ ln
    T/√T with C₁ = (2/η₀)(f(w₁) − E f(w_T)) and C₂ = 2(L σ² η₀ + L G ρ₀), for |∇f| ≤ G and ρ₀ ≤ G η₀. The terms in f
    and σ² are ours too. The one in ρ₀ bounds ⟨∇f, δ_t⟩ by G L ρ_t where step 2 above splits the product, which needs
    no G and takes the logarithm off ρ₀. Theorem 2, for SSAM with ρ₀ ≤ G η₀/2, adds to C₁ a term in η₀ L² ρ₀² (1 + L
    η₀) that cannot be read in full and is left out. Compared is C₁ + C₂ (1 + ln T), as Σ 1/t is 1 and not 0 at T = 1,
    with 0 for f(w_T).
    """
    second = 2 * SMOOTHNESS * (VARIANCE * RATE + LARGEST_GRADIENT * rho)
    return (2 * first_loss / RATE + second * (1 + np.log(steps))) / np.sqrt(steps)


@jax.jit
def lowest_curvature(w: jax.Array, rows: Problem) -> jax.Array:
    """The least eigenvalue of the Hessian: negative where the loss is not convex."""
    return jnp.linalg.eigvalsh(jax.hessian(loss)(w, rows))[0]

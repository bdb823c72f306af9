"""A bound on the risk of S2-SAM for convex losses, by uniform stability, and logistic regression to hold it against."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import perturb, s2sam

DIMENSION, TEST, PASSES = 20, 20_000, 5
RATE = 1.0  # The first learning rate; up to 2 / SMOOTHNESS is allowed.
SMOOTHNESS, LIPSCHITZ = 0.25, 1.0  # Of log(1 + exp(-y x.w)) with |x| = 1.


class Examples(NamedTuple):
    """Points on the unit sphere with labels -1 and 1."""

    x: jax.Array
    y: jax.Array


def truth() -> jax.Array:
    """The weights that labels are drawn by, which minimise the risk."""
    return jnp.full(DIMENSION, 5.0 / DIMENSION**0.5)


def draw(key: jax.Array, count: int) -> Examples:
    """Labels are 1 with probability ``sigmoid(x . truth)``."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (count, DIMENSION))
    x /= jnp.linalg.norm(x, axis=1, keepdims=True)
    return Examples(x, jnp.where(jax.random.uniform(keys[1], (count,)) < jax.nn.sigmoid(x @ truth()), 1.0, -1.0))


def loss(w: jax.Array, examples: Examples) -> jax.Array:
    """The mean over examples, or the loss of one."""
    return jnp.mean(jax.nn.softplus(-examples.y * (examples.x @ w)))


def risk(w: jax.Array, x: jax.Array) -> jax.Array:
    """The expectation over labels, exactly; over ``x``, as a mean."""
    score, right = x @ w, jax.nn.sigmoid(x @ truth())
    return jnp.mean(right * jax.nn.softplus(-score) + (1 - right) * jax.nn.softplus(score))


def average(examples: Examples, order: jax.Array, rho: jax.typing.ArrayLike) -> jax.Array:
    """S2-SAM from zero, one example a step in that order; the mean of the iterates, weighted by learning rates."""

    def rate(step):
        return RATE / jnp.sqrt(step + 1.0)

    tx = optax.chain(s2sam(lambda step: rho / jnp.sqrt(step + 1.0)), optax.sgd(rate))

    def step(carry: Any, index_and_row: Any) -> tuple[Any, None]:
        (w, state, total), (index, row) = carry, index_and_row
        grads = jax.grad(loss)(perturb(w, state), Examples(examples.x[row], examples.y[row]))
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state, total + rate(index) * w), None

    start, steps = jnp.zeros(DIMENSION), jnp.arange(len(order))
    (_, _, total), _ = jax.lax.scan(step, (start, tx.init(start), start), (steps, order))
    return total / jnp.sum(rate(steps))


@partial(jax.jit, static_argnames=("n", "sets"))
def measure(key: jax.Array, rho: jax.typing.ArrayLike, *, n: int, sets: int) -> dict[str, jax.Array]:
    """Of each training set of ``n``, after ``5 n`` steps: generalisation gap, excess risk, distance to a neighbour."""
    test = draw(jax.random.fold_in(key, 0), TEST).x

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        examples, other = draw(keys[0], n), draw(keys[1], 1)
        order = jax.random.randint(keys[2], (PASSES * n,), 0, n)
        neighbours = Examples(examples.x.at[0].set(other.x[0]), examples.y.at[0].set(other.y[0]))
        w, moved = average(examples, order, rho), average(neighbours, order, rho)
        population = risk(w, test)
        return {
            "gap": population - loss(w, examples),
            "excess": population - risk(truth(), test),
            "distance": jnp.linalg.norm(w - moved),
        }

    return jax.lax.map(one, jax.random.split(jax.random.fold_in(key, 1), sets), batch_size=50)


def risk_bound(n: int, rho: float) -> dict[str, float]:
    """**Risk.** Let ℓ(·; z) be convex, L-smooth and G-Lipschitz, F its expectation and F_S its mean over n examples;
    S2-SAM with one example a step, drawn with replacement, any η_t ≤ 2/L and any ρ_t; w̄ = Σ η_t w_t / Σ η_t over T
    steps. With p_t = 1 − (1 − 1/n)^(t−1) and

        D = Σ η_t [ 2G/n + 2 L ρ_t p_t ],

    for training sets S and S' that differ in one example, the same draws, and any fixed w°

        E|w̄ − w̄'| ≤ D,        |E[F(w̄) − F_S(w̄)]| ≤ G D,
        E F(w̄) − F(w°) ≤ [ |w₁ − w°|² + G² Σ η_t² + L Σ η_t ρ_t² ] / (2 Σ η_t) + G D.

    *Derivation (ours).*

    1. Stability. Until the differing example is first drawn, which has happened before step t with probability p_t,
       both runs are one. Afterwards a step on a common example moves w by −η_t ∇ℓ(w_t) − η_t r_t with |r_t| ≤ L ρ_t;
       the map w ↦ w − η ∇ℓ(w) does not expand distances for convex ℓ and η ≤ 2/L, so the distance grows by at most 2
       η_t L ρ_t. A step on the differing example, with probability 1/n, adds at most 2 η_t G. Hence D for every w_t
       up to T, and for their average.
    2. Gap. E[F(w̄) − F_S(w̄)] is the mean of ℓ(w̄; z') − ℓ(w̄'; z') for a fresh example z' that S' has in place of
       one of S (Hardt, Recht and Singer, 2016), so at most G D.
    3. Optimisation. ε_t is known before the example is drawn, so its gradient at u_t = w_t + ε_t has the mean
       ∇F_S(u_t). By convexity, then smoothness, ⟨∇F_S(u_t), w_t − w°⟩ = ⟨∇F_S(u_t), u_t − w°⟩ − ⟨∇F_S(u_t), ε_t⟩ ≥
       F_S(u_t) − F_S(w°) − ⟨∇F_S(u_t), ε_t⟩ ≥ F_S(w_t) − F_S(w°) − ½ L ρ_t². Put this into the expansion of |w_{t+1}
       − w°|², sum over t, use convexity for w̄ and E F_S(w°) = F(w°), and add the gap.

    The term 2 L ρ_t p_t is crude: it takes the directions of the two runs to be opposite once they differ at all, as
    the normalised gradient is not continuous at 0. With T in proportion to n it does not fall as n grows.

    *The slides' theorem*, as far as it can be read, is of the same three parts, for constant η: F_S(w₀)/(μ η T); a
    noise term with η (L + λ) σ² over μ; and a stability term with B over μ n, where λ = 2L and ℓ is L-smooth and
    B-Lipschitz. Its constants cannot be read with certainty, nor its Assumption 2, which has to bring in μ. With
    constant η and without ρ ours is |w₁ − w°|²/(2 η T) + η G²/2 + 2 G² η T/n: convexity in place of Assumption 2, and
    η T in place of 1/μ in the last. The terms in ρ are ours.
    """
    t = np.arange(1, PASSES * n + 1)
    rates, radii, drawn = RATE / np.sqrt(t), rho / np.sqrt(t), 1 - (1 - 1 / n) ** (t - 1)
    distance = float(np.sum(rates * (2 * LIPSCHITZ / n + 2 * SMOOTHNESS * radii * drawn)))
    start = float(jnp.sum(truth() ** 2))
    wander = LIPSCHITZ**2 * np.sum(rates**2) + SMOOTHNESS * np.sum(rates * radii**2)
    optimisation = float((start + wander) / (2 * np.sum(rates)))
    gap = LIPSCHITZ * distance
    return {"distance": distance, "gap": gap, "excess": optimisation + gap}

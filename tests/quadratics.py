"""Quadratic problems of three weights, and loops that train on them: float64 trajectories to compare with NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import perturb

DIAGONAL = np.diag([1.0, 2.0, 4.0])
COUPLED = np.array([[1.0, 0, 0.5], [0, 2, 0], [0.5, 0, 4]])
MASK = np.array([1.0, 1.0, 0.0])
START = np.array([1.0, -2.0, 0.5])
EXACT = dict(rtol=1e-12, atol=1e-12)
PRINTED = dict(rtol=0, atol=6e-8)  # the worked numbers carry seven digits


def sgd(momentum=0.0, decay=0.0, lr=0.1):
    """The reference's SGD: decay is coupled, momentum has no dampening."""
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr, momentum=momentum))


def split(w):
    """Two leaves of different rank, so that a per-leaf norm would show."""
    return {"a": jnp.asarray(w[:2]).reshape(2, 1), "b": jnp.asarray(w[2:])}


def joined(tree):
    return np.concatenate([np.asarray(tree["a"]).ravel(), np.asarray(tree["b"])])


def quadratic(matrix):
    return jax.grad(lambda tree: 0.5 * (w := jnp.concatenate([tree["a"].ravel(), tree["b"]])) @ matrix @ w)


def train(tx, matrix, steps, params=None, state=None, perturbs=False, **extra):
    grad_fn = quadratic(matrix)
    params = split(START) if params is None else params
    state = tx.init(params) if state is None else state
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=grad_fn, **extra))
    path = []
    for _ in range(steps):
        grads = grad_fn(perturb(params, state) if perturbs else params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        path.append(joined(params))
    return path, state


def first_leaf(path, leaf):
    del leaf
    return path == "a"

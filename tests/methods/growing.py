"""Trajectories of methods that prune, or drop and grow, and draws to compare them with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import Every, sparsify
from s2sam_jax._base.select import random_scores

WHEN = Every(1, 1, 21)
LAST = 21
LR, MOMENTUM = 0.1, 0.9


def prunable(path, leaf):
    return "bias" not in path


def start():
    draw = np.random.default_rng(0)
    return {
        "a": jnp.asarray(draw.normal(size=(3, 2, 12)), jnp.float32),
        "bias": jnp.ones(5),
        "one": jnp.asarray([[0.7]]),
        "ties": jnp.asarray(draw.integers(-2, 3, size=(6, 5)), jnp.float32),
        "zeros": jnp.zeros((4, 6)),
    }


def gradient(step):
    """None on the leaves of ties and of zeros, so that they stay what they are."""
    draw = np.random.default_rng(step + 1)
    still = ("ties", "zeros")
    return {
        name: jnp.zeros_like(p) if name in still else jnp.asarray(draw.normal(size=p.shape), jnp.float32)
        for name, p in start().items()
    }


def optimizer(method, sparsity=0.6, distribution="uniform", when=WHEN, **kwargs):
    inner = optax.sgd(LR, momentum=MOMENTUM)
    return sparsify(inner, method, sparsity=sparsity, distribution=distribution, when=when, prunable=prunable, **kwargs)


def sparse(tree):
    return [np.asarray(leaf) for name, leaf in tree.items() if name != "bias"]


def check_trajectory(tx, expected):
    """20 updates: the masks against ``expected(state, weights, grads)``, weights and momentum by the state rule.

    Momentum is zero off the old mask and off the new one, so a pruned weight loses it and a new one has none. A weight
    off the mask is zero. ``expected`` may say which weights kept their value; if not, those on the old mask did.
    """
    params = start()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(LAST + 2):
        grads = gradient(step)
        weights = [w * m for w, m in zip(sparse(params), sparse(state.masks), strict=True)]
        momenta = sparse(state.inner_state[0].trace)
        want, values = sparse(state.masks), weights
        if WHEN.start <= step <= LAST:
            want, kept = expected(state, weights, sparse(grads))
            values = [np.where(k, w, 0) for k, w in zip(kept, weights, strict=True)] if kept else weights
        updates, new = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for mask, m in zip(sparse(new.masks), want, strict=True):
            np.testing.assert_array_equal(mask, m)
        momenta = [(MOMENTUM * v + g) * m for v, g, m in zip(momenta, sparse(grads), want, strict=True)]
        for got, v in zip(sparse(new.inner_state[0].trace), momenta, strict=True):
            np.testing.assert_allclose(got, v, rtol=1e-5, atol=1e-6)
        for got, w, v, m in zip(sparse(params), values, momenta, want, strict=True):
            np.testing.assert_allclose(got, (w - LR * v) * m, rtol=1e-5, atol=1e-6)
        assert bool(new.masks["bias"].all())
        yield state, new
        state = new


def exhaust(trajectory):
    return list(trajectory)[-1][1]


def draws(state, weights):
    key = jax.random.fold_in(state.key, state.step)
    return [np.asarray(s) for s in random_scores(key, [jnp.asarray(w) for w in weights])]


def ones(masks):
    return [int(m.sum()) for m in sparse(masks)]

"""Optimizers and trees for tests of checked."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import (
    Every,
    SparseState,
    apply_masks,
    methods,
    perturb,
    sparsify,
)
from s2sam_jax._base.tree import find_states

# Without its fusion emitters XLA fuses multiplying and adding as it happens.
AS_USUAL = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
BATCHES = np.random.default_rng(0).normal(size=(5, 7, 6)).astype(np.float32)
SGD = optax.sgd(0.1, momentum=0.9)


def static(inner, **options):
    return sparsify(inner, methods.static(), **{"sparsity": 0.5, **options})


def rigl(inner, **options):
    return sparsify(inner, methods.rigl(0.5), sparsity=0.5, when=Every(1, 2, 10), **options)


def one_leaf():
    return {"kernel": jax.random.normal(jax.random.key(1), (6, 5))}


def three_leaves():
    keys = jax.random.split(jax.random.key(2), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (6, 6)), "bias": jnp.zeros(6)},
        "b": {"kernel": jax.random.normal(keys[1], (6, 6))},
    }


def loss(params, batch):
    if "kernel" in params:
        return jnp.mean(jnp.square(batch @ params["kernel"] - 1))
    hidden = jnp.tanh(batch @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["b"]["kernel"] - 1))


def sparse_start(tx, params):
    state = tx.init(params)
    return apply_masks(params, state), state


def start(tx):
    params = one_leaf()
    return sparse_start(tx, params) if find_states(tx.init(params), SparseState) else (params, tx.init(params))


def stepper(tx, perturbs):
    def step(params, state, batch, fault):
        def grad_fn(params):
            return jax.tree.map(lambda g: g + fault, jax.grad(loss)(params, batch))

        grads = grad_fn(perturb(params, state) if perturbs else params)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, grad_fn=grad_fn, value=fault)
        return optax.apply_updates(params, updates), state

    return step


def at(tree, path, change):
    """The tree with one leaf changed."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: change(x) if jax.tree_util.keystr(keys, simple=True, separator="/").endswith(path) else x, tree
    )


class Case(NamedTuple):
    """A state in mid-training, and a program that checks an update from there."""

    params: Any
    state: Any
    gradient: Any
    update: Any

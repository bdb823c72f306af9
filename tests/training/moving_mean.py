"""A linear layer whose model state has a moving mean."""

import jax.numpy as jnp
import numpy as np

from s2sam_jax import (
    TrainState,
)

DRAW = np.random.default_rng(0)
BATCHES = [jnp.asarray(DRAW.normal(size=(8, 3)) + 1, jnp.float32) for _ in range(8)]


def loss_fn(params, model_state, batch, key):
    """A linear layer whose model state records the weights it was run at and a moving mean."""
    del key
    out = batch @ params["kernel"]
    new = {"seen": params["kernel"], "mean": 0.9 * model_state["mean"] + 0.1 * out.mean(0)}
    return jnp.mean((out - 1.0) ** 2), (new, {"largest": out.max()})


def start(tx):
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)}
    model_state = {"seen": jnp.zeros((3, 4)), "mean": jnp.zeros(4)}
    return TrainState.create(params, tx, model_state=model_state)

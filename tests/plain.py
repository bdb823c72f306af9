"""Training by a plain optax loop, to compare with."""

import jax
import optax
from common import (
    loss_fn,
    squared,
)


def plain(tx, params, steps=5, point=lambda params, state: params, loss=loss_fn):
    """A loop that knows nothing: the parameters after each step, and the last state."""
    tx = optax.with_extra_args_support(tx)
    opt_state, path = tx.init(params), []

    @jax.jit
    def step(params, opt_state):
        at = point(params, opt_state)
        updates, opt_state = tx.update(
            jax.grad(loss)(at), opt_state, params, grad_fn=jax.grad(loss),
            fisher_fn=lambda p: squared(jax.grad(loss)(p)),
        )  # fmt: skip
        return optax.apply_updates(params, updates), opt_state, at

    for _ in range(steps):
        params, opt_state, at = step(params, opt_state)
        path.append((params, at))
    return path, opt_state

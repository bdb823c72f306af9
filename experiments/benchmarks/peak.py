"""Peak memory where weights take most of it: an MLP with few examples, its step as one program. Nothing is run."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import timing
from experiments.benchmarks.masks import RARELY, sgd
from experiments.benchmarks.timing import Row, figure
from s2sam_jax import TrainState, make_train_step, methods, perturb, s2sam, sparsify

WIDTH, DEPTH, EXAMPLES = 1800, 3, 8


def mlp(width: int = WIDTH) -> Any:
    return {f"layer{n}": {"kernel": jnp.ones((width, width)), "bias": jnp.zeros(width)} for n in range(DEPTH)}


def loss_fn(params: Any, model_state: Any, x: jax.Array, key: jax.Array) -> Any:
    del key
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(jnp.square(x)), (model_state, {})


def rows() -> Iterator[Row]:
    """Peak memory in copies of the parameters; these and the optimizer's state are included."""
    cases = {"S2-SAM": optax.chain(s2sam(), sgd()), "S2-SAM, Adam": optax.chain(s2sam(), optax.adam(0.1))}
    cases["S2-SAM, RigL"] = sparsify(cases["S2-SAM"], methods.rigl(), sparsity=0.9, when=RARELY)
    for name, tx in cases.items():
        state = jax.eval_shape(lambda tx=tx: TrainState.create(mlp(), tx))
        yield _row(
            name,
            "a loop of your own",
            lambda carry, batch, tx=tx: _plain(tx, carry, batch),
            (state.params, state.opt_state),
        )
        yield _row(name, "freeze=False", make_train_step(loss_fn, tx, freeze=False), state)
        yield _row(name, "make_train_step", make_train_step(loss_fn, tx), state)


def _plain(tx: optax.GradientTransformation, carry: Any, batch: jax.Array) -> Any:
    params, opt_state = carry
    grads = jax.grad(lambda point: loss_fn(point, (), batch, jax.random.key(0))[0])(perturb(params, opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _row(name: str, way: str, step: Any, state: Any) -> Row:
    batch = jax.ShapeDtypeStruct((EXAMPLES, WIDTH), jnp.float32)
    used = timing.memory(jax.jit(step, donate_argnums=0).lower(state, batch).compile())
    size = sum(x.size * 4 for x in jax.tree.leaves(jax.eval_shape(mlp)))
    return figure(f"peak memory, MLP, {name}, {way}", used.peak / size, "params")

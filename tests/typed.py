# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportMissingTypeStubs=false
# pyright: reportUnknownMemberType=false, reportUnusedExpression=false
"""What a type checker makes of users' code, which nothing runs: pyright alone reads it, with the rest.

A call that must be refused stands above an ``ignore`` with its rule; pyright complains if it lets it pass.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import (
    ChannelAxis,
    ChannelGroup,
    Every,
    TrainState,
    TrainStep,
    channel_masks,
    checked,
    erdos_renyi,
    make_train_step,
    methods,
    s2sam,
    sparsify,
)

Params = dict[str, jax.Array]
SGD = optax.sgd(0.1)


def typed_loss(
    params: Params, model_state: Params, batch: jax.Array, key: jax.Array
) -> tuple[jax.Array, tuple[Params, dict[str, float]]]:
    del key
    return jnp.mean(batch * params["kernel"]), (model_state, {"rate": 0.1})


def short_loss(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.mean(batch * params["kernel"])


def train_steps(params: Params, batch: jax.Array) -> None:
    step = assert_type(make_train_step(typed_loss, SGD), TrainStep)
    make_train_step(lambda params, state, batch, key: (jnp.sum(params), (state, {"loss": 0.1, "n": batch})), SGD)
    state, metrics = step(TrainState.create(params, SGD), batch)
    assert_type(state, TrainState)
    assert_type(metrics, dict[str, jax.Array])
    several = optax.MultiSteps(SGD, 2)
    make_train_step(typed_loss, several)
    checked(several)
    TrainState.create(params, several)
    make_train_step(short_loss, SGD)  # pyright: ignore[reportArgumentType]
    make_train_step(typed_loss, methods.rigl())  # pyright: ignore[reportArgumentType]
    step(params, batch)  # pyright: ignore[reportArgumentType]


def schedules(step: jax.Array) -> jax.Array:
    s2sam(optax.linear_schedule(0.0, 0.1, 10))
    s2sam(schedules)
    s2sam(jnp.ones(()))
    s2sam("0.1")  # pyright: ignore[reportArgumentType]
    s2sam(compat="author")  # pyright: ignore[reportArgumentType]
    return 0.1 * step


def sparse(when: Every, name: Any) -> None:
    sparsify(SGD, methods.rigl(), sparsity=0.5, distribution="erk", when=when)
    sparsify(SGD, methods.rigl(), sparsity=0.5, distribution=erdos_renyi, when=when)
    sparsify(SGD, methods.rigl(), sparsity=0.5, distribution=name, when=when)
    sparsify(SGD, methods.rigl(), sparsity=0.5, distribution="ekr", when=when)  # pyright: ignore[reportArgumentType]
    sparsify(SGD, methods.static, sparsity=0.5)  # pyright: ignore[reportArgumentType]
    sparsify(methods.static(), SGD, sparsity=0.5)  # pyright: ignore[reportArgumentType]
    sparsify(SGD, methods.rigl(), sparsity=0.5, when=100)  # pyright: ignore[reportArgumentType]


def channels(params: Params) -> None:
    group = ChannelGroup("hidden", (ChannelAxis("kernel", -1),))
    channel_masks(params, [group], {"hidden": np.ones(10, bool)})

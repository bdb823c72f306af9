"""What the train step refuses, and why."""

import inspect
from typing import Any

import jax
import optax

from s2sam_jax._base.optax_wrappers import Optimizer, check_state_of_tx
from s2sam_jax._base.tree import find_states
from s2sam_jax._sharpness.esam import check_sharpest_fraction
from s2sam_jax._sharpness.order import check_order
from s2sam_jax._sharpness.second_gradient import NAMES, taking_second_gradients
from s2sam_jax._training.train_state import TrainState


def check_loss_fn(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise TypeError(f"make_train_step needs a function loss_fn; got {loss_fn!r}.")
    if hasattr(loss_fn, "__wrapped__"):  # an adapter shows the signature of what it adapts
        return
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # some callables have none
        return
    try:
        signature.bind(*"1234")
    except TypeError as error:
        raise TypeError(
            "make_train_step calls loss_fn(params, model_state, batch, key), which returns (loss, (model_state, "
            f"metrics)); this one takes {signature}: {error}. Without a model state: lambda params, model_state, "
            "batch, key: (loss(params, batch), (model_state, {}))."
        ) from error


def check_options(
    accumulate: int, sharpness_parts: int, fisher_examples: int, sharpest_fraction: float, example_loss_fn: Any
) -> None:
    counts = {"accumulate": accumulate, "sharpness_parts": sharpness_parts, "fisher_examples": fisher_examples}
    for option, value in counts.items():
        if value < 1:
            raise ValueError(f"make_train_step needs {option} >= 1; got {value}.")
    if accumulate > 1 and sharpness_parts > 1:
        raise ValueError(
            f"accumulate={accumulate} and sharpness_parts={sharpness_parts} cut the batch in two ways: one has to be 1."
        )
    check_sharpest_fraction(sharpest_fraction)
    if sharpest_fraction < 1 and (accumulate > 1 or sharpness_parts > 1):
        raise ValueError(
            f"sharpest_fraction={sharpest_fraction} chooses among the examples of one whole batch: accumulate and "
            f"sharpness_parts have to be 1; got {accumulate} and {sharpness_parts}."
        )
    if sharpest_fraction < 1 and example_loss_fn is None:
        raise ValueError(
            f"sharpest_fraction={sharpest_fraction} needs example_loss_fn, (params, model_state, batch, key) -> "
            "losses[B], to choose the examples by; or leave it at 1."
        )


def check_second_gradient(state: TrainState, sharpness_parts: int, sharpest_fraction: float) -> None:
    if taking_second_gradients(state.opt_state):
        return
    if sharpness_parts > 1:
        raise ValueError(
            f"sharpness_parts cuts the batch for {NAMES}, and tx has none of them; s2sam perturbs once for the whole "
            "batch, along the gradient of the step before, and msam along the momentum. Leave it at 1."
        )
    if sharpest_fraction < 1:
        raise ValueError(
            f"sharpest_fraction is the share of the batch in the second gradient of {NAMES}, and tx has none of them. "
            "Leave it at 1."
        )


def check_state(tx: Optimizer, state: TrainState) -> None:
    expected = jax.eval_shape(tx.init, state.params)
    check_state_of_tx(state.opt_state, expected, "TrainState.create(params, tx)")
    if any(taking_second_gradients(outer) for outer in find_states(expected, optax.MultiStepsState)):
        raise ValueError(
            f"{NAMES} inside optax.MultiSteps would take their second gradient on the last micro-batch alone; "
            "use make_train_step(..., accumulate=k) instead."
        )
    check_order(expected)


def check_metrics(metrics: dict[str, Any], own: dict[str, Any]) -> None:
    if twice := sorted(metrics.keys() & own.keys()):
        raise ValueError(f"loss_fn returns metrics that the train step has itself: {twice}; give them other names.")

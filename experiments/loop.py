"""One training run: the same loop for every task, optimizer and method."""

import time
from typing import Any

import jax
import numpy as np
import optax

from experiments import optimizers
from experiments.config import Config
from experiments.models import Network
from experiments.tasks import Reporter, Task
from s2sam_jax import TrainState, eval_params, get_masks, make_train_step, recalibrate_batch_stats

RECALIBRATION_BATCHES = 20

Row = dict[str, Any]


def initial_state(
    config: Config, network: Network, tx: optax.GradientTransformation, start: TrainState | None = None
) -> TrainState:
    """Fresh, or with the weights and statistics of ``start``."""
    params, model_state = network.params, network.model_state
    if start is not None:
        params, model_state = eval_params(start.params, start.opt_state), start.model_state
    return TrainState.create(params, tx, model_state=model_state, seed=config.key("train"))


def train(config: Config, task: Task, reporter: Reporter, start: TrainState | None = None) -> TrainState:
    """Trains, and returns the final state, with recalibrated BatchNorm statistics.

    Raises:
      FloatingPointError: naming the step at which something was not finite.
    """
    begin = time.perf_counter()
    tx = optimizers.make(config, task.steps_per_epoch)
    state = initial_state(config, task.network, tx, start)
    step = make_train_step(task.loss_fn, tx, accumulate=config.accumulate, fisher_loss_fn=task.plain_loss_fn)

    interval = 0.0
    history: list[dict[str, np.ndarray]] = []
    for epoch in range(config.epochs):
        started = time.perf_counter()
        state, metrics = task.epoch(step, state, epoch, reporter)
        interval += time.perf_counter() - started
        history.append({"train_loss": metrics.pop("loss")} | metrics)
        _stop_if_bad(state)
        last = epoch + 1 == config.epochs
        if (epoch + 1) % config.eval_every and not last:
            continue
        row = _means(history) | {
            "epoch": epoch + 1,
            "step": int(state.step),
            "images_per_second": sum(len(m["train_loss"]) for m in history) * config.batch_size / interval,
            "final": last,
        }
        row |= task.evaluate(eval_params(state.params, state.opt_state), state.model_state)
        if last:
            state = _recalibrated(config, task, state)
            final = task.evaluate(eval_params(state.params, state.opt_state), state.model_state, final=True)
            row |= {"test_accuracy_recalibrated": final.pop("test_accuracy"), "layers": layer_sparsity(config, state)}
            row |= final
        row["seconds"] = time.perf_counter() - begin
        reporter.row(row)
        history, interval = [], 0.0
    return state


def layer_sparsity(config: Config, state: TrainState) -> dict[str, list[int]]:
    """Per kernel, by path: ``[zeros of the mask, size]``; empty for dense training."""
    if config.method == "dense":
        return {}
    masks = jax.device_get(get_masks(state.opt_state, state.params))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): m for path, m in jax.tree.leaves_with_path(masks)}
    return {name: [int((~mask).sum()), mask.size] for name, mask in named.items() if mask.ndim >= 2}


def _means(history: list[dict[str, np.ndarray]]) -> Row:
    """Over the steps since the last row; the sparsity is the newest."""
    rows = {name: float(np.mean(np.concatenate([m[name] for m in history]))) for name in history[0]}
    return rows | {"sparsity": float(history[-1]["sparsity"][-1]) if "sparsity" in rows else 0.0}


def _recalibrated(config: Config, task: Task, state: TrainState) -> TrainState:
    if not jax.tree.leaves(state.model_state):
        return state
    batches = (batch for batch, _ in zip(task.batches(config.epochs), range(RECALIBRATION_BATCHES), strict=False))
    params = eval_params(state.params, state.opt_state)
    return state._replace(
        model_state=recalibrate_batch_stats(task.loss_fn, params, state.model_state, batches, seed=config.seed)
    )


def _stop_if_bad(state: TrainState) -> None:
    if (bad := int(state.first_bad_step)) >= 0:
        raise FloatingPointError(
            f"Training broke down at step {bad}: the loss, a gradient or an update was not finite. Try a lower "
            "learning_rate or rho."
        )

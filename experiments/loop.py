"""One training run: the same loop for every optimizer and every method."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import data, models, optimizers
from experiments.config import Config
from experiments.data import Dataset, Kind
from experiments.models import Network
from s2sam_jax import TrainState, eval_params, get_masks, make_train_step, recalibrate_batch_stats

RECALIBRATION_BATCHES = 20

Row = dict[str, Any]
EpochFn = Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, np.ndarray]]]


class Reporter(Protocol):
    """Who wants to hear of progress."""

    def steps(self, count: int) -> None: ...

    def row(self, row: Row) -> None: ...


def build(config: Config) -> Network:
    kind = data.KINDS[config.dataset]
    return models.build(
        config.model, width=config.width, channels=kind.shape[2], classes=kind.classes, seed=config.seed
    )


def initial_state(
    config: Config, network: Network, tx: optax.GradientTransformation, start: TrainState | None = None
) -> TrainState:
    """Fresh, or with the weights and statistics of ``start``."""
    params, model_state = network.params, network.model_state
    if start is not None:
        params, model_state = eval_params(start.params, start.opt_state), start.model_state
    return TrainState.create(params, tx, model_state=model_state, seed=config.key("train"))


def loss_function(config: Config, network: Network, *, train: bool = True) -> Callable[..., Any]:
    """The library's loss: augmentation, normalisation, network and cross-entropy on a batch of raw images."""
    kind = data.KINDS[config.dataset]

    def loss_fn(params, model_state, batch, key):
        images, labels = batch
        images = data.augment(key, images, kind) if train else images
        logits, new_state = network.apply(params, model_state, data.normalise(images, kind), train)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, kind.classes), config.label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        return loss, (new_state, {"train_accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)})

    return loss_fn


def evaluator(network: Network, kind: Kind, dataset: Dataset) -> Callable[[Any, Any], float]:
    """``(params, model_state) -> accuracy`` on the test set, every row counted once."""
    batches = data.eval_batches(dataset.test_images, dataset.test_labels)

    @jax.jit
    def correct(params, model_state, images, labels):
        logits, _ = network.apply(params, model_state, data.normalise(images, kind), False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def accuracy(params, model_state):
        counts = [correct(params, model_state, images, labels) for images, labels in batches]
        return float(sum(jax.device_get(counts)) / len(dataset.test_labels))

    return accuracy


def train(config: Config, dataset: Dataset, reporter: Reporter, start: TrainState | None = None) -> TrainState:
    """Trains, and returns the final state, with recalibrated BatchNorm statistics.

    Raises:
      ValueError: when the training set has not one full batch.
      FloatingPointError: naming the step at which something was not finite.
    """
    begin, examples = time.perf_counter(), len(dataset.train_labels)
    if examples < config.batch_size:
        raise ValueError(f"batch_size={config.batch_size} is more than the {examples} training rows.")
    network = build(config)
    tx = optimizers.make(config, steps_per_epoch=examples // config.batch_size)
    state = initial_state(config, network, tx, start)
    accuracy = evaluator(network, data.KINDS[config.dataset], dataset)
    loss_fn = loss_function(config, network)
    step = make_train_step(
        loss_fn,
        tx,
        accumulate=config.accumulate,
        fisher_loss_fn=loss_function(config, network, train=False),
    )
    epoch_fn = epoch_runner(step, dataset, reporter)

    interval = 0.0
    history: list[dict[str, np.ndarray]] = []
    for epoch in range(config.epochs):
        started = time.perf_counter()
        state, metrics = epoch_fn(state, data.epoch_order(config.seed, epoch, examples, config.batch_size))
        interval += time.perf_counter() - started
        history.append(metrics)
        _stop_if_bad(state)
        last = epoch + 1 == config.epochs
        if (epoch + 1) % config.eval_every and not last:
            continue
        row = _means(history) | {
            "epoch": epoch + 1,
            "step": int(state.step),
            "test_accuracy": accuracy(eval_params(state.params, state.opt_state), state.model_state),
            "images_per_second": sum(len(m["train_loss"]) for m in history) * config.batch_size / interval,
            "final": last,
        }
        if last:
            state = _recalibrated(config, dataset, loss_fn, state)
            final = accuracy(eval_params(state.params, state.opt_state), state.model_state)
            row |= {"test_accuracy_recalibrated": final, "layers": layer_sparsity(config, state)}
        row["seconds"] = time.perf_counter() - begin
        reporter.row(row)
        history, interval = [], 0.0
    return state


def epoch_runner(step: Callable[..., Any], dataset: Dataset, reporter: Reporter) -> EpochFn:
    """An epoch as one program; on CPU, where XLA is slow at convolution gradients inside loops, as one a step."""
    images, labels = dataset.train_images, dataset.train_labels
    take = jax.jit(lambda images, labels, rows: (images[rows], labels[rows]))

    def stepwise(state, order):
        history = []
        for rows in order:
            state, metrics = step(state, take(images, labels, rows))
            history.append(metrics)
            reporter.steps(1)
        history = jax.device_get(history)
        return state, {name: np.stack([metrics[name] for metrics in history]) for name in history[0]}

    @jax.jit(donate_argnames="state")
    def scanned(state, images, labels, order):
        return jax.lax.scan(lambda state, rows: step(state, take(images, labels, rows)), state, order)

    def whole(state, order):
        state, metrics = scanned(state, images, labels, order)
        metrics = jax.device_get(metrics)
        reporter.steps(len(order))
        return state, metrics

    run = stepwise if jax.default_backend() == "cpu" else whole

    def epoch(state, order):
        state, metrics = run(state, order)
        return state, {"train_loss": metrics.pop("loss")} | metrics

    return epoch


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


def _recalibrated(config: Config, dataset: Dataset, loss_fn: Callable[..., Any], state: TrainState) -> TrainState:
    order = data.epoch_order(config.seed, config.epochs, len(dataset.train_labels), config.batch_size)
    batches = ((dataset.train_images[rows], dataset.train_labels[rows]) for rows in order[:RECALIBRATION_BATCHES])
    params = eval_params(state.params, state.opt_state)
    return state._replace(
        model_state=recalibrate_batch_stats(loss_fn, params, state.model_state, batches, seed=config.seed)
    )


def _stop_if_bad(state: TrainState) -> None:
    if (bad := int(state.first_bad_step)) >= 0:
        raise FloatingPointError(
            f"Training broke down at step {bad}: the loss, a gradient or an update was not finite. Try a lower "
            "learning_rate or rho."
        )

"""Images that lie on the device as a whole."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments import data
from experiments.config import Config
from experiments.data import Dataset
from experiments.models import Network
from experiments.tasks import Reporter, Step, images, run_epoch
from s2sam_jax import TrainState

Epoch = Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, np.ndarray]]]


class ImageArrays:
    """A :class:`~experiments.tasks.Task` of images on the device."""

    def __init__(self, config: Config, network: Network, dataset: Dataset):
        self._config, self._dataset, self._runner = config, dataset, None
        examples = len(dataset.train_labels)
        if examples < config.batch_size:
            raise ValueError(f"batch_size={config.batch_size} is more than the {examples} training rows.")
        self.network = network
        self.steps_per_epoch = examples // config.batch_size
        self.loss_fn = images.loss_function(config, network)
        self.plain_loss_fn = images.plain_loss_function(config, network)
        self._predict = images.predictor(network, data.KINDS[config.dataset])
        self._test = data.eval_batches(dataset.test_images, dataset.test_labels)

    def order(self, number: int) -> np.ndarray:
        return data.epoch_order(self._config.seed, number, len(self._dataset.train_labels), self._config.batch_size)

    def epoch(
        self, step: Step, state: TrainState, number: int, reporter: Reporter
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        self._runner = self._runner or epoch_runner(step, self._dataset, reporter)
        return self._runner(state, self.order(number))

    def evaluate(self, params: Any, model_state: Any, final: bool = False) -> dict[str, float]:
        del final
        return {"test_accuracy": images.accuracy(lambda x: self._predict(params, model_state, x), self._test)}

    def batches(self, number: int) -> Iterator[Any]:
        return ((self._dataset.train_images[rows], self._dataset.train_labels[rows]) for rows in self.order(number))


def epoch_runner(step: Step, dataset: Dataset, reporter: Reporter) -> Epoch:
    """An epoch as one program; on CPU, where XLA is slow at convolution gradients inside loops, as one a step."""
    take = jax.jit(lambda images, labels, rows: (images[rows], labels[rows]))

    def stepwise(state, order):
        batches = (take(dataset.train_images, dataset.train_labels, rows) for rows in order)
        return run_epoch(step, state, batches, reporter)

    @jax.jit(donate_argnames="state")
    def scanned(state, images, labels, order):
        return jax.lax.scan(lambda state, rows: step(state, take(images, labels, rows)), state, order)

    def whole(state, order):
        state, metrics = scanned(state, dataset.train_images, dataset.train_labels, order)
        metrics = jax.device_get(metrics)
        reporter.steps(len(order))
        return state, metrics

    return stepwise if jax.default_backend() == "cpu" else whole

"""Images that lie on the device as a whole."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import sharding
from experiments.config import Config
from experiments.datasets import in_memory, kinds, transforms
from experiments.datasets.in_memory import Dataset
from experiments.models import Network
from experiments.tasks import images
from experiments.tasks.base import Epoch, Losses, Reporter, Step, run_epoch
from s2sam_jax import TrainState

EVAL_BATCH = 500

OrderedEpoch = Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, np.ndarray]]]


def load(config: Config) -> Dataset:
    return in_memory.load(config.dataset, config.data, config.subset)


def losses(config: Config, network: Network) -> Losses:
    return images.losses(config, network, augment=True)


class Task:
    """A :class:`~experiments.tasks.base.Task` of images on the device."""

    def __init__(self, config: Config, network: Network, dataset: Dataset, mesh: Mesh):
        self._config, self.network, self.mesh = config, network, mesh
        dataset = in_memory.hold_out(dataset, config.validation) if config.validation else dataset
        if config.label_noise:
            classes = kinds.KINDS[config.dataset].classes
            dataset = in_memory.with_label_noise(dataset, config.label_noise, classes, config.seed)
        self._dataset = dataset = sharding.put(dataset, sharding.replicated(mesh))
        examples = len(dataset.train_labels)
        if examples < config.batch_size:
            raise ValueError(f"batch_size={config.batch_size} is more than the {examples} training rows.")
        self.steps_per_epoch = examples // config.batch_size
        self.losses = losses(config, network)
        self._predict = images.predictor(network, kinds.KINDS[config.dataset])
        size = sharding.fill(mesh, min(EVAL_BATCH, len(dataset.test_labels)))
        batches = in_memory.eval_batches(dataset.test_images, dataset.test_labels, size)
        self._test = [sharding.put(batch, sharding.of_batch(mesh)) for batch in batches]

    def order(self, number: int) -> np.ndarray:
        return in_memory.epoch_order(
            self._config.seed, number, len(self._dataset.train_labels), self._config.batch_size
        )

    def runner(self, step: Step, reporter: Reporter) -> Epoch:
        run = epoch_runner(step, self._dataset, reporter, self.mesh)
        return lambda state, number: run(state, self.order(number))

    def evaluate(self, params: Any, model_state: Any, final: bool = False) -> dict[str, float]:
        del final
        return {"test_accuracy": images.accuracy(lambda x: self._predict(params, model_state, x), self._test)}

    def examples(self) -> Iterator[tuple[Any, jax.Array, jax.Array]]:
        return images.examples(self._test, kinds.KINDS[self._config.dataset])

    def of_each_class(self, count: int) -> list[tuple[jax.Array, jax.Array]]:
        """So many training images of each class, ready for the network, and labels; half of the classes are a batch.

        Raises:
          ValueError: when a class has fewer.
        """
        kind, labels = kinds.KINDS[self._config.dataset], np.asarray(self._dataset.train_labels)
        order = self.order(0).ravel()
        found = [order[labels[order] == name][:count] for name in range(kind.classes)]
        if few := [f"{len(rows)} of class {name}" for name, rows in enumerate(found) if len(rows) < count]:
            raise ValueError(f"images_per_class={count} is more than there are to train on: {', '.join(few)}.")
        batches = []
        for number, rows in enumerate(np.array_split(np.stack(found), 2)):
            images, targets = _take(self._dataset.train_images, self._dataset.train_labels, rows.ravel())
            key = jax.random.fold_in(self._config.key("of each class"), number)
            batches.append((transforms.normalise(transforms.augment(key, images, kind), kind), targets))
        return batches

    def batches(self, number: int) -> Iterator[Any]:
        return batches_of(self._dataset, self.order(number), self.mesh)


def batches_of(dataset: Dataset, order: np.ndarray, mesh: Mesh) -> Iterator[Any]:
    """The rows of an order, step by step, cut up among the devices."""
    for rows in order:
        yield _take(dataset.train_images, dataset.train_labels, sharding.put(rows, sharding.of_batch(mesh)))


@jax.jit
def _take(images: jax.Array, labels: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return images[rows], labels[rows]


def epoch_runner(step: Step, dataset: Dataset, reporter: Reporter, mesh: Mesh | None = None) -> OrderedEpoch:
    """An epoch as one program; on CPU, where XLA is slow at convolution gradients inside loops, a step at a time."""
    mesh = mesh or sharding.make_mesh()

    def stepwise(state, order):
        return run_epoch(step, state, batches_of(dataset, order, mesh), reporter)

    @jax.jit(donate_argnames="state")
    def scanned(state, images, labels, order):
        return jax.lax.scan(lambda state, rows: step(state, _take(images, labels, rows)), state, order)

    def whole(state, order):
        rows = sharding.put(order, sharding.of_batch(mesh, axis=1))
        state, metrics = scanned(state, dataset.train_images, dataset.train_labels, rows)
        metrics = jax.device_get(metrics)
        reporter.steps(len(order))
        return state, metrics

    return stepwise if jax.default_backend() == "cpu" else whole

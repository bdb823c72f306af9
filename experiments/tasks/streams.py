"""Images that are read while training: ImageNet, or another classification set of TFDS in its place."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments import sharding
from experiments.config import Config
from experiments.datasets import imagenet, kinds
from experiments.datasets.stream import Evaluation, Stream
from experiments.models import Network
from experiments.tasks import images
from experiments.tasks.base import Epoch, Losses, Reporter, Step, run_epoch

EVAL_BATCH = 256


class Loaded(NamedTuple):
    train: Stream
    test: Evaluation


def load(config: Config) -> Loaded:
    """Opens the prepared files; nothing is read yet."""
    size = images.side(config)
    train = imagenet.train_stream(config.batch_size, config.data, image_size=size)
    return Loaded(train, imagenet.evaluation(EVAL_BATCH, config.data, image_size=size))


def losses(config: Config, network: Network) -> Losses:
    """Images that are streamed have been augmented on the host."""
    return images.losses(config, network, augment=False)


class Streamed:
    """What tasks of data that are read while training have in common; they add losses and the evaluation."""

    def __init__(self, config: Config, network: Network, loaded: Any, mesh: Mesh):
        self._config, self._loaded, self.network, self.mesh = config, loaded, network, mesh
        self._test = dataclasses.replace(loaded.test, batch_size=sharding.fill(mesh, loaded.test.batch_size))
        self.steps_per_epoch = loaded.train.steps_per_epoch

    def runner(self, step: Step, reporter: Reporter) -> Epoch:
        return lambda state, number: run_epoch(step, state, self.batches(number), reporter)

    def tests(self) -> Iterator[Any]:
        return (sharding.assemble(self.mesh, batch) for batch in self._test)

    def batches(self, number: int) -> Iterator[Any]:
        batches = self._loaded.train.batches(self._config.seed, number * self.steps_per_epoch)
        return (sharding.assemble(self.mesh, next(batches)) for _ in range(self.steps_per_epoch))


class Task(Streamed):
    """A :class:`~experiments.tasks.base.Task` of streamed images, augmented on the host."""

    def __init__(self, config: Config, network: Network, loaded: Loaded, mesh: Mesh):
        super().__init__(config, network, loaded, mesh)
        self.losses = losses(config, network)
        self._predict = images.predictor(network, kinds.KINDS[config.dataset])

    def evaluate(self, params: Any, model_state: Any, final: bool = False) -> dict[str, float]:
        del final
        return {"test_accuracy": images.accuracy(lambda x: self._predict(params, model_state, x), self.tests())}

    def examples(self) -> Iterator[tuple[Any, jax.Array, jax.Array]]:
        return images.examples(self.tests(), kinds.KINDS[self._config.dataset])

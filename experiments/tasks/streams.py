"""Images that are read while training: ImageNet, or another classification set of TFDS in its place."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from experiments import data, models, sharding
from experiments.config import Config
from experiments.datasets import imagenet
from experiments.datasets.stream import Evaluation, Stream
from experiments.models import Network
from experiments.tasks import Reporter, Step, images, run_epoch
from s2sam_jax import TrainState

EVAL_BATCH = 256


class Loaded(NamedTuple):
    train: Stream
    test: Evaluation


def load(config: Config) -> Loaded:
    """Opens the prepared files; nothing is read yet."""
    size = config.image_size or models.MODELS[config.model].image_size or 224
    train = imagenet.train_stream(config.batch_size, config.data, image_size=size)
    return Loaded(train, imagenet.evaluation(EVAL_BATCH, config.data, image_size=size))


class ImageStream:
    """A :class:`~experiments.tasks.Task` of streamed images, augmented on the host."""

    def __init__(self, config: Config, network: Network, loaded: Loaded, mesh: Mesh):
        self._config, self._train, self.mesh = config, loaded.train, mesh
        self._test = dataclasses.replace(loaded.test, batch_size=sharding.fill(mesh, loaded.test.batch_size))
        self.network, self.steps_per_epoch = network, loaded.train.steps_per_epoch
        self.losses = images.losses(config, network)
        self._predict = images.predictor(network, data.KINDS[config.dataset])

    def epoch(
        self, step: Step, state: TrainState, number: int, reporter: Reporter
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        return run_epoch(step, state, self.batches(number), reporter)

    def evaluate(self, params: Any, model_state: Any, final: bool = False) -> dict[str, float]:
        del final
        test = (sharding.assemble(self.mesh, batch) for batch in self._test)
        return {"test_accuracy": images.accuracy(lambda x: self._predict(params, model_state, x), test)}

    def batches(self, number: int) -> Iterator[Any]:
        return epoch_batches(self._train, self._config.seed, number, self.mesh)


def epoch_batches(stream: Stream, seed: int, number: int, mesh: Mesh) -> Iterator[Any]:
    batches = stream.batches(seed, number * stream.steps_per_epoch)
    return (sharding.assemble(mesh, next(batches)) for _ in range(stream.steps_per_epoch))

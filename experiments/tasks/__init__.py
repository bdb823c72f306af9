"""What a run trains on, as the loop sees it: a network, its loss, epochs and an evaluation."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import data, models
from experiments.config import Config
from experiments.models import Network
from experiments.training import sharding
from s2sam_jax import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
Epoch = Callable[[TrainState, int], tuple[TrainState, dict[str, np.ndarray]]]
Loss = Callable[..., Any]


class Losses(NamedTuple):
    """The losses of a network on a data set.

    Attributes:
      loss_fn: with augmentation and dropout.
      plain_loss_fn: without augmentation.
      example_loss_fn: as ``loss_fn``, but the losses of the examples; ``None`` where the loss is no mean of such.
    """

    loss_fn: Loss
    plain_loss_fn: Loss
    example_loss_fn: Loss | None


class Reporter(Protocol):
    """Receives progress: steps done, and rows."""

    def steps(self, count: int) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...


class Task(Protocol):
    """One data set with one network.

    Attributes:
      network: freshly initialised.
      steps_per_epoch: full batches.
      losses: of the network.
      mesh: of devices that it trains on.
    """

    network: Network
    steps_per_epoch: int
    losses: Losses
    mesh: Mesh

    def runner(self, step: Step, reporter: Reporter) -> Epoch:
        """Trains once over the data by this step, as the epoch of that number; metrics have one value a step."""
        ...

    def evaluate(self, params: Any, model_state: Any, final: bool = False) -> dict[str, float]:
        """Figures of the test set, ``test_accuracy`` among them; the costly ones at the end only."""
        ...

    def examples(self) -> Iterator[tuple[Any, jax.Array, jax.Array]]:
        """Batches of what is evaluated on: inputs of the network, labels, and which labels count."""
        ...

    def batches(self, number: int) -> Iterator[Any]:
        """Training batches of an epoch, raw."""
        ...


def build(config: Config, widths: Mapping[str, int] | None = None) -> Network:
    """The network of a config, or with fewer channels in the groups that ``widths`` names."""
    text = models.MODELS[config.model].text
    if text != (config.dataset == "wmt14"):
        raise ValueError(
            f"model={config.model} is for {'text' if text else 'images'}; dataset={config.dataset} is not."
        )
    classes = config.vocabulary if text else data.KINDS[config.dataset].classes
    channels = None if text else data.KINDS[config.dataset].shape[2]
    return models.build(
        config.model,
        width=config.width,
        channels=channels,
        classes=classes,
        seed=config.seed,
        dtype=config.compute,
        widths=widths,
    )


def _module(config: Config):
    """The one for the data of a config, with its ``load``, ``losses`` and ``Task``; they import this one."""
    if config.dataset == "imagenet2012":
        from experiments.tasks import streams

        return streams
    if config.dataset == "wmt14":
        from experiments.tasks import text

        return text
    from experiments.tasks import arrays

    return arrays


def losses(config: Config, network: Network) -> Losses:
    """Of a network on the data of a config, which need not be there."""
    return _module(config).losses(config, network)


def load(config: Config) -> Any:
    """The data of a config, once for all runs on it.

    Raises:
      FileNotFoundError: saying how to get them.
    """
    return _module(config).load(config)


def make(config: Config, loaded: Any, mesh: Mesh | None = None) -> Task:
    """The task of a config on the data that :func:`load` gave; by default on one device."""
    mesh = mesh or sharding.make_mesh()
    sharding.check_batch(mesh, config.batch_size)
    return _module(config).Task(config, build(config), loaded, mesh)


def run_epoch(
    step: Step, state: TrainState, batches: Iterator[Any], reporter: Reporter
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """A step a batch; metrics are fetched once, so that the device never waits for the host."""
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(metrics)
        reporter.steps(1)
    history = jax.device_get(history)
    return state, {name: np.stack([metrics[name] for metrics in history]) for name in history[0]}

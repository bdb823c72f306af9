"""What the loop sees of a task, whatever its data are."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.models import Network
from experiments.rows.jsonl import Row
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

    def row(self, row: Row) -> None: ...


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
        """A function that trains through the epoch of that number; its metrics have one value for each step."""
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


def run_epoch(
    step: Step, state: TrainState, batches: Iterator[Any], reporter: Reporter
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Takes a step on each batch; metrics are fetched once, so that the device never waits for the host."""
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(metrics)
        reporter.steps(1)
    history = jax.device_get(history)
    return state, {name: np.stack([metrics[name] for metrics in history]) for name in history[0]}

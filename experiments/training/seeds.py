"""Runs that differ in their seed alone, trained side by side as one program."""

import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.config import Config
from experiments.tasks.base import Reporter, Task, run_epoch
from experiments.training import loop, optimizers
from experiments.training.checkpoint import Checkpoints
from experiments.training.record import Record
from experiments.trees import stack
from s2sam_jax import TrainState


def train(
    configs: Sequence[Config],
    tasks: Sequence[Task],
    reporters: Sequence[Reporter],
    start: TrainState | None = None,
    checkpoints: Sequence[Checkpoints] | None = None,
) -> list[TrainState]:
    """As :func:`experiments.training.loop.train`, for each config; their seconds are those of all together.

    States and batches are stacked along a new first axis.

    Raises:
      FloatingPointError: as soon as one breaks down.
      ValueError: for checkpoints without a common epoch to go on from, and for a mesh of several devices.
    """
    _check_mesh(tasks[0].mesh)
    books = checkpoints or [None] * len(configs)
    records = [Record(*of_one) for of_one in zip(configs, tasks, reporters, books, strict=True)]
    epoch = None if checkpoints is None else common_epoch(configs, checkpoints)
    groups = tasks[0].network.groups
    txs = [optimizers.make(config, tasks[0].steps_per_epoch, groups) for config in configs]
    states = [
        record.begin(lambda c=config, t=task, tx=tx: loop.first_state(c, t, tx, start), epoch)
        for config, task, tx, record in zip(configs, tasks, txs, records, strict=True)
    ]
    # Seeds are in the states: the step is the same whichever config it is made from.
    step, stacked = loop.train_step(configs[0], tasks[0].losses, txs[0], vmap=True), stack(*states)
    for number in range(records[0].epoch, configs[0].epochs):
        started = time.perf_counter()
        stacked, metrics = run_epoch(step, stacked, _batches(tasks, number), reporters[0])
        seconds, states = time.perf_counter() - started, _unstack(stacked)
        for books_of_one in checkpoints or ():
            books_of_one.wait()  # so that after an interruption there is an epoch that all have
        for index, (record, state) in enumerate(zip(records, states, strict=True)):
            record.add(state, {name: values[:, index] for name, values in metrics.items()}, seconds)
    return [record.finish(state) for record, state in zip(records, states, strict=True)]


def common_epoch(configs: Sequence[Config], checkpoints: Sequence[Checkpoints]) -> int | None:
    """The newest epoch of which all have a checkpoint; None if none has any."""
    epochs = {config.seed: found.epochs for config, found in zip(configs, checkpoints, strict=True)}
    common = set.intersection(*(set(found) for found in epochs.values()))
    if not common and any(epochs.values()):
        raise ValueError(
            f"The seeds have checkpoints of no common epoch to go on from together: {epochs}. Train them without "
            "--vmap, each from where it is, or anew with --overwrite."
        )
    return max(common, default=None)


def _batches(tasks: Sequence[Task], number: int) -> Iterator[Any]:
    return (stack(*of_all) for of_all in zip(*(task.batches(number) for task in tasks), strict=True))


@jax.jit
def _unstack(tree: Any) -> list[Any]:
    count = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(operator.itemgetter(index), tree) for index in range(count)]


def _check_mesh(mesh: Mesh) -> None:
    if mesh.size > 1:
        raise ValueError(f"--vmap trains seeds on one device, and the mesh has {mesh.size}; leave one of them out.")

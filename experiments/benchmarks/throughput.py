"""Images a second and peak memory of steps of SGD, S2-SAM and SAM under RigL, on noise: a table without its data."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.steps import Workload, optimizer
from experiments.benchmarks.timing import Row, figure, paired
from experiments.config import ComputeName, Config
from experiments.training.record import perturbation

OPTIMIZERS = ("sgd", "s2sam", "sam")


def rows(config: Config, formats: Sequence[ComputeName], rounds: int, steps: int) -> Iterator[Row]:
    """Speed and memory of a network in each format of its products; memory as XLA says of the whole step."""
    for compute in formats:
        workload = Workload(dataclasses.replace(config, compute=compute))
        name = f"{config.model}, RigL-ERK 90 %, batch {config.batch_size}, {compute}"
        runners, peaks = {}, {}
        for which in OPTIMIZERS:
            runners[which], peaks[which] = _runner(workload, which, steps)
        seconds = paired(runners, rounds)
        for which in OPTIMIZERS:
            speed = steps * config.batch_size / seconds[which]
            low, middle, high = map(float, np.quantile(speed, [0.25, 0.5, 0.75]))
            yield Row(f"throughput, {name}, {which}", middle, low, high, "images/s")
            yield figure(f"peak memory, {name}, {which}", peaks[which] / 1e6, "MB")
        kept = perturbation(workload.config, runners["s2sam"]())["epsilon_cosine"]
        yield figure(f"cosine of the perturbation with what is left of it, {name}", kept, "")


def _runner(workload: Workload, which: str, steps: int) -> tuple[Callable[[], Any], int]:
    """A case that goes on training by so many steps at each call, and the bytes that a step holds at the most."""
    tx = optimizer(which)
    step = workload.compiled(tx)
    state = [workload.state(tx)]

    def run() -> Any:
        for _ in range(steps):
            state[0], _ = step(state[0], workload.batch)
        return state[0]

    return run, timing.memory(step).peak

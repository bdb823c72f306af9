"""Training under the checks of :func:`s2sam_jax.checked`."""

from typing import Any

import jax
from jax.experimental import checkify

from experiments.tasks import Reporter, Step, Task, run_epoch
from s2sam_jax import TrainState


class DebugEpochs:
    """Epochs of a step that checks itself, in which every step is waited for and raises what it has found."""

    def __init__(self, task: Task, step: Step):
        self._task, self._step = task, jax.jit(checkify.checkify(step))

    def __call__(self, state: TrainState, number: int, reporter: Reporter) -> tuple[TrainState, dict[str, Any]]:
        return run_epoch(self._throwing, state, self._task.batches(number), reporter)

    def _throwing(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        error, result = self._step(state, batch)
        error.throw()
        return result

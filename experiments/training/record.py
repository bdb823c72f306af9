"""The bookkeeping of a run from epoch to epoch: what its next row is made of, its rows, and its checkpoints."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments import sharding
from experiments.config import Config
from experiments.rows.jsonl import Row
from experiments.tasks.base import Reporter, Task
from experiments.training import churn
from experiments.training.checkpoint import Checkpoints
from s2sam_jax import (
    MSAMState,
    S2SAMState,
    TrainState,
    eval_params,
    recalibrate_batch_stats,
    sharpness_metrics,
    warn_if_collapsed,
    warn_if_perturbation_lost,
)

RECALIBRATION_BATCHES = 20
PERTURBING = (S2SAMState, MSAMState)  # They tell the perturbation of the next step; sam's is inside its update.


class Last:
    """A reporter that keeps the last row."""

    def __init__(self):
        self.last: Row = {}

    def steps(self, count: int) -> None: ...

    def row(self, row: Row) -> None:
        self.last = row


class Record:
    """Bookkeeping of one run.

    A checkpoint is made before the row of its epoch is reported and holds what that is made of. So a run that goes on
    from it reports this row, anew or for the first time, and no row is lost.

    Attributes:
      epoch: how many are done.
    """

    def __init__(self, config: Config, task: Task, reporter: Reporter, checkpoints: Checkpoints | None = None):
        self._config, self._task, self._reporter, self._checkpoints = config, task, reporter, checkpoints
        self._begin = time.perf_counter()
        self._history: list[dict[str, float]] = []  # an entry an epoch since the last row
        self._figures: dict[str, float] | None = None  # of the test set after this epoch, if it was evaluated
        self._masks: Any = None  # after this epoch
        self._counts: churn.Counts = {}  # of the masks since the last row
        self._compiles = True  # in the next epoch, whose time is then no measure of speed
        self._warns = True  # at the next row, if low precision takes the perturbation away
        self.epoch = 0

    def begin(self, create: Callable[[], TrainState], epoch: int | None = None) -> TrainState:
        """The state to go on from: that of the checkpoint of an epoch, or without one a new one."""
        if self._checkpoints is None or epoch is None:
            state = create()
            self._masks = churn.masks_of(self._config, state)
            return state
        like = jax.eval_shape(create)
        like = jax.tree.map(
            lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
            like,
            sharding.of_state(self._task.mesh, like),
        )
        state, progress = self._checkpoints.restore(epoch, like)
        self.epoch, self._history, self._figures = progress["epoch"], progress["history"], progress["figures"]
        self._masks, self._counts = churn.masks_of(self._config, state), progress["masks"]
        self._begin -= progress["seconds"]
        self._reporter.steps(self.epoch * self._task.steps_per_epoch)
        self._report(state)
        return state

    def add(self, state: TrainState, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Takes in an epoch: the state after it, the metrics of its steps, and how long it took.

        Raises:
          FloatingPointError: naming the step at which something was not finite.
          OSError: when a checkpoint cannot be written.
        """
        stop_if_bad(state)
        self.epoch += 1
        self._history.append(_means(metrics) | ({} if self._compiles else {"seconds": seconds}))
        self._compiles = False
        before, self._masks = self._masks, churn.masks_of(self._config, state)
        self._counts = churn.total(self._counts, churn.count(before, self._masks))
        if self._masks is not None and self.epoch in (1, self._config.epochs):  # SNIP has pruned by now, or all have
            warn_if_collapsed(state.opt_state)
        last = self.epoch == self._config.epochs
        self._figures = self._evaluate(state) if last or self.epoch % self._config.eval_every == 0 else None
        if self._checkpoints is not None and (last or self.epoch % self._config.checkpoint_every == 0):
            accuracy = None if self._figures is None else self._figures["test_accuracy"]
            self._checkpoints.save(self.epoch, state, self._progress(), accuracy)
        self._report(state)

    def finish(self, state: TrainState) -> TrainState:
        """Recalibrates BatchNorm statistics and reports the last row; returns the final state."""
        row = self._row(state)
        state = _recalibrated(self._config, self._task, state)
        final = self._evaluate(state, final=True)
        row |= {"test_accuracy_recalibrated": final.pop("test_accuracy"), "layers": layer_sparsity(self._config, state)}
        self._reporter.row(row | final | {"seconds": time.perf_counter() - self._begin})
        return state

    def _report(self, state: TrainState) -> None:
        """The row of this epoch, if there is one; the last is left to :meth:`finish`."""
        if self._figures is not None and self.epoch < self._config.epochs:
            self._reporter.row(self._row(state) | {"seconds": time.perf_counter() - self._begin})
            self._history, self._counts = [], {}

    def _row(self, state: TrainState) -> Row:
        names = dict.fromkeys(name for epoch in self._history for name in epoch)
        row: Row = {name: float(np.mean([e[name] for e in self._history if name in e])) for name in names}
        images = self._task.steps_per_epoch * self._config.batch_size
        speed = {"images_per_second": images / row.pop("seconds")} if "seconds" in row else {}
        row |= speed | {
            "sparsity": self._history[-1]["sparsity"],
            "epoch": self.epoch,
            "step": int(state.step),
            "final": self.epoch == self._config.epochs,
            "masks": self._counts,
        }
        return row | self._perturbation(state) | (self._figures or {})

    def _perturbation(self, state: TrainState) -> dict[str, float]:
        metrics = perturbation(self._config, state)
        # A radius that follows a schedule may be zero by plan.
        if self._warns and metrics and (metrics["epsilon_norm"] or self._config.rho_schedule == "constant"):
            warn_if_perturbation_lost(metrics)
        self._warns = False
        return metrics

    def _progress(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._begin
        progress = {"epoch": self.epoch, "history": self._history, "figures": self._figures, "masks": self._counts}
        return progress | {"seconds": seconds}

    def _evaluate(self, state: TrainState, final: bool = False) -> dict[str, float]:
        return self._task.evaluate(eval_params(state.params, state.opt_state), state.model_state, final=final)


def layer_sparsity(config: Config, state: TrainState) -> dict[str, list[int]]:
    """Per kernel, by path: ``[zeros of the mask, size]``; empty for dense training."""
    masks = churn.masks_of(config, state)
    return {name: counts[:2] for name, counts in churn.count(masks, masks).items()}


def perturbation(config: Config, state: TrainState) -> dict[str, float]:
    """Norm of the perturbation, and how well the format of products keeps its direction; empty where none is kept."""
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, PERTURBING))
    if not any(isinstance(leaf, PERTURBING) for leaf in leaves):
        return {}
    metrics = _sharpness_metrics(eval_params(state.params, state.opt_state), state.opt_state, config.compute)
    return {name: float(metrics[name]) for name in ("epsilon_norm", "epsilon_cosine")}


@partial(jax.jit, static_argnames="compute")
def _sharpness_metrics(params: Any, opt_state: Any, compute: str) -> dict[str, jax.Array]:
    return sharpness_metrics(params, opt_state, compute_dtype=compute)


def stop_if_bad(state: TrainState) -> None:
    if (bad := int(state.first_bad_step)) >= 0:
        raise FloatingPointError(
            f"Training broke down at step {bad}: the loss or the update was not finite. Try a lower learning_rate or "
            "rho."
        )


def _means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the steps of an epoch; the sparsity is that of the last."""
    means = {"train_loss" if name == "loss" else name: float(np.mean(values)) for name, values in metrics.items()}
    return means | {"sparsity": float(metrics["sparsity"][-1]) if "sparsity" in metrics else 0.0}


def _recalibrated(config: Config, task: Task, state: TrainState) -> TrainState:
    if not jax.tree.leaves(state.model_state):
        return state
    batches = (batch for batch, _ in zip(task.batches(config.epochs), range(RECALIBRATION_BATCHES), strict=False))
    params = eval_params(state.params, state.opt_state)
    return state._replace(
        model_state=recalibrate_batch_stats(task.losses.loss_fn, params, state.model_state, batches, seed=config.seed)
    )

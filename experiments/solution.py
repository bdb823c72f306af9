"""What the analyses look at: a trained network as a loss of its weights, on training data without augmentation."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from experiments import jsonl, runs, tasks
from experiments.config import Config
from experiments.tasks import Task
from s2sam_jax import TrainState, eval_params, get_masks


@dataclasses.dataclass(frozen=True)
class Solution:
    """Clean weights, which of them live (None if dense), and the loss in evaluation mode on fixed batches."""

    params: Any
    masks: Any
    loss_fn: Callable[[Any, Any], jax.Array]
    batches: list[Any]


def of_run(folder: Path, data: Path | None, examples: int) -> tuple[Config, Solution]:
    """The final state of a finished run."""
    config = runs.read_config(folder, data)
    task = tasks.make(config, tasks.load(config))
    return config, of_state(config, task, runs.restore(folder), examples)


def look(
    folder: Path,
    data: Path | None,
    examples: int,
    console: Console,
    work: str,
    total: Callable[[Solution], int],
    measure: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """A row of what ``measure(solution, progress=...)`` finds at a finished run, under a bar of ``total`` steps."""
    config, found = of_run(folder, data, examples)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(work, total=total(found))
        figures = measure(found, progress=lambda count: bar.advance(task, count))
    return runs.provenance(config) | figures | {"examples": len(found.batches) * config.batch_size}


def present(
    row: dict[str, Any],
    rows: Path,
    figure: Path,
    draw: Callable[[dict[str, Any], Path], None],
    lines: list[str],
    console: Console,
) -> None:
    """Writes row and figure, both in the run's folder, and prints what there is to say."""
    jsonl.write(rows, [row])
    draw({rows.resolve().parent.name: row}, figure)
    for line in [*lines, f"Files: {rows}, {figure}"]:
        console.print(line, soft_wrap=True)


def of_state(config: Config, task: Task, state: TrainState, examples: int) -> Solution:
    """A state, on the first ``examples`` of the training data in the order of the first epoch, in whole batches.

    Raises:
      ValueError: for fewer examples than a batch.
    """
    if examples < config.batch_size:
        raise ValueError(f"examples={examples} must be at least one batch of {config.batch_size}.")
    batches = list(itertools.islice(task.batches(0), examples // config.batch_size))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return task.plain_loss_fn(params, state.model_state, batch, jax.random.key(0))[0]

    masks = None if config.method == "dense" else get_masks(state.opt_state, state.params)
    return Solution(eval_params(state.params, state.opt_state), masks, loss_fn, batches)

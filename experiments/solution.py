"""What the analyses look at: a trained network as a loss of its weights, on training data without augmentation."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro
from rich import progress
from rich.console import Console

from experiments import tasks
from experiments.config import Config
from experiments.rows import jsonl, provenance
from experiments.rows.jsonl import Row
from experiments.tasks.base import Task
from experiments.training import runs
from s2sam_jax import TrainState, eval_params, get_masks

Progress = Callable[[int], None]  # Is told of each piece of work that is done.


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What every analysis of a finished run is told; its own options come on top."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    data: Path | None = None  # Where its data set lies, if no longer where it was.
    examples: int = 1024  # Training images to look at; whole batches are used.


@dataclasses.dataclass(frozen=True)
class Solution:
    """Clean weights, which of them live (None if dense), and the loss in evaluation mode on fixed batches."""

    params: Any
    masks: Any
    loss_fn: Callable[[Any, Any], jax.Array]
    batches: list[Any]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A command that looks at a finished run, and leaves NAME.jsonl and NAME.png in its folder."""

    name: str
    work: str  # What the progress bar counts,
    total: Callable[[Any, Solution], int]  # and how many of them there are for these arguments.
    measure: Callable[..., Row]  # Of a solution, the analysis's own options and progress(count).
    draw: Callable[[dict[str, Row], Path], None]
    say: Callable[[Row], list[str]]

    @property
    def rows(self) -> str:
        return f"{self.name}.jsonl"

    @property
    def figure(self) -> str:
        return f"{self.name}.png"

    def run(self, arguments: Arguments, console: Console) -> Row:
        """Measures, writes, draws and prints; returns the row."""
        folder = arguments.run_dir
        config, found = of_run(folder, arguments.data, arguments.examples)
        common = {field.name for field in dataclasses.fields(Arguments)}
        options = {name: value for name, value in vars(arguments).items() if name not in common}
        with progress.Progress(console=console, transient=True) as bar:
            task = bar.add_task(self.work, total=self.total(arguments, found))
            figures = self.measure(found, **options, progress=lambda count: bar.advance(task, count))
        row = provenance.of_run(config) | figures | {"examples": len(found.batches) * config.batch_size}
        jsonl.write(folder / self.rows, [row])
        self.draw({folder.resolve().name: row}, folder / self.figure)
        for line in [*self.say(row), f"Files: {folder / self.rows}, {folder / self.figure}"]:
            console.print(line, soft_wrap=True)
        return row


def of_run(folder: Path, data: Path | None, examples: int) -> tuple[Config, Solution]:
    """The final state of a finished run."""
    config = runs.read_config(folder, data)
    task = tasks.make(config, tasks.load(config))
    return config, of_state(config, task, runs.restore(folder), examples)


def of_state(config: Config, task: Task, state: TrainState, examples: int) -> Solution:
    """A state, on the first ``examples`` of the training data in the order of the first epoch, in whole batches.

    Raises:
      ValueError: for fewer examples than a batch.
    """
    if examples < config.batch_size:
        raise ValueError(f"examples={examples} must be at least one batch of {config.batch_size}.")
    batches = list(itertools.islice(task.batches(0), examples // config.batch_size))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return task.losses.plain_loss_fn(params, state.model_state, batch, jax.random.key(0))[0]

    masks = None if config.method == "dense" else get_masks(state.opt_state, state.params)
    return Solution(eval_params(state.params, state.opt_state), masks, loss_fn, batches)

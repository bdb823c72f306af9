"""Evaluates a finished run from its folder alone, and checks its masks."""

import dataclasses
from pathlib import Path

import jax
import tyro
from rich.console import Console

from experiments import cli, tasks
from experiments.training import record, runs
from s2sam_jax import check_masks, eval_params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluates a run: test accuracy, sparsity, and whether every promise about its masks holds. Writes nothing."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    which: runs.Which = "last"  # The final state, or that after the epoch of the best test accuracy.
    data: Path | None = None  # Where its data set lies, if no longer where it was.


def evaluate(arguments: Arguments, console: Console) -> tuple[float, float]:
    """Prints and returns test accuracy and sparsity (fraction of zeros over all kernels)."""
    config = runs.read_config(arguments.run_dir, arguments.data)
    task = tasks.make(config, tasks.load(config))
    state = runs.restore(arguments.run_dir, arguments.which)
    params = eval_params(state.params, state.opt_state)
    checked = "no masks: dense"
    if config.method != "dense":
        check_masks(params, state.opt_state)
        checked = "masks hold"
    accuracy = task.evaluate(params, state.model_state)["test_accuracy"]
    layers = record.layer_sparsity(config, state).values()
    sparsity = sum(zeros for zeros, _ in layers) / max(1, sum(size for _, size in layers))
    measured = "accuracy on held-out images" if config.validation else "test accuracy"
    notes = _notes(arguments.which, bool(jax.tree.leaves(state.model_state)))
    console.print(f"{measured} {accuracy:.2%}{notes}, sparsity {sparsity:.2%}, {checked}", soft_wrap=True)
    return accuracy, sparsity


def _notes(which: runs.Which, batch_norm: bool) -> str:
    """How to read an accuracy: BatchNorm statistics are recalibrated at the end of a run alone."""
    statistics = {"last": "recalibrated", "best": "running"}[which] + " BatchNorm statistics"
    notes = [statistics] * batch_norm + ["of the epoch that is best by this figure, so optimistic"] * (which == "best")
    return f" ({'; '.join(notes)})" if notes else ""


@cli.command
def main(arguments: Arguments) -> tuple[float, float]:
    return evaluate(arguments, Console())


if __name__ == "__main__":
    main()

"""Evaluates a finished run from its folder alone, and checks its masks."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from experiments import cli, tasks
from experiments.training import record, runs
from s2sam_jax import check_masks, eval_params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluates a run: test accuracy, sparsity, and whether every promise about its masks holds."""

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
    console.print(f"test accuracy {accuracy:.2%}, sparsity {sparsity:.2%}, {checked}")
    return accuracy, sparsity


@cli.command
def main(arguments: Arguments) -> tuple[float, float]:
    return evaluate(arguments, Console())


if __name__ == "__main__":
    main()

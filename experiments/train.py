"""The main job: trains one network, or the same one with several optimizers, and shows the result."""

import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console

from experiments import data, loop, plots, report, runs
from experiments.config import Config, OptimizerName
from experiments.data import Dataset
from experiments.loop import Row
from s2sam_jax import TrainState


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a sparse network; without arguments, scikit-learn's digits with RigL and S2-SAM."""

    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)
    compare: tuple[OptimizerName, ...] = ()  # Train with each of these optimizers, from the same seed.
    overwrite: bool = False  # Train anew even if the result is there.


class _Recorder:
    """Writes every row to the run's folder, and passes it on to the progress bar."""

    def __init__(self, config: Config, folder: Path, bar: report.ProgressBar):
        self._provenance, self._folder, self._bar = runs.provenance(config), folder, bar

    def steps(self, count: int) -> None:
        self._bar.steps(count)

    def row(self, row: Row) -> None:
        runs.append(self._folder, self._provenance | row)
        self._bar.row(row)


def train(arguments: Arguments, console: Console) -> dict[str, Path]:
    """Runs what was asked for and prints the result; returns the folders of the runs, by optimizer."""
    optimizers = arguments.compare or (arguments.config.optimizer,)
    configs = {name: dataclasses.replace(arguments.config, optimizer=name) for name in optimizers}
    fresh = [config for config in configs.values() if arguments.overwrite or not config.run_dir.is_dir()]
    if fresh:
        dataset = data.load(arguments.config.dataset, arguments.config.data, arguments.config.subset)
        start = _start(arguments.config)
        for config in fresh:
            _run(config, dataset, start, console)
    folders = {name: config.run_dir for name, config in configs.items()}
    rows = {name: runs.rows(folder) for name, folder in folders.items()}
    console.print(_title(arguments.config), soft_wrap=True)
    console.print(report.result_table({name: rows[name][-1] for name in rows}))
    if len(fresh) < len(configs):
        console.print("Shown from stored runs where they exist; add --overwrite to train anew.")
    for folder in folders.values():
        console.print(f"Files: {folder}", soft_wrap=True)
    if arguments.compare:
        file = arguments.config.out / f"compare-{'-'.join(optimizers)}-{configs[optimizers[0]].name}.png"
        plots.draw(rows, _title(arguments.config), file)
        console.print(f"Curves: {file}", soft_wrap=True)
    return folders


def _run(config: Config, dataset: Dataset, start: TrainState | None, console: Console) -> None:
    folder = runs.begin(config)
    steps_per_epoch = len(dataset.train_labels) // config.batch_size
    with report.ProgressBar(console, config.optimizer, config.epochs, steps_per_epoch) as bar:
        state = loop.train(config, dataset, _Recorder(config, folder, bar), start)
    runs.finish(config, folder, state)


def _start(config: Config) -> TrainState | None:
    """The run to start from, which must be of the same network."""
    if config.init_from is None:
        return None
    other = runs.read_config(config.init_from)
    for field in ("dataset", "model", "width"):
        if getattr(config, field) != getattr(other, field):
            raise ValueError(
                f"--init-from {config.init_from} has {field}={getattr(other, field)}, and this run "
                f"{getattr(config, field)}; they must agree."
            )
    return runs.restore(config.init_from)


def _title(config: Config) -> str:
    kind = "dense" if config.method == "dense" else f"{config.method}, {config.sparsity:.0%} sparse"
    return f"{config.dataset}, {config.model} x{config.width}, {kind}, seed {config.seed}"


def main(argv: list[str] | None = None) -> dict[str, Path]:
    """The command line; returns the folders of the runs, by optimizer."""
    console = Console()
    arguments = tyro.cli(Arguments, args=argv)
    try:
        return train(arguments, console)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

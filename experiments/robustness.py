"""Accuracy of finished runs under common corruptions, CIFAR-10-C or ImageNet-C; of several runs paired by seed.

    python -m experiments.robustness runs/SOME_CIFAR10_RUN runs/OTHER_RUN

Each corruption is made once for all runs. Corruptions that are computed lack frost, and their mean is over the other
fourteen; the summary names what is missing. ``--rows FILE.jsonl`` collects one row per run, with a page beside it: does
S2-SAM make sparse networks more robust?
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments import cli, tasks
from experiments.config import Config
from experiments.datasets import cifar_c, corruptions, kinds
from experiments.datasets.corruptions import Cell
from experiments.figures.robustness import draw_corruptions
from experiments.pages import corruptions as page
from experiments.rows import jsonl, provenance
from experiments.rows.jsonl import Row
from experiments.tasks import images
from experiments.training import runs
from s2sam_jax import eval_params

BATCH = 500


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes accuracies under each corruption and severity, and a figure, into each run's folder; prints a summary."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # Folders of finished runs on one data set.
    data: Path | None = None  # Where the clean test set lies, if no longer where it was.
    # TFDS folder of CIFAR-10-C or ImageNet-C, or folder of CIFAR-10-C's .npy files; default: CIFAR-10's are computed,
    # without frost.
    corrupted: Path | None = None
    corruptions: tuple[str, ...] = ()  # Only these, such as fog; default: all there are.
    examples: int | None = None  # Only the first so many test images; for corruptions that are computed.
    # Add a row for each run that has none to this file, and write a page beside it; for corruptions that are computed.
    rows: Path | None = None


@cli.command
def main(arguments: Arguments) -> dict[Path, Row]:
    """The command line; returns the summaries by run."""
    found = evaluate(arguments, Console())
    if arguments.rows is not None:
        page.write(arguments.rows)
    return found


def evaluate(arguments: Arguments, console: Console) -> dict[Path, Row]:
    """Accuracy on every cell, written into the folders of the runs; returns the summaries of those that had no row."""
    asked = {folder: runs.read_config(folder, arguments.data) for folder in arguments.runs}
    _check(arguments, asked.values())
    old = [] if arguments.rows is None else jsonl.read(arguments.rows, ("examples", "by_corruption"))
    done = {(Config.from_json(row["config"]).digest, row["seed"]) for row in old}
    configs = {folder: config for folder, config in asked.items() if (config.digest, config.seed) not in done}
    if there := len(asked) - len(configs):
        said = f"{there} runs have their rows in {arguments.rows} already, of {old[0]['examples']} images."
        console.print(said, soft_wrap=True)
    if not configs:
        return {}
    first = next(iter(configs.values()))
    loaded = tasks.load(first)
    if arguments.corrupted is None:
        kept = slice(arguments.examples)
        loaded = loaded._replace(test_images=loaded.test_images[kept], test_labels=loaded.test_labels[kept])
    cells = _cells(arguments, first, loaded)
    if arguments.rows is not None:
        names = [name for name in cifar_c.CORRUPTIONS if name in (arguments.corruptions or (name,))]
        same = {"examples": len(loaded.test_labels), "by_corruption": dict.fromkeys(names)}
        page.check([*old, *({"config": config.to_json()} | same for config in configs.values())])
    summaries = {}
    for folder, (rows, clean) in _accuracies(configs, loaded, cells).items():
        summaries[folder] = summary = corruptions.summary(rows, clean)
        jsonl.write(folder / runs.ROBUSTNESS, [row | {"run": folder.name} for row in rows] + [{"summary": summary}])
        config = configs[folder]
        row, figure = {"optimizer": config.optimizer} | summary, (folder / runs.ROBUSTNESS).with_suffix(".png")
        draw_corruptions([row], folder.name, figure)
        if arguments.rows is not None:
            jsonl.append(arguments.rows, row | {"examples": len(loaded.test_labels)} | provenance.of_run(config))
        console.print(summary)
        console.print(f"Rows: {folder / runs.ROBUSTNESS}; figure: {figure.name}", soft_wrap=True)
    return summaries


def _check(arguments: Arguments, configs: Collection[Config]) -> None:
    if not configs:
        raise ValueError("There is nothing to look at: give the folders of runs.")
    dataset, *others = {config.dataset for config in configs}
    if not others and dataset not in ("cifar10", "imagenet2012"):
        raise ValueError(f"There are corrupted forms of cifar10 and imagenet2012; the run is of {dataset}.")
    if others or len(set(map(images.side, configs))) > 1:
        raise ValueError("The runs must be on the same data set and size of images; give the others by themselves.")
    if arguments.corrupted is None and dataset != "cifar10":
        raise ValueError("ImageNet-C cannot be computed here: pass --corrupted with the TFDS folder that has it.")
    if arguments.examples is not None and arguments.examples < 1:
        raise ValueError(f"examples must be at least 1; got {arguments.examples}.")
    for option, value in (("examples", arguments.examples), ("rows", arguments.rows)):
        if arguments.corrupted is not None and value is not None:
            raise ValueError(f"{option}={value} is for corruptions that are computed; leave it out with --corrupted.")


def _cells(arguments: Arguments, config: Config, loaded: Any) -> Iterator[Cell]:
    """The corrupted images: computed, read as they were released, or as TFDS has prepared them."""
    folder, names = arguments.corrupted, arguments.corruptions
    if folder is None:
        clean = np.asarray(loaded.test_images), np.asarray(loaded.test_labels)
        return corruptions.computed(*clean, min(BATCH, len(clean[1])), names=names)
    if any(folder.glob("*.npy")):
        return corruptions.from_npy(folder, BATCH, names=names)
    name, side = f"{config.dataset}_corrupted", images.side(config)
    return corruptions.from_tfds(name, BATCH, folder, image_size=side, names=names)


def _accuracies(
    configs: Mapping[Path, Config], loaded: Any, cells: Iterator[Cell]
) -> dict[Path, tuple[list[Row], float]]:
    """For each run one row per cell, and its accuracy on clean images."""
    predictors, clean = {}, {}
    for folder, config in configs.items():
        # On test images, also of a run that was evaluated on held-out ones.
        task, state = tasks.make(dataclasses.replace(config, validation=0), loaded), runs.restore(folder)
        params, model_state = eval_params(state.params, state.opt_state), state.model_state
        clean[folder] = task.evaluate(params, model_state)["test_accuracy"]
        predict = images.predictor(task.network, kinds.KINDS[config.dataset])
        predictors[folder] = partial(predict, params, model_state)
    rows: dict[Path, list[Row]] = {folder: [] for folder in configs}
    for cell in track(cells, description="corruptions", total=None):
        for folder, predict in predictors.items():
            rows[folder].append(corruptions.accuracy_row(cell, predict))
    return {folder: (rows[folder], clean[folder]) for folder in configs}


if __name__ == "__main__":
    main()

"""Accuracy of finished runs under common corruptions: CIFAR-10-C or ImageNet-C.

    python -m experiments.robustness runs/SOME_CIFAR10_RUN

Corruptions that are computed lack frost, and their mean is over the other fourteen; the summary names what is missing.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments import cli, data, models, tasks
from experiments.config import Config
from experiments.datasets import corruptions
from experiments.datasets.corruptions import Cell
from experiments.rows import jsonl
from experiments.tasks import images
from experiments.training import runs
from s2sam_jax import eval_params

BATCH = 500


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes one row a corruption and severity, and prints their summary."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    data: Path | None = None  # Of the clean test set, if no longer where it was.
    corrupted: Path | None = (
        None  # TFDS folder, or CIFAR-10-C's .npy files; default: computed, on CIFAR-10, without frost.
    )
    corruptions: tuple[str, ...] = ()  # Only these, such as fog; default: all there are.
    rows: int | None = None  # Only the first so many test images; for corruptions that are computed.


@cli.command
def main(arguments: Arguments) -> dict[str, object]:
    """The command line; returns the summary."""
    return evaluate(arguments, Console())


def evaluate(arguments: Arguments, console: Console) -> dict[str, object]:
    """Accuracy on every cell, written into the run's folder; returns the summary."""
    config = runs.read_config(arguments.run_dir, arguments.data)
    _check(arguments, config)
    state, loaded = runs.restore(arguments.run_dir), tasks.load(config)
    if arguments.corrupted is None:
        kept = slice(arguments.rows)
        loaded = loaded._replace(test_images=loaded.test_images[kept], test_labels=loaded.test_labels[kept])
    # On test images, also of a run that was evaluated on held-out ones.
    cells, task = _cells(arguments, config, loaded), tasks.make(dataclasses.replace(config, validation=0), loaded)
    params = eval_params(state.params, state.opt_state)
    predict = images.predictor(task.network, data.KINDS[config.dataset])
    clean = task.evaluate(params, state.model_state)["test_accuracy"]
    found = corruptions.accuracy_rows(cells, lambda batch: np.asarray(predict(params, state.model_state, batch)))
    rows = list(track(found, description="corruptions", total=None))
    summary = corruptions.summary(rows, clean)
    lines = [row | {"run": arguments.run_dir.name} for row in rows] + [{"summary": summary}]
    file = arguments.run_dir / runs.ROBUSTNESS
    jsonl.write(file, lines)
    console.print(summary)
    console.print(f"Rows: {file}", soft_wrap=True)
    return summary


def _check(arguments: Arguments, config: Config) -> None:
    if config.dataset not in ("cifar10", "imagenet2012"):
        raise ValueError(f"There are corrupted forms of cifar10 and imagenet2012; the run is of {config.dataset}.")
    if arguments.corrupted is None and config.dataset != "cifar10":
        raise ValueError("ImageNet-C cannot be computed here: pass --corrupted with the TFDS folder that has it.")
    if arguments.rows is not None and arguments.rows < 1:
        raise ValueError(f"rows must be at least 1; got {arguments.rows}.")
    if arguments.corrupted is not None and arguments.rows is not None:
        raise ValueError(f"rows={arguments.rows} is for corruptions that are computed; leave it out with --corrupted.")


def _cells(arguments: Arguments, config: Config, loaded: Any) -> Iterator[Cell]:
    """Computed, released or prepared by TFDS."""
    folder, names = arguments.corrupted, arguments.corruptions
    if folder is None:
        clean = np.asarray(loaded.test_images), np.asarray(loaded.test_labels)
        return corruptions.computed(*clean, BATCH, names=names)
    if any(folder.glob("*.npy")):
        return corruptions.from_npy(folder, BATCH, names=names)
    size = config.image_size or models.MODELS[config.model].image_size or 32
    return corruptions.from_tfds(f"{config.dataset}_corrupted", BATCH, folder, image_size=size, names=names)


if __name__ == "__main__":
    main()

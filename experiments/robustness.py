"""Accuracy of finished runs under common corruptions: CIFAR-10-C or ImageNet-C."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments import data, models, runs, tasks
from experiments.datasets import corruptions
from experiments.tasks import images
from s2sam_jax import eval_params

BATCH = 500


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes one row a corruption and severity, and prints their summary."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    data: Path | None = None  # Of the clean test set, if no longer where it was.
    corrupted: Path | None = None  # TFDS folder, or CIFAR-10-C's .npy files; default: computed, for CIFAR-10 alone.
    rows: int | None = None  # Only the first so many test images; for corruptions that are computed.


def main(argv: list[str] | None = None) -> dict[str, object]:
    """The command line; returns the summary."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        return evaluate(arguments, Console())
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


def evaluate(arguments: Arguments, console: Console) -> dict[str, object]:
    """Accuracy on every cell, written into the run's folder; returns the summary."""
    config = runs.read_config(arguments.run_dir)
    config = dataclasses.replace(config, data=arguments.data or config.data)
    if config.dataset not in ("cifar10", "imagenet2012"):
        raise ValueError(f"There are corrupted forms of cifar10 and imagenet2012; the run is of {config.dataset}.")
    state, loaded = runs.restore(arguments.run_dir), tasks.load(config)
    network, kind = tasks.build(config), data.KINDS[config.dataset]
    params, predict = eval_params(state.params, state.opt_state), images.predictor(network, kind)

    if arguments.corrupted is None:
        if config.dataset != "cifar10":
            raise ValueError("ImageNet-C cannot be computed here: pass --corrupted with the TFDS folder that has it.")
        test, labels = (np.asarray(x)[: arguments.rows] for x in (loaded.test_images, loaded.test_labels))
        cells = corruptions.computed(test, labels, BATCH)
        task = tasks.make(config, loaded._replace(test_images=test, test_labels=labels))
    else:
        size = config.image_size or models.MODELS[config.model].image_size or kind.shape[0]
        released = any(arguments.corrupted.glob("*.npy"))
        name = f"{config.dataset}_corrupted"
        cells = (
            corruptions.from_npy(arguments.corrupted, BATCH)
            if released
            else corruptions.from_tfds(name, BATCH, arguments.corrupted, image_size=size)
        )
        task = tasks.make(config, loaded)
    clean = task.evaluate(params, state.model_state)["test_accuracy"]
    found = corruptions.accuracy_rows(cells, lambda batch: np.asarray(predict(params, state.model_state, batch)))
    rows = list(track(found, description="corruptions", total=None))
    summary = corruptions.summary(rows, clean)
    lines = [row | {"run": arguments.run_dir.name} for row in rows] + [{"summary": summary}]
    file = arguments.run_dir / runs.ROBUSTNESS
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    console.print(summary)
    console.print(f"Rows: {file}", soft_wrap=True)
    return summary


if __name__ == "__main__":
    main()

"""Accuracy of finished runs under common corruptions, CIFAR-10-C or ImageNet-C; of several runs paired by seed.

    python -m experiments.robustness runs/SOME_CIFAR10_RUN runs/OTHER_RUN

Each corruption is made once for all runs. Corruptions that are computed lack frost, and their mean is over the other
fourteen; the summary names what is missing. ``--rows FILE.jsonl`` collects a row a run, with a page beside it that is
made from the rows alone: does S2-SAM make sparse networks more robust?
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from experiments import cli, models, tasks
from experiments.config import LABELS, Config, choices, differing
from experiments.datasets import cifar_c, corruptions, kinds
from experiments.datasets.corruptions import CORRUPTIONS, Cell
from experiments.rows import files, jsonl, pages, provenance, spread
from experiments.rows.jsonl import Row
from experiments.tasks import images
from experiments.training import runs
from s2sam_jax import eval_params

BATCH = 500
KINDS = {"noise": CORRUPTIONS[:3], "blur": CORRUPTIONS[3:7], "weather": CORRUPTIONS[7:11], "digital": CORRUPTIONS[11:]}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes accuracies under each corruption and severity into each run's folder, and prints their summary."""

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
        write(arguments.rows)
    return found


def evaluate(arguments: Arguments, console: Console) -> dict[Path, Row]:
    """Accuracy on every cell, written into the folders of the runs; returns the summaries of those that had no row."""
    configs = {folder: runs.read_config(folder, arguments.data) for folder in arguments.runs}
    _check(arguments, configs.values())
    old = [] if arguments.rows is None else jsonl.read(arguments.rows, ("examples", "by_corruption"))
    done = {(Config.from_json(row["config"]).digest, row["seed"]) for row in old}
    asked, configs = configs, {f: config for f, config in configs.items() if (config.digest, config.seed) not in done}
    if len(configs) < len(asked):
        there = f"{len(asked) - len(configs)} runs have their rows in {arguments.rows} already"
        console.print(f"{there}, of {old[0]['examples']} images.", soft_wrap=True)
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
        check([*old, *({"config": config.to_json()} | same for config in configs.values())])
    summaries = {}
    for folder, (rows, clean) in _accuracies(configs, loaded, cells).items():
        summaries[folder] = summary = corruptions.summary(rows, clean)
        jsonl.write(folder / runs.ROBUSTNESS, [row | {"run": folder.name} for row in rows] + [{"summary": summary}])
        if arguments.rows is not None:
            config, count = configs[folder], {"examples": len(loaded.test_labels)}
            jsonl.append(arguments.rows, {"optimizer": config.optimizer} | summary | count | provenance.of_run(config))
        console.print(summary)
        console.print(f"Rows: {folder / runs.ROBUSTNESS}", soft_wrap=True)
    return summaries


def _check(arguments: Arguments, configs: Collection[Config]) -> None:
    if not configs:
        raise ValueError("There is nothing to look at: give the folders of runs.")
    if len({(config.dataset, _size(config)) for config in configs}) > 1:
        raise ValueError("The runs must be on the same data set and size of images; give the others by themselves.")
    dataset = next(iter(configs)).dataset
    if dataset not in ("cifar10", "imagenet2012"):
        raise ValueError(f"There are corrupted forms of cifar10 and imagenet2012; the run is of {dataset}.")
    if arguments.corrupted is None and dataset != "cifar10":
        raise ValueError("ImageNet-C cannot be computed here: pass --corrupted with the TFDS folder that has it.")
    if arguments.examples is not None and arguments.examples < 1:
        raise ValueError(f"examples must be at least 1; got {arguments.examples}.")
    for option, value in (("examples", arguments.examples), ("rows", arguments.rows)):
        if arguments.corrupted is not None and value is not None:
            raise ValueError(f"{option}={value} is for corruptions that are computed; leave it out with --corrupted.")


def _size(config: Config) -> int:
    return config.image_size or models.MODELS[config.model].image_size or 32


def _cells(arguments: Arguments, config: Config, loaded: Any) -> Iterator[Cell]:
    """Computed, released or prepared by TFDS."""
    folder, names = arguments.corrupted, arguments.corruptions
    if folder is None:
        clean = np.asarray(loaded.test_images), np.asarray(loaded.test_labels)
        return corruptions.computed(*clean, min(BATCH, len(clean[1])), names=names)
    if any(folder.glob("*.npy")):
        return corruptions.from_npy(folder, BATCH, names=names)
    return corruptions.from_tfds(f"{config.dataset}_corrupted", BATCH, folder, image_size=_size(config), names=names)


def _accuracies(
    configs: Mapping[Path, Config], loaded: Any, cells: Iterator[Cell]
) -> dict[Path, tuple[list[Row], float]]:
    """Of each run a row a cell, and its accuracy on clean images."""
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
            rows[folder] += corruptions.accuracy_rows([cell], predict)
    return {folder: (rows[folder], clean[folder]) for folder in configs}


def check(rows: Sequence[Row]) -> None:
    """What stands in one table differs in optimizer and seed alone, and is of the same images and corruptions.

    Raises:
      ValueError: naming what else differs.
    """
    measured = [{"examples": row["examples"], "corruptions": list(row["by_corruption"])} for row in rows]
    chosen = [choices(row["config"]) | how for row, how in zip(rows, measured, strict=True)]
    if different := [field for field in differing(chosen) if field != "optimizer"]:
        raise ValueError(
            f"Runs of one table must differ in optimizer and seed alone; these also differ in {', '.join(different)}. "
            "Leave some out, or give other --rows."
        )


def table(rows: list[Row]) -> str:
    """Means over seeds in per cent; gains over SGD are paired by seed, with their 95 % interval."""
    names = list(accuracies(rows[0]))
    header = ["optimizer", "seeds", *names, "gain, clean", "gain, corrupted", "pairs"]
    lines = []
    by_optimizer: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        by_optimizer.setdefault(row["optimizer"], {})[row["seed"]] = accuracies(row)
    base = by_optimizer.get("sgd", {})
    for optimizer, mine in by_optimizer.items():
        other = {} if optimizer == "sgd" else base
        gains = [spread.gains(*({seed: of[seed][name] for seed in of} for of in (mine, other))) for name in names[:2]]
        means = [f"{np.mean([figures[name] for figures in mine.values()]):.1f}" for name in names]
        shown = [spread.with_interval(differences) for differences in gains]
        lines.append([LABELS[optimizer], str(len(mine)), *means, *shown, str(len(gains[0]))])
    return pages.table(header, lines, rule=" --- ")


def accuracies(row: Row) -> dict[str, float]:
    """Of one run in per cent: clean, the mean over all corruptions, and over each kind that there are some of."""
    each = row["by_corruption"]
    kinds = {kind: [each[name] for name in names if name in each] for kind, names in KINDS.items()}
    found = {"clean": row["clean_accuracy"], "corrupted": row["mean_corruption_accuracy"]}
    found |= {kind: float(np.mean(values)) for kind, values in kinds.items() if values}
    return {name: 100 * value for name, value in found.items()}


def write(file: Path) -> None:
    """The page, from the rows alone."""
    rows = jsonl.read(file)
    check(rows)
    first = rows[0]
    config, command = first["config"], f"robustness RUN RUN ... --examples {first['examples']} --rows {file.name}"
    page = (
        f"# Robustness of sparse networks to corruptions, {config['dataset']}\n\n"
        f"{config['model']} of width {config['width']}, {config['method']} at {100 * config['sparsity']:g} %, "
        f"{config['epochs']} epochs on {config['subset'] or 'all'} images; rho {config['rho']:g}. Accuracy (%) on the "
        f"first {first['examples']} test images, clean and under {len(first['by_corruption'])} corruptions at 5 "
        f"severities, computed here; missing: {', '.join(first['missing'])}. Means over seeds; gains over SGD "
        f"are paired by seed, with their 95 % interval.\n\n{table(rows)}\n\n"
        f"{pages.source(rows, command, file.name)}, which holds config, versions and commit of each row.\n"
    )
    files.write_text(file.with_suffix(".md"), page)


if __name__ == "__main__":
    main()

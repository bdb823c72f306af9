"""Does S2-SAM make sparse networks more robust? Accuracy of finished runs under corruptions, paired by seed.

    python -m experiments.corrupted runs/SOME_CIFAR10_RUN runs/OTHER_RUN --data FILE.npz

Corruptions are computed once for all runs, without frost; a run that has a row is not looked at again. The page beside
the rows is made from them alone. For the whole benchmark on one run there is ``experiments.robustness``.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.progress import track

from experiments import cli, data, tasks
from experiments.config import Config, choices, differing
from experiments.datasets import corruptions
from experiments.datasets.corruptions import CORRUPTIONS, Cell
from experiments.recipes.base import LABELS
from experiments.rows import files, jsonl, pages, spread
from experiments.tasks import images
from experiments.training import runs
from experiments.training.record import Row
from s2sam_jax import eval_params

BATCH = 500
KINDS = {"noise": CORRUPTIONS[:3], "blur": CORRUPTIONS[3:7], "weather": CORRUPTIONS[7:11], "digital": CORRUPTIONS[11:]}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, and on how many images."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # Folders of finished runs on CIFAR-10.
    data: Path | None = None  # Of the clean test set, if no longer where it was.
    examples: int = 1000  # Only the first so many test images.
    corruptions: tuple[str, ...] = ()  # Only these, such as fog; default: all there are.
    rows: Path = jsonl.RESULTS / "corruptions_cifar10.jsonl"


def run(arguments: Arguments) -> None:
    """Adds a row for each run that has none.

    Raises:
      ValueError: for runs that are not on CIFAR-10, or that do not belong into one table with the others.
    """
    old = jsonl.read(arguments.rows, ("examples", "by_corruption"))
    if not (arguments.runs or old):
        raise ValueError("There is nothing to look at: give the folders of runs.")
    if arguments.examples < 1:
        raise ValueError(f"examples must be at least 1; got {arguments.examples}.")
    done = {(Config.from_json(row["config"]).digest, row["seed"]) for row in old}
    configs = {folder: runs.read_config(folder, arguments.data) for folder in arguments.runs}
    if foreign := {config.dataset for config in configs.values()} - {"cifar10"}:
        raise ValueError(f"There are corrupted forms of cifar10 alone; there are runs of {', '.join(foreign)}.")
    missing = {folder: config for folder, config in configs.items() if (config.digest, config.seed) not in done}
    if not missing:
        return
    first = next(iter(missing.values()))
    loaded = tasks.load(first)
    pixels, labels = (np.asarray(x[: arguments.examples]) for x in (loaded.test_images, loaded.test_labels))
    cells = list(corruptions.computed(pixels, labels, BATCH, names=arguments.corruptions))
    same = {"examples": len(labels), "by_corruption": dict.fromkeys(cell.corruption for cell in cells)}
    check([*old, *({"config": config.to_json()} | same for config in missing.values())])
    for folder, config in track(missing.items(), description="runs"):
        row: Row = {"optimizer": config.optimizer} | figures(folder, config, (pixels, labels), cells)
        row |= runs.provenance(config)
        jsonl.append(arguments.rows, row)


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


def figures(folder: Path, config: Config, clean: tuple[np.ndarray, np.ndarray], cells: Sequence[Cell]) -> Row:
    """Accuracy of one run on clean images, and on every corruption."""
    state = runs.restore(folder)
    params, network = eval_params(state.params, state.opt_state), tasks.build(config)
    predict = images.predictor(network, data.KINDS[config.dataset])

    def classes(batch: Any) -> np.ndarray:
        return np.asarray(predict(params, state.model_state, batch))

    pixels, labels = clean
    found = np.concatenate([classes(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)])
    rows = list(corruptions.accuracy_rows(cells, classes))
    return corruptions.summary(rows, float(np.mean(found == labels))) | {"examples": len(labels)}


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
    config = first["config"]
    page = (
        f"# Robustness of sparse networks to corruptions, {config['dataset']}\n\n"
        f"{config['model']} of width {config['width']}, {config['method']} at {100 * config['sparsity']:g} %, "
        f"{config['epochs']} epochs on {config['subset'] or 'all'} images; rho {config['rho']:g}. Accuracy (%) on the "
        f"first {first['examples']} test images, clean and under {len(first['by_corruption'])} corruptions at 5 "
        f"severities, computed here; missing: {', '.join(first['missing'])}. Means over seeds; gains over SGD "
        f"are paired by seed, with their 95 % interval.\n\n{table(rows)}\n\n"
        f"{pages.source(rows, 'corrupted', file.name)}, which holds config, versions and commit of each row.\n"
    )
    files.write_text(file.with_suffix(".md"), page)


@cli.command
def main(arguments: Arguments) -> None:
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main()

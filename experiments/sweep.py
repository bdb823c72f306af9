"""Every method with and without S2-SAM on digits, paired by seed: rows, and a table made from the rows alone.

    python -m experiments.sweep

Runs what is missing in the rows file and rewrites the table beside it.
"""

import dataclasses
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from rich.progress import track

from experiments import cli, tasks
from experiments.config import Config, OptimizerName
from experiments.config.variants import ROUNDS
from experiments.rows import files, jsonl, missing, pages, spread
from experiments.training import loop, runs, sparse_methods
from experiments.training.record import Last

Cell = tuple[str, OptimizerName, float, int]
CELL = ("method", "optimizer", "sparsity_asked", "seed")

METHODS = (
    "static", "magnitude", "gmp", "snip", "grasp", "set", "dsr", "rigl", "itop", "mest-em", "mest-ems",
    "lottery", "lrr",
)  # fmt: skip
ROUND_EPOCHS, PRUNE_FRACTION = 10, 0.4


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, and where their rows go."""

    methods: tuple[str, ...] = METHODS
    optimizers: tuple[Literal["sgd", "s2sam"], ...] = ("sgd", "s2sam")
    sparsities: tuple[float, ...] = (0.9, 0.95)
    seeds: tuple[int, ...] = (0, 1, 2)  # Which ones, not how many.
    rows: Path = jsonl.RESULTS / "methods_digits.jsonl"
    cache: Path = cli.COMPILED  # Compiled programs: the seeds of a cell share them.


def config_of(method: str, optimizer: OptimizerName, sparsity: float, seed: int) -> Config:
    """The fixed small scale: a ResNet-8 of width 8, 20 epochs; for rounds of pruning, 10 epochs each."""
    small = Config(width=8, epochs=20, eval_every=10_000)
    small = dataclasses.replace(small, method=method, optimizer=optimizer, sparsity=sparsity, seed=seed)
    if method not in ROUNDS:
        return small
    epochs = ROUND_EPOCHS * (sparse_methods.rounds(sparsity, PRUNE_FRACTION) + 1)
    return dataclasses.replace(small, epochs=epochs, prune_fraction=PRUNE_FRACTION)


def run(arguments: Arguments) -> None:
    """Trains what has no row yet; each row is written as soon as it is there.

    Raises:
      ValueError: for a method that is not sparse, and for a row of another config.
    """
    if "dense" in arguments.methods:
        raise ValueError("The sweep is over sparse methods, at each sparsity; dense is none: leave it out.")
    have = {cell_of(row): row for row in jsonl.read(arguments.rows, (*CELL, "config"))}
    cells: list[Cell] = [
        (method, optimizer, sparsity, seed)
        for method in arguments.methods
        for sparsity in arguments.sparsities
        for optimizer in arguments.optimizers
        for seed in arguments.seeds
    ]
    dataset = tasks.load(Config())
    left = missing.of(arguments.rows, have, {cell: {"config": config_of(*cell)} for cell in cells})
    for cell in track(left, description="runs"):
        config, last = config_of(*cell), Last()
        loop.train(config, tasks.make(config, dataset), last)
        method, optimizer, sparsity, _ = cell
        row = {"method": method, "optimizer": optimizer, "sparsity_asked": sparsity}
        row |= runs.provenance(config) | last.last
        jsonl.append(arguments.rows, row)


def cell_of(row: dict[str, Any]) -> Cell:
    method, optimizer, sparsity, seed = (row[field] for field in CELL)
    return method, optimizer, sparsity, seed


def table(rows: list[dict[str, Any]]) -> str:
    """Test accuracy in per cent, mean ± standard deviation over seeds, and the difference paired by seed."""
    accuracy: dict[Any, dict[int, float]] = defaultdict(dict)
    zeros: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        accuracy[row["method"], row["sparsity_asked"], row["optimizer"]][row["seed"]] = (
            100 * row["test_accuracy_recalibrated"]
        )
        counts = row["layers"].values()
        zeros[row["method"], row["sparsity_asked"]].append(100 * sum(z for z, _ in counts) / sum(n for _, n in counts))
    header = "method", "sparsity asked (%)", "reached (%)", "SGD (%)", "S2-SAM (%)", "S2-SAM − SGD, paired", "seeds"
    lines = []
    for method, sparsity in zeros:
        sgd, s2sam = (accuracy[method, sparsity, name] for name in ("sgd", "s2sam"))
        gains = spread.gains(s2sam, sgd)
        reached = f"{statistics.mean(zeros[method, sparsity]):.2f}"
        cells = [spread.figure(*spread.mean(values.values())) for values in (sgd, s2sam)]
        cells.append(spread.figure(*spread.mean(gains), sign="+"))
        lines.append([method, f"{100 * sparsity:g}", reached, *cells, str(len(gains))])
    return pages.table(header, lines)


def write(file: Path) -> None:
    """The page, from the rows alone."""
    rows = jsonl.read(file)
    head = (
        "# Every method on digits, with SGD and with S2-SAM\n\n"
        "scikit-learn's digits (1437 training, 360 test images), ResNet-8 of width 8, 20 epochs, batch 64, SGD with "
        "momentum 0.9, cosine from 0.1, weight decay 5e-4 for both, rho 0.05, one mask update an epoch over three "
        "quarters of training (`gmp` from a fifth on; `set`, `dsr`, `itop`, `chex` and `chase` from the second epoch); "
        f"`lottery` and `lrr`: {ROUND_EPOCHS} epochs a round, {PRUNE_FRACTION:.0%} pruned a "
        "round, so more training in all. Accuracy on the test set after the last epoch, BatchNorm statistics "
        "recalibrated for both; one image is 0.28 points. Mean ± standard deviation over seeds.\n\n"
        f"Device: {pages.values(rows, 'device')}; XLA flags: `{pages.values(rows, 'xla_flags')}`. Made by "
        f"`python -m experiments.sweep`{_beside(rows)} from `{file.name}`, which holds config, versions and commit of "
        "each run.\n\n"
    )
    files.write_text(file.with_suffix(".md"), head + table(rows) + "\n")


def _beside(rows: list[dict[str, Any]]) -> str:
    """The methods that were asked for on top of the command's own."""
    others: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["method"] not in METHODS:
            others.setdefault(row["method"], {})[f"{row['sparsity_asked']:g}"] = None
    said = [f"`--methods {method} --sparsities {' '.join(values)}`" for method, values in others.items()]
    return "".join(f" and {words}" for words in said)


@cli.command
def main(arguments: Arguments) -> None:
    cli.keep_compiled(arguments.cache)
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main()

"""A table of a paper, or part of it: runs what is missing, and prints the paper's figures beside ours.

    python -m experiments.table table1 --methods rigl-erk --sparsities 0.95 --seeds 0 1 2 --scale cpu --data PATH

Rows, page, figures and plot go to experiments/results, beside those that are committed; ``--results DIR`` keeps yours
apart. A run is done when its folder is there, so that the same command goes on after an interruption.
"""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.progress import track

from experiments import cli, recipes, train, tune
from experiments.config import Config
from experiments.pages import markdown, rendering
from experiments.pages import table as page
from experiments.recipes import Recipe
from experiments.recipes.base import ACCURACY, CORRUPTED
from experiments.recipes.scales import Scale, scaled
from experiments.recipes.selection import Selection, chosen
from experiments.rows import comparison, files, jsonl, missing
from experiments.rows.jsonl import Row
from experiments.training import runs

OTHERWISE = "Pass --tuned if it was made so, give another folder as --results, or take the row out of the file."


@dataclasses.dataclass(frozen=True)
class Arguments(Selection):
    """Which rows of which table, and how large."""

    seeds: tuple[int, ...] = (0, 1, 2)  # Which ones, not how many.
    # full: as in the paper. cpu: narrower, fewer images. smoke: it runs. These need --data; digits, another data set,
    # does not.
    scale: Scale = "full"
    tuned: Path | None = None  # Rows of experiments.tune: each recipe with the rho that was best there.
    data: Path | None = None  # As in experiments.train.
    out: Path = Path("runs")  # The folder that run folders are made in.
    # Folder of rows and page. The default has the committed ones, which yours are added to; another keeps yours apart.
    results: Path = jsonl.RESULTS


def run(arguments: Arguments) -> list[Row]:
    """Trains what has neither a row nor a folder yet, and returns the last row of each run asked for.

    Each row is stored as soon as it is there, so that an interrupted table goes on where it was, on any machine.
    """
    best = None if arguments.tuned is None else tune.best(arguments.tuned)
    pairs = [(r, _config(r, seed, arguments, best)) for r in chosen(arguments) for seed in arguments.seeds]
    stored = {(row["recipe"]["name"], row["seed"]): row for row in jsonl.read(rows_file(arguments))}
    wanted = {(recipe.name, config.seed): {"config": config} for recipe, config in pairs}
    missing.of(rows_file(arguments), stored, wanted, OTHERWISE)
    rows = []
    for recipe, config in track(pairs, description="runs"):
        row = stored.get((recipe.name, config.seed))
        if row is None:
            try:
                if not config.run_dir.is_dir():
                    train.train(train.Arguments(config), Console(quiet=True))
            except FloatingPointError as error:  # the others are still wanted; the page counts the seeds there are
                Console(stderr=True).print(f"{recipe.name}, seed {config.seed}, has no row. {error}", soft_wrap=True)
                continue
            row = _row(recipe, config, arguments.scale)
            store([row], rows_file(arguments))
        rows.append(row)
    return rows


def asked_for(arguments: Arguments) -> list[comparison.Line]:
    """The lines of the recipes and seeds asked for; their gains are over baselines that need not be."""
    rows = [row for row in jsonl.read(rows_file(arguments)) if row["seed"] in arguments.seeds]
    names = {recipe.name for recipe in chosen(arguments)}
    return [line for line in comparison.compare(rows) if line.name in names]


def rows_file(arguments: Arguments) -> Path:
    return arguments.results / f"{arguments.table}_{arguments.scale}.jsonl"


def _config(recipe: Recipe, seed: int, arguments: Arguments, best: dict[str, float] | None) -> Config:
    config = scaled(recipe, arguments.scale)
    if best is not None and config.optimizer != "sgd":
        config = dataclasses.replace(config, rho=tune.of(recipe, best))
    return dataclasses.replace(config, seed=seed, data=arguments.data, out=arguments.out)


def _row(recipe: Recipe, config: Config, scale: Scale) -> Row:
    """A row of the table: the printed figures, ours, and all that the run says of itself."""
    rows, metric = runs.rows(config.run_dir), recipe.metric
    last = rows[-1] | runs.robustness(config.run_dir)
    value = metric.scale * last[metric.field] if metric.field in last else None
    if metric is CORRUPTED and last.get("missing"):
        value = None  # a mean over some corruptions is not the paper's
    best = metric.scale * best_accuracy(rows) if metric is ACCURACY and len(rows) == config.epochs else None
    if known := [row for row in rows if "device" in row]:
        last["device"] = markdown.values(known, "device")  # all that an interrupted run has been on
    return {"recipe": described(recipe), "scale": scale, "value": value, "best": best} | last


def best_accuracy(rows: list[Row]) -> float:
    """The highest test accuracy of a run after any epoch: as papers report it, and too high.

    Only of epochs with as many zeros as there are in the end: before, a network that is pruned is another one.
    """
    zeros = rows[-1]["sparsity"] - 1e-6
    return max(row["test_accuracy"] for row in rows if row["sparsity"] >= zeros)


def described(recipe: Recipe) -> Row:
    """What the paper says of a recipe, as fields of a line of the comparison."""
    baseline = None if recipe.baseline is None else recipes.get(recipe.baseline).expected
    return {
        "name": recipe.name,
        "row": recipe.row,
        "sparsity": recipe.sparsity,
        "optimizer": recipe.config.optimizer,
        "metric": recipe.metric.name,
        "paper": recipe.expected,
        "paper_spread": recipe.printed.spread,
        "paper_difference": _difference(recipe.expected, baseline),
        "baseline": recipe.baseline,
        "gradients": recipe.gradients,
    }


def _difference(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or baseline is None else round(value - baseline, 4)


def store(rows: list[Row], file: Path) -> list[Row]:
    """Adds rows to the file, in place of older ones of the same recipe and seed; returns all, in the table's order."""
    order = {name: place for place, name in enumerate(recipes.RECIPES)}
    with files.locked(file):
        merged = {(row["recipe"]["name"], row["seed"]): row for row in [*jsonl.read(file), *rows]}
        kept = sorted(merged.values(), key=lambda row: (order.get(row["recipe"]["name"], len(order)), row["seed"]))
        jsonl.write(file, kept)
    return kept


@cli.command
def main(arguments: Arguments) -> None:
    console, file = Console(), rows_file(arguments)
    cli.keep_compiled(arguments.out / "compiled")
    old = jsonl.read(file)
    rows = run(arguments)
    page.write(file)
    title = file.stem.replace("_", ", ")
    if lines := asked_for(arguments):
        console.print(rendering.terminal(lines, title, console.width), soft_wrap=True)
    there = sum(row in old for row in rows)
    console.print(f"{len(rows) - there} runs are new, {there} had their rows in {file} already.", soft_wrap=True)
    console.print(f"Files, of all rows and with all columns: {file.with_suffix('')}.*", soft_wrap=True)


if __name__ == "__main__":
    main()

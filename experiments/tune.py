"""Chooses rho for each recipe of a table, on training images that are held out: never on the test set.

    python -m experiments.tune budget --scale digits --grid 0.01 0.05 0.2 1.0

One seed, the same grid for all. What has a row is skipped. ``experiments.table TABLE --tuned ROWS`` takes the best.
"""

import dataclasses
import functools
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import cli, recipes, tasks
from experiments.config import Config
from experiments.datasets import in_memory
from experiments.recipes import Recipe
from experiments.recipes.scales import Scale, scaled
from experiments.recipes.selection import Selection, chosen
from experiments.rows import jsonl, missing, provenance
from experiments.rows.jsonl import Row
from experiments.training import loop
from experiments.training.record import Last

FIELDS = ("setting", "accuracy", "config")  # What a row must have.


@dataclasses.dataclass(frozen=True)
class Arguments(Selection):
    """Trains rows of a table with each rho of a grid and prints accuracies on held-out training images.

    The rows are for the option --tuned of experiments.table.
    """

    scale: Scale = "full"  # As in experiments.table: all but digits need --data.
    grid: tuple[float, ...] = (0.01, 0.05, 0.2, 1.0)  # The radii to choose from.
    held_out: float = 0.2  # Share of the training images to choose by.
    seed: int = 0  # The one seed of all runs.
    data: Path | None = None  # As in experiments.train.
    # File that rows are added to; default: TABLE_SCALE_tuning.jsonl among the committed results.
    rows: Path | None = None
    cache: Path = cli.COMPILED  # Folder of compiled programs, for the next run.


def setting(recipe: Recipe) -> str:
    """What a radius is chosen for: a row of any table of the same kind, such as ``rigl-erk-0.95.sam``."""
    return recipe.name.partition(".")[2]


def best(file: Path) -> dict[str, float]:
    """The radius of the highest accuracy on held-out images, by setting; of equal ones the smaller.

    A setting that broke down at every radius has none.

    Raises:
      FileNotFoundError: when there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There are no rows in {file}; python -m experiments.tune makes them.")
    found: dict[str, Row] = {}
    for row in sorted(jsonl.read(file, FIELDS), key=lambda row: row["config"]["rho"]):
        if row["accuracy"] > found.get(row["setting"], {"accuracy": 0.0})["accuracy"]:
            found[row["setting"]] = row
    return {name: row["config"]["rho"] for name, row in found.items()}


def of(recipe: Recipe, radii: dict[str, float]) -> float:
    """The chosen radius of a recipe.

    Raises:
      ValueError: when none was chosen.
    """
    if setting(recipe) not in radii:
        raise ValueError(
            f"No rho was tuned for {setting(recipe)}, or each broke down; there are {', '.join(radii) or 'none'}."
        )
    return radii[setting(recipe)]


def configs(arguments: Arguments) -> list[tuple[str, Config]]:
    """A run for each setting and radius.

    Raises:
      ValueError: for a table whose rows are themselves of several radii, and where no row asked for has one.
    """
    if len({recipe.config.rho for recipe in recipes.of_table(arguments.table) if recipe.config.optimizer != "sgd"}) > 1:
        raise ValueError(f"{arguments.table} compares radii, so there is none to choose for it.")
    rows = [recipe for recipe in chosen(arguments) if recipe.config.optimizer != "sgd"]
    if not rows:
        raise ValueError("SGD has no rho to choose; ask for other --optimizers.")
    found = [(setting(recipe), scaled(recipe, arguments.scale)) for recipe in rows]
    return [
        (name, dataclasses.replace(config, rho=rho, seed=arguments.seed, data=arguments.data))
        for name, config in found
        for rho in arguments.grid
    ]


def run(arguments: Arguments, file: Path) -> list[Row]:
    """Returns the rows asked for, each written as soon as it is there; what broke down has an accuracy of zero."""
    if not arguments.held_out > 0:
        raise ValueError(f"held_out is the share of the training images to choose by; got {arguments.held_out}.")
    load = functools.cache(lambda dataset, subset: in_memory.load(dataset, arguments.data, subset))
    wanted = {}
    for name, config in configs(arguments):
        images = len(load(config.dataset, config.subset).train_labels)
        held_out = dataclasses.replace(config, validation=max(1, round(arguments.held_out * images)))
        wanted[name, config.rho] = {"config": held_out}
    have = {(row["setting"], row["config"]["rho"]): row for row in jsonl.read(file, FIELDS)}
    for name, rho in track(missing.of(file, have, wanted), description="runs"):
        config, reporter = wanted[name, rho]["config"], Last()
        dataset = load(config.dataset, config.subset)
        try:
            loop.train(config, tasks.make(config, dataset), reporter)
            accuracy = reporter.last["test_accuracy_recalibrated"]
        except FloatingPointError:  # a radius that is too large for this optimizer: never the best one
            accuracy = 0.0
        row = {"setting": name, "accuracy": accuracy} | provenance.of_run(config)
        jsonl.append(file, row)
        have[name, rho] = row
    return [have[key] for key in wanted]


def table(rows: list[Row]) -> Table:
    """Accuracy on held-out images by setting and radius."""
    radii = sorted({row["config"]["rho"] for row in rows})
    result = Table("held-out accuracy (%)", *(f"rho {rho:g}" for rho in radii))
    accuracy = {
        (row["setting"], row["config"]["rho"]): f"{100 * row['accuracy']:.2f}" if row["accuracy"] else "broke down"
        for row in rows
    }
    for name in dict.fromkeys(row["setting"] for row in rows):
        result.add_row(name, *(accuracy.get((name, rho), "–") for rho in radii))
    return result


@cli.command
def main(arguments: Arguments) -> None:
    file = arguments.rows or jsonl.RESULTS / f"{arguments.table}_{arguments.scale}_tuning.jsonl"
    cli.keep_compiled(arguments.cache)
    Console().print(table(run(arguments, file)))
    Console().print(f"Rows: {file}", soft_wrap=True)


if __name__ == "__main__":
    main()

"""Two real train steps of each combination of model, method and optimizers among the recipes, on narrow networks.

    python -m experiments.reliability.narrow_steps

Masks change at the first for RigL and MEST; the methods that wait an interval (SET, DSR, CHEX, Chase) take two
ordinary steps. A network keeps its class and depth; width, images, vocabulary, sentences and batch are small. Each
row is stored as soon as it is there, and what has a row is skipped, so that the same command goes on after an
interruption.
"""

import dataclasses
from pathlib import Path

import jax
from rich.progress import track

from experiments import cli, models, recipes
from experiments.config import Config
from experiments.reliability import one_step
from experiments.rows import jsonl, provenance
from experiments.rows.jsonl import Row

Key = tuple[str, str, str, str]  # model, method, how sharpness is minimised, and the optimizer under it


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Takes two train steps of each combination of model, method and optimizers among the recipes, at small width."""

    recipes: tuple[str, ...] = ()  # Only the combinations of these; default: of all.
    out: Path = jsonl.RESULTS / "narrow_steps.jsonl"  # File that rows are added to.
    cache: Path = cli.COMPILED  # Compiled programs: methods with one optimizer share the gradient.


def combinations(names: tuple[str, ...] = ()) -> dict[Key, str]:
    """The first recipe of each combination, among these or all."""
    found: dict[Key, str] = {}
    for name in names or recipes.RECIPES:
        config = recipes.get(name).config
        found.setdefault((config.model, config.method, config.optimizer, config.base), name)
    return found


def key_of(row: Row) -> Key:
    return row["model"], row["method"], row["optimizer"], row["config"]["base"]


def narrowed(config: Config) -> Config:
    """A quarter of the width. No warm-up, in whose first step no weight would move; GraSP is scored at the first."""
    return dataclasses.replace(
        config,
        width=models.MODELS[config.model].width // 4,
        image_size=32 if config.dataset == "imagenet2012" else None,
        vocabulary=64,
        max_length=8,
        batch_size=4,
        warmup_epochs=0.0,
        images_per_class=None,
    )


def run(arguments: Arguments) -> None:
    """Takes the steps of what has no row yet."""
    done = {key_of(row) for row in jsonl.read(arguments.out)}
    missing = {key: name for key, name in combinations(arguments.recipes).items() if key not in done}
    for (model, method, optimizer, _), name in track(missing.items(), description="combinations"):
        config = narrowed(recipes.get(name).config)
        row = {"model": model, "method": method, "optimizer": optimizer, "recipe": name}
        row |= one_step.two_steps(config) | provenance.of_run(config)
        jsonl.append(arguments.out, row)
        jax.clear_caches()


@cli.command
def main(arguments: Arguments) -> None:
    cli.keep_compiled(arguments.cache, 0.0)
    run(arguments)


if __name__ == "__main__":
    main()

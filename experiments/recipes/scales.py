"""The sizes at which the recipes of a table are run: as they are, or small enough for a few CPU cores."""

import dataclasses
from typing import Literal

from experiments import models
from experiments.config import Config
from experiments.config.variants import ONE_SHOT, ROUNDS
from experiments.recipes import Recipe
from experiments.training import sparse_methods

# full: the recipe. cpu: a quarter of the width, 10 000 images, 9 epochs. digits: a ResNet-8 of width 8 on these small
# images, 20 epochs. smoke: it runs.
Scale = Literal["smoke", "digits", "cpu", "full"]


def scaled(recipe: Recipe, scale: Scale) -> Config:
    """The run of a recipe at a scale; a round of lottery or LRR is as long as another run.

    On the small scales no clock is slower than an epoch: of MEST's five, 9 epochs would leave a single update.

    Raises:
      ValueError: for a small scale of what is not on CIFAR.
    """
    config = recipe.config
    if scale == "full":
        return config
    if not config.dataset.startswith("cifar"):
        raise ValueError(f"The scale {scale} exists for CIFAR alone; {config.dataset} has the scale full.")
    trainings, width = sparse_methods.trainings(config), models.MODELS[config.model].width
    config = dataclasses.replace(config, **_clocks(config))
    if scale == "smoke":
        return dataclasses.replace(config, width=max(2, width // 16), subset=256, epochs=trainings)
    if scale == "digits":
        small: dict = {"dataset": "digits", "model": "resnet8", "width": 8, "batch_size": 64, "cutout": 0}
        epochs = _share(recipe, 20 if trainings == 1 else 10) * trainings
        small |= {"eval_every": 1, "checkpoint_every": epochs}  # looking costs little there, writing does not
    else:
        small = {"width": width // 4, "subset": 10_000, "batch_size": 128}
        epochs = _share(recipe, 9) * trainings
        small["eval_every"] = epochs
    return dataclasses.replace(config, **small, epochs=epochs)


def _clocks(config: Config) -> dict[str, float]:
    fast: dict[str, float] = {"ssam_update_every": min(config.ssam_update_every, 1.0)}
    if config.method not in ("dense", *ONE_SHOT, *ROUNDS):
        interval, _ = sparse_methods.CIFAR_RECIPES.get(config.method, sparse_methods.ELSEWHERE)
        fast["update_every"] = min(config.update_every or interval, 1.0)
    return fast


def _share(recipe: Recipe, epochs: int) -> int:
    return max(1, round(recipe.share * epochs))

"""GraSP as its released code scores it: before training, on as many images of each class."""

from collections.abc import Callable
from typing import Any, cast

import jax

from experiments.config import Config
from experiments.tasks import arrays
from experiments.tasks.base import Task
from s2sam_jax import methods

ScoredMasks = Callable[[Any, Any], Any]  # (params, model_state) -> masks


def scored_masks(config: Config, task: Task) -> ScoredMasks | None:
    """What gives a network's masks before its first step; None where the method finds them on the way.

    Raises:
      ValueError: when a class has fewer images.
    """
    if config.method != "grasp" or config.images_per_class is None:
        return None
    batches = cast(arrays.Task, task).of_each_class(config.images_per_class)  # no config has others

    def masks(params: Any, model_state: Any) -> Any:
        def logits(params: Any, images: jax.Array) -> jax.Array:
            return task.network.apply(params, model_state, images, True, config.key("grasp"))[0]

        return methods.masks_from_scores(methods.grasp_scores(logits, params, batches), config.sparsity)

    return masks

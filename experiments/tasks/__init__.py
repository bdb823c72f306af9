"""What a run trains on, as the loop sees it: a network, its loss, epochs and an evaluation."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from experiments import models, sharding
from experiments.config import Config
from experiments.datasets import kinds
from experiments.models import Network
from experiments.tasks import arrays, streams, text
from experiments.tasks.base import Losses, Task


def build(config: Config, widths: Mapping[str, int] | None = None) -> Network:
    """The network of a config, or with fewer channels in the groups that ``widths`` names."""
    is_text = models.MODELS[config.model].text
    if is_text != (config.dataset == "wmt14"):
        raise ValueError(
            f"model={config.model} is for {'text' if is_text else 'images'}; dataset={config.dataset} is not."
        )
    classes = config.vocabulary if is_text else kinds.KINDS[config.dataset].classes
    channels = None if is_text else kinds.KINDS[config.dataset].shape[2]
    return models.build(
        config.model,
        width=config.width,
        channels=channels,
        classes=classes,
        seed=config.seed,
        dtype="float32" if config.compute == "tensorfloat32" else config.compute,
        precision="tensorfloat32" if config.compute == "tensorfloat32" else None,
        widths=widths,
    )


def _module(config: Config):
    """The one for the data of a config, with its ``load``, ``losses`` and ``Task``."""
    return {"imagenet2012": streams, "wmt14": text}.get(config.dataset, arrays)


def losses(config: Config, network: Network) -> Losses:
    """Of a network on the data of a config, which need not be there."""
    return _module(config).losses(config, network)


def load(config: Config) -> Any:
    """The data of a config, once for all runs on it.

    Raises:
      FileNotFoundError: saying how to get them.
    """
    return _module(config).load(config)


def make(config: Config, loaded: Any, mesh: Mesh | None = None) -> Task:
    """The task of a config on the data that :func:`load` gave; by default on one device."""
    mesh = mesh or sharding.make_mesh()
    sharding.check_batch(mesh, config.batch_size)
    return _module(config).Task(config, build(config), loaded, mesh)

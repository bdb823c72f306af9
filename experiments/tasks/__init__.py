"""What a run trains on, as the loop sees it: a network, its loss, epochs and an evaluation."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import models, sharding
from experiments.config import Config
from experiments.datasets import kinds
from experiments.models import Network
from experiments.tasks import arrays, images, streams, text
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
    """The losses of a network on the data of a config, which need not be there."""
    return _module(config).losses(config, network)


def noise(config: Config) -> Any:
    """A batch in the shapes of the data of a config, which need not be there."""
    rng = np.random.default_rng(0)
    if models.MODELS[config.model].text:
        tokens = rng.integers(4, config.vocabulary, (2, config.batch_size, config.max_length), np.int32)
        return {"sources": jnp.asarray(tokens[0]), "targets": jnp.asarray(tokens[1])}
    kind, side = kinds.KINDS[config.dataset], images.side(config)
    pixels = rng.integers(0, 256, (config.batch_size, side, side, kind.shape[2]), np.uint8)
    return jnp.asarray(pixels), jnp.asarray(rng.integers(0, kind.classes, config.batch_size))


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

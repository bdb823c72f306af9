"""A small network in place of the models, for tests of what is around them; it compiles in no time."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import tasks
from experiments.figures import training
from experiments.models import Network

WIDTH = 96


def build(config):
    """Two layers on 8x8 images, with a running mean in between; its size is above that of leaves not worth cutting."""
    keys = jax.random.split(jax.random.key(config.seed))
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, WIDTH)) / 8, "bias": jnp.zeros(WIDTH)},
        "head": {"kernel": jax.random.normal(keys[1], (WIDTH, 10)) / 10},
    }

    def apply(params, model_state, images, train, key=None):
        hidden = images.reshape(len(images), -1) @ params["hidden"]["kernel"]
        mean = hidden.mean(0) if train else model_state["mean"]
        new = {"mean": 0.9 * model_state["mean"] + 0.1 * mean} if train else model_state
        return jnp.tanh(hidden - mean + params["hidden"]["bias"]) @ params["head"]["kernel"], new

    return Network(params, {"mean": jnp.zeros(WIDTH)}, apply)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """The runs of a module share their programs, as those of a user do."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is options:
            yield options["jax_compilation_cache_dir"]


@pytest.fixture
def toy(monkeypatch, compiled_once):
    """In place of the models; and no curves are drawn."""
    monkeypatch.setattr(tasks, "build", build)
    monkeypatch.setattr(training, "draw", lambda runs, title, file: file.touch())
    return compiled_once

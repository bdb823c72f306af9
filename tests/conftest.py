"""Eight virtual devices for sharding, quick compilation (most of what the suite spends), and a toy for the models.

Without optimization, and where possible without fusion emitters and with each program in one piece, XLA compiles
several times as fast; programs run slower, but briefly.
"""

import os
from importlib.metadata import version

# Versions after 0.10 may end at a flag that they do not know.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if version("jaxlib").startswith("0.10.")
        else ""
    )
)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)


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
    import toy

    from experiments import tasks
    from experiments.figures import training

    monkeypatch.setattr(tasks, "build", toy.build)
    monkeypatch.setattr(training, "draw", lambda runs, title, file: file.touch())
    return compiled_once


@pytest.fixture
def float64():
    """64-bit types, so that rounding hides nothing from NumPy's float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def shallow(monkeypatch):
    """The large models with few blocks, which compile quickly, for tests that are not about their depth."""
    from functools import partial

    from experiments import models
    from experiments.models import efficientnet, mobilenet, resnet, transformer, vit, wide_resnet

    makes = {
        "wrn28x10": partial(wide_resnet.WideResNet, 1, 10),
        "resnet18-cifar": partial(resnet.ResNet, resnet.Block, (1, 1), small_images=True),
        "resnet34": partial(resnet.ResNet, resnet.Block, (1, 1), small_images=False),
        "resnet50": partial(resnet.ResNet, resnet.Bottleneck, (1, 1), small_images=False),
        "vit-small-cifar": partial(vit.ViT, 4, 32, 2),
        "transformer-base": partial(transformer.Transformer, 2, 0.1),
    }
    for name, make in makes.items():
        monkeypatch.setitem(models.MODELS, name, models.MODELS[name]._replace(make=make))
    for module in (mobilenet, efficientnet):
        monkeypatch.setattr(module, "_GROUPS", module._GROUPS[:3:2])


@pytest.fixture
def small_evaluations(monkeypatch):
    """Batches of evaluation for data sets as small as those of tests: larger ones would be padding."""
    from experiments import robustness
    from experiments.tasks import streams, text

    monkeypatch.setattr(streams, "EVAL_BATCH", 8)
    monkeypatch.setattr(text, "EVAL_BATCH", 4)
    monkeypatch.setattr(robustness, "BATCH", 16)

"""A toy in place of the models, large models with few blocks, and programs that the runs of a module share."""

from functools import partial

import jax
import numpy as np
import pytest
import toy as toy_network
from interrupted import stop_in
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from prepared import encoded, image_features, write_tfds
from sentences import PAIRS, SIZE

from experiments import models, robustness, tasks
from experiments.datasets import wmt
from experiments.figures import training
from experiments.models import efficientnet, mobilenet, resnet, transformer, vit, wide_resnet
from experiments.tasks import arrays, streams, text


@pytest.fixture(scope="module")
def pictures():
    """Smooth, of several shapes, one of them grey."""
    rng = np.random.default_rng(0)
    shapes = [(40, 60), (60, 40), (50, 50), (33, 90), (70, 45), (48, 48)]
    small = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)) for _ in shapes]
    full = [np.asarray(image.resize(shape)) for image, shape in zip(small, shapes, strict=True)]
    return [*full[:-1], full[-1][..., 0]]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory, pictures):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    rows = [{"image": encoded(x), "label": i} for i, x in enumerate(pictures)]
    write_tfds(folder / "imagenet2012/5.1.0", image_features(), {"train": rows, "validation": rows})
    for version, word in (("9.0.0", b"old"), ("10.0.0", b"newest"), ("2.0.0", b"oldest")):
        write_tfds(folder / "words" / version, {"text": tfds.features.Text()}, {"train": [{"text": word}]})
    pairs = [{"en": en.encode(), "de": de.encode()} for en, de in PAIRS]
    write_tfds(folder / "wmt14_translate/de-en/1.0.0", tfds.features.Translation(("de", "en")), {"train": pairs})
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return wmt.vocabulary(tmp_path_factory.mktemp("bpe") / "bpe.json", PAIRS, SIZE)


@pytest.fixture(scope="module")
def token_pairs(tmp_path_factory, tokenizer):
    return wmt.tokenize(tmp_path_factory.mktemp("tokens") / "train.npz", PAIRS, tokenizer)


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
    monkeypatch.setattr(tasks, "build", toy_network.build)
    monkeypatch.setattr(training, "draw", lambda runs, title, file: file.touch())
    return compiled_once


@pytest.fixture
def shallow(monkeypatch):
    """The large models with few blocks, which compile quickly, for tests that are not about their depth."""

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
    monkeypatch.setattr(streams, "EVAL_BATCH", 8)
    monkeypatch.setattr(text, "EVAL_BATCH", 4)
    monkeypatch.setattr(robustness, "BATCH", 16)


@pytest.fixture
def interrupted(toy, tmp_path, monkeypatch):
    """The folder of a run that was stopped in its third epoch."""
    stop_in(monkeypatch, arrays.Task, "order", 3, tmp_path)
    (partial,) = tmp_path.iterdir()
    return partial

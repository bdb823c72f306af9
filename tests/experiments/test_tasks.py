"""Runs from end to end on every kind of data, learning rates, cutout, and lowering for other platforms."""

import itertools
import json
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from prepared import encoded, image_features, write_tfds

from experiments import evaluate, models, sharding, tasks, train
from experiments.config import Config, OptimizerName
from experiments.datasets import in_memory, transforms, wmt
from experiments.tasks import arrays, images, streams, text
from experiments.training import loop, optimizers
from s2sam_jax import TrainState

pytestmark = pytest.mark.usefixtures("small_evaluations")


def last_row(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def prepared_images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tfds"), np.random.default_rng(0)
    rows = [{"image": encoded(rng.integers(0, 256, (40, 50, 3), np.uint8)), "label": i % 10} for i in range(20)]
    splits = {"train": rows, "validation": rows[:10]}
    write_tfds(folder / "imagenet2012/5.1.0", image_features(), splits)
    return folder


def test_imagenet_from_end_to_end(prepared_images, shallow, tmp_path):
    arguments = ["--dataset", "imagenet2012", "--data", str(prepared_images), "--model", "resnet34", "--width", "2"]
    arguments += ["--image-size", "32", "--batch-size", "8", "--epochs", "2", "--out", str(tmp_path)]
    arguments += ["--mesh", "data=2"]
    folder = train.main(arguments)["s2sam"]
    row = last_row(folder)
    assert row["step"] == 4
    assert row["test_accuracy_recalibrated"] in {n / 10 for n in range(11)}
    zeros, size = np.sum(list(row["layers"].values()), axis=0)
    assert zeros / size == pytest.approx(0.9, abs=0.01)
    accuracy, sparsity = evaluate.main([str(folder)])
    assert accuracy == row["test_accuracy_recalibrated"]
    assert sparsity == pytest.approx(zeros / size)


def test_translation_from_end_to_end(shallow, tmp_path):
    rng = np.random.default_rng(0)
    words = [("one", "eins"), ("two", "zwei"), ("three", "drei"), ("four", "vier")]
    for split, count in (("train", 24), ("validation", 6)):
        chosen = [[words[i] for i in rng.integers(0, 4, 3)] for _ in range(count)]
        for index, language in enumerate(("en", "de")):
            lines = [" ".join(pair[index] for pair in sentence) + "\n" for sentence in chosen]
            (tmp_path / f"{split}.{language}").write_text("".join(lines))
    arguments = ["--dataset", "wmt14", "--data", str(tmp_path), "--model", "transformer-base", "--width", "16"]
    arguments += ["--vocabulary", "280", "--max-length", "12", "--batch-size", "8", "--epochs", "2", "--base", "adamw"]
    arguments += ["--mesh", "data=2,fsdp=2"]
    folder = train.main([*arguments, "--learning-rate", "0.001", "--out", str(tmp_path / "runs")])["s2sam"]
    row = last_row(folder)
    assert row["step"] == 6
    assert 0 <= row["bleu"] <= 100
    assert 0 <= row["test_accuracy"] <= 1
    assert row["test_accuracy"] == row["test_accuracy_recalibrated"]


@pytest.mark.parametrize(("in_training", "smoothing"), [(True, 0.2), (False, 0.0)])
def test_the_loss_of_a_translation_is_a_mean_over_tokens(in_training, smoothing):
    logits, targets = np.random.default_rng(0).normal(size=(1, 4, 6)), np.array([[4, 2, 0, 0]])

    def apply(params, model_state, inputs, train, key=None):
        return jnp.asarray(logits), model_state

    network = models.Network((), (), apply)
    loss_fn = text.loss_function(SimpleNamespace(label_smoothing=0.2), network, train=in_training)
    found, _ = loss_fn((), (), {"sources": targets, "targets": jnp.asarray(targets)}, None)
    logs = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[0, :2]  # the rest is padding
    of_targets = logs[[0, 1], [4, 2]]
    assert found == pytest.approx(-np.mean((1 - smoothing) * of_targets + smoothing * logs.mean(axis=-1)), rel=1e-5)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_translation_is_read_up_to_the_token_that_is_to_come(in_training):
    """Of five tokens three are guessed right; padding, which is guessed right as well, does not count."""
    seen, sources = [], np.array([[7, 8, wmt.EOS], [9, wmt.EOS, 0]])
    targets = jnp.array([[4, 5, wmt.EOS], [6, wmt.EOS, 0]])
    guesses = np.array([[4, 5, 5], [4, wmt.EOS, 0]])

    def apply(params, model_state, inputs, train, key=None):
        seen.append((*inputs, train, key))
        return 9.0 * jax.nn.one_hot(guesses, 10), model_state

    loss_fn = text.loss_function(SimpleNamespace(label_smoothing=0.2), models.Network((), (), apply), train=in_training)
    batch = {"sources": sources, "targets": targets}
    _, (_, metrics) = loss_fn((), (), batch, "key")
    ((read, before, train_mode, key),) = seen
    np.testing.assert_array_equal(read, sources)
    np.testing.assert_array_equal(before, [[wmt.BOS, 4, 5], [wmt.BOS, 6, wmt.EOS]])
    assert (train_mode, key) == (in_training, "key")
    assert metrics["train_accuracy"] == pytest.approx(3 / 5)
    task = object.__new__(text.Task)
    task.tests = lambda: iter([batch])
    (((read, again), labels, counted),) = task.examples()
    np.testing.assert_array_equal(again, before)
    np.testing.assert_array_equal(labels, targets)
    np.testing.assert_array_equal(counted, np.array([[1, 1, 1], [1, 1, 0]], bool))


def test_translations_are_evaluated_without_dropout():
    """Neither in the search, nor in the accuracy."""
    modes = []

    def apply(params, model_state, inputs, train, key=None, method="__call__"):
        modes.append((method, train))
        return (inputs[0] if method == "encode" else jnp.zeros((*inputs[-1].shape, 10))), model_state

    task, sources = object.__new__(text.Task), jnp.array([[4, 5, wmt.EOS]])
    task._config, task.network = SimpleNamespace(max_length=3, label_smoothing=0.0), models.Network((), (), apply)
    task.losses = text.losses(task._config, task.network)
    assert task._search((), (), sources).shape == (1, 3)
    task._counts((), (), {"sources": sources, "targets": sources})
    assert set(modes) == {("encode", False), ("decode", False), ("__call__", False)}


def test_the_accuracy_of_a_translation_weights_batches_by_their_tokens():
    task = object.__new__(text.Task)
    task._score = lambda params, model_state, batch: batch
    task.tests = lambda: iter([(0.5, 2), (1.0, 6)])
    assert task.evaluate((), ()) == {"test_accuracy": 7 / 8}


def test_models_and_data_must_fit():
    with pytest.raises(ValueError, match="model=resnet8 is for images; dataset=wmt14 is not"):
        tasks.build(Config(dataset="wmt14"))
    with pytest.raises(ValueError, match="model=transformer-base is for text; dataset=digits is not"):
        tasks.build(Config(model="transformer-base"))


def test_learning_rates():
    rate = optimizers.learning_rate(Config(epochs=10, learning_rate=0.4, warmup_epochs=2.0), steps_per_epoch=5)
    steps = np.arange(51)
    wanted = np.where(steps < 10, 0.04 * steps, 0.2 * (1 + np.cos(np.pi * (steps - 10) / 40)))
    np.testing.assert_allclose([rate(step) for step in steps], wanted, atol=1e-6)
    rate = optimizers.learning_rate(Config(epochs=8, schedule="steps", warmup_epochs=1.0), steps_per_epoch=1)
    np.testing.assert_allclose(
        [rate(s) for s in range(9)], [0, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001], atol=1e-7
    )
    rate = optimizers.learning_rate(Config(epochs=4, final_learning_rate=0.02), steps_per_epoch=1)
    np.testing.assert_allclose([rate(0), rate(2), rate(4)], [0.1, 0.06, 0.02], rtol=1e-6)
    with pytest.raises(ValueError, match="warmup_epochs=4 must be fewer"):
        optimizers.learning_rate(Config(epochs=4, warmup_epochs=4), steps_per_epoch=1)


def test_label_noise_replaces_its_share_by_other_classes_and_leaves_the_evaluation_right():
    clean = in_memory.load("digits")
    task = arrays.Task(Config(validation=437, label_noise=0.4), tasks.build(Config()), clean, sharding.make_mesh())
    noisy, held = task._dataset, in_memory.hold_out(clean, 437)
    wrong = np.flatnonzero(np.asarray(noisy.train_labels) != np.asarray(held.train_labels))
    assert len(wrong) == 400
    # All nine other classes, about equally often: 44 each, with a deviation of 6.
    moved = (np.asarray(noisy.train_labels) - np.asarray(held.train_labels))[wrong] % 10
    assert np.all(np.abs(np.bincount(moved, minlength=10)[1:] - 400 / 9) < 25)
    np.testing.assert_array_equal(noisy.test_labels, held.test_labels)
    np.testing.assert_array_equal(noisy.train_images, held.train_images)

    same, other = (in_memory.with_label_noise(held, 0.4, 10, seed).train_labels for seed in (0, 1))
    np.testing.assert_array_equal(same, noisy.train_labels)
    assert np.any(np.asarray(other) != np.asarray(same))
    of_seed = arrays.Task(Config(validation=437, label_noise=0.4, seed=1), task.network, clean, sharding.make_mesh())
    np.testing.assert_array_equal(of_seed._dataset.train_labels, other)
    with pytest.raises(ValueError, match=r"label_noise must be 0 for imagenet2012; got 0\.1"):
        Config(dataset="imagenet2012", model="resnet50", label_noise=0.1)


def test_an_epoch_of_a_stream_begins_where_the_one_before_ended(monkeypatch):
    monkeypatch.setattr(sharding, "assemble", lambda mesh, batch: batch)
    task = object.__new__(streams.Streamed)
    task._config, task.mesh, task.steps_per_epoch = Config(seed=7), None, 3
    batches = SimpleNamespace(batches=lambda seed, start: itertools.count(100 * seed + start))
    task._loaded = SimpleNamespace(train=batches)
    assert [list(task.batches(number)) for number in (0, 1)] == [[700, 701, 702], [703, 704, 705]]


def test_cutout_blanks_one_square_of_half_the_images():
    images = jnp.ones((400, 20, 24, 2))
    got = np.asarray(transforms.cutout(jax.random.key(0), images, 6))
    blank = (got == 0).all(axis=-1)
    np.testing.assert_array_equal(got == 0, np.repeat(blank[..., None], 2, axis=-1))
    sides = set()
    for image in blank:
        rows, columns = image.any(axis=1), image.any(axis=0)
        np.testing.assert_array_equal(image, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            places = np.flatnonzero(line)
            assert len(places) == 0 or places[-1] - places[0] + 1 == len(places) <= 6
        sides.add((rows.sum(), columns.sum()))
    assert (6, 6) in sides
    assert 150 < blank.any(axis=(1, 2)).sum() < 250
    # Three of six pixels lie before the one in the middle: four of 20 rows reach the first, three the last.
    rows = blank[blank.any(axis=(1, 2))].any(axis=2).mean(axis=0)
    np.testing.assert_allclose(rows[[0, -1]], [4 / 20, 3 / 20], atol=0.08)


@pytest.mark.parametrize(("loss", "in_training"), [(images.loss_function, True), (images.plain_loss_function, False)])
def test_labels_are_smoothed(loss, in_training):
    logits, labels, modes = np.random.default_rng(0).normal(size=(6, 10)), np.arange(6), []

    def apply(params, model_state, inputs, train, key=None):
        modes.append(train)
        return jnp.asarray(logits), model_state

    loss_fn = loss(Config(label_smoothing=0.2), models.Network((), (), apply))
    found, _ = loss_fn((), (), (np.zeros((6, 8, 8, 1), np.uint8), labels), jax.random.key(0))
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert found == pytest.approx(-np.mean(0.8 * logs[labels, labels] + 0.2 * logs.mean(axis=1)), rel=1e-5)
    assert modes == [in_training]


def test_flips_cutout_and_dropout_have_noise_of_their_own(monkeypatch):
    """No key is used twice; of some, one is the other's child by another name: a split folds in 0, 1 and so on."""
    shown, used, given = [], [], jax.random.key(0)

    def data(key):
        return tuple(jax.random.key_data(key).tolist())

    for name in ("split", "randint", "bernoulli"):
        draw = getattr(jax.random, name)
        monkeypatch.setattr(
            jax.random, name, lambda key, *rest, draw=draw, **how: used.append(data(key)) or draw(key, *rest, **how)
        )

    def apply(params, model_state, inputs, train, key=None):
        shown.append((np.asarray(inputs), key))
        return jnp.zeros((len(inputs), 10)), model_state

    raw = np.zeros((100, 32, 32, 3), np.uint8)
    raw[:, :, 16:] = 255
    config = Config(dataset="cifar10", model="resnet32", cutout=8)
    batch = raw, np.zeros(100, np.int32)
    images.loss_function(config, models.Network((), (), apply))((), (), batch, given)
    ((inputs, key),) = shown
    flipped = (inputs[:, 8:24, 6:14] > 0).mean(axis=(1, 2, 3)) > 0.5
    cut = (inputs == 0).all(axis=-1).any(axis=(1, 2))
    assert min((a & b).sum() for a in (flipped, ~flipped) for b in (cut, ~cut)) > 10
    assert len({*used, data(key)}) == len(used) + 1 == 7  # two splits, four draws, and dropout


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *itertools.product(("rigl",), get_args(OptimizerName)),
        *itertools.product(("dense", "mest-em"), ("sgd", "s2sam", "sam", "asam", "ssam-f", "ssam-d")),
    ],
)
def test_the_train_step_lowers_for_gpu_and_tpu(method, optimizer):
    """The ResNet with three optimizers, the others with a network that is quicker to trace."""
    config = Config(width=2, method=method, optimizer=optimizer, batch_size=16)
    network = (tasks.build if optimizer in ("sgd", "s2sam", "sam") else toy.build)(config)
    tx = optimizers.make(config, steps_per_epoch=10)
    step = loop.train_step(config, tasks.losses(config, network), tx)
    state = TrainState.create(network.params, tx, model_state=network.model_state)
    batch = (jnp.zeros((16, 8, 8, 1), jnp.uint8), jnp.zeros(16, jnp.int32))
    exported = jax.export.export(jax.jit(lambda s, b: step(s, b)), platforms=("cuda", "tpu"))(state, batch)
    assert exported.platforms == ("cuda", "tpu")
    assert len(exported.mlir_module_serialized) > 0


def test_nesterov_and_adamw_are_those_of_optax():
    params, grads = {"kernel": jnp.full((4, 4), 0.5)}, {"kernel": jnp.full((4, 4), 0.2)}
    wanted = {
        "sgd": optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        "adamw": optax.adamw(0.1, b1=0.9, weight_decay=5e-4),
    }
    for base, reference in wanted.items():
        tx = optimizers.make(Config(method="dense", optimizer="sgd", base=base, nesterov=base == "sgd"), 10)
        got, _ = tx.update(grads, tx.init(params), params)
        expected, _ = reference.update(grads, reference.init(params), params)
        np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=1e-6)

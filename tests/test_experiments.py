"""The experiments: data, models, and whole runs through the command line."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from prepared import encoded, image_features, write_tfds
from scipy import stats

from experiments import config as configs
from experiments import evaluate, models, sharding, tasks, train
from experiments.config import Config, OptimizerName, variants
from experiments.datasets import in_memory, kinds, transforms
from experiments.tasks import arrays, images
from experiments.training import (
    checkpoint,
    display,
    loop,
    optimizers,
    record,
    runs,
    sieving,
    sparse_methods,
)
from s2sam_jax import (
    ChannelAxis,
    ChannelGroup,
    Every,
    TrainState,
    apply_masks,
    get_masks,
    make_train_step,
    methods,
    perturb,
)
from s2sam_jax._base.tree import find_states

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "experiments.md"
TINY = ["--width", "4", "--subset", "128", "--epochs", "2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_dir(out):
    """A finished run: 2 epochs of RigL and S2-SAM on 128 digits."""
    return train.main([*TINY, "--out", str(out)])["s2sam"]


@pytest.fixture(scope="module")
def digits():
    return in_memory.load("digits")


@pytest.fixture
def cifar_arrays():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 24), ("test", 10)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 10, size)
    return arrays


class Silent:
    def steps(self, count):
        pass

    def row(self, row):
        pass


# Config


def test_run_name_is_stable_and_unique():
    assert Config().name == "digits-resnet8-rigl0.9-s2sam-44136fa3-seed0"
    changes = [{"rho": 0.1}, {"epochs": 31}, {"optimizer": "sam"}, {"init_from": Path("a")}, {"init_from": Path("b")}]
    assert len({Config(**change).digest for change in [{}, *changes]}) == 6


def test_run_name_does_not_depend_on_where_things_lie():
    assert Config(data=Path("x.npz"), out=Path("y")).name == Config().name
    assert Config(init_from=Path("here/run")).name == Config(init_from=Path("there/run")).name
    assert Config(seed=3).digest == Config(eval_every=7, checkpoint_every=9).digest == Config().digest


def test_config_survives_json():
    config = Config(data=Path("x.npz"), subset=100, init_from=Path("a"), rho=0.1)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match=r"does not know: \['colour'\]"):
        Config.from_json({"colour": "red"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "rigel"}, "Unknown method 'rigel'; there are dense, .*rigl, .*static"),
        ({"dataset": "mnist"}, "Unknown dataset 'mnist'; there are digits, cifar10, cifar100"),
        ({"base": "adam"}, "Unknown base 'adam'; there are sgd, adamw"),
        ({"schedule": "linear"}, "Unknown schedule 'linear'; there are cosine, steps"),
        ({"distribution": "even"}, "Unknown distribution 'even'; there are uniform, er, erk"),
        ({"rounds": 0}, "rounds must be at least 1; got 0"),
        ({"optimizer": "adam"}, "Unknown optimizer 'adam'; there are sgd, sam"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\); got 1.0"),
        ({"accumulate": 3}, "accumulate must be a divisor of batch_size; got 3"),
        ({"subset": 10}, "subset must be at least one batch; got 10"),
    ],
)
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


# Data


def test_digits_are_split_completely_and_by_class(digits):
    from sklearn.datasets import load_digits

    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.train_images.dtype == jnp.uint8
    assert digits.test_images.shape == (360, 8, 8, 1)
    images, labels = load_digits(return_X_y=True)
    rows = [np.concatenate(x) for x in ((digits.train_images, digits.test_images), digits[1::2])]
    ours = sorted((row.tobytes(), int(label)) for row, label in zip(*rows, strict=True))
    assert ours == sorted(
        (np.round(row * 255 / 16).astype(np.uint8).tobytes(), int(y)) for row, y in zip(images, labels, strict=True)
    )
    assert np.bincount(digits.test_labels).min() >= 35
    pixels = np.asarray(digits.train_images) / 255
    kind = kinds.KINDS["digits"]
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [kind.mean[0], kind.std[0]], atol=5e-5)


def test_subset_is_the_first_rows(digits):
    np.testing.assert_array_equal(in_memory.load("digits", subset=100).train_images, digits.train_images[:100])
    with pytest.raises(ValueError, match="subset=2000 is more than the 1437 training rows"):
        in_memory.load("digits", subset=2000)


def test_epoch_order_is_a_permutation_of_its_seed_and_epoch():
    order = in_memory.epoch_order(0, 1, examples=103, batch_size=10)
    assert order.shape == (10, 10)
    assert len(np.unique(order)) == 100
    np.testing.assert_array_equal(order, in_memory.epoch_order(0, 1, examples=103, batch_size=10))
    assert (order != in_memory.epoch_order(0, 2, examples=103, batch_size=10)).any()
    assert (order != in_memory.epoch_order(1, 1, examples=103, batch_size=10)).any()


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_augmented_images_are_crops(name):
    kind = kinds.KINDS[name]
    images = np.random.default_rng(0).integers(1, 256, (64, *kind.shape), np.uint8)
    got = np.asarray(jax.jit(lambda key, x: transforms.augment(key, x, kind))(jax.random.key(0), images))
    assert got.shape == images.shape
    assert got.dtype == np.uint8
    height, width, _ = kind.shape
    pad = kind.pad
    seen = set()
    for image, crop in zip(images, got, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        places = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        fits = [
            (y, x, flip)
            for y, x in places
            for flip in ((False, True) if kind.flip else (False,))
            if np.array_equal(crop[:, ::-1] if flip else crop, padded[y : y + height, x : x + width])
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) > (8 if pad == 1 else 40)
    assert {flip for _, _, flip in seen} == ({False, True} if kind.flip else {False})


def test_every_test_row_is_counted_once(digits):
    def apply(params, model_state, images, train):
        return jax.nn.one_hot(jnp.zeros(len(images), jnp.int32), 10), model_state

    task = arrays.Task(Config(), models.Network((), (), apply), digits, sharding.make_mesh())
    accuracy = task.evaluate((), ())["test_accuracy"]
    assert accuracy == np.mean(np.asarray(digits.test_labels) == 0)
    labels = np.concatenate([y for _, y in in_memory.eval_batches(digits.test_images, digits.test_labels, 100)])
    np.testing.assert_array_equal(labels[:360], digits.test_labels)
    np.testing.assert_array_equal(labels[360:], np.full(40, -1))


def test_tfds_and_npz_give_the_same_batches_and_losses(cifar_arrays, tmp_path):
    import tensorflow_datasets as tfds

    def shuffled(split):
        images, labels = cifar_arrays[f"{split}_images"], cifar_arrays[f"{split}_labels"]
        order = np.random.default_rng(1).permutation(len(labels))
        return [{"id": f"{split}_{i:05d}".encode(), "image": encoded(images[i]), "label": labels[i]} for i in order]

    features = {"id": tfds.features.Text(), **image_features()}
    splits = {split: shuffled(split) for split in ("train", "test")}
    write_tfds(tmp_path / "cifar10" / "3.0.2", features, splits)
    np.savez(tmp_path / "cifar.npz", **cifar_arrays)
    sets = [in_memory.load("cifar10", path) for path in (tmp_path, tmp_path / "cifar.npz")]

    config = Config(dataset="cifar10", width=2)
    network = tasks.build(config)
    loss_fn = jax.jit(images.loss_function(config, network))
    rows = in_memory.epoch_order(0, 0, examples=24, batch_size=8)[1]
    losses = []
    for dataset in sets:
        batch = (dataset.train_images[rows], dataset.train_labels[rows])
        np.testing.assert_array_equal(batch[0], cifar_arrays["train_images"][rows])
        np.testing.assert_array_equal(dataset.test_images, cifar_arrays["test_images"])
        losses.append(float(loss_fn(network.params, network.model_state, batch, jax.random.key(0))[0]))
    assert losses[0] == losses[1]


def test_missing_data_says_how_to_get_it_in_one_line(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "cifar10.npz"):
        with pytest.raises(SystemExit) as stop:
            train.main(["--dataset", "cifar10", "--data", str(path), "--out", str(tmp_path / "runs")])
        assert "tfds.data_source('cifar10'" in str(stop.value)
        assert str(stop.value).count("npz with the arrays") == 1
        assert str(stop.value).index("--data FILE.npz") < str(stop.value).index("tfds.data_source")
        assert "\n" not in str(stop.value)
    assert not (tmp_path / "runs").exists()


def test_npz_with_other_arrays_is_refused(cifar_arrays, tmp_path):
    file = tmp_path / "x.npz"
    np.savez(file, train_images=cifar_arrays["train_images"])
    with pytest.raises(ValueError, match=r"lacks the arrays \['test_images', 'test_labels', 'train_labels'\]"):
        in_memory.load("cifar10", file)
    np.savez(file, **(cifar_arrays | {"test_images": cifar_arrays["test_images"] / 255}))
    with pytest.raises(ValueError, match=r"test_images .* must be uint8 .* got float64"):
        in_memory.load("cifar10", file)
    np.savez(file, **(cifar_arrays | {"train_labels": cifar_arrays["train_labels"] + 5}))
    with pytest.raises(ValueError, match=r"train_labels .* must lie in \[0, 10\)"):
        in_memory.load("cifar10", file)


# Model, optimizer and loop


def test_wide_resnet32_has_the_published_size():
    shapes = jax.eval_shape(lambda: models.build("resnet32", width=32, channels=3, classes=10, seed=0)[:2])
    assert sum(x.size for x in jax.tree.leaves(shapes[0])) == 1_860_522


@pytest.mark.parametrize("method", ["dense", *methods.available()])
@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_goes_with_every_method(optimizer, method):
    group = ChannelGroup("all", filters=(ChannelAxis("kernel", -1),), scales=(ChannelAxis("bias", 0),))
    tx = optimizers.make(Config(optimizer=optimizer, method=method), 10, [group])
    state = jax.eval_shape(lambda: TrainState.create({"kernel": jnp.ones((20, 20)), "bias": jnp.ones(20)}, tx))
    assert state.params["kernel"].shape == (20, 20)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2] * 5),
        ("warmup", [0.0, 0.1, 0.2, 0.2, 0.2]),  # up to step 4 of 12
        ("learning-rate", [0.1 * (1 + np.cos(np.pi * step / 12)) for step in (0, 2, 4, 8, 12)]),
    ],
)
def test_radius_over_training(schedule, expected):
    config = Config(method="dense", epochs=3, rho=0.2, rho_schedule=schedule)
    tx, params = optimizers.make(config, steps_per_epoch=4), {"kernel": jnp.ones(3)}
    state = jax.jit(tx.init)(params)
    update, radii = jax.jit(tx.update), []
    for step in range(13):
        if step in (0, 2, 4, 8, 12):
            radii.append(float(state[0].rho))
        _, state = update(params, state, params)
    np.testing.assert_allclose(radii, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("optimizer", "mask"), [("ssam-f", "fisher"), ("ssam-d", "dynamic")])
def test_ssam_is_told_steps_where_the_config_has_epochs(optimizer, mask, monkeypatch):
    told = {}
    monkeypatch.setattr(optimizers, "ssam", lambda rho, **options: told.update(options) or optax.identity())
    config = Config(method="dense", optimizer=optimizer, epochs=6, ssam_update_every=1.5, ssam_sparsity=0.8)
    optimizers.make(config, steps_per_epoch=10)
    del told["seed"]
    assert told == {"mask": mask, "sparsity": 0.8, "update_every": 15, "total_steps": 60}


@pytest.mark.parametrize("optimizer", ["esam", "ssam-d"])
def test_whatever_a_run_draws_follows_its_seed(optimizer):
    """Noise, masks and perturbation: three keys, and others for another seed."""
    found = []
    for seed in (0, 1):
        config = Config(method="set", optimizer=optimizer, seed=seed)
        state = loop.initial_state(config, toy.build(config), optimizers.make(config, steps_per_epoch=4))
        keys = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
        assert len(keys) == 3
        found += [tuple(jax.random.key_data(key).tolist()) for key in keys]
    assert len(set(found)) == 6


def test_variants_of_s2sam_perturb_as_they_say():
    """After one gradient g at w: rho g / |g|, or downhill; adaptive rho T^2 g / |T g|, with T = |w| + eta; as released
    rho g^3 / |w g|, on pruned weights too."""
    params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}
    grads = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
    moved = {}
    momentum = {}
    for optimizer in ("s2sam", "s2sam-adaptive", "s2sam-opposite", "s2sam-released"):
        config = Config(optimizer=optimizer, method="static", sparsity=0.5, rho=0.1, learning_rate=0.0)
        tx = optimizers.make(config, steps_per_epoch=4)
        state = tx.init(params)
        masks = get_masks(state)
        held = {"kernel": params["kernel"] * masks["kernel"]}
        _, state = tx.update(grads, state, held)
        moved[optimizer] = perturb(held, state)["kernel"] - held["kernel"]
        (trace,) = find_states(state, optax.TraceState)
        momentum[optimizer] = np.asarray(trace.trace["kernel"])
    live, g = masks["kernel"], np.asarray(grads["kernel"], np.float64)
    assert (momentum["s2sam"][~live] == 0).all()
    assert (momentum["s2sam-released"] != 0).all()  # dense, as the released code has it
    expected = 0.1 * g * live / np.linalg.norm(g * live)
    np.testing.assert_allclose(moved["s2sam"], expected, rtol=1e-5)
    np.testing.assert_allclose(moved["s2sam-opposite"], -expected, rtol=1e-5)
    scale = np.abs(np.asarray(held["kernel"])) + Config.eta
    adaptive = 0.1 * scale**2 * g * live / np.linalg.norm(scale * g * live)
    np.testing.assert_allclose(moved["s2sam-adaptive"], adaptive, rtol=1e-5)
    np.testing.assert_allclose(
        moved["s2sam-released"], 0.1 * g**3 / np.linalg.norm(np.asarray(held["kernel"]) * g), rtol=1e-4
    )


def test_an_epoch_is_the_same_as_a_scan(monkeypatch, digits):
    """The form for accelerators against the one for CPU, on a linear model."""
    dataset = digits._replace(train_images=digits.train_images[:64].astype(jnp.float32) / 255)

    def loss_fn(params, model_state, batch, key):
        images, labels = batch
        logits = images.reshape(len(images), -1) @ params["kernel"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (model_state, {})

    tx = optimizers.make(Config(method="rigl", epochs=4, optimizer="s2sam"), steps_per_epoch=8)
    results = []
    for backend in ("cpu", "gpu"):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            run = arrays.epoch_runner(make_train_step(loss_fn, tx), dataset, Silent())
            state = TrainState.create({"kernel": jnp.full((64, 10), 0.01)}, tx)
            for epoch in range(2):
                state, metrics = run(state, in_memory.epoch_order(0, epoch, 64, 8))
            results.append((metrics["loss"], state.params["kernel"]))
    assert results[0][0].shape == (8,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *results)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_task_runs_the_step_and_tells_the_reporter_that_it_is_given(backend, monkeypatch, digits):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    task = arrays.Task(Config(batch_size=700), models.Network((), (), lambda *_: None), digits, sharding.make_mesh())
    seen = []
    for amount in (1, 10):
        reporter = SimpleNamespace(steps=lambda count, amount=amount: seen.append((amount, count)))
        run = task.runner(lambda state, batch, amount=amount: (state + amount, {"loss": state}), reporter)
        state, metrics = run(jnp.array(0), 0)
        assert int(state) == 2 * amount
        assert metrics["loss"].tolist() == [0, amount]
    assert seen == ([(1, 1), (1, 1), (10, 1), (10, 1)] if backend == "cpu" else [(1, 2), (10, 2)])


def test_a_breakdown_stops_the_run_and_names_the_step():
    state = SimpleNamespace(first_bad_step=jnp.array(7))
    with pytest.raises(FloatingPointError, match="broke down at step 7"):
        record.stop_if_bad(state)


def test_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size=2000 is more than the 1437 training rows"):
        tasks.make(Config(batch_size=2000), digits)


# Runs


def test_rows_say_all_that_is_needed(run_dir):
    rows = runs.rows(run_dir)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["final"] for row in rows] == [False, True]
    for row in rows:
        assert row["config"]["method"] == "rigl"
        assert row["seed"] == 0
        assert row["versions"].keys() == {"jax", "optax", "flax", "s2sam_jax"}
        assert {"train_loss", "test_accuracy", "sparsity", "seconds", "device"} <= row.keys()
    assert ["images_per_second" in row for row in rows] == [False, True]  # not of the epoch that compiles


def test_the_last_row_is_of_statistics_of_20_batches_that_no_epoch_had():
    """And of the newest sparsity, where other figures are means over the epochs since the row before."""

    def loss_fn(params, model_state, batch, key):
        return params["w"].sum(), (0.9 * model_state + 0.1 * batch, {})

    task = SimpleNamespace(
        steps_per_epoch=1,
        losses=SimpleNamespace(loss_fn=loss_fn),
        batches=lambda number: (jnp.float32(100 * number + index) for index in range(30)),
        evaluate=lambda params, model_state, final=False: {"test_accuracy": float(model_state)},
    )
    reporter = record.Last()
    kept = record.Record(Config(method="dense", optimizer="sgd", epochs=3, eval_every=3), task, reporter)
    state = kept.begin(lambda: TrainState.create({"w": jnp.ones(2)}, optax.sgd(0.1), model_state=jnp.zeros(())))
    for epoch in (1, 2, 3):
        kept.add(state, {"loss": np.array([epoch, 3 * epoch]), "sparsity": np.array([0.0, epoch / 10])}, 1.0)
    state = kept.finish(state)
    assert reporter.last["test_accuracy"] == 0
    assert (reporter.last["sparsity"], reporter.last["train_loss"]) == (0.3, 4.0)
    assert reporter.last["test_accuracy_recalibrated"] == state.model_state == pytest.approx(300 + 9.5, rel=1e-5)


def test_speed_is_without_the_epoch_that_compiles():
    task = SimpleNamespace(steps_per_epoch=2, evaluate=lambda *_, final: {"test_accuracy": 0.5})
    reporter = record.Last()
    books = record.Record(Config(method="dense", epochs=9, eval_every=3), task, reporter)
    state = TrainState.create({"kernel": jnp.ones(3)}, optax.sgd(0.1))
    for seconds in (100.0, 0.3, 0.5):
        books.add(state, {"loss": np.ones(2)}, seconds)
    assert reporter.last["images_per_second"] == pytest.approx(2 * 64 / 0.4)
    assert "seconds" in reporter.last
    books.add(state, {"loss": np.ones(2)}, 0.5)
    assert reporter.last["epoch"] == 3, "no row with figures of another epoch"


def test_evaluation_from_the_folder_equals_the_record(run_dir, capsys):
    final = runs.rows(run_dir)[-1]
    accuracy, sparsity = evaluate.main([str(run_dir)])
    assert accuracy == final["test_accuracy_recalibrated"]
    zeros, sizes = np.sum(list(final["layers"].values()), axis=0)
    assert sparsity == zeros / sizes
    assert abs(sparsity - 0.9) < 0.01
    said = f"test accuracy {accuracy:.2%} (recalibrated BatchNorm statistics), sparsity {sparsity:.2%}, masks hold\n"
    assert capsys.readouterr().out == said


def test_evaluation_says_how_its_accuracy_came_about(toy, tmp_path, capsys):
    """The best epoch has been chosen by what it is judged by, here on held-out images."""
    folder = train.main([*TINY, "--method", "static", "--validation", "64", "--out", str(tmp_path)])["s2sam"]
    capsys.readouterr()
    accuracy, _ = evaluate.main([str(folder), "--which", "best"])
    start = f"accuracy on held-out images {accuracy:.2%} (running BatchNorm statistics; of the epoch that is best by"
    assert capsys.readouterr().out.startswith(start)
    assert evaluate._notes("last", False) == ""


def test_the_guide_names_all_that_a_run_leaves_and_what_is_no_part_of_its_name(run_dir):
    text = GUIDE.read_text()
    files = [path.name + "/" * path.is_dir() for path in run_dir.iterdir()]
    fields = set().union(*runs.rows(run_dir))
    options = [f"--{field.replace('_', '-')}" for field in configs._NOT_HASHED]
    assert [name for name in [*files, *fields, *options] if f"`{name}`" not in text and f"`{name} " not in text] == []


def test_exported_weights_equal_the_checkpoint_and_are_sparse(run_dir):
    """Read by the lines that the guide has for it."""
    names = {"run": run_dir}
    (lines,) = [
        block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "safetensors" in block
    ]
    exec(lines, names)
    state, arrays = runs.restore(run_dir), names["arrays"]
    masks = get_masks(state.opt_state)
    for path, param in jax.tree.leaves_with_path(state.params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(arrays[name], param)
        assert (arrays[name][arrays[f"mask/{name}"] == 0] == 0).all()
    for path, leaf in jax.tree.leaves_with_path(state.model_state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(arrays[f"model_state/{name}"], leaf)
    assert len(arrays) == 2 * len(jax.tree.leaves(state.params)) + len(jax.tree.leaves(state.model_state))
    head = masks["blocks"][2]["conv2"]["kernel"]
    np.testing.assert_array_equal(arrays["mask/blocks/2/conv2/kernel"], np.asarray(head, np.uint8))
    assert names["metadata"] == {
        "model": "resnet8", "width": "4", "dataset": "digits", "method": "rigl", "sparsity": "0.9"
    }  # fmt: skip
    files = [run_dir / name for name in (runs.WEIGHTS, runs.METRICS)]
    assert len({file.stat().st_mode for file in files}) == 1  # whatever the umask


def test_checkpoints_that_do_not_fit_name_the_field(run_dir, tmp_path):
    state = runs.restore(run_dir)
    folder = run_dir / runs.CHECKPOINT
    wrong = state._replace(step=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"step: int32\(\) in the checkpoint, float32\(3,\) expected"):
        checkpoint.restore(folder, wrong)
    with pytest.raises(ValueError, match="model_state/norm/mean: in the checkpoint only"):
        checkpoint.restore(folder, state._replace(model_state=()))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore(tmp_path / "none", state)
    with pytest.raises(SystemExit, match="is not the folder of a finished run"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="is of a run that has not finished"):
        evaluate.main([f"{run_dir}.partial"])


def test_a_finished_run_is_shown_not_repeated(run_dir, out, capsys):
    before = (run_dir / runs.METRICS).read_bytes()
    assert train.main([*TINY, "--out", str(out)]) == {"s2sam": run_dir}
    assert "--overwrite" in capsys.readouterr().out
    assert (run_dir / runs.METRICS).read_bytes() == before


def test_compare_trains_the_others_and_draws_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "build", toy.build)
    first = train.main([*TINY, "--out", str(tmp_path)])["s2sam"]
    stamp = (first / runs.METRICS).stat().st_mtime_ns
    folders = train.main([*TINY, "--out", str(tmp_path), "--compare", "sgd", "s2sam"])
    assert list(folders) == ["sgd", "s2sam"]
    assert folders["s2sam"] == first
    assert (first / runs.METRICS).stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("compare-sgd-s2sam-*.png"))) == 1
    printed = capsys.readouterr().out
    assert "sgd" in printed
    assert "hidden/kernel" in printed


def test_a_comparison_over_seeds_ends_in_means_and_paired_gains(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--subset", "128", "--epochs", "1", "--out", str(tmp_path), "--compare", "sgd", "s2sam", "--seeds"]
    folders = train.main([*options, "0", "1", "2"])
    printed = capsys.readouterr().out
    accuracies = [100 * runs.rows(folders[f"sgd seed {n}"])[-1]["test_accuracy_recalibrated"] for n in range(3)]
    assert f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}" in printed
    assert "gain over sgd" in printed
    assert printed.count("if zeros cost nothing") == 2  # the state of s2sam is larger; seeds cost the same
    assert "hidden/kernel" not in printed
    assert "…" not in printed.partition("digits, ")[2]
    (file,) = tmp_path.glob("*.png")
    assert re.fullmatch(r"compare-sgd-s2sam-digits-resnet8-rigl0\.9-[0-9a-f]{8}\.png", file.name)

    train.main([*options, "0", "1", "2", "--layers"])
    assert capsys.readouterr().out.count("hidden/kernel") == 1


def test_gains_are_paired_by_seed_and_over_the_first_optimizer():
    values = {"sam": [0.5, 0.52, 0.57], "sgd": [0.51, 0.5, 0.5]}
    rows = [
        {"config": {"optimizer": name}, "seed": seed, "test_accuracy_recalibrated": value}
        for name, mine in values.items()
        for seed, value in enumerate(mine)
    ]
    _, means, _, gains = (list(column.cells) for column in display.seeds_table(rows).columns)
    assert means == ["53.00 ± 3.61", "50.33 ± 0.58"]
    differences = 100 * (np.array(values["sgd"]) - np.array(values["sam"]))
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert gains == ["–", f"{differences.mean():+.2f} (±{(high - low) / 2:.2f})"]


def test_zeros_are_shown_once_unless_runs_differ():
    one, other = ({"layers": {"a": [zeros, 4], "b": [2, 4]}} for zeros in (1, 3))
    cells = [list(column.cells) for column in display.layer_table({"sgd": one, "sam": one}).columns]
    assert cells == [["a", "b"], ["25.00%", "50.00%"]]
    cells = [list(column.cells) for column in display.layer_table({"sgd": one, "sam": other}).columns]
    assert cells[1:] == [["25.00%", "50.00%"], ["75.00%", "50.00%"]]


def test_a_run_can_start_from_another(run_dir, out, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "build", toy.build)
        first = train.main([*TINY, "--out", str(tmp_path)])["s2sam"]
        arguments = ["--width", "4", "--subset", "128", "--epochs", "1", "--learning-rate", "0", "--weight-decay", "0"]
        arguments += ["--optimizer", "sgd", "--method", "dense", "--init-from", str(first), "--out", str(tmp_path)]
        folder = train.main(arguments)["sgd"]
        jax.tree.map(np.testing.assert_array_equal, runs.restore(folder).params, runs.restore(first).params)
        assert evaluate.main([str(folder)])[1] == 0
    with pytest.raises(SystemExit, match="has width=4, and this run 8; they must agree"):
        train.main(["--width", "8", "--init-from", str(run_dir), "--out", str(out)])


def test_magnitude_prunes_the_run_it_starts_from(run_dir):
    start = runs.restore(run_dir)
    config = dataclasses.replace(runs.read_config(run_dir), method="magnitude", sparsity=0.95, optimizer="sgd")
    network, tx = tasks.build(config), optimizers.make(config, steps_per_epoch=2)
    kernel = loop.initial_state(config, network, tx, start).params["blocks"][2]["conv2"]["kernel"]
    before = start.params["blocks"][2]["conv2"]["kernel"]
    kept = np.asarray(kernel) != 0
    np.testing.assert_array_equal(kernel[kept], before[kept])
    assert np.abs(before)[kept].min() >= np.abs(before)[~kept].max()
    assert kept.sum() < (np.asarray(before) != 0).sum()


@pytest.mark.parametrize("method", sorted({*variants.method_names()} - {"dense", "chex"}))
def test_methods_of_random_first_masks_are_known(method):
    """Others keep the largest of the given weights, or all (chex the best channels), so that those of a run count."""
    params = {"kernel": jnp.zeros((100, 100)).at[::4].set(1.0), "bias": jnp.ones(100)}
    group = ChannelGroup("all", filters=(ChannelAxis("kernel", -1),), scales=(ChannelAxis("bias", 0),))
    tx = optimizers.make(Config(method=method, sparsity=0.75, epochs=160), 10, [group])
    kept = int((params["kernel"] * get_masks(tx.init(params))["kernel"]).sum())
    assert (kept == 2500) == (variants.in_library(method)[0] not in variants.RANDOM)


def test_a_sparse_run_is_not_given_random_masks(toy, tmp_path):
    options = [*TINY, "--out", str(tmp_path)]
    first = train.main(options)["s2sam"]
    goes_on = "--method magnitude-global --sparsity 0.9"
    with pytest.raises(SystemExit, match=f"is sparse, and --method set draws .* use {goes_on}\\.$"):
        train.main([*options, "--method", "set", "--init-from", str(first)])
    folder = train.main([*options, *goes_on.split(), "--init-from", str(first)])["s2sam"]
    masks = [get_masks(runs.restore(run).opt_state) for run in (first, folder)]
    lost = sum(int((a & ~b).sum()) for a, b in zip(*map(jax.tree.leaves, masks), strict=True))
    assert lost <= len(jax.tree.leaves(masks[0]))  # by rounding


# Data sieving


def test_sieving_leaves_out_what_is_never_forgotten():
    """Four examples over four epochs: always right, forgotten twice, never right, right from the second on."""
    history = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1]], bool)
    state = sieving.start(4)
    for correct in history:
        rows = np.array([3, 1, 0, 2])  # in the order an epoch has them
        state = sieving.record(state, rows, correct[rows])
    np.testing.assert_array_equal(state.forgotten, [0, 2, 0, 0])
    np.testing.assert_array_equal(sieving.keep(state, 0), [0, 1, 2, 3])
    np.testing.assert_array_equal(sieving.keep(state, 1), [1, 2, 3])
    np.testing.assert_array_equal(sieving.keep(state, 2), [1, 2])
    np.testing.assert_array_equal(sieving.keep(state, 3), [2])
    with pytest.raises(ValueError, match=r"remove must lie in \[0, 4\)"):
        sieving.keep(state, 4)


@pytest.mark.parametrize("method", ["mest-em", "mest-ems", "gmp-global", "set-itop", "rigl-itop", "lottery", "snip"])
def test_every_name_makes_an_optimizer_with_a_clock_that_can_fire(method):
    config = Config(method=method, epochs=24, dataset="cifar10")
    tx = optimizers.make(config, steps_per_epoch=10)
    state = tx.init({"kernel": jnp.ones((20, 30))})
    assert 0 <= int(state.next_update) < 240


def test_rounds_share_the_epochs_out():
    """11 prunings to 90 %: twelve rounds of 20 steps and the call that prunes."""
    config = Config(method="lottery", epochs=21, rounds=11)
    assert sparse_methods.round_steps(config, steps_per_epoch=12) == 20
    assert sparse_methods.clock(config, steps_per_epoch=12) == Every(0, 21)
    with pytest.raises(ValueError, match="too few: 11 prunings make 12 rounds of training"):
        sparse_methods.round_steps(Config(method="lottery", epochs=1), steps_per_epoch=12)


@pytest.mark.parametrize(
    ("method", "ends"), {"mest-em": (100, 130), "mest-ems": (90, 120), "mest-ems-98": (100, 130)}.items()
)
def test_phases_of_mest_end_when_they_were_published_to(method, ends):
    """Of 160 epochs; while a phase lasts something moves, and EM&S has more weights than planned."""
    tx = optimizers.make(Config(method=method, dataset="cifar10", epochs=160, optimizer="sgd"), steps_per_epoch=100)
    params = {"kernel": jax.random.normal(jax.random.key(0), (50, 100))}
    state = tx.init(params)
    params = apply_masks(params, state)

    @jax.jit
    def update(state, params, step):
        state = state._replace(step=step)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, refresh_masks=True)
        return state, optax.apply_updates(params, updates)

    moved, counts = {}, {}
    for epoch in range(0, 160, 5):
        before = state.masks["kernel"]
        state, params = update(state, params, epoch * 100)
        moved[epoch], counts[epoch] = int((before ^ state.masks["kernel"]).sum()), int(state.masks["kernel"].sum())
    if method == "mest-em":
        assert set(counts.values()) == {500}
        assert moved[ends[0] - 5] > 1.5 * moved[ends[0]] > 0
    else:
        first, second = ends
        assert counts[0] == counts[first - 5] > counts[first] == counts[second - 5] > counts[second] == 500
    assert [epoch for epoch in moved if moved[epoch]][-1] == ends[1] - (5 if method == "mest-em" else 0)


def test_recipes_apply_on_cifar_and_can_be_overridden():
    assert sparse_methods.clock(Config(method="mest-em", dataset="cifar10", epochs=160), 100) == Every(0, 500, 15_500)
    assert sparse_methods.clock(Config(method="mest-em", epochs=160), 100) == Every(0, 100, 12_000)
    changed = Config(method="mest-em", dataset="cifar10", epochs=160, update_every=10, update_end=1.0)
    assert sparse_methods.clock(changed, 100) == Every(0, 1000, 15_000)
    # As often as published: ITOP on CIFAR-100, GMP in RigL's comparison, SET after each epoch but the last.
    for method, epochs, count in (("set-itop", 250, 65), ("rigl-itop", 250, 24), ("gmp", 250, 56), ("set", 160, 159)):
        clock = sparse_methods.clock(Config(method=method, dataset="cifar10", epochs=epochs), 391)
        assert len(range(clock.start, clock.end + 1, clock.every)) == count
        assert clock.start > 0
    five = (
        sparse_methods.clock(Config(dataset="cifar10", epochs=800), 391),
        sparse_methods.clock(Config(dataset="cifar10", epochs=160), 391),
    )
    assert five[0].every == five[1].every == 100  # RigL's extended schedule: the end grows, the interval does not
    assert 0 <= five[0].end - 5 * five[1].end < 5 * 100

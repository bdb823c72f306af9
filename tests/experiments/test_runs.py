"""Whole runs: their rows, evaluation, export, and where they start from."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from experiments import config as configs
from experiments import evaluate, models, sharding, tasks, train
from experiments.config import Config
from experiments.datasets import in_memory
from experiments.tasks import arrays
from experiments.training import checkpoint, loop, optimizers, record, runs
from s2sam_jax import TrainState, get_masks, make_train_step

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "experiments.md"
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


class Silent:
    def steps(self, count):
        pass

    def row(self, row):
        pass


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

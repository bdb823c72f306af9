"""Choosing rho on held-out training images."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import sharding, table, tasks, train, tune
from experiments.config import Config
from experiments.datasets import in_memory
from experiments.tasks import arrays


def rows(file, *triples):
    file.write_text(
        "".join(json.dumps({"setting": s, "config": {"rho": r}, "accuracy": a}) + "\n" for s, r, a in triples)
    )
    return file


def test_the_best_radius_of_each_setting_and_of_equal_ones_the_smaller(tmp_path):
    file = rows(tmp_path / "rows", ("a.sam", 0.5, 0.9), ("a.sam", 0.1, 0.9), ("a.sam", 1.0, 0.8), ("b.sam", 1.0, 0.1))
    assert tune.best(file) == {"a.sam": 0.1, "b.sam": 1.0}
    with pytest.raises(FileNotFoundError, match=r"no rows in .*experiments\.tune makes them"):
        tune.best(tmp_path / "none")


def test_a_setting_that_broke_down_at_every_radius_has_no_best_one(tmp_path):
    file = rows(tmp_path / "rows", ("a.sam", 0.1, 0.0), ("a.sam", 1.0, 0.0), ("b.sam", 1.0, 0.1))
    assert tune.best(file) == {"b.sam": 1.0}


def test_held_out_images_are_the_last_training_rows_and_the_test_set_is_out_of_sight():
    whole = in_memory.load("digits")
    part = in_memory.hold_out(whole, 287)
    assert [len(x) for x in part] == [1150, 1150, 287, 287]
    np.testing.assert_array_equal(part.test_images, whole.train_images[1150:])
    np.testing.assert_array_equal(part.train_labels, whole.train_labels[:1150])
    with pytest.raises(ValueError, match="validation=1437 leaves none of the 1437 training rows"):
        in_memory.hold_out(whole, 1437)


def test_a_run_with_validation_reports_on_held_out_images(toy, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(in_memory, "eval_batches", lambda images, *_: seen.append(len(images)) or [])
    task = arrays.Task(Config(validation=287), tasks.build(Config()), in_memory.load("digits"), sharding.make_mesh())
    assert (task.steps_per_epoch, seen) == (1150 // 64, [287])
    assert Config(validation=287).digest != Config().digest
    with pytest.raises(ValueError, match="validation must be 0 for wmt14; got 5"):
        Config(dataset="wmt14", model="transformer-base", validation=5)


def test_what_is_missing_is_tried_and_a_table_takes_the_best(toy, tmp_path, monkeypatch):
    names = ["budget.rigl-erk-0.95.sgd", "budget.rigl-erk-0.95.sam", "budget.dense.s2sam"]
    chosen = [tune.recipes.get(name) for name in names]
    monkeypatch.setattr(tune.recipes, "of_table", lambda name: chosen)
    monkeypatch.setattr(
        tune, "scaled", lambda recipe, scale: Config(subset=320, epochs=1, optimizer=recipe.config.optimizer)
    )
    arguments = tune.Arguments("budget", grid=(0.01, 0.1))
    file = tmp_path / "rows.jsonl"
    tune.run(arguments, file)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    settings = ["rigl-erk-0.95.sam", "dense.s2sam"]
    assert [(row["setting"], row["config"]["rho"]) for row in found] == [(s, r) for s in settings for r in (0.01, 0.1)]
    assert {row["config"]["validation"] for row in found} == {64}
    assert all(0 <= row["accuracy"] <= 1 for row in found)
    before = file.read_text()
    assert tune.run(dataclasses.replace(arguments, methods=("dense",), grid=(0.1,)), file) == found[3:]
    assert file.read_text() == before
    assert len(tune.table(found).rows) == 2
    with pytest.raises(
        ValueError, match=r"(?s)rigl-erk-0\.95\.sam, 0\.01, but of another config:\n  seed: 0 there, 1 asked"
    ):
        tune.run(dataclasses.replace(arguments, seed=1), file)
    with pytest.raises(ValueError, match=r"validation: 64 there, 32 asked for"):
        tune.run(dataclasses.replace(arguments, held_out=0.1), file)
    assert file.read_text() == before

    file = rows(file, ("rigl-erk-0.95.sam", 0.3, 0.9))
    ran = []
    monkeypatch.setattr(train, "train", lambda arguments, console: ran.append(arguments.config))
    monkeypatch.setattr(table, "_row", lambda recipe, config, scale: {"recipe": {"name": recipe.name}, "seed": 0})
    common = {"seeds": (0,), "out": tmp_path, "results": tmp_path, "tuned": file}
    table.run(table.Arguments("budget", optimizers=("sgd", "sam"), **common))
    assert [config.rho for config in ran] == [0.05, 0.3]
    with pytest.raises(ValueError, match=r"No rho was tuned for dense\.s2sam, .*; there are rigl-erk-0\.95\.sam"):
        table.run(table.Arguments("budget", optimizers=("s2sam",), **common))


def test_what_breaks_down_is_never_the_best_and_ends_neither_a_grid_nor_a_table(tmp_path, monkeypatch, capsys):
    names = ["budget.dense.sam", "budget.dense.s2sam"]
    monkeypatch.setattr(tune.recipes, "of_table", lambda name: [tune.recipes.get(name) for name in names])

    def breaks_down(config, *rest):
        if config.rho > 0.05 or config.optimizer == "sam":
            raise FloatingPointError("Training broke down at step 61")
        rest[-1].last = {"test_accuracy_recalibrated": 0.1}

    monkeypatch.setattr(tune.loop, "train", breaks_down)
    monkeypatch.setattr(tune.tasks, "make", lambda config, dataset: None)
    tune.run(tune.Arguments("budget", scale="digits", grid=(0.05, 0.2)), tmp_path / "rows")
    found = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["accuracy"] for row in found] == [0.0, 0.0, 0.1, 0.0]
    assert tune.best(tmp_path / "rows")["dense.s2sam"] == 0.05

    monkeypatch.setattr(train, "train", lambda arguments, console: breaks_down(arguments.config, tune.Last()))
    monkeypatch.setattr(table, "_row", lambda recipe, config, scale: {"recipe": {"name": recipe.name}, "seed": 0})
    kept = table.run(table.Arguments("budget", scale="digits", seeds=(0,), out=tmp_path, results=tmp_path))
    assert [row["recipe"]["name"] for row in kept] == ["budget.dense.s2sam"]
    assert "budget.dense.sam, seed 0, has no row. Training broke down at step 61" in capsys.readouterr().err


def test_command_line(tmp_path, monkeypatch, capsys):
    before = {
        n: getattr(jax.config, n) for n in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    row = {"setting": "dense.sam", "config": {"rho": 0.5}, "accuracy": 0.875}
    monkeypatch.setattr(tune, "run", lambda arguments, file: [row])
    tune.main(["budget", "--scale", "digits", "--rows", str(tmp_path / "rows"), "--cache", str(tmp_path)])
    for name, value in before.items():
        jax.config.update(name, value)
    assert "87.50" in capsys.readouterr().out


def test_rows_are_chosen_as_of_a_table():
    chosen = {"methods": ("rigl-erk",), "sparsities": (0.95,), "grid": (0.1, 0.2)}
    found = tune.configs(tune.Arguments("budget", scale="digits", optimizers=("sgd", "sam"), **chosen))
    assert [(name, config.rho) for name, config in found] == [("rigl-erk-0.95.sam", rho) for rho in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"budget has no methods \['rigel'\]; it has"):
        tune.configs(tune.Arguments("budget", methods=("rigel",)))
    with pytest.raises(ValueError, match="SGD has no rho to choose"):
        tune.configs(tune.Arguments("budget", optimizers=("sgd",)))


def test_a_table_that_compares_radii_has_none_to_choose():
    with pytest.raises(ValueError, match="causes compares radii"):
        tune.configs(tune.Arguments("causes", scale="digits"))

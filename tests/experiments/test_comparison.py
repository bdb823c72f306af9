"""Runs side by side: trained, paired by seed, and drawn."""

import re

import numpy as np
import pytest
import toy
from scipy import stats

from experiments import tasks, train
from experiments.training import display, runs

TINY = ["--width", "4", "--subset", "128", "--epochs", "2"]


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


def test_one_run_that_breaks_down_ends_no_other(toy, tmp_path, monkeypatch, capsys):
    def training(config, *rest):
        if (config.optimizer, config.seed) == ("s2sam", 1):
            raise FloatingPointError("Training broke down at step 2")
        return train_one(config, *rest)

    train_one = train.loop.train
    monkeypatch.setattr(train.loop, "train", training)
    options = ["--subset", "128", "--epochs", "1", "--out", str(tmp_path), "--compare", "s2sam", "sgd", "--seeds"]
    with pytest.raises(SystemExit, match=r"error: \S*s2sam-\w+-seed1: Training broke down at step 2$"):
        train.main([*options, "0", "1"])
    printed = capsys.readouterr().out
    assert len([path for path in tmp_path.iterdir() if (path / runs.WEIGHTS).is_file()]) == 3
    assert "gain over s2sam" in printed


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

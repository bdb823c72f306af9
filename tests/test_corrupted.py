"""``experiments.corrupted``: rows of several runs under corruptions, and the page that is made from them."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from test_robustness import NAMES, ROWS, cifar_run, pictures

from experiments import corrupted, robustness
from experiments.config import Config
from experiments.datasets.corruptions import CORRUPTIONS
from experiments.rows import jsonl
from experiments.training import runs

__all__ = ["cifar_run", "pictures"]


def arguments_of(tmp_path, *folders):
    return corrupted.Arguments(folders, examples=ROWS, corruptions=tuple(NAMES), rows=tmp_path / "rows.jsonl")


def test_a_row_is_what_the_whole_benchmark_finds(cifar_run, tmp_path):
    arguments = arguments_of(tmp_path, cifar_run)
    corrupted.main([str(cifar_run), "--examples", str(ROWS), "--corruptions", *NAMES, "--rows", str(arguments.rows)])
    (row,) = jsonl.read(arguments.rows)
    summary = robustness.main([str(cifar_run), "--rows", str(ROWS), "--corruptions", *NAMES])
    assert {name: row[name] for name in summary} == summary
    assert (row["optimizer"], row["seed"], row["examples"]) == ("sgd", 0, ROWS)
    assert str(cifar_run.parent) not in json.dumps(row)
    before = arguments.rows.read_text()
    corrupted.run(arguments)  # has its row; the data are not even looked for
    assert arguments.rows.read_text() == before
    assert "computed here; missing: shot_noise" in arguments.rows.with_suffix(".md").read_text()


def synthetic():
    rng, rows = np.random.default_rng(0), []
    for optimizer, seeds in (("sgd", range(4)), ("s2sam", range(1, 5)), ("sam", (0,))):
        for seed in seeds:
            each = {name: float(rng.uniform(0.3, 0.6)) for name in CORRUPTIONS if name != "frost"}
            mean = float(np.mean(list(each.values())))
            figures = {"clean_accuracy": float(rng.uniform(0.6, 0.7)), "mean_corruption_accuracy": mean}
            rows.append({"optimizer": optimizer, "seed": seed, "by_corruption": each} | figures)
    return rows


def test_gains_are_paired_by_seed_with_their_interval():
    rows = synthetic()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in corrupted.table(rows).splitlines()]
    header, _, sgd, s2sam, sam = lines
    assert header[2:8] == ["clean", "corrupted", "noise", "blur", "weather", "digital"]
    value = {(row["optimizer"], row["seed"]): 100 * row["mean_corruption_accuracy"] for row in rows}
    differences = np.array([value["s2sam", seed] - value["sgd", seed] for seed in (1, 2, 3)])
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert s2sam[9] == f"{differences.mean():+.2f} (±{(high - low) / 2:.2f})"
    assert (sgd[8:], s2sam[10], sam[10]) == (["–", "–", "0"], "3", "1")
    assert sam[9] == f"{value['sam', 0] - value['sgd', 0]:+.2f}"  # one pair has no interval
    weather = [np.mean([row["by_corruption"][n] for n in ("snow", "fog", "brightness")]) for row in rows[:4]]
    assert sgd[6] == f"{100 * np.mean(weather):.1f}"


def test_a_table_is_of_runs_that_differ_in_optimizer_and_seed(tmp_path):
    config = Config(dataset="cifar10", optimizer="s2sam").to_json()
    row = {**synthetic()[0], "config": config, "examples": 60}
    corrupted.check([row, {**row, "config": {**config, "optimizer": "sam", "seed": 3}}])
    for other, named in (
        ({"config": {**config, "rho": 0.1, "width": 3}}, "width, rho"),
        ({"examples": 61}, "examples"),
        ({"by_corruption": {"fog": 0.5}}, "corruptions"),
    ):
        with pytest.raises(ValueError, match=f"these also differ in {named}. Leave some out"):
            corrupted.check([row, {**row, **other}])
    file = tmp_path / "rows.jsonl"
    jsonl.append(file, row, {**row, "examples": 61})
    with pytest.raises(ValueError, match="differ in examples"):
        corrupted.write(file)


def test_runs_of_two_tables_are_refused_before_a_row_is_written(cifar_run, tmp_path, monkeypatch):
    other, read = tmp_path / "other", runs.read_config
    configs = {cifar_run: read(cifar_run), other: dataclasses.replace(read(cifar_run), momentum=0.7)}
    monkeypatch.setattr(runs, "read_config", lambda folder, data: configs[folder])
    arguments = arguments_of(tmp_path, cifar_run, other)
    with pytest.raises(ValueError, match="these also differ in momentum"):
        corrupted.run(arguments)
    assert jsonl.read(arguments.rows) == []


def test_only_cifar10(cifar_run, tmp_path, monkeypatch):
    config = dataclasses.replace(runs.read_config(cifar_run), dataset="digits")
    monkeypatch.setattr(runs, "read_config", lambda folder, data: config)
    with pytest.raises(ValueError, match="corrupted forms of cifar10 alone; there are runs of digits"):
        corrupted.run(arguments_of(tmp_path, cifar_run))

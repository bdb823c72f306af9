"""``experiments.robustness``: runs, corrupted images, rows, the summary that tables read, and the page of several."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes
from prepared import encoded, image_features, write_tfds
from rich.console import Console
from scipy import stats

from experiments import recipes, robustness, table, tasks, train
from experiments.config import Config
from experiments.datasets import cifar_c, corruptions
from experiments.datasets.corruptions import CORRUPTIONS
from experiments.pages import corruptions as corruptions_page
from experiments.rows import jsonl
from experiments.training import runs

pytestmark = pytest.mark.usefixtures("small_evaluations")
SMALL = ["--model", "resnet8", "--width", "4", "--batch-size", "16", "--optimizer", "sgd", "--method", "dense"]
NAMES = ["gaussian_noise", "contrast", "brightness"]
ROWS = 60


def pictures(count):
    """Grey in ten shades, one a class, with noise: what a change of brightness or contrast confuses."""
    rng, labels = np.random.default_rng(count), np.arange(count) % 10
    noise = rng.integers(-8, 9, (count, 32, 32, 3))
    return np.uint8(25 * labels[:, None, None, None] + 12 + noise), labels


def predictions(folder, images):
    """Of the network on normalised pixels; to be compared with what the command reports."""
    config, state = runs.read_config(folder), runs.restore(folder)
    mean, std = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }[config.dataset]
    pixels = ((images / 255 - mean) / std).astype(np.float32)
    apply = jax.jit(partial(tasks.build(config).apply, train=False))
    return np.argmax(np.asarray(apply(state.params, state.model_state, pixels)[0]), axis=-1)


def write(folder, images, labels, splits):
    rows = [{"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True)]
    write_tfds(folder, image_features(), dict.fromkeys(splits, rows))


def stored(folder):
    *rows, last = map(json.loads, (folder / "robustness.jsonl").read_text().splitlines())
    return rows, last["summary"]


@pytest.fixture(scope="session")
def cifar_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    arrays = {f"{split}_{what}": x for split in ("train", "test") for what, x in zip(
        ("images", "labels"), pictures(320 if split == "train" else 80), strict=True)}  # fmt: skip
    np.savez(folder / "cifar.npz", **arrays)
    options = ["--dataset", "cifar10", "--data", str(folder / "cifar.npz"), "--epochs", "3", "--out", str(folder)]
    return train.main([*SMALL, *options])["sgd"]


def test_computed_corruptions_of_a_cifar10_run(cifar_run, capsys, monkeypatch):
    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *args, **options: drawn.append(args[2]) or errorbar(*args, **options))
    summary = robustness.main([str(cifar_run), "--examples", str(ROWS), "--corruptions", *NAMES])[cifar_run]
    rows, kept = stored(cifar_run)
    assert kept == summary
    accuracies = summary["clean_accuracy"], *summary["by_corruption"].values()
    np.testing.assert_allclose(drawn, [100 * np.array(accuracies)])
    assert (cifar_run / "robustness.png").stat().st_size > 10_000
    images, labels = (x[:ROWS] for x in pictures(80))
    cells = [(name, severity) for name in NAMES for severity in range(1, 6)]
    everything = np.concatenate([images, *(cifar_c.corrupt(*cell, images) for cell in cells)])
    right = predictions(cifar_run, everything).reshape(-1, ROWS) == labels
    clean, *expected = right.mean(axis=1)
    assert {(row["corruption"], row["severity"]): row["accuracy"] for row in rows} == pytest.approx(
        dict(zip(cells, expected, strict=True))
    )
    assert len(set(expected)) > 3
    assert {row["examples"] for row in rows} == {ROWS}
    assert {row["run"] for row in rows} == {cifar_run.name}
    assert summary["mean_corruption_accuracy"] == pytest.approx(np.mean(expected))
    assert summary["clean_accuracy"] == pytest.approx(clean)
    assert summary["relative_accuracy"] == pytest.approx(np.mean(expected) / clean)
    assert summary["missing"] == [name for name in corruptions.CORRUPTIONS if name not in NAMES]
    assert "frost" in summary["missing"]
    assert "mean_corruption_accuracy" in capsys.readouterr().out


def test_a_run_that_held_images_out_is_compared_on_test_images(cifar_run, tmp_path):
    """Its config says how it was evaluated while training; shares of one accuracy and another would say nothing."""
    folder = tmp_path / "run"
    shutil.copytree(cifar_run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"validation": 64}))
    found = robustness.main([str(folder), "--examples", str(ROWS), "--corruptions", "contrast"])[folder]
    images, labels = (x[:ROWS] for x in pictures(80))
    assert found["clean_accuracy"] == pytest.approx(np.mean(predictions(cifar_run, images) == labels))


def test_released_files_with_the_same_images_give_the_same_rows(cifar_run, tmp_path):
    images, labels = pictures(80)
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    cells = [cifar_c.corrupt("contrast", severity, images) for severity in range(1, 6)]
    np.save(tmp_path / "contrast.npy", np.concatenate(cells))
    computed = robustness.main([str(cifar_run), "--corruptions", "contrast"])
    of_computed = stored(cifar_run)
    released = robustness.main([str(cifar_run), "--corruptions", "contrast", "--corrupted", str(tmp_path)])
    assert released == computed
    assert stored(cifar_run) == of_computed


def test_imagenet_c_from_a_run_to_the_figure_of_a_table(tmp_path):
    """Corrupted sets whose labels are what the run predicts, but for 3 of 20 more at each severity."""
    pixels, labels = pictures(20)
    data, folder = tmp_path / "tfds", tmp_path / "tfds" / "imagenet2012_corrupted"
    images = [encoded(x) for x in pixels]
    write(data / "imagenet2012/5.1.0", images, labels, ("train", "validation"))
    options = ["--dataset", "imagenet2012", "--data", str(data), "--image-size", "32", "--epochs", "1"]
    run = train.main([*SMALL, *options, "--out", str(tmp_path / "runs")])["sgd"]
    predicted = predictions(run, pixels)
    for severity in range(1, 6):
        write(tmp_path / f"{severity}", images, predicted ^ (np.arange(20) < 3 * severity), ("validation",))
        for name in corruptions.CORRUPTIONS:
            shutil.copytree(tmp_path / f"{severity}", folder / f"{name}_{severity}/1.0.0")

    summary = robustness.main([str(run), "--corrupted", str(data)])[run]
    rows, kept = stored(run)
    assert kept == summary
    assert len(rows) == 75
    assert summary["missing"] == []
    assert summary["clean_accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert summary["by_severity"] == pytest.approx({"1": 0.85, "2": 0.7, "3": 0.55, "4": 0.4, "5": 0.25})
    assert summary["by_corruption"] == pytest.approx(dict.fromkeys(corruptions.CORRUPTIONS, 0.55))
    assert summary["mean_corruption_accuracy"] == pytest.approx(0.55)
    row = table._row(recipes.get("table5.rigl-0.8.s2sam"), runs.read_config(run), "full")
    assert row["recipe"]["metric"] == "ImageNet-C accuracy (%)"
    assert row["value"] == pytest.approx(55)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("digits", [], "corrupted forms of cifar10 and imagenet2012; the run is of digits"),
        ("imagenet2012", [], "ImageNet-C cannot be computed here: pass --corrupted"),
        ("cifar10", ["--corrupted", "x", "--examples", "5"], "examples=5 is for corruptions that are computed; leave"),
        ("cifar10", ["--corrupted", "x", "--rows", "y"], "rows=y is for corruptions that are computed; leave it out"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(dataset, options, message, tmp_path):
    (tmp_path / runs.CONFIG).write_text(json.dumps(Config(dataset=dataset).to_json()))
    with pytest.raises(SystemExit, match=message):
        robustness.main([str(tmp_path), *options])


def test_runs_on_other_data_have_a_command_of_their_own(tmp_path):
    for dataset in ("cifar10", "imagenet2012"):
        (tmp_path / dataset).mkdir()
        (tmp_path / dataset / runs.CONFIG).write_text(json.dumps(Config(dataset=dataset).to_json()))
    with pytest.raises(SystemExit, match="must be on the same data set and size of images"):
        robustness.main([str(tmp_path / "cifar10"), str(tmp_path / "imagenet2012")])


def test_missing_corruptions_are_named(cifar_run, tmp_path):
    with pytest.raises(SystemExit, match=r"no corruptions \['frost'\] here; there are gaussian_noise, .*, snow, fog,"):
        robustness.main([str(cifar_run), "--corruptions", "frost"])
    with pytest.raises(ValueError, match=r"no corruptions \['rain'\] here; there are gaussian_noise, .*, frost, fog,"):
        corruptions.from_npy(tmp_path, 5, names=["rain"])
    with pytest.raises(SystemExit, match=r"Of the 5 corruptions in cifar10_corrupted, 5 are not prepared"):
        robustness.main([str(cifar_run), "--corruptions", "frost", "--corrupted", str(tmp_path)])
    with pytest.raises(SystemExit, match="is not the folder of a finished run"):
        robustness.main([str(tmp_path)])


def arguments_of(tmp_path, *folders):
    return robustness.Arguments(folders, examples=ROWS, corruptions=tuple(NAMES), rows=tmp_path / "rows.jsonl")


def test_a_row_is_what_the_whole_benchmark_finds(cifar_run, tmp_path):
    arguments = arguments_of(tmp_path, cifar_run)
    options = ["--examples", str(ROWS), "--corruptions", *NAMES, "--rows", str(arguments.rows)]
    summary = robustness.main([str(cifar_run), *options])[cifar_run]
    (row,) = jsonl.read(arguments.rows)
    assert stored(cifar_run)[1] == summary
    assert {name: row[name] for name in summary} == summary
    assert (row["optimizer"], row["seed"], row["examples"]) == ("sgd", 0, ROWS)
    assert str(cifar_run.parent) not in json.dumps(row)
    before = arguments.rows.read_text()
    assert robustness.evaluate(arguments, Console(quiet=True)) == {}  # has its row; the data are not even looked for
    assert arguments.rows.read_text() == before
    assert "computed here; missing: shot_noise" in arguments.rows.with_suffix(".md").read_text()


def test_corruptions_are_made_once_for_all_runs(cifar_run, tmp_path, monkeypatch):
    """And each run has the figures that it has alone."""
    second, made = tmp_path / "second", []
    shutil.copytree(cifar_run, second)
    state = runs.restore(cifar_run)
    other = state._replace(params=jax.tree.map(jnp.negative, state.params))
    monkeypatch.setattr(runs, "restore", lambda folder: other if folder == second else state)
    corrupt = cifar_c.corrupt
    monkeypatch.setattr(cifar_c, "corrupt", lambda *cell: made.append(cell[:2]) or corrupt(*cell))
    options = ["--examples", str(ROWS), "--corruptions", "contrast"]
    both = robustness.main([str(cifar_run), str(second), *options])
    assert made == [("contrast", severity) for severity in range(1, 6)]
    assert both[cifar_run] != both[second]
    for folder in (second, cifar_run):
        assert robustness.main([str(folder), *options]) == {folder: both[folder]}
        assert stored(folder)[1] == both[folder]


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
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in corruptions_page.table(rows).splitlines()]
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
    corruptions_page.check([row, {**row, "config": {**config, "optimizer": "sam", "seed": 3}}])
    for other, named in (
        ({"config": {**config, "rho": 0.1, "width": 3}}, "width, rho"),
        ({"examples": 61}, "examples"),
        ({"by_corruption": {"fog": 0.5}}, "corruptions"),
    ):
        with pytest.raises(ValueError, match=f"these also differ in {named}. Leave some out"):
            corruptions_page.check([row, {**row, **other}])
    file = tmp_path / "rows.jsonl"
    jsonl.append(file, row, {**row, "examples": 61})
    with pytest.raises(ValueError, match="differ in examples"):
        corruptions_page.write(file)


def test_runs_of_two_tables_are_refused_before_a_row_is_written(cifar_run, tmp_path, monkeypatch):
    other, read = tmp_path / "other", runs.read_config
    configs = {cifar_run: read(cifar_run), other: dataclasses.replace(read(cifar_run), momentum=0.7)}
    monkeypatch.setattr(runs, "read_config", lambda folder, data: configs[folder])
    arguments = arguments_of(tmp_path, cifar_run, other)
    with pytest.raises(ValueError, match="these also differ in momentum"):
        robustness.evaluate(arguments, Console(quiet=True))
    assert jsonl.read(arguments.rows) == []

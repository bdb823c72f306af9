"""Tables of runs: what is missing is trained, and what is printed and drawn follows from the rows."""

import csv
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from scipy import stats
from table_rows import printed, synthetic

from experiments import recipes, table
from experiments.figures import tables
from experiments.pages import rendering
from experiments.pages import table as page
from experiments.rows import comparison, jsonl, provenance
from experiments.training import runs


@pytest.fixture
def trained(monkeypatch):
    """Records configs in place of training them; the accuracy follows from config and seed."""
    done = []

    def train(arguments, console):
        config = arguments.config
        done.append(config)
        config.run_dir.mkdir(parents=True)
        row = {
            "config": provenance.of_run(config)["config"], "seed": config.seed, "device": "cpu", "xla_flags": "",
            "versions": {"jax": "1"},
            "test_accuracy_recalibrated": (0.5 if config.optimizer == "sgd" else 0.52) + config.seed / 100,
        }  # fmt: skip
        (config.run_dir / runs.METRICS).write_text('{"seed": 0}\n' + json.dumps(row) + "\n")

    monkeypatch.setattr(table.train, "train", train)
    return done


@pytest.fixture
def compilation_cache():
    """Puts back what the command line sets for the whole process."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def arguments_of(tmp_path, **change):
    common = {"methods": ("rigl-erk",), "sparsities": (0.95,), "seeds": (0, 1), "scale": "cpu"}
    return table.Arguments("table1", out=tmp_path / "runs", results=tmp_path / "results", **common | change)


def test_only_what_is_missing_is_run(tmp_path, trained):
    first = table.run(arguments_of(tmp_path, optimizers=("sgd",)))
    assert [(c.optimizer, c.seed) for c in trained] == [("sgd", 0), ("sgd", 1)]
    rows = table.run(arguments_of(tmp_path))
    assert [(c.optimizer, c.seed) for c in trained[2:]] == [("s2sam", 0), ("s2sam", 1)]
    assert table.run(arguments_of(tmp_path)) == rows
    assert len(trained) == 4
    assert rows[:2] == first
    assert all(c.width == 8 and c.subset == 10_000 for c in trained)
    assert [row["value"] for row in rows] == pytest.approx([50, 51, 52, 53])
    assert rows[2]["recipe"] == {
        "name": "table1.rigl-erk-0.95.s2sam",
        "row": "RigL (ERK) + S2-SAM",
        "sparsity": 0.95,
        "optimizer": "s2sam",
        "metric": "accuracy (%)",
        "paper": 92.81,
        "paper_spread": 0.08,
        "paper_difference": 0.42,
        "baseline": "table1.rigl-erk-0.95.sgd",
        "gradients": 1.0,
    }
    assert "data" not in rows[0]["config"]
    assert str(tmp_path) not in json.dumps(rows)


def test_rows_are_enough_to_go_on_from_unless_the_config_differs(tmp_path, trained):
    first = table.run(arguments_of(tmp_path))
    shutil.rmtree(tmp_path / "runs")
    assert table.run(arguments_of(tmp_path)) == first
    assert len(trained) == 4
    file = tmp_path / "results" / "table1_cpu.jsonl"
    older = {**first[1], "config": first[1]["config"] | {"epochs": 3}}
    table.store([older], file)
    before = file.read_text()
    with pytest.raises(
        ValueError, match=r"(?s), 1, but of another config:\n  epochs: 3 there, 9 asked for\n.*take the row out"
    ):
        table.run(arguments_of(tmp_path))
    assert file.read_text() == before
    assert len(trained) == 4


def test_only_what_was_asked_for_is_printed(tmp_path, trained, compilation_cache, capsys):
    """Of these seeds; a gain is over the baseline's row, whether that was asked for or not. The page is of all rows."""
    options = ["table1", "--scale", "cpu", "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--methods"]
    table.main([*options, "rigl-erk", "mest-em", "--sparsities", "0.95", "--seeds", "0", "1", "4"])
    assert f"12 runs are new, 0 had their rows in {tmp_path / 'table1_cpu.jsonl'} already." in capsys.readouterr().out
    few = [*options, "rigl-erk", "--sparsities", "0.95", "--seeds", "0", "1", "2", "--optimizers", "s2sam"]
    table.main(few)
    text = capsys.readouterr().out
    assert "1 runs are new, 2 had" in text
    assert "MEST" not in text
    assert text.count("RigL (ERK)") == 1
    assert "53.00 ± 1.00" in text  # seeds 0, 1 and 2, and not 4
    assert "+2.00 ± 0.00" in text
    assert "MEST (EM) + S2-SAM" in (tmp_path / "table1_cpu.md").read_text()


def test_stored_rows_grow_and_are_replaced(tmp_path, trained):
    file = tmp_path / "results" / "table1_cpu.jsonl"
    s2sam = table.store(table.run(arguments_of(tmp_path, optimizers=("s2sam",))), file)
    both = table.store(table.run(arguments_of(tmp_path, optimizers=("sgd",))), file)
    assert [row["recipe"]["optimizer"] for row in both] == ["sgd", "sgd", "s2sam", "s2sam"]
    assert both[2:] == s2sam
    table.store([{**both[0], "value": 1.0}], file)
    values = [json.loads(line)["value"] for line in file.read_text().splitlines()]
    assert values == [1.0, *(row["value"] for row in both[1:])]


def test_command_line_writes_page_figures_and_plot(tmp_path, trained, compilation_cache, capsys):
    names = ["--methods", "rigl-erk", "--sparsities", "0.95", "--scale", "cpu"]
    table.main(["table1", *names, "--out", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert "RigL" in capsys.readouterr().out
    page = (tmp_path / "table1_cpu.md").read_text()
    line = "RigL (ERK) + S2-SAM | 95 | 1.00 | 92.81 ± 0.08 | 53.00 ± 1.00 | 3 | +0.42 | +2.00 ± 0.00 | ±0.00 | 3 |"
    assert f"| {line}\n" in page
    assert "model resnet32, width 8, subset 10000, epochs 9, batch size 128." in page
    assert "cannot be compared" in page.replace("\n", " ")
    assert "![table1 cpu](table1_cpu.png)" in page
    with (tmp_path / "table1_cpu.csv").open() as stream:
        figures = list(csv.DictReader(stream))
    assert [float(line["ours"]) for line in figures] == pytest.approx([51, 53])
    assert (tmp_path / "table1_cpu.png").stat().st_size > 1000


def test_a_page_says_how_its_rows_are_made(tmp_path):
    """From rows of CIFAR under AdamW, one of them of a tree with changes."""
    committed = jsonl.read(jsonl.RESULTS / "label-noise-cifar10_full.jsonl")[:2]
    rows = [
        row | {"commit": commit, "seconds": 1800, "config": row["config"] | {"base": "adamw"}}
        for row, commit in zip(committed, ("1234567", "1234567+"), strict=True)
    ]
    file = tmp_path / "label-noise-cifar10_full.jsonl"
    jsonl.write(file, rows)
    page.write(file)
    text = " ".join(file.with_suffix(".md").read_text().split())
    assert "2 runs, 1.0 hours in all; commits 1234567, 1234567+ (+: with changes that were not committed)." in text
    assert "`python -m experiments.table label-noise-cifar10 --scale full --data PATH`" in text
    assert "Gains are over the row of AdamW;" in text


def test_means_deviations_and_paired_differences():
    rows = synthetic()
    sgd, s2sam, alone, unmeasured = comparison.compare(rows)
    a = np.array([row["value"] for row in rows[:4]])
    b = np.array([row["value"] for row in rows[4:9]])
    np.testing.assert_allclose((sgd.ours, sgd.spread), (a.mean(), a.std(ddof=1)))
    np.testing.assert_allclose((s2sam.ours, s2sam.spread), (b.mean(), b.std(ddof=1)))
    paired = b[1:] - a  # seed 0 has no partner
    np.testing.assert_allclose((s2sam.difference, s2sam.difference_spread), (paired.mean(), paired.std(ddof=1)))
    assert (sgd.seeds, s2sam.seeds, sgd.pairs, s2sam.pairs) == (4, 5, 0, 4)
    low, high = stats.ttest_1samp(paired, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(s2sam.interval, (high - low) / 2)
    assert sgd.interval is None
    assert s2sam.paper_difference == 0.48
    assert (sgd.difference, alone.paper, alone.difference) == (None, None, None)
    assert (unmeasured.ours, unmeasured.seeds, unmeasured.paper) == (None, 0, 33.68)


def test_best_epochs_stand_beside_the_last_where_each_epoch_was_evaluated():
    rows = synthetic()
    for row, best in zip(rows[:9], (91.0, 92.0, 93.0, 96.0, 90.0, 92.0, 94.0, 97.0, 99.0), strict=True):
        row["best"] = best  # seeds 1 to 4 of SGD, 0 to 4 of S2-SAM
    sgd, s2sam, *others = comparison.compare(rows)
    assert (sgd.best, sgd.best_difference) == (93.0, None)
    assert (s2sam.best, s2sam.best_difference) == (94.4, pytest.approx((1 + 2 + 4 + 3) / 4))
    assert {(line.best, line.best_difference) for line in others} == {(None, None)}
    header, _, *cells = rendering.markdown([sgd, s2sam]).splitlines()
    assert header.endswith("| pairs | ours: best | best: gain |")
    assert [line.split(" | ", 10)[-1] for line in cells] == ["93.00 | – |", "94.40 | +2.50 |"]
    rows[0]["best"] = None  # a mean over other seeds than the last epoch's would be no comparison
    sgd, s2sam, *_ = comparison.compare(rows)
    assert (sgd.best, s2sam.best, s2sam.best_difference) == (None, 94.4, None)


@pytest.mark.parametrize(("evaluations", "best"), [(3, 70.0), (2, None)])
def test_best_epoch_of_a_run(tmp_path, evaluations, best):
    recipe = recipes.get("table1.rigl-erk-0.95.sgd")
    config = dataclasses.replace(recipe.config, epochs=3, out=tmp_path)
    config.run_dir.mkdir()
    for accuracy, zeros in ((0.5, 0.9), (0.7, 0.95), (0.6, 0.95))[-evaluations:]:
        row = {"config": config.to_json(), "test_accuracy": accuracy, "test_accuracy_recalibrated": accuracy + 0.01}
        row |= {"sparsity": zeros}
        with (config.run_dir / runs.METRICS).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    found = table._row(recipe, config, "full")
    assert (found["value"], found["best"]) == (pytest.approx(61.0), best)


def test_a_row_names_every_device_that_its_run_has_been_on(tmp_path):
    recipe = recipes.get("table1.rigl-erk-0.95.sgd")
    config = dataclasses.replace(recipe.config, out=tmp_path)
    config.run_dir.mkdir()
    rows = [{"device": device, "test_accuracy_recalibrated": 0.9} for device in ("gpu B", "gpu A", "gpu B")]
    (config.run_dir / runs.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table._row(recipe, config, "full")["device"] == "gpu A, gpu B"


def test_the_best_epoch_is_one_of_the_final_sparsity():
    figures = ((0.9, 0.0), (0.8, 0.9), (0.7, 0.9), (0.75, 0.95), (0.72, 0.95))
    rows = [{"test_accuracy": accuracy, "sparsity": zeros} for accuracy, zeros in figures]
    assert table.best_accuracy(rows) == 0.75
    assert table.best_accuracy(rows[:3]) == 0.8


def test_missing_cells_are_dashes():
    header, rule, *cells = rendering.markdown(comparison.compare(synthetic())).splitlines()
    assert {line.count("|") for line in (header, rule, *cells)} == {len(rendering.HEADER) + 1}
    assert cells[0].startswith("| RigL | 90 | 1.00 | 93.07 | ")
    assert cells[0].endswith(" | 4 | – | – | – | 0 |")
    assert cells[2].startswith("| RigL + S2-SAM | 80 | 1.00 | – | ")
    assert cells[3] == "| RigL | 80 | 1.00 | 33.68 | – | 0 | – | – | – | 0 |"


def test_one_seed_has_no_deviation():
    rows = [row for row in synthetic() if row["seed"] == 1]
    assert " ± " not in rendering.markdown(comparison.compare(rows)).replace("93.55 ± 0.14", "")


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_width_truncates_a_cell(width):
    """On a narrow terminal there are fewer columns, and the last of them go beyond its edge."""
    lines = comparison.compare(synthetic())
    text = printed(lines, width)
    assert "…" not in text
    assert width < 80 or max(map(len, text.splitlines())) <= width
    assert ("pairs" in text) == (width == 200)
    gained = next(line for line in lines if line.difference_spread is not None)
    assert f"{gained.difference:+.2f} ± {gained.difference_spread:.2f}" in text
    assert "paper" not in printed([line._replace(paper=None, paper_difference=None) for line in lines], 200)


def test_terminal_table_and_plot(tmp_path):
    lines = comparison.compare(synthetic())
    text = printed(lines, 200)
    assert "table1, cpu" in text
    assert all(line.row in text for line in lines)
    assert all(word in text for column in rendering.HEADER for word in column.split())
    tables.draw_comparison(lines, "table1, cpu", tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_rows_of_several_processes_are_all_kept(tmp_path):
    """Threads stand for them: a lock on the folder keeps them apart just as well."""
    recipe = table.described(recipes.get("table1.rigl-0.9.sgd"))
    rows = [{"recipe": recipe, "seed": seed} for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: table.store([row], tmp_path / "rows.jsonl"), rows))
    assert [row["seed"] for row in jsonl.read(tmp_path / "rows.jsonl")] == list(range(24))

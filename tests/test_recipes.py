"""Recipes of the papers' tables, and the tables that are made of runs of them."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from experiments import recipes, table
from experiments.figures import tables
from experiments.pages import rendering
from experiments.recipes import base
from experiments.recipes.ssam import DOUBTFUL
from experiments.rows import comparison, provenance
from experiments.training import runs, sparse_methods
from s2sam_jax import ChannelAxis, ChannelGroup, Every

ALL = list(recipes.RECIPES.values())

# Copied by hand from the papers' text.
PRINTED = {
    "table1.dense.sgd": (94.58, None),
    "table1.lottery-0.95.s2sam": (91.47, 0.10),
    "table1.snip-0.98.sgd": (87.51, 0.31),
    "table1.grasp-0.9.s2sam": (92.87, 0.14),
    "table1.rigl-erk-0.95.s2sam": (92.81, 0.08),
    "table1-cifar100.rigl-0.98.s2sam": (64.98, 0.06),
    "table1-cifar100.mest-ems-0.95.sgd": (70.36, 0.05),
    "table1-cifar100.set-0.9.s2sam": (70.23, 0.20),
    "table4.rigl-0.9.sam": (1508, None),
    "table4-accuracy.mest-em-0.9.s2sam": (74.58, None),
    "table5.snip-0.8.s2sam": (34.87, None),
    "table5-clean.grasp-0.8.sgd": (72.10, None),
    "table6.efficientnet-b0.s2sam": (77.10, None),
    "table6.resnet34.sam": (74.77, None),
    "rebuttal-lrr.lrr-0.95.s2sam": (94.22, None),
    "rebuttal-lottery-40.lottery-0.9.sgd": (90.73, None),
    "rebuttal-sweep.mest-em-0.6.s2sam": (94.11, None),
    "rebuttal-imagenet95.rigl-0.95.sgd": (69.02, None),
    "rebuttal-set5x.set-5x-0.9.s2sam": (73.16, None),
    "wmt14.mest-em-0.9.s2sam": (27.2, None),
    "ssam-table1.ssam-f-0.5": (96.81, None),
    "ssam-table2-cifar100.ssam-f-0.98": (83.85, None),
    "ssam-table3.ssam-d-0.8": (77.00, None),
    "table2.rigl-erk-0.8.s2sam": (None, None),
    "tableA1-cifar100.snip-0.9.sgd": (None, None),
}


# Recipes


def test_every_name_is_its_recipes():
    assert len(ALL) > 400
    assert all(name == recipe.name and name.startswith(recipe.table + ".") for name, recipe in recipes.RECIPES.items())
    assert len({(r.table, r.key, r.sparsity, r.config.optimizer) for r in ALL}) == len(ALL)
    assert [recipe.name for recipe in recipes.of_table("official")] == [
        f"official.{row}.{optimizer}"
        for row in ("mest-em-0.95", "mest-em-0.98", "mest-ems-0.98")
        for optimizer in ("sgd", "s2sam")
    ]


def test_table_1_is_complete():
    keys = ["lottery", "snip", "grasp", "set", "dsr", "rigl", "rigl-erk", "mest-em", "mest-ems"]
    for name in ("table1", "table1-cifar100"):
        sparse = [r for r in recipes.of_table(name) if r.sparsity]
        assert list(dict.fromkeys(r.key for r in sparse)) == keys
        assert len(sparse) == len(keys) * 3 * 2
        assert all(r.expected is not None for r in sparse)


@pytest.mark.parametrize("name", PRINTED)
def test_printed_figures(name):
    recipe = recipes.get(name)
    assert (recipe.expected, recipe.printed.spread) == PRINTED[name]


def test_printed_differences_are_those_of_the_figures():
    checked = 0
    for recipe in ALL:
        if recipe.printed.difference is not None:
            gained = recipe.expected - recipes.get(recipe.baseline).expected
            agrees = abs(gained - recipe.printed.difference) < 0.015
            assert agrees != (recipe.name in DOUBTFUL), (recipe.name, gained, recipe.printed.difference)
            checked += 1
    assert checked == 54 + 8 + 6 + 8 + 3 + 4 * 12 + 6 + 11


@pytest.mark.parametrize(
    "text", ["92.58±", "(+0.1)", "92.58 0.1", "92,58", "", "92.58±0.07(0.27)"], ids=lambda text: text or "empty"
)
def test_cell_says_what_it_expects(text):
    with pytest.raises(ValueError, match=r"A cell looks like 92\.58±0\.07\(\+0\.27\)"):
        base.cell(text)


def test_pairs_differ_in_the_optimizer_alone():
    for recipe in ALL:
        if recipe.baseline is None or recipe.table.startswith(("ssam", "causes", "overfit", "length", "label-noise")):
            continue
        other = recipes.get(recipe.baseline).config
        same = {"optimizer": other.optimizer}
        if recipe.table == "official":
            assert (other.weight_decay, recipe.config.weight_decay) == (1e-4, 5e-4)
            same["weight_decay"] = 1e-4
        if recipe.table == "budget-gradients":
            same["epochs"] = 160
        assert dataclasses.replace(recipe.config, **same) == other, recipe.name


def test_ssam_is_compared_as_in_its_paper():
    decays = {(r.config.dataset, r.config.optimizer): r.config.weight_decay for r in ALL if r.table.startswith("ssam")}
    assert {decay for (dataset, _), decay in decays.items() if dataset == "imagenet2012"} == {1e-4}
    assert {decays[d, "sgd"] for d in ("cifar10", "cifar100")} == {5e-4}
    assert {decays[d, o] for d in ("cifar10", "cifar100") for o in ("sam", "ssam-f", "ssam-d")} == {1e-3}
    assert recipes.get("ssam-table1.ssam-f-0.5").baseline == "ssam-table1.sam"
    assert recipes.get("ssam-table1.ssam-d-0.5").config.ssam_update_every == 5.0
    assert {r.config.rho for r in ALL if r.table == "ssam-table2-cifar100"} == {0.2}


def test_distributions_and_rounds():
    assert recipes.get("table1.rigl-0.9.sgd").config.distribution == "uniform"
    assert recipes.get("table1.rigl-erk-0.9.sgd").config.distribution == "erk"
    lottery = recipes.get("table1.lottery-0.9.sgd").config
    assert lottery.epochs == 160 * 12
    assert abs(sparse_methods.round_steps(lottery, 781) - 160 * 781) <= 1
    assert recipes.get("rebuttal-lottery-40.lottery-0.9.sgd").config.epochs == 160 * 6
    assert "11.8%" in recipes.get("rebuttal-lottery-30.lottery-0.9.sgd").unknown
    assert recipes.get("table2.mest-em-1.7x-0.8.sgd").config.epochs == 170


def test_methods_and_clocks_can_be_made():
    for recipe in ALL:
        if recipe.config.method != "dense":
            method = sparse_methods.make(
                recipe.config, [ChannelGroup("hidden", (ChannelAxis("a", -1),), (ChannelAxis("b", 0),))]
            )
            clock = sparse_methods.clock(recipe.config, steps_per_epoch=100)
            assert method.update is None or (clock or method.when) is not None, recipe.name


def test_channel_methods_follow_their_papers_clocks():
    chex = recipes.get("table3.chex-resnet50-0.7.s2sam").config
    assert sparse_methods.clock(chex, steps_per_epoch=1251) == Every(2 * 1251, 2 * 1251, 180 * 1251)
    assert (chex.explore, chex.batch_size, chex.learning_rate) == (0.3, 1024, 1.024)
    chase = recipes.get("table3.chase-resnet50-0.9.sgd").config
    assert sparse_methods.clock(chase, steps_per_epoch=2502).every == pytest.approx(1000, abs=1)
    assert (chase.channel_sparsity, chase.batch_size, chase.weight_decay) == (0.4, 512, 1e-4)
    assert recipes.get("table3-cifar10.chase-0.9.s2sam").expected is None


def test_unknown_names_are_met_with_near_ones():
    with pytest.raises(
        ValueError, match=r"'table1\.rigl-erk-0\.95\.s2sma'; did you mean table1\.rigl-erk-0\.95\.s2sam,"
    ):
        recipes.get("table1.rigl-erk-0.95.s2sma")
    with pytest.raises(
        ValueError,
        match=r"Unknown recipe 'rigl'; the nearest are \S*rigl\S*, .*; names begin with one of table1, table1-c",
    ):
        recipes.get("rigl")
    with pytest.raises(ValueError, match="Unknown table 'table11'; there are table1, table1-c"):
        recipes.of_table("table11")


def test_description():
    text = recipes.describe(recipes.get("table1.rigl-erk-0.95.s2sam"))
    assert "accuracy (%): 92.81 ± 0.08" in text
    assert "RigL (ERK) + S2-SAM, cifar10, 95 % zeros" in text
    assert "python -m experiments.train --recipe table1.rigl-erk-0.95.s2sam --seed 0" in text
    assert "accuracy (%): unknown" in recipes.describe(recipes.get("table2.rigl-0.8.sgd"))


# Scales


def test_full_scale_is_the_recipe():
    recipe = recipes.get("table2.rigl-0.8.s2sam")
    assert table.scaled(recipe, "full") is recipe.config


@pytest.mark.parametrize(
    ("name", "width", "epochs", "update_every"),
    [
        ("table1.rigl-erk-0.95.s2sam", 8, 9, 0.256),
        ("table1.mest-em-0.95.s2sam", 8, 9, 1.0),
        ("table1.snip-0.95.sgd", 8, 9, None),
        ("table1.lottery-0.9.sgd", 8, 9 * 12, None),
        ("tableA1.set-0.9.sgd", 16, 9, 1.0),
        ("ssam-table2.sam", 40, 9, None),
    ],
)
def test_cpu_scale(name, width, epochs, update_every):
    full = recipes.get(name).config
    small = table.scaled(recipes.get(name), "cpu")
    assert small == dataclasses.replace(
        full, width=width, epochs=epochs, update_every=update_every, subset=10_000, batch_size=128, eval_every=epochs
    )


def test_digits_scale():
    recipe = recipes.get("ssam-table1.ssam-d-0.9")
    expected = {
        "dataset": "digits", "model": "resnet8", "width": 8, "batch_size": 64, "cutout": 0, "epochs": 20,
        "checkpoint_every": 20, "ssam_update_every": 1.0,
    }  # fmt: skip
    assert table.scaled(recipe, "digits") == dataclasses.replace(recipe.config, **expected)
    assert table.scaled(recipes.get("table1.lottery-0.9.sgd"), "digits").epochs == 10 * 12
    assert table.scaled(recipes.get("table1.rigl-0.9.sgd"), "digits").update_every == 0.256


def test_equal_gradients_are_fewer_epochs():
    """Of 160, 20 and 9."""
    for optimizer, share in (("sgd", 1.0), ("msam", 1.0), ("gsam", 0.5), ("ssam-f", 0.5), ("looksam", 5 / 6)):
        recipe = recipes.get(f"budget-gradients.rigl-erk-0.95.{optimizer}")
        epochs = [table.scaled(recipe, scale).epochs for scale in ("full", "digits", "cpu")]
        assert epochs == [round(share * epochs) for epochs in (160, 20, 9)]
        same = dataclasses.replace(recipe.config, epochs=160)
        assert recipes.get(f"budget.rigl-erk-0.95.{optimizer}").config == same


def test_causes_change_one_thing_each():
    sgd, s2sam = (recipes.get(f"causes.{key}").config for key in ("sgd", "s2sam"))
    assert sgd == recipes.get("table1.rigl-erk-0.95.sgd").config
    assert s2sam == recipes.get("table1.rigl-erk-0.95.s2sam").config
    for recipe in recipes.of_table("causes"):
        assert recipe.baseline == (None if recipe.key == "sgd" else "causes.sgd")
        base = sgd if recipe.config.optimizer == "sgd" else s2sam
        changed = [f.name for f in dataclasses.fields(base) if getattr(recipe.config, f.name) != getattr(base, f.name)]
        if recipe.key == "s2sam-adaptive":  # its radius is another length
            assert changed == ["optimizer", "rho"]
        else:
            assert len(changed) == (recipe.key not in ("sgd", "s2sam"))


def test_sparsities_beside_the_rebuttal_and_table_1():
    found = {recipe.name: recipe.expected for recipe in recipes.of_table("sparsities")}
    assert len(found) == 3 * (1 + 2 * 7)
    assert found["sparsities.dense.s2sam"] == 94.99
    assert found["sparsities.mest-em-0.98.s2sam"] == 91.22
    assert found["sparsities.rigl-erk-0.95.s2sam"] == 92.81
    assert found["sparsities.rigl-erk-0.6.sgd"] is None
    assert not any(value for name, value in found.items() if name.endswith(".sam"))
    sources = {recipe.expected is None: recipe.paper for recipe in recipes.of_table("sparsities")}
    assert sources == {True: "none: ours", False: f"{base.REBUTTAL}, and Table 1 of the paper"}


def test_overfitting_is_compared_at_equal_steps():
    found = recipes.of_table("overfit")
    assert len(found) == 15
    for recipe in found:
        config, base = recipe.config, recipes.get(recipe.baseline or recipe.name).config
        steps = config.subset // config.batch_size * config.epochs
        assert steps == pytest.approx(440, rel=0.01)
        assert config.update_every * (config.subset // config.batch_size) == pytest.approx(22, rel=0.01)
        assert dataclasses.replace(config, optimizer="sgd", rho=0.05) == base


def test_overfitting_has_a_dense_control():
    found = recipes.of_table("overfit-cifar10")
    assert [recipe.config.method for recipe in found] == (["dense"] * 5 + ["rigl"] * 5) * 2
    for recipe in found:
        assert recipe.config.subset // recipe.config.batch_size * recipe.config.epochs == 800
        base = recipes.get(recipe.baseline or recipe.name)
        assert dataclasses.replace(recipe.config, optimizer="sgd", rho=0.05) == base.config
        assert base.name.endswith("-sgd")


def test_lengths_differ_in_the_epochs_alone():
    found = recipes.of_table("length")
    assert [recipe.config.epochs for recipe in found] == [10] * 8 + [30] * 8 + [100] * 8
    for recipe in found:
        base = recipes.get(recipe.baseline or recipe.name)
        assert dataclasses.replace(recipe.config, optimizer="sgd", rho=0.05) == base.config
        name = recipe.name.replace(f"length.{recipe.config.epochs}-", "length.10-")
        once = {"epochs": 10, "eval_every": 10, "checkpoint_every": 10, "update_every": 0.5}
        assert dataclasses.replace(recipe.config, **once) == recipes.get(name).config
        assert recipe.config.update_every == recipe.config.epochs / 20


def test_label_noise_differs_in_optimizer_and_radius_alone():
    found = recipes.of_table("label-noise")
    assert [recipe.config.label_noise for recipe in found] == ([0.4] * 17 + [0.0] * 9) * 2
    assert [recipe.config.method for recipe in found] == ["dense"] * 26 + ["rigl"] * 26
    for recipe in found:
        base = recipes.get(recipe.baseline or recipe.name)
        assert (recipe.config.rho_schedule == "warmup") == ("rising" in recipe.name)
        plain = dataclasses.replace(recipe.config, optimizer="sgd", rho=0.05, rho_schedule="constant")
        assert plain == base.config
        assert (base.config.method, base.config.label_noise) == (recipe.config.method, recipe.config.label_noise)


def test_label_noise_of_cifar10_differs_in_optimizer_and_radius_alone():
    found = recipes.of_table("label-noise-cifar10")
    assert [recipe.config.method for recipe in found] == ["dense"] * 7 + ["rigl"] * 7
    for recipe in found:
        base = recipes.get(recipe.baseline or recipe.name).config
        assert dataclasses.replace(recipe.config, optimizer="sgd", rho=0.05) == base
        assert base.method == recipe.config.method
        assert (base.dataset, base.subset, base.label_noise) == ("cifar10", 1000, 0.4)


def test_work_a_step():
    """SSAM's is that of its tables."""
    printed = {0.5: 1.65, 0.8: 1.44, 0.9: 1.36, 0.95: 1.33, 0.98: 1.31, 0.99: 1.30}
    for sparsity, flops in printed.items():
        assert recipes.get(f"ssam-table1.ssam-f-{sparsity:g}").gradients == pytest.approx(flops, abs=0.006)
    assert [recipes.get(f"ssam-table1.{name}").gradients for name in ("sgd", "sam")] == [1.0, 2.0]
    esam = recipes.get("budget.dense.esam")
    assert esam.gradients == pytest.approx(1 + 0.5 + 2 / 3)
    assert (esam.sparsity, recipes.get("budget.rigl-erk-0.9.ssam-f").sparsity) == (None, 0.9)


@pytest.mark.parametrize("scale", ["smoke", "digits", "cpu"])
def test_every_cifar_recipe_has_a_clock_at_small_scales(scale):
    for recipe in ALL:
        if recipe.config.dataset.startswith("cifar"):
            small = table.scaled(recipe, scale)
            assert small.width >= 2
            if small.method != "dense":
                steps = (small.subset or 1437) // small.batch_size
                clock = sparse_methods.clock(small, steps_per_epoch=steps)
                assert clock is None or clock.start < small.epochs * steps


@pytest.mark.parametrize("name", ["table4.rigl-0.9.sam", "wmt14.dense.sgd"])
def test_small_scales_are_for_cifar(name):
    recipe = recipes.get(name)
    with pytest.raises(ValueError, match=f"cpu exists for CIFAR alone; {recipe.config.dataset} has the scale full"):
        table.scaled(recipe, "cpu")


# Which rows


def test_filters():
    arguments = table.Arguments("table1", methods=("rigl-erk", "mest-em"), sparsities=(0.95,), optimizers=("s2sam",))
    assert [r.name for r in table.chosen(arguments)] == ["table1.rigl-erk-0.95.s2sam", "table1.mest-em-0.95.s2sam"]
    ssam = table.chosen(table.Arguments("ssam-table1", sparsities=(0.5,)))
    assert [r.name.split(".", 1)[1] for r in ssam] == ["sgd", "sam", "ssam-f-0.5", "ssam-d-0.5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("rigel",)}, r"table1 has no methods \['rigel'\]; it has \['dense', 'lottery', .*'rigl-erk'"),
        ({"sparsities": (0.5,)}, r"table1 has no sparsities \[0.5\]; it has \[0.9, 0.95, 0.98\]"),
        ({"optimizers": ("sam",)}, r"table1 has no optimizers \['sam'\]; it has \['sgd', 's2sam'\]"),
        ({"methods": ("dense",), "optimizers": ("s2sam",)}, "No row of table1 has these"),
    ],
)
def test_filters_say_what_there_is(change, message):
    with pytest.raises(ValueError, match=message):
        table.chosen(table.Arguments("table1", **change))


# Running, with a stand-in for training


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


# Tables from rows


def synthetic():
    """Five seeds of a pair of which one run is missing, and a row that nothing is printed for."""
    rng = np.random.default_rng(0)
    rows = []
    for name in ("table1.rigl-0.9.sgd", "table1.rigl-0.9.s2sam", "table2.rigl-0.8.s2sam", "table5.rigl-0.8.sgd"):
        for seed in range(5):
            value = None if name.startswith("table5") else float(rng.normal(90, 1))
            rows.append({"recipe": table.described(recipes.get(name)), "seed": seed, "value": value})
    return rows[1:]


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


def test_gains_are_drawn_against_the_share_of_zeros(tmp_path, monkeypatch):
    """Of each method with what belongs to all; with intervals, and the paper's where there are some."""
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    rng, rows = np.random.default_rng(0), []
    for recipe in recipes.of_table("sparsities"):
        if recipe.sparsity in (None, 0.9, 0.98) and recipe.config.optimizer != "sam":
            rows += [{"recipe": table.described(recipe), "seed": s, "value": rng.normal(90, 1)} for s in range(3)]
    lines = comparison.compare(rows)
    tables.draw_gains(lines, "sparsities", tmp_path / "gains.png")
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["MEST (EM)", "RigL (ERK)"]
    found = {line.name: line for line in lines}
    (bars,) = panels[1].containers
    names = ["sparsities.dense.s2sam", "sparsities.rigl-erk-0.9.s2sam", "sparsities.rigl-erk-0.98.s2sam"]
    np.testing.assert_allclose(bars.lines[0].get_ydata(orig=False), [found[name].difference for name in names])
    np.testing.assert_allclose(bars.lines[0].get_xdata(orig=False), [0, 90, 98])
    ends = np.array(bars.lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, [found[name].interval for name in names])
    printed = [line for line in panels[1].lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose([line.get_xydata()[0] for line in printed], [[0, 0.41], [90, 0.20], [98, 0.94]])


def test_a_comparison_has_deviations_of_means_and_intervals_of_gains(tmp_path, monkeypatch):
    """Wide intervals are cut off, so that they do not make all gains look alike."""
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    sgd, s2sam, alone, _ = comparison.compare(synthetic())
    wide = s2sam._replace(difference=0.1, difference_spread=99.0)
    tables.draw_comparison([sgd, s2sam, alone, wide], "table1", tmp_path / "table.png")
    means, gains = figures[0].axes

    def halves(axes):
        return [np.ptp(bars.lines[2][0].get_segments()[0][:, 0]) / 2 for bars in axes.containers if bars.has_xerr]

    np.testing.assert_allclose(halves(means), [sgd.spread, s2sam.spread, alone.spread, wide.spread])
    np.testing.assert_allclose(halves(gains), [s2sam.interval, wide.interval])
    reach = 2.5 * max(abs(s2sam.difference), s2sam.paper_difference)
    np.testing.assert_allclose(gains.get_xlim(), (-reach, reach))
    assert figures[0].get_suptitle() == "table1; hollow: the paper's"


def test_prices_have_a_panel_for_each_line_of_sgd_and_the_cheapest_first(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: figures.append(figure))
    names = ["dense-sgd", "dense-sam-0.2", "dense-s2sam-0.2", "rigl-erk-sgd", "rigl-erk-s2sam-0.2"]
    rows = [
        {"recipe": table.described(recipes.get(f"label-noise.{name}")), "seed": seed, "value": 90.0 + place * seed}
        for place, name in enumerate(names)
        for seed in range(3)
    ]
    lines = comparison.compare(rows)
    tables.draw_prices(lines[:1], "label-noise", tmp_path / "gains.png")
    assert figures == []
    tables.draw_prices(lines, "label-noise", tmp_path / "gains.png")
    dense, rigl = figures[0].axes
    assert [axes.get_title().split("\n") for axes in (dense, rigl)] == [
        ["dense", "(SGD: 90.0)"],
        ["RigL (ERK), 90 %", "(SGD: 93.0)"],
    ]
    assert [word.get_text() for word in dense.get_yticklabels()] == ["S2-SAM, rho 0.2 (1)", "SAM, rho 0.2 (2)"]
    points = [bars.lines[0].get_xydata()[0] for bars in dense.containers]
    np.testing.assert_allclose(points, [[2.0, 0], [1.0, 1]])
    np.testing.assert_allclose([bars.lines[0].get_xydata()[0] for bars in rigl.containers], [[1.0, 0]])


def test_no_gains_no_figure_and_no_interval_no_bar(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, file, dpi: drawn.append(figure))
    rows = [
        {"recipe": table.described(recipes.get(f"sparsities.rigl-erk-0.9.{name}")), "seed": 0, "value": 90.0}
        for name in ("sgd", "s2sam")
    ]
    tables.draw_gains(comparison.compare(rows[:1]), "sparsities", tmp_path / "gains.png")
    assert drawn == []
    tables.draw_gains(comparison.compare(rows), "sparsities", tmp_path / "gains.png")
    (bars,) = drawn[0].axes[0].containers
    assert all(np.isnan(segment).any() or not len(segment) for segment in bars.lines[2][0].get_segments())


def test_one_seed_has_no_deviation():
    rows = [row for row in synthetic() if row["seed"] == 1]
    assert " ± " not in rendering.markdown(comparison.compare(rows)).replace("93.55 ± 0.14", "")


def printed(lines, width):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(rendering.terminal(lines, "table1, cpu", console.width), soft_wrap=True)
    return captured.get()


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


def test_the_readme_counts_the_recipes():
    assert f"; {len(recipes.RECIPES)} recipes," in (Path(__file__).parents[1] / "README.md").read_text()

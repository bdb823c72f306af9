"""Recipes of the papers' tables."""

import dataclasses
from pathlib import Path

import pytest

from experiments import recipes, table
from experiments.recipes import base
from experiments.recipes.ssam import DOUBTFUL
from experiments.training import sparse_methods
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


def test_work_a_step():
    """SSAM's is that of its tables."""
    printed = {0.5: 1.65, 0.8: 1.44, 0.9: 1.36, 0.95: 1.33, 0.98: 1.31, 0.99: 1.30}
    for sparsity, flops in printed.items():
        assert recipes.get(f"ssam-table1.ssam-f-{sparsity:g}").gradients == pytest.approx(flops, abs=0.006)
    assert [recipes.get(f"ssam-table1.{name}").gradients for name in ("sgd", "sam")] == [1.0, 2.0]
    esam = recipes.get("budget.dense.esam")
    assert esam.gradients == pytest.approx(1 + 0.5 + 2 / 3)
    assert (esam.sparsity, recipes.get("budget.rigl-erk-0.9.ssam-f").sparsity) == (None, 0.9)


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


def test_the_readme_counts_the_recipes():
    assert f"; {len(recipes.RECIPES)} recipes," in (Path(__file__).parents[2] / "README.md").read_text()

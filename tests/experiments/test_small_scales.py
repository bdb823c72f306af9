"""Recipes at small scales differ in what they compare, and in nothing else."""

import dataclasses

import pytest

from experiments import recipes, table
from experiments.recipes import base
from experiments.training import sparse_methods

ALL = list(recipes.RECIPES.values())


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


def test_label_noise_under_adamw_is_that_under_sgd_but_for_the_step():
    found = recipes.of_table("label-noise-adamw")
    assert [(r.config.method, r.config.label_noise, r.config.optimizer, r.config.rho) for r in found] == [
        (method, wrong, *radius)
        for method in ("dense", "rigl")
        for wrong in (0.4, 0.0)
        for radius in (("sgd", 0.05), ("s2sam", 0.2), ("s2sam", 0.5), ("sam", 0.2), ("sam", 0.5))
    ]
    for recipe in found:
        key = recipe.name.split(".", 1)[1].replace("adamw", "sgd")
        step = {"base": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05}
        assert recipe.config == dataclasses.replace(recipes.get(f"label-noise.{key}").config, **step)


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

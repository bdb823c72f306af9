"""What a run reads: that alone names it and tells it from others, and what no run reads is refused."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import recipes, train
from experiments.config import Config, OptimizerName, check_read, check_same, choices, differing
from experiments.config.variants import in_library, method_names
from experiments.recipes.scales import scaled
from experiments.rows import jsonl
from experiments.tasks.base import Losses
from experiments.training import loop, optimizers, sparse_methods
from s2sam_jax import Every, get_masks, methods
from s2sam_jax._base.tree import find_states

SHARPNESS = {
    "rho": 0.3, "rho_schedule": "warmup", "eta": 0.5, "ssam_sparsity": 0.75, "ssam_update_every": 2.0,
    "looksam_every": 3, "alpha": 0.9, "esam_beta": 0.3,
}  # fmt: skip


OF_STEP = {"sharpness_parts": 4, "sharpest_fraction": 0.25}
CLOCK = {"update_every": 3.0, "update_end": 0.25, "rewind_epochs": 1.0}
FACTORY = {"drop_fraction": 0.4, "prune_fraction": 0.3, "rounds": 2, "channel_sparsity": 0.3, "explore": 0.1}
MASKED = {"sparsity": 0.8, "distribution": "uniform", "structure": "nm:2:4:pad"}


def read(options, **changes):
    return choices(Config(**changes).to_json()).keys() & options.keys()


def having_effect(options, effect, **changes):
    plain = effect(Config(**changes))
    return {option for option, value in options.items() if effect(Config(**changes, **{option: value})) != plain}


def program(config):
    """The optimizer's step, as text, without what differs from trace to trace: addresses and the numbers of checks."""
    tx, params = optimizers.make(config, 4), {"kernel": jnp.arange(4.0).reshape(2, 2)}

    def step(p):
        return tx.update(p, tx.init(p), p, grad_fn=lambda q: q, fisher_fn=lambda q: q)

    return re.sub(r"0x[0-9a-f]+|\d+:i32\[\] -1:", "", str(jax.make_jaxpr(step)(params)))


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_an_optimizer_reads_what_changes_its_step(optimizer, monkeypatch):
    run = {"optimizer": optimizer, "method": "dense"}
    assert read(SHARPNESS, **run) == having_effect(SHARPNESS, program, **run)
    given = []
    monkeypatch.setattr(loop, "make_train_step", lambda *_, **o: given.append([o[field] for field in OF_STEP]))
    loop.train_step(Config(**run, **OF_STEP), Losses(None, None, None), None)
    assert given == [[OF_STEP[field] if field in read(OF_STEP, **run) else 1 for field in OF_STEP]]


@pytest.mark.parametrize("method", method_names())
def test_a_method_reads_its_arguments_and_what_changes_its_clock(method):
    arguments = {} if method == "dense" else inspect.signature(getattr(methods, in_library(method)[0])).parameters
    assert read(FACTORY, method=method) == FACTORY.keys() & arguments.keys()
    assert read(MASKED, method=method) == (set() if method == "dense" else MASKED.keys())
    run = {"method": method, "sparsity": 0.5} if method != "dense" else {"method": method}
    clock = (lambda _: None) if method == "dense" else (lambda config: sparse_methods.clock(config, 4))
    assert read(CLOCK, **run) == having_effect(CLOCK, clock, **run)


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_masked_gradients_are_read_where_they_change_the_momentum(optimizer):
    def masked(config):
        tx = optimizers.make(config, 4)
        params = {"kernel": jnp.ones((8, 8))}
        state = tx.init(params)
        grads = jax.tree.map(jnp.ones_like, params)
        options = {"grad_fn": lambda params: grads, "fisher_fn": lambda params: grads}
        _, state = tx.update(grads, state, params, **options)
        (momentum,) = (s.trace["kernel"] for s in find_states(state, optax.TraceState))
        return bool((momentum[~get_masks(state)["kernel"]] == 0).all())

    run = {"optimizer": optimizer, "method": "static", "sparsity": 0.5, "distribution": "uniform"}
    kept = {value: masked(Config(mask_grads=value, **run)) for value in (True, False)}
    assert ("mask_grads" in read({"mask_grads": False}, **run)) == (kept[True] != kept[False])
    assert kept[False] is False
    assert not read({"mask_grads": False}, optimizer=optimizer, method="dense")


def test_the_base_and_the_schedule_read_what_changes_their_step():
    options = {"nesterov": True, "final_learning_rate": 0.01}
    for base in ("sgd", "adamw"):
        for schedule in ("cosine", "steps"):
            run = {"base": base, "schedule": schedule, "optimizer": "sgd", "method": "dense"}
            assert read(options, **run) == having_effect(options, program, **run)


DATA = {"subset": 640, "vocabulary": 500, "max_length": 64, "image_size": 32, "cutout": 4}


ON = {
    "digits": {"subset", "cutout"},
    "cifar10": {"subset", "cutout"},
    "cifar100": {"subset", "cutout"},
    "imagenet2012": {"image_size", "cutout"},
    "wmt14": {"vocabulary", "max_length"},
}


@pytest.mark.parametrize("dataset", ON)
def test_what_is_not_read_does_not_change_a_name(dataset):
    for option, value in DATA.items():
        other = Config(dataset=dataset, **{option: value})
        assert (other.name != Config(dataset=dataset).name) == (option in ON[dataset])


def test_what_is_read_may_hang_on_what_is_compared():
    sgd, other, s2sam = (choices(Config(optimizer=o, rho=r).to_json()) for o, r in ((
        "sgd", 0.2), ("sgd", 0.5), ("s2sam", 0.2)))  # fmt: skip
    assert sgd == other
    assert differing((sgd, s2sam)) == ["optimizer"]
    assert differing((sgd, s2sam, {**s2sam, "rho": 0.5})) == ["optimizer", "rho"]
    check_same(Config(optimizer="sgd", rho=0.5).to_json(), Config(optimizer="sgd", rho=0.2), "x has", "Go.")
    stored = Config(optimizer="sgd").to_json() | {"colour": "red"}
    with pytest.raises(ValueError, match=r'^x has another config:\n  colour: "red" there, null asked for\nGo'):
        check_same(stored, Config(optimizer="sgd"), "x has", "Go.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd", "rho": 0.2}, "rho=0.2 has no effect with optimizer=sgd: it is for any optimizer but sgd"),
        ({"eta": 0.1}, "eta=0.1 has no effect with optimizer=s2sam: it is for optimizer asam"),
        ({"alpha": 0.1}, "alpha=0.1 .* it is for optimizer looksam or gsam. Leave it out"),
        ({"drop_fraction": 0.5, "method": "static"}, "with method=static: it is for method set, rigl, itop or chase"),
        ({"update_every": 2.0, "method": "snip"}, "update_every=2.0 has no effect with method=snip"),
        ({"method": "dense", "structure": "channel"}, "structure=channel has no effect with method=dense"),
        ({"vocabulary": 500}, "vocabulary=500 has no effect with dataset=digits: it is for dataset wmt14"),
        ({"base": "adamw", "nesterov": True}, "nesterov=True has no effect with base=adamw"),
        ({"data": "x.npz"}, "data=x.npz has no effect with dataset=digits"),
    ],
)
def test_what_no_run_reads_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_read([Config(**changes)], Config())


def test_what_one_of_them_reads_is_not():
    runs = [Config(optimizer=optimizer, rho=0.2, sharpness_parts=4) for optimizer in ("sgd", "s2sam", "sam")]
    check_read(runs, Config())
    with pytest.raises(ValueError, match="sharpness_parts=4 has no effect with optimizer=sgd, s2sam: it is for"):
        check_read(runs[:2], Config())
    recipe = recipes.get("ssam-table1.sgd").config
    assert recipe.rho == 0.1
    check_read([recipe], recipe)  # there for those that it is compared with
    with pytest.raises(ValueError, match=r"rho=0\.2 has no effect"):
        check_read([dataclasses.replace(recipe, rho=0.2)], recipe)


def test_a_comparison_with_another_radius_trains_sgd_once(toy, tmp_path):
    options = ["--subset", "128", "--epochs", "1", "--out", str(tmp_path), "--compare", "sgd", "s2sam", "--rho"]
    first, second = (train.main([*options, rho]) for rho in ("0.2", "0.5"))
    assert first["sgd"] == second["sgd"]
    assert first["s2sam"] != second["s2sam"]
    assert len(list(tmp_path.glob("*-seed0"))) == 3
    assert len(list(tmp_path.glob("compare-sgd-s2sam-*.png"))) == 2


@pytest.mark.parametrize("file", sorted(jsonl.RESULTS.glob("*_*.jsonl")), ids=lambda file: file.stem)
def test_committed_rows_are_those_of_the_recipes(file):
    """But for the radius, which may have been tuned."""
    name, _, scale = file.stem.rpartition("_")
    if name not in recipes.TABLES:
        return
    for row in jsonl.read(file):
        recipe = recipes.get(row["recipe"]["name"])
        wanted = dataclasses.replace(scaled(recipe, scale), rho=row["config"]["rho"], seed=row["seed"])
        check_same(row["config"], wanted, f"{file} has", "")


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


def test_names_of_runs():
    assert Config(looksam_every=5, alpha=None, esam_beta=0.6, sharpest_fraction=0.5).digest == Config().digest
    for optimizer, field, value in (
        ("looksam", "looksam_every", 4),
        ("gsam", "alpha", 0.2),
        ("esam", "esam_beta", 0.5),
    ):
        assert Config(optimizer=optimizer, **{field: value}).digest != Config(optimizer=optimizer).digest
    for field, value in {"looksam_every": 0, "alpha": -1.0, "esam_beta": 0.0, "sharpest_fraction": 1.5}.items():
        with pytest.raises(ValueError, match=f"{field} must be .*; got {value}"):
            Config(**{field: value})

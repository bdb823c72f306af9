"""The train steps of the recipes: at full size, traced; and real ones of a narrow network."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models, recipes, tasks
from experiments.config import Config
from experiments.datasets import kinds
from experiments.reliability import narrow_steps, one_step
from experiments.rows import jsonl
from s2sam_jax import SparseState
from s2sam_jax._base.tree import find_states

CONFIGS = {name: recipe.config for name, recipe in recipes.RECIPES.items()}


def full_size() -> dict[str, Config]:
    """The first recipe of each combination of what a step is made of."""
    parts = ("model", "dataset", "method", "optimizer", "base")
    found = {tuple(getattr(config, part) for part in parts): name for name, config in reversed(CONFIGS.items())}
    return {name: CONFIGS[name] for name in reversed(found.values())}


@functools.cache
def traced_once(model, width, classes, channels):
    """A network whose forward pass, and with it its gradient, is traced once for all recipes that have it."""
    built = []

    def build():
        built.append(models.build(model, width=width, classes=classes, channels=channels, seed=0))
        return built[0].params, built[0].model_state

    params, model_state = jax.eval_shape(build)
    return built[0]._replace(
        params=params, model_state=model_state, apply=jax.jit(built[0].apply, static_argnums=(3, 5))
    )


def network_of(config):
    text = models.MODELS[config.model].text
    classes = config.vocabulary if text else kinds.KINDS[config.dataset].classes
    network = traced_once(config.model, config.width, classes, None if text else kinds.KINDS[config.dataset].shape[2])
    params, model_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (network.params, network.model_state))
    return network._replace(params=params, model_state=model_state)


@pytest.mark.parametrize("config", full_size().values(), ids=full_size())
def test_full_size_step(config, monkeypatch):
    monkeypatch.setattr(tasks, "build", network_of)

    def step():
        train_step, first_state = one_step.step_and_state(config, steps_per_epoch=1000)
        state = first_state()
        return state, *train_step(state, tasks.noise(config))

    before, after, metrics = jax.eval_shape(step)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert metrics["loss"].shape == ()
    assert metrics["loss"].dtype == jnp.float32
    assert bool(find_states(after.opt_state, SparseState)) == (config.method != "dense")
    size = sum(np.prod(p.shape) for p in jax.tree.leaves(after.params))
    assert size > (1e4 if config.model == "resnet8" else 1e6)


@pytest.fixture
def compilation_cache():
    """Puts back what the command line sets for the whole process."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_combinations_are_those_of_all_recipes_once():
    found = narrow_steps.combinations()
    assert set(found) == {(c.model, c.method, c.optimizer, c.base) for c in CONFIGS.values()}
    assert all(
        (c.model, c.method, c.optimizer, c.base) == key for key, c in ((k, CONFIGS[n]) for k, n in found.items())
    )
    assert narrow_steps.combinations(("table1.rigl-0.9.sgd", "table1.rigl-erk-0.95.sgd")) == {
        ("resnet32", "rigl", "sgd", "sgd"): "table1.rigl-0.9.sgd"
    }


def test_every_combination_has_a_row():
    rows = jsonl.read(jsonl.RESULTS / "narrow_steps.jsonl")
    assert {narrow_steps.key_of(row) for row in rows} >= set(narrow_steps.combinations())
    assert all(row["finite"] and row["moved"] for row in rows)


@pytest.mark.parametrize(("dataset", "shape"), [("digits", (8, 8, 1)), ("cifar100", (32, 32, 3))])
def test_a_batch_has_the_shape_of_its_data(dataset, shape):
    images, labels = tasks.noise(Config(dataset=dataset, batch_size=2))
    assert (images.shape, labels.shape) == ((2, *shape), (2,))
    images, _ = tasks.noise(Config(dataset="imagenet2012", model="resnet50", batch_size=2, image_size=32))
    assert images.shape == (2, 32, 32, 3)


def test_only_sizes_warm_up_and_what_grasp_is_scored_on_are_changed():
    sizes = {"width", "image_size", "vocabulary", "max_length", "batch_size", "warmup_epochs", "images_per_class"}
    for name in narrow_steps.combinations().values():
        full = recipes.get(name).config
        narrow = narrow_steps.narrowed(full)
        assert {k for k, v in dataclasses.asdict(narrow).items() if v != getattr(full, k)} <= sizes


@pytest.mark.parametrize("name", ["table6.vgg19.sgd", "wmt14.dense.sgd"])
def test_narrow_networks_have_all_layers(name):
    full = recipes.get(name).config
    shapes = [jax.eval_shape(lambda c=c: tasks.build(c).params) for c in (narrow_steps.narrowed(full), full)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    few, many = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in shapes)
    assert few < many / 8


def test_narrow_steps_write_a_row_and_go_on_from_it(tmp_path, monkeypatch, compilation_cache):
    """Of a recipe whose network is exchanged for one that compiles soon."""
    name, other = "table1.snip-0.9.s2sam", "table1.snip-0.9.sgd"
    small = dataclasses.replace(recipes.get(name).config, model="resnet8")
    monkeypatch.setitem(recipes.RECIPES, name, dataclasses.replace(recipes.get(name), config=small))
    file = tmp_path / "rows" / "narrow.jsonl"
    options = ["--out", str(file), "--cache", str(tmp_path / "compiled")]
    narrow_steps.main([*options, "--recipes", name])
    (row,) = map(json.loads, file.read_text().splitlines())
    assert [row[key] for key in ("model", "method", "optimizer", "recipe")] == ["resnet8", "snip", "s2sam", name]
    assert row["config"]["width"] == 4
    assert row["finite"]
    assert np.isfinite([row["loss_before"], row["loss_after"]]).all()
    assert row["loss_before"] != row["loss_after"]
    assert 0 < row["moved"] <= row["parameters"] - row["zeros"]
    assert row["sparsity"] == row["zeros"] / row["parameters"] == pytest.approx(0.9, abs=0.05)
    assert {"versions", "commit", "device", "xla_flags", "seconds_with_compilation"} <= row.keys()

    taken = []
    monkeypatch.setattr(one_step, "two_steps", lambda config: taken.append(config.optimizer) or {"loss_after": 1.0})
    narrow_steps.main([*options, "--recipes", name, other])
    assert taken == ["sgd"]
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == row
    assert second["recipe"] == other


@pytest.mark.parametrize(("factor", "loss", "message"), [(1.0, 0.5, "'moved': 0"), (2.0, np.nan, "'finite': False")])
def test_steps_that_fail_make_no_row(factor, loss, message, monkeypatch):
    def step(state, batch):
        return SimpleNamespace(params=jax.tree.map(lambda p: factor * p, state.params)), {"loss": loss}

    first = SimpleNamespace(params={"kernel": jnp.ones((2, 2))})
    monkeypatch.setattr(one_step, "step_and_state", lambda config: (step, lambda: first))
    config = dataclasses.replace(one_step.config_of("resnet8", 2), method="dense")
    with pytest.raises(FloatingPointError, match=f"must move its weights and stay finite; got .*{message}"):
        one_step.two_steps(config)

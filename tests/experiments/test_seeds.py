"""Many seeds in one program: each the run that it is alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interrupted import CASES, StoppedError, rows

from experiments import train
from experiments.tasks import arrays
from experiments.training import runs
from s2sam_jax import Every, TrainState, get_masks, make_train_step, methods, s2sam, sparsify, ssam

SHORT = ["--subset", "256", "--epochs", "3"]


def start(out, *options):
    return train.main([*SHORT, "--out", str(out), *options])


def assert_close_runs(folder, reference):
    a, b = (runs.restore(x) for x in (folder, reference))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a.params, b.params)
    jax.tree.map(np.testing.assert_array_equal, get_masks(a.opt_state), get_masks(b.opt_state))
    for row, other in zip(rows(folder), rows(reference), strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(row["train_loss"], other["train_loss"], rtol=1e-4)
        assert (row["seed"], row["step"]) == (other["seed"], other["step"])


@pytest.mark.parametrize("case", ["rigl-s2sam", "mest-ems-sam"])
def test_seeds_side_by_side_are_the_runs_one_by_one(case, toy, tmp_path):
    options = [*CASES[case], "--epochs", "2", "--seeds", "0", "1", "2", "3"]
    together = start(tmp_path / "vmap", *options, "--vmap")
    alone = start(tmp_path / "alone", *options)
    assert list(together) == list(alone) == [f"seed {seed}" for seed in range(4)]
    for name in together:
        assert_close_runs(together[name], alone[name])
        assert sorted(p.name for p in together[name].iterdir()) == sorted(p.name for p in alone[name].iterdir())
    masks = [get_masks(runs.restore(folder).opt_state)["hidden"]["kernel"] for folder in together.values()]
    assert all((one != other).any() for one, other in itertools.combinations(masks, 2))


def test_seeds_go_on_together_from_an_epoch_that_all_have(toy, tmp_path, monkeypatch):
    options = ["--seeds", "0", "1", "--vmap"]
    reference = start(tmp_path / "whole", *options)
    calls = iter(range(1, 100))
    append = runs.append

    def stopping(folder, row):
        if next(calls) == 4:  # the second seed's row of the second epoch: its checkpoint is there
            raise StoppedError
        append(folder, row)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "append", stopping)
        with pytest.raises(StoppedError):
            start(tmp_path / "stopped", *options)
    going = start(tmp_path / "stopped", *options)
    for name in reference:
        a, b = (runs.restore(x[name]) for x in (going, reference))
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
        assert [row["epoch"] for row in runs.rows(going[name])] == [1, 2, 3]


def test_seeds_at_different_epochs_are_refused_and_go_on_alone(toy, tmp_path, monkeypatch):
    real = arrays.Task.order
    with monkeypatch.context() as patch:
        patch.setattr(arrays.Task, "order", lambda self, number: None if number == 2 else real(self, number))
        with pytest.raises(TypeError):
            start(tmp_path, "--seed", "1")
    with pytest.raises(
        SystemExit, match=r"no common epoch to go on from together: \{0: \[\], 1: \[1, 2\]\}. Train them"
    ):
        start(tmp_path, "--seeds", "0", "1", "--vmap")
    assert list(start(tmp_path, "--seeds", "0", "1")) == ["seed 0", "seed 1"]


def test_side_by_side_needs_seeds_and_one_device(toy, tmp_path):
    with pytest.raises(SystemExit, match="give them as --seeds; got \\(\\)"):
        start(tmp_path, "--vmap")
    with pytest.raises(SystemExit, match="--vmap trains seeds on one device, and the mesh has 2"):
        start(tmp_path, "--seeds", "0", "1", "--vmap", "--mesh", "data=2")


def test_debugging_is_of_one_run_and_of_perturbations_uphill(toy, tmp_path):
    with pytest.raises(SystemExit, match="leave out --vmap"):
        start(tmp_path, "--vmap", "--debug", "--seeds", "0", "1")
    with pytest.raises(SystemExit, match="s2sam-opposite has no other"):
        start(tmp_path, "--debug", "--compare", "sgd", "s2sam-opposite")


def test_optimizers_and_seeds_have_labels():
    base = train.Arguments(seeds=(0, 1))
    configs = train._configs(dataclasses.replace(base, compare=("sgd", "s2sam")))
    assert list(configs) == ["sgd seed 0", "sgd seed 1", "s2sam seed 0", "s2sam seed 1"]
    assert [(c.optimizer, c.seed) for c in configs.values()] == [("sgd", 0), ("sgd", 1), ("s2sam", 0), ("s2sam", 1)]
    assert [[c.seed for c in group] for group in train._groups(list(configs.values()), vmap=True)] == [[0, 1], [0, 1]]
    assert list(train._configs(base)) == ["seed 0", "seed 1"]
    assert list(train._configs(train.Arguments())) == ["s2sam"]


def loss_fn(params, model_state, batch, key):
    noise = jax.random.normal(key, batch.shape)
    return jnp.mean((jnp.tanh((batch + 0.1 * noise) @ params["kernel"])) ** 2), (model_state, {})


def optimizer(climb):
    return sparsify(
        optax.chain(climb, optax.sgd(0.1, momentum=0.9)), methods.rigl(0.5), sparsity=0.5, when=Every(1, 3, 20)
    )


@pytest.mark.parametrize("climb", [s2sam(0.1), ssam(0.1, total_steps=9, update_every=2)], ids=["s2sam", "ssam"])
def test_several_networks_in_one_step(climb):
    """Equal to each alone, called from Python and inside jit; and no step pays for updates that are not due."""
    tx, rng = optimizer(climb), np.random.default_rng(0)
    batches = jnp.asarray(rng.normal(size=(7, 3, 8, 6)), jnp.float32)

    def create(seed):
        return TrainState.create({"kernel": jax.random.normal(jax.random.key(seed), (6, 5))}, tx, seed=seed)

    one, many = make_train_step(loss_fn, tx), make_train_step(loss_fn, tx, vmap=True)
    traced = jax.jit(lambda state, batch: many(state, batch))
    alone = [create(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    inside = jax.tree.map(jnp.array, stacked)
    for batch in batches:
        stacked, metrics = many(stacked, batch)
        inside, _ = traced(inside, batch)
        assert metrics["loss"].shape == (3,)
        alone = [one(state, part)[0] for state, part in zip(alone, batch, strict=True)]
    for index, state in enumerate(alone):
        for whole in (stacked, inside):
            np.testing.assert_allclose(whole.params["kernel"][index], state.params["kernel"], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(
                get_masks(whole.opt_state)["kernel"][index], get_masks(state.opt_state)["kernel"]
            )


def test_one_that_breaks_down_is_frozen_and_the_others_go_on():
    tx, rng = optimizer(s2sam(0.1)), np.random.default_rng(0)
    many, one = make_train_step(loss_fn, tx, vmap=True), make_train_step(loss_fn, tx)
    both = [TrainState.create({"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}, tx) for _ in range(2)]
    state, alone = jax.tree.map(lambda *x: jnp.stack(x), *both), both[1]
    for index in range(6):
        batch = jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32)
        state, _ = many(state, batch.at[0].set(jnp.nan) if index == 1 else batch)
        alone, _ = one(alone, batch[1])
        np.testing.assert_array_equal(get_masks(state.opt_state)["kernel"][1], get_masks(alone.opt_state)["kernel"])
    np.testing.assert_array_equal(state.first_bad_step, [1, -1])
    np.testing.assert_allclose(state.params["kernel"][1], alone.params["kernel"], rtol=1e-4, atol=1e-5)

"""Optimizers, radii, clocks and methods by their names, as a config asks for them."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from toy import build

from experiments import tasks
from experiments.config import Config, OptimizerName, variants
from experiments.datasets.in_memory import Dataset
from experiments.training import loop, optimizers, sparse_methods
from s2sam_jax import (
    ChannelAxis,
    ChannelGroup,
    ESAMState,
    Every,
    LookSAMState,
    MSAMState,
    SAMState,
    TrainState,
    apply_masks,
    get_masks,
    methods,
    perturb,
)
from s2sam_jax._base.tree import find_states


@pytest.mark.parametrize("method", ["dense", *methods.available()])
@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_goes_with_every_method(optimizer, method):
    group = ChannelGroup("all", filters=(ChannelAxis("kernel", -1),), scales=(ChannelAxis("bias", 0),))
    tx = optimizers.make(Config(optimizer=optimizer, method=method), 10, [group])
    state = jax.eval_shape(lambda: TrainState.create({"kernel": jnp.ones((20, 20)), "bias": jnp.ones(20)}, tx))
    assert state.params["kernel"].shape == (20, 20)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2] * 5),
        ("warmup", [0.0, 0.1, 0.2, 0.2, 0.2]),  # up to step 4 of 12
        ("learning-rate", [0.1 * (1 + np.cos(np.pi * step / 12)) for step in (0, 2, 4, 8, 12)]),
    ],
)
def test_radius_over_training(schedule, expected):
    config = Config(method="dense", epochs=3, rho=0.2, rho_schedule=schedule)
    tx, params = optimizers.make(config, steps_per_epoch=4), {"kernel": jnp.ones(3)}
    state = jax.jit(tx.init)(params)
    update, radii = jax.jit(tx.update), []
    for step in range(13):
        if step in (0, 2, 4, 8, 12):
            radii.append(float(state[0].rho))
        _, state = update(params, state, params)
    np.testing.assert_allclose(radii, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("optimizer", "mask"), [("ssam-f", "fisher"), ("ssam-d", "dynamic")])
def test_ssam_is_told_steps_where_the_config_has_epochs(optimizer, mask, monkeypatch):
    told = {}
    monkeypatch.setattr(optimizers, "ssam", lambda rho, **options: told.update(options) or optax.identity())
    config = Config(method="dense", optimizer=optimizer, epochs=6, ssam_update_every=1.5, ssam_sparsity=0.8)
    optimizers.make(config, steps_per_epoch=10)
    del told["seed"]
    assert told == {"mask": mask, "sparsity": 0.8, "update_every": 15, "total_steps": 60}


@pytest.mark.parametrize("optimizer", ["esam", "ssam-d"])
def test_whatever_a_run_draws_follows_its_seed(optimizer):
    """Noise, masks and perturbation: three keys, and others for another seed."""
    found = []
    for seed in (0, 1):
        config = Config(method="set", optimizer=optimizer, seed=seed)
        state = loop.initial_state(config, toy.build(config), optimizers.make(config, steps_per_epoch=4))
        keys = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
        assert len(keys) == 3
        found += [tuple(jax.random.key_data(key).tolist()) for key in keys]
    assert len(set(found)) == 6


def test_variants_of_s2sam_perturb_as_they_say():
    """After one gradient g at w: rho g / |g|, or downhill; adaptive rho T^2 g / |T g|, with T = |w| + eta; as released
    rho g^3 / |w g|, on pruned weights too."""
    params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 4.0]])}
    grads = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
    moved = {}
    momentum = {}
    for optimizer in ("s2sam", "s2sam-adaptive", "s2sam-opposite", "s2sam-released"):
        config = Config(optimizer=optimizer, method="static", sparsity=0.5, rho=0.1, learning_rate=0.0)
        tx = optimizers.make(config, steps_per_epoch=4)
        state = tx.init(params)
        masks = get_masks(state)
        held = {"kernel": params["kernel"] * masks["kernel"]}
        _, state = tx.update(grads, state, held)
        moved[optimizer] = perturb(held, state)["kernel"] - held["kernel"]
        (trace,) = find_states(state, optax.TraceState)
        momentum[optimizer] = np.asarray(trace.trace["kernel"])
    live, g = masks["kernel"], np.asarray(grads["kernel"], np.float64)
    assert (momentum["s2sam"][~live] == 0).all()
    assert (momentum["s2sam-released"] != 0).all()  # dense, as the released code has it
    expected = 0.1 * g * live / np.linalg.norm(g * live)
    np.testing.assert_allclose(moved["s2sam"], expected, rtol=1e-5)
    np.testing.assert_allclose(moved["s2sam-opposite"], -expected, rtol=1e-5)
    scale = np.abs(np.asarray(held["kernel"])) + Config.eta
    adaptive = 0.1 * scale**2 * g * live / np.linalg.norm(scale * g * live)
    np.testing.assert_allclose(moved["s2sam-adaptive"], adaptive, rtol=1e-5)
    np.testing.assert_allclose(
        moved["s2sam-released"], 0.1 * g**3 / np.linalg.norm(np.asarray(held["kernel"]) * g), rtol=1e-4
    )


@pytest.mark.parametrize("method", sorted({*variants.method_names()} - {"dense", "chex"}))
def test_methods_of_random_first_masks_are_known(method):
    """Others keep the largest of the given weights, or all (chex the best channels), so that those of a run count."""
    params = {"kernel": jnp.zeros((100, 100)).at[::4].set(1.0), "bias": jnp.ones(100)}
    group = ChannelGroup("all", filters=(ChannelAxis("kernel", -1),), scales=(ChannelAxis("bias", 0),))
    tx = optimizers.make(Config(method=method, sparsity=0.75, epochs=160), 10, [group])
    kept = int((params["kernel"] * get_masks(tx.init(params))["kernel"]).sum())
    assert (kept == 2500) == (variants.in_library(method)[0] not in variants.RANDOM)


@pytest.mark.parametrize("method", ["mest-em", "mest-ems", "gmp-global", "set-itop", "rigl-itop", "lottery", "snip"])
def test_every_name_makes_an_optimizer_with_a_clock_that_can_fire(method):
    config = Config(method=method, epochs=24, dataset="cifar10")
    tx = optimizers.make(config, steps_per_epoch=10)
    state = tx.init({"kernel": jnp.ones((20, 30))})
    assert 0 <= int(state.next_update) < 240


def test_rounds_share_the_epochs_out():
    """11 prunings to 90 %: twelve rounds of 20 steps and the call that prunes."""
    config = Config(method="lottery", epochs=21, rounds=11)
    assert sparse_methods.round_steps(config, steps_per_epoch=12) == 20
    assert sparse_methods.clock(config, steps_per_epoch=12) == Every(0, 21)
    with pytest.raises(ValueError, match="too few: 11 prunings make 12 rounds of training"):
        sparse_methods.round_steps(Config(method="lottery", epochs=1), steps_per_epoch=12)


@pytest.mark.parametrize(
    ("method", "ends"), {"mest-em": (100, 130), "mest-ems": (90, 120), "mest-ems-98": (100, 130)}.items()
)
def test_phases_of_mest_end_when_they_were_published_to(method, ends):
    """Of 160 epochs; while a phase lasts something moves, and EM&S has more weights than planned."""
    tx = optimizers.make(Config(method=method, dataset="cifar10", epochs=160, optimizer="sgd"), steps_per_epoch=100)
    params = {"kernel": jax.random.normal(jax.random.key(0), (50, 100))}
    state = tx.init(params)
    params = apply_masks(params, state)

    @jax.jit
    def update(state, params, step):
        state = state._replace(step=step)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, refresh_masks=True)
        return state, optax.apply_updates(params, updates)

    moved, counts = {}, {}
    for epoch in range(0, 160, 5):
        before = state.masks["kernel"]
        state, params = update(state, params, epoch * 100)
        moved[epoch], counts[epoch] = int((before ^ state.masks["kernel"]).sum()), int(state.masks["kernel"].sum())
    if method == "mest-em":
        assert set(counts.values()) == {500}
        assert moved[ends[0] - 5] > 1.5 * moved[ends[0]] > 0
    else:
        first, second = ends
        assert counts[0] == counts[first - 5] > counts[first] == counts[second - 5] > counts[second] == 500
    assert [epoch for epoch in moved if moved[epoch]][-1] == ends[1] - (5 if method == "mest-em" else 0)


DRAW = np.random.default_rng(0)
STATES = {"msam": MSAMState, "looksam": LookSAMState, "gsam": SAMState, "esam": ESAMState}


@pytest.mark.parametrize("name", STATES)
def test_optimizers_by_name(name):
    config = Config(optimizer=name, method="dense", rho=0.2, alpha=0.3, looksam_every=2, esam_beta=0.9)
    state = optimizers.make(config, 10).init({"kernel": jnp.ones((2, 2))})
    assert isinstance(state[0], STATES[name])
    assert float(state[0].rho) == pytest.approx(0.2)


def test_esam_in_the_loop(monkeypatch):
    monkeypatch.setattr(tasks, "build", build)
    config = Config(optimizer="esam", method="dense", batch_size=16)
    rows = (DRAW.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8), np.arange(16) % 10)
    task = tasks.make(config, Dataset(*rows, *rows))
    tx = optimizers.make(config, task.steps_per_epoch)
    state, (batch,) = loop.initial_state(config, task.network, tx), task.batches(0)
    state, metrics = loop.train_step(config, task.losses, tx)(state, batch)
    assert int(state.first_bad_step) == -1
    assert float(metrics["rho"]) == pytest.approx(config.rho)

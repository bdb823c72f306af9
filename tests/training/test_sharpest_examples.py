"""ESAM's second gradient on the sharpest examples, and relatives of SAM with a perturbation for each part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import oracles_family
import pytest

from experiments.config import Config
from experiments.models import Network
from experiments.tasks import images
from s2sam_jax import MaskUpdate, SparseMethod, TrainState, esam, gsam, looksam, make_train_step, sam, sparsify

DRAW = np.random.default_rng(0)
LINEAR = [(DRAW.normal(size=(12, 5)), DRAW.normal(size=12)) for _ in range(4)]
WEIGHTS = DRAW.normal(size=5)
PARTS = 4


def linear_losses(params, model_state, batch, key):
    return 0.5 * (batch[0] @ params["kernel"] - batch[1]) ** 2


def linear_loss(params, model_state, batch, key):
    return jnp.mean(linear_losses(params, model_state, batch, key)), (model_state, {})


def gradient(w, inputs, targets):
    return inputs.T @ (inputs @ w - targets) / len(targets)


def linear_steps(sharp, batches=LINEAR, mask=None, **options):
    tx = optax.chain(sharp, optax.sgd(0.1))
    if mask is not None:
        method = SparseMethod(lambda x: MaskUpdate({"kernel": jnp.asarray(mask)}), None, "per_layer")
        tx = sparsify(tx, method, sparsity=0.0, prunable=lambda path, leaf: True)
    state = TrainState.create({"kernel": jnp.asarray(WEIGHTS, jnp.float32)}, tx)
    step, path = make_train_step(linear_loss, tx, **options), []
    for batch in batches:
        state, _ = step(state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch))
        path.append(np.asarray(state.params["kernel"]))
    return path


def test_second_gradient_on_the_sharpest_examples():
    mask = np.array([True, False, True, True, False])
    path = linear_steps(esam(0.3, beta=1.0), mask=mask, sharpest_fraction=0.4, example_loss_fn=linear_losses)
    w = WEIGHTS * mask
    for (inputs, targets), got in zip(LINEAR, path, strict=True):
        point = w + oracles.ascent(gradient(w, inputs, targets) * mask, 0.3)
        before, after = (0.5 * (inputs @ at - targets) ** 2 for at in (w, point))
        rows = oracles_family.sharpest(before, after, 4)
        w = w - 0.1 * mask * gradient(point, inputs[rows], targets[rows])
        np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5)


def test_gsam_with_a_perturbation_for_each_part():
    path = linear_steps(gsam(0.3, alpha=0.5), LINEAR[:2], sharpness_parts=PARTS)
    w = WEIGHTS
    for (inputs, targets), got in zip(LINEAR[:2], path, strict=True):
        parts = list(zip(np.split(inputs, PARTS), np.split(targets, PARTS), strict=True))
        g_p = np.mean([gradient(w + oracles.ascent(gradient(w, *part), 0.3), *part) for part in parts], axis=0)
        w = w - 0.1 * (g_p - 0.5 * oracles_family.across(gradient(w, inputs, targets), g_p))
        np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharp", [looksam(0.3, every=2), esam(0.3, seed=1)], ids=["looksam", "esam"])
def test_equal_parts_are_perturbed_as_the_whole(sharp):
    batches = [tuple(np.concatenate([array[:3]] * PARTS) for array in batch) for batch in LINEAR[:2]]
    whole, parts = (linear_steps(sharp, batches, sharpness_parts=m) for m in (1, PARTS))
    np.testing.assert_allclose(whole, parts, rtol=1e-4)


@pytest.mark.parametrize(("fraction", "calls"), [(0.5, 4), (1.0, 2)])
def test_examples_have_the_noise_of_the_gradient(fraction, calls):
    """And are not looked at where all of them count."""
    keys = []

    def recorded(loss):
        def fn(params, model_state, batch, key):
            jax.debug.callback(lambda key: keys.append(key.tolist()), jax.random.key_data(key))
            return loss(params, model_state, batch, key)

        return fn

    tx = optax.chain(sam(0.3), optax.sgd(0.1))
    state = TrainState.create({"kernel": jnp.asarray(WEIGHTS, jnp.float32)}, tx)
    step = make_train_step(
        recorded(linear_loss), tx, sharpest_fraction=fraction, example_loss_fn=recorded(linear_losses)
    )  # fmt: skip
    step(state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), LINEAR[0]))
    jax.effects_barrier()
    assert len(keys) == calls
    assert len({tuple(key) for key in keys}) == 1


def pixels(params, model_state, inputs, train, key=None):
    """In place of a network: ten sums of pixels, so that losses show how an image was moved."""
    del params, train, key
    return jnp.cumsum(inputs.reshape(len(inputs), -1), axis=1)[:, 5:64:6], model_state


def test_a_smaller_batch_keeps_the_augmentation():
    config, key = Config(batch_size=16, cutout=4), jax.random.key(3)
    losses = jax.jit(images.example_loss_function(config, Network({}, (), pixels)))
    raw = (np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype(np.uint8), np.arange(16) % 10)
    batch = images.numbered(raw)
    whole = losses({}, (), batch, key)
    np.testing.assert_allclose(losses({}, (), raw, key), whole, rtol=1e-5)
    rows = np.array([11, 2, 5])
    np.testing.assert_allclose(losses({}, (), tuple(x[rows] for x in batch), key), whole[rows], rtol=1e-5)

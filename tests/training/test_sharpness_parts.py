"""m-sharpness: each part of a batch is perturbed along its own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments import sharding
from s2sam_jax import TrainState, get_masks, make_train_step, methods, s2sam, sam, sparsify, ssam
from s2sam_jax._training.gradient import gradient_by_part

RHO, RATE, MOMENTUM, PARTS = 0.3, 0.1, 0.9, 4
RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=(12, 5)), RNG.normal(size=(12, 3))) for _ in range(4)]
START = RNG.normal(size=(5, 3))


def loss_fn(params, model_state, batch, key):
    inputs, targets = batch
    outputs = inputs @ params["kernel"]
    new = {"mean": outputs.mean(0), "calls": model_state["calls"] + 1}
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1)), (new, {"largest": outputs.max()})


def gradient(weights, inputs, targets):
    return inputs.T @ (inputs @ weights - targets) / len(inputs)


def climbed(weights, inputs, targets, mask, *, eta=None, perturbed=1.0):
    """The gradient at the ascent point of one part, as SAM and ASAM write it."""
    ascent = mask * gradient(weights, inputs, targets)
    if eta is None:
        epsilon = RHO * ascent / np.linalg.norm(ascent)
    else:
        scale = np.abs(weights) + eta
        epsilon = RHO * scale**2 * ascent / np.linalg.norm(scale * ascent)
    return mask * gradient(weights + perturbed * epsilon, inputs, targets)


def parts_of(batch):
    return zip(*(np.split(array, PARTS) for array in batch), strict=True)


def begin(tx):
    state = {"mean": jnp.zeros(3), "calls": jnp.int32(0)}
    return TrainState.create({"kernel": jnp.asarray(START, jnp.float32)}, tx, model_state=state)


def on_device(batch):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
@pytest.mark.parametrize("eta", [None, 0.05])
def test_steps_are_those_of_the_equations(eta, sparsity):
    climb = sam(RHO) if eta is None else sam(RHO, adaptive=True, eta=eta)
    tx = sparsify(optax.chain(climb, optax.sgd(RATE, momentum=MOMENTUM)), methods.static(), sparsity=sparsity)
    state, step = begin(tx), make_train_step(loss_fn, tx, sharpness_parts=PARTS)
    mask = np.asarray(get_masks(state.opt_state)["kernel"], float)
    weights, velocity = mask * START, np.zeros_like(START)
    for batch in BATCHES:
        outputs = batch[0] @ weights
        state, metrics = step(state, on_device(batch))
        np.testing.assert_allclose(metrics["loss"], 0.5 * np.mean(np.sum((outputs - batch[1]) ** 2, 1)), rtol=1e-5)
        np.testing.assert_allclose(metrics["largest"], np.mean([x.max() for x in np.split(outputs, PARTS)]), rtol=1e-5)
        np.testing.assert_allclose(state.model_state["mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)
        grads = np.mean([climbed(weights, *part, mask, eta=eta) for part in parts_of(batch)], axis=0)
        velocity = MOMENTUM * velocity + grads
        weights = weights - RATE * velocity
        np.testing.assert_allclose(state.params["kernel"], weights, rtol=1e-4, atol=1e-5)
    assert int(state.model_state["calls"]) == len(BATCHES)


def test_ssam_perturbs_each_part_on_its_mask():
    tx = optax.chain(ssam(RHO, total_steps=9, update_every=100), optax.sgd(RATE))
    state, step = begin(tx), make_train_step(loss_fn, tx, sharpness_parts=PARTS)
    state, _ = step(state, on_device(BATCHES[0]))
    perturbed = np.asarray(state.opt_state[0].perturb_masks["kernel"], float)
    assert 0 < perturbed.sum() < perturbed.size
    grads = np.mean([climbed(START, *part, 1.0, perturbed=perturbed) for part in parts_of(BATCHES[0])], axis=0)
    np.testing.assert_allclose(state.params["kernel"], START - RATE * grads, rtol=1e-4, atol=1e-5)


def test_equal_parts_are_perturbed_as_the_whole():
    tx = optax.chain(sam(RHO), optax.sgd(RATE))
    batch = on_device(tuple(np.tile(array[:3], (PARTS, 1)) for array in BATCHES[0]))
    whole, parts = (make_train_step(loss_fn, tx, sharpness_parts=m)(begin(tx), batch)[0] for m in (1, PARTS))
    np.testing.assert_allclose(whole.params["kernel"], parts.params["kernel"], rtol=1e-5)


def test_what_follows_the_second_gradient_sees_live_weights_alone():
    """Else the clipped update would be shorter, by what it loses behind the mask."""
    inner = optax.chain(sam(RHO), optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    tx = sparsify(inner, methods.static(), sparsity=0.6)
    _, metrics = make_train_step(loss_fn, tx, sharpness_parts=PARTS)(begin(tx), on_device(BATCHES[0]))
    assert metrics["update_norm"] == pytest.approx(0.01, rel=1e-4)


def test_what_cannot_be_averaged_over_parts_is_that_of_the_first():
    def counting(params, model_state, batch, key):
        loss, (new, metrics) = loss_fn(params, model_state, batch, key)
        return loss, (new | {"calls": jnp.sum(batch[0] > 0, dtype=jnp.int32)}, metrics)

    positive = [int((inputs > 0).sum()) for inputs, _ in parts_of(BATCHES[0])]
    tx = optax.chain(sam(RHO), optax.sgd(RATE))
    state, _ = make_train_step(counting, tx, sharpness_parts=PARTS)(begin(tx), on_device(BATCHES[0]))
    assert int(state.model_state["calls"]) == positive[0] != positive[-1]


@pytest.mark.parametrize("keys", [jax.random.key(0), jax.random.split(jax.random.key(0), (2, 3))], ids=["one", "split"])
def test_parts_draw_apart_from_keys_in_the_model_state(keys):
    """As Flax NNX keeps them there, beside a count that all parts begin from."""

    def drawing(params, model_state, batch, key):
        used = jax.random.fold_in(model_state["keys"].reshape(-1)[-1], model_state["count"])
        return params * jax.random.uniform(used) + 0.0 * batch.sum(), (model_state, {})

    state = {"keys": keys, "count": jnp.uint32(7)}
    grads = gradient_by_part(drawing, state, jnp.ones((PARTS, 1)), jax.random.key(1), PARTS)
    first, second = (grads(lambda _: jnp.float32(1), jnp.arange(PARTS)) for _ in range(2))
    draws = np.asarray(first.by_part)
    assert len(set(draws.tolist())) == PARTS
    np.testing.assert_array_equal(draws, np.asarray(second.by_part))  # a part keeps its noise for the second gradient
    np.testing.assert_array_equal(jax.random.key_data(first.model_state["keys"]), jax.random.key_data(keys))


def test_a_key_that_the_loss_moves_on_is_that_of_the_first_part():
    def moving(params, model_state, batch, key):
        return params * batch.sum(), (jax.random.split(model_state)[1], {})

    key = jax.random.key(0)
    gradient = gradient_by_part(moving, key, jnp.ones((PARTS, 1)), key, PARTS)(lambda _: 1.0, jnp.arange(PARTS))
    want = jax.random.split(jax.random.fold_in(key, 0))[1]
    np.testing.assert_array_equal(jax.random.key_data(gradient.model_state), jax.random.key_data(want))


def test_each_part_costs_two_gradients():
    seen = []

    def counted(params, model_state, batch, key):
        jax.debug.callback(lambda rows: seen.append(rows.shape), batch[0])
        return loss_fn(params, model_state, batch, key)

    tx = optax.chain(sam(RHO), optax.sgd(RATE))
    step = make_train_step(counted, tx, sharpness_parts=PARTS)
    step(begin(tx), on_device(BATCHES[0]))
    jax.effects_barrier()
    assert seen == [(3, 5)] * (2 * PARTS)


def test_with_a_batch_cut_up_each_device_has_its_own_part():
    mesh = sharding.make_mesh("data=4")
    params = {"kernel": jnp.asarray(START, jnp.float32)}
    state = {"mean": jnp.zeros(3), "calls": jnp.int32(0)}

    @jax.jit
    def by_part(params, batch):
        take = gradient_by_part(loss_fn, state, batch, jax.random.key(0), PARTS)
        return take(lambda _: params, jnp.arange(PARTS)).by_part["kernel"]

    got = by_part(params, jax.device_put(on_device(BATCHES[0]), sharding.of_batch(mesh)))
    assert got.sharding.shard_shape(got.shape) == (1, 5, 3)
    wanted = [gradient(START, *part) for part in parts_of(BATCHES[0])]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert got.sharding.spec[0] in ("data", ("data",), ("data", "fsdp"))
    assert isinstance(got.sharding.spec, P)


@pytest.mark.parametrize(
    ("climb", "options", "message"),
    [
        (sam, {"sharpness_parts": 0}, "sharpness_parts >= 1; got 0"),
        (sam, {"sharpness_parts": 2, "accumulate": 2}, "cut the batch in two ways"),
        (sam, {"sharpness_parts": 5}, r"sharpness_parts=5 does not divide a batch leaf of shape \(12, 5\)"),
        (s2sam, {"sharpness_parts": 2}, "tx has none of them; s2sam perturbs once"),
        (optax.identity, {"sharpness_parts": 2}, "tx has none of them"),
    ],
)
def test_what_cannot_be_cut(climb, options, message):
    tx = optax.chain(climb(), optax.sgd(RATE))
    with pytest.raises(ValueError, match=message):
        make_train_step(loss_fn, tx, **options)(begin(tx), on_device(BATCHES[0]))

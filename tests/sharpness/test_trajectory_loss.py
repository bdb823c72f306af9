"""SAF's buffer and loss, against NumPy and hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import TrainState, TrajectoryBuffer, make_train_step, sam, trajectory_loss


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(z, past, temperature, weight):
    p, q = softmax(np.float64(past) / temperature), softmax(np.float64(z) / temperature)
    return np.mean(weight * temperature**2 * np.sum(p * np.log(p / q), -1))


def test_loss_is_the_worked_number():
    z, past = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, 0.0]])
    np.testing.assert_allclose(trajectory_loss(z, past, weight=1.0), 0.4730362, rtol=1e-5)
    np.testing.assert_allclose(trajectory_loss(z, past), 0.1419109, rtol=1e-5)


def test_loss_and_gradient_against_numpy():
    rng = np.random.default_rng(0)
    z, past, weight = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), np.array([0.3, 0.0, 1.0, 2.0])

    @jax.jit
    def loss(z, past):
        return trajectory_loss(z, past, temperature=2.0, weight=weight)

    np.testing.assert_allclose(loss(z, past), oracle(z, past, 2.0, weight), rtol=1e-5)
    by_z, by_past = jax.grad(loss, argnums=(0, 1))(jnp.float32(z), jnp.float32(past))
    expected = 2.0 / 4 * weight[:, None] * (softmax(z / 2) - softmax(past / 2))  # tau / b * weight * (q - p)
    np.testing.assert_allclose(by_z, expected, rtol=1e-4, atol=1e-6)
    assert not by_past.any()
    assert trajectory_loss(jnp.bfloat16(z), jnp.bfloat16(past)).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        trajectory_loss(z, past[:, :2])
    with pytest.raises(ValueError, match=r"\(4, 1\)"):  # times [batch] that would be [batch, batch]
        trajectory_loss(z, past, weight=np.ones((4, 1)))


def test_no_gradient_flows_into_the_buffer():
    buffer = TrajectoryBuffer.init(2, 3)
    slope = jax.grad(lambda logits: buffer.record(jnp.arange(2), logits, 0).logits.sum())(jnp.ones((2, 3)))
    assert not slope.any()


@pytest.mark.parametrize("delay", [1, 3])
def test_ring_recalls_exactly_delay_epochs_ago(delay):
    n, buffer = 5, TrajectoryBuffer.init(5, 2, delay)
    record, recall = jax.jit(TrajectoryBuffer.record), jax.jit(TrajectoryBuffer.recall)
    rng, history = np.random.default_rng(0), {}
    for epoch in range(3 * delay + 2):
        order = rng.permutation(n)[:4]  # one example is left out
        for rows in order.reshape(2, 2):
            past, known = recall(buffer, rows, epoch)
            for row, logits, there in zip(rows, past, known, strict=True):
                assert there == ((epoch - delay, row) in history)
                if there:
                    np.testing.assert_array_equal(logits, history[epoch - delay, row])
            logits = rng.normal(size=(2, 2)).astype(np.float32)
            buffer = record(buffer, rows, logits, epoch)
            history |= {(epoch, row): z for row, z in zip(rows, logits, strict=True)}


def test_buffer_takes_an_epoch_an_example_and_leaves_padding_out():
    buffer = TrajectoryBuffer.init(3, 1, 1, dtype=jnp.bfloat16)
    buffer = buffer.record(jnp.array([0, 1, 3]), jnp.array([[1.0], [2.0], [9.0]]), jnp.array([4, 5, 4]))
    past, known = buffer.recall(jnp.array([0, 1, 2, 3]), 5)
    assert known.tolist() == [True, False, False, False]
    assert float(past[0, 0]) == 1.0
    assert buffer.logits.dtype == jnp.bfloat16
    assert float(buffer.logits.max()) == 2.0
    buffer = buffer.record(jnp.array([-1, 2]), jnp.array([[9.0], [3.0]]), 6)  # -1 would be the last row
    past, known = buffer.recall(jnp.array([2, -1]), 7)
    assert past.tolist() == [[3.0], [0.0]]
    assert known.tolist() == [True, False]
    with pytest.raises(ValueError, match="delay >= 1; got 0"):
        TrajectoryBuffer.init(3, 1, 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffer_is_the_model_state_of_a_train_step(accumulate):
    """SAF on softmax regression against NumPy, over epochs with batches in changing order."""
    rng = np.random.default_rng(0)
    x, labels, delay, rate = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 2, 8), 2, 0.5

    def loss_fn(params, buffer, batch, key):
        rows, epoch = batch["rows"], batch["epoch"]
        logits = jnp.asarray(x)[rows] @ params
        past, known = buffer.recall(rows, epoch)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[rows]).mean()
        penalty = trajectory_loss(logits, past, weight=0.8 * known * (epoch > 2))
        return loss + penalty, (buffer.record(rows, logits, epoch), {"penalty": penalty})

    tx = optax.sgd(rate)
    step = make_train_step(loss_fn, tx, accumulate=accumulate)
    state = TrainState.create(jnp.zeros((3, 2)), tx, model_state=TrajectoryBuffer.init(8, 2, delay))
    w, outputs, penalties = np.zeros((3, 2)), {}, []
    for epoch in range(6):
        for rows in rng.permutation(8).reshape(2, 4):
            state, metrics = step(state, {"rows": jnp.asarray(rows), "epoch": jnp.full(4, epoch)})
            z = x[rows] @ w
            slope = softmax(z) - np.eye(2)[labels[rows]]
            if epoch > 2:
                past = np.stack([outputs[epoch - delay, row] for row in rows])
                slope += 0.8 * 5.0 * (softmax(z / 5) - softmax(past / 5))
                penalties.append(oracle(z, past, 5.0, 0.8))
                np.testing.assert_allclose(metrics["penalty"], penalties[-1], rtol=1e-3)
            else:
                assert metrics["penalty"] == 0
            outputs |= {(epoch, row): value for row, value in zip(rows, z, strict=True)}
            w = w - rate / 4 * x[rows].T @ slope
            np.testing.assert_allclose(state.params, w, rtol=1e-4, atol=1e-5)
    assert max(penalties) > 1e-3


def test_padding_is_never_known():
    buffer = TrajectoryBuffer.init(n=2, classes=3, delay=1).record(jnp.array([0, 1]), jnp.ones((2, 3)), 0)
    _, known = buffer.recall(jnp.array([1, 2]), 1)
    np.testing.assert_array_equal(known, [True, False])


def beside_sam(**options):
    """A step on x w = (1, 5, 9, 13), each three times, that records what it saw."""
    x = jnp.arange(8.0).reshape(4, 2)

    def loss_fn(params, model_state, rows, key):
        logits = x[rows] @ params
        return jnp.mean(logits**2), ({"past": model_state["past"].record(rows, logits, 0)}, {})

    tx = optax.chain(sam(0.05), optax.sgd(0.1))
    buffer = TrajectoryBuffer.init(n=4, classes=3, delay=1)
    state = TrainState.create(jnp.ones((2, 3)), tx, model_state={"past": buffer})
    return make_train_step(loss_fn, tx, **options)(state, jnp.arange(4))[0].model_state["past"]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_clean_outputs_are_recorded_beside_sam(accumulate):
    logits, known = beside_sam(accumulate=accumulate).recall(jnp.arange(4), 1)
    np.testing.assert_allclose(logits, np.repeat([[1.0], [5.0], [9.0], [13.0]], 3, axis=1), rtol=1e-6)
    assert known.all()


def test_recorded_outputs_are_not_averaged_over_parts():
    with pytest.raises(ValueError, match=r"sharpness_parts=2 averages the model state .* TrajectoryBuffer"):
        beside_sam(sharpness_parts=2)


def test_masked_classes_add_nothing():
    logits = jnp.array([[1.0, 2.0, -jnp.inf]])
    with_class = trajectory_loss(logits, logits + jnp.array([[0.5, 0.0, 0.0]]))
    np.testing.assert_allclose(with_class, trajectory_loss(logits[:, :2], jnp.array([[1.5, 2.0]])), rtol=1e-6)

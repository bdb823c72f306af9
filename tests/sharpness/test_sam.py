"""SAM and its relatives on whole models, on some leaves, and around sparsify."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    TrainState,
    apply_masks,
    checked,
    looksam,
    make_train_step,
    methods,
    s2sam,
    sam,
    sharpness_metrics,
    sparsify,
)


@pytest.mark.parametrize("rho", [0.0, 1e-6, optax.linear_schedule(0.0, 0.05, 1000)], ids=["zero", "tiny", "warm-up"])
def test_looksam_reuses_no_rounding(rho):
    weights, curvature = jax.random.normal(jax.random.key(0), (1000,)), jax.random.uniform(jax.random.key(1), (1000,))
    grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(curvature * w**2))
    tx = looksam(rho=rho, every=5)
    state = tx.init(weights)
    for _ in range(3):
        grads = grad_fn(weights)
        updates, state = tx.update(grads, state, weights, grad_fn=grad_fn)
        np.testing.assert_allclose(updates, grads, rtol=1e-3, atol=1e-6)


PARAMS = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def loss_fn(params, model_state, batch, key):
    """Its statistic is the batch's own mean."""
    mean = jnp.mean(batch)
    return jnp.sum(params["kernel"] ** 2) * mean, (0.5 * model_state + 0.5 * mean, {})


def start(tx, params=PARAMS):
    return TrainState.create(jax.tree.map(jnp.array, params), tx, model_state=jnp.ones(()))


def test_sam_outside_sparsify_is_refused_and_inside_is_not():
    outside = optax.chain(sam(0.5), sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5))
    refused = r"outside sparsify would perturb pruned weights"
    state = outside.init(PARAMS)
    with pytest.raises(ValueError, match=refused):
        apply_masks(PARAMS, state)
    with pytest.raises(ValueError, match=refused):
        start(outside)
    with pytest.raises(ValueError, match=refused):
        checked(outside).update(PARAMS, state, PARAMS, grad_fn=lambda params: params)
    inside = sparsify(optax.chain(sam(0.5), optax.sgd(0.1)), methods.static(), sparsity=0.5)
    make_train_step(loss_fn, inside)(start(inside), jnp.ones(4))


def test_sam_that_sees_some_leaves_says_so():
    tx = optax.masked(sam(0.1), {"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"sam takes a gradient at all parameters, and optax\.masked .* hides some"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p: p)


def test_the_cosine_of_a_complex_gradient_with_itself_is_one():
    tx, z, grads = s2sam(), jnp.array([3 + 4j]), jnp.array([1 - 2j])
    _, state = tx.update(grads, tx.init(z), z)
    np.testing.assert_allclose(sharpness_metrics(z, state, grads)["cosine_last_gradient"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("eta", [None, 0.01])
def test_sam_takes_a_whole_model_of_which_some_leaves_have_no_gradient(eta):
    """As ``eqx.filter_grad`` gives them, for functions, integers and frozen layers."""
    model = {"act": jnp.tanh, "frozen": jnp.ones(3), "w": jnp.array([3.0, 4.0]), "n": jnp.arange(2)}
    points = []

    def grad_fn(at):
        points.append(at)
        return model | {"act": None, "frozen": None, "w": 2 * at["w"], "n": None}

    tx = sam(0.5) if eta is None else sam(0.5, adaptive=True, eta=eta)
    grads = {"act": None, "frozen": None, "w": jnp.array([1.0, 2.0]), "n": None}
    updates, _ = tx.update(grads, tx.init(None), model, grad_fn=grad_fn)
    w, g = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    scale = np.ones(2) if eta is None else w + eta
    expected = w + 0.5 * scale**2 * g / np.linalg.norm(scale * g)
    np.testing.assert_allclose(points[0]["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], 2 * expected, rtol=1e-6)
    assert all(points[0][name] is model[name] for name in ("act", "frozen", "n"))

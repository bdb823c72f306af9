"""SNIP and GraSP: scores against NumPy, collapsed layers, many batches, and low precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from s2sam_jax import (
    Every,
    TrainState,
    apply_masks,
    check_masks,
    get_masks,
    make_train_step,
    methods,
    perturb,
    s2sam,
    set_masks,
    sparsify,
    warn_if_collapsed,
)

DRAW = np.random.default_rng(0)


PARAMS = {
    "a": {"kernel": jnp.asarray(DRAW.normal(size=(3, 3, 2, 4)), jnp.float32), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.asarray(DRAW.normal(size=(16, 10)), jnp.float32)},
}


SIZE = 72 + 160


def random_grads(seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), PARAMS)


def flat(tree):
    """The prunable leaves as one vector, in tree order."""
    return np.concatenate([np.asarray(tree["a"]["kernel"]).ravel(), np.asarray(tree["b"]["kernel"]).ravel()])


def quadratic_grad(params):
    """Gradient of a coupled quadratic in all weights, so that the Hessian is not diagonal."""
    return jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p)) ** 2)(params)


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize("keep_at_least", [0, 7])
def test_one_shot_in_chain(name, keep_at_least):
    tx = sparsify(
        optax.chain(s2sam(0.1), optax.sgd(0.1, momentum=0.9)),
        getattr(methods, name)(keep_at_least=keep_at_least),
        sparsity=0.9,
    )
    state, params = tx.init(PARAMS), PARAMS
    assert bool(flat(state.masks).all())
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=quadratic_grad))
    grads = quadratic_grad(perturb(params, state))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)

    w, g = flat(PARAMS).astype(np.float64), flat(grads).astype(np.float64)
    if name == "snip":
        scores = np.abs(w * g)
    else:  # L = S(w)^2 over every leaf: Hg = 2 c (c.g) - 2 S sin(w) g, with c = cos(w), S = sum sin(w)
        every_w = np.concatenate([w, np.ones(4)])
        every_g = np.concatenate([g, np.asarray(grads["a"]["bias"], np.float64)])
        c, total = np.cos(every_w), np.sin(every_w).sum()
        scores = (every_w * (2 * c * (c @ every_g) - 2 * total * np.sin(every_w) * every_g))[:SIZE]
    count = SIZE - math.floor(0.9 * SIZE)
    reserved = np.concatenate(
        [oracles.top_mask(scores[:72], keep_at_least), oracles.top_mask(scores[72:], keep_at_least)]
    )
    mask = reserved | oracles.top_mask(scores, count - reserved.sum(), ~reserved)
    np.testing.assert_array_equal(flat(state.masks), mask)
    np.testing.assert_array_equal(flat(params), flat(PARAMS) * mask)  # the step that makes the mask moves nothing
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.inner_state[1]))

    before = state.masks
    for seed in range(3):
        updates, state = update(random_grads(seed), state, params)
        params = optax.apply_updates(params, updates)
        check_masks(params, state)
    jax.tree.map(np.testing.assert_array_equal, state.masks, before)


def test_grasp_needs_a_gradient_function():
    tx = sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.9)
    with pytest.raises(TypeError, match="grasp needs grad_fn"):
        tx.update(random_grads(0), tx.init(PARAMS), PARAMS)


COLLAPSING = {"dead/kernel": jnp.full((4, 4), 1e-9), "b/kernel": jnp.ones((8, 8))}


def square_loss(params, model_state, batch, key):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)), (model_state, {})


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize("keep_at_least", [0, 2])
def test_collapsed_layers_are_named_and_can_be_prevented(name, keep_at_least):
    tx = sparsify(optax.sgd(0.1), getattr(methods, name)(keep_at_least=keep_at_least), sparsity=0.8)
    state = TrainState.create(COLLAPSING, tx)
    warn_if_collapsed(state.opt_state)  # dense still
    state, _ = make_train_step(square_loss, tx)(state, None)
    assert int(state.opt_state.masks["dead/kernel"].sum()) == keep_at_least
    if keep_at_least:
        warn_if_collapsed(state.opt_state)
    else:
        with pytest.warns(UserWarning, match=r"No weight is left in \['dead/kernel'\]\. .* keep_at_least=1"):
            warn_if_collapsed(state.opt_state)


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_no_step_calls_back(name):
    """JAX keeps no program with a callback in its cache on disk."""
    tx = sparsify(optax.sgd(0.1), getattr(methods, name)(), sparsity=0.8)
    step = jax.jit(make_train_step(square_loss, tx))
    assert "callback" not in step.lower(TrainState.create(COLLAPSING, tx), None).as_text()


def test_collapse_is_told_of_any_state_with_masks_but_not_of_a_tracer():
    tx = sparsify(optax.sgd(0.1), methods.magnitude("global"), sparsity=0.8)
    fine, collapsed = (tx.init(COLLAPSING | {"dead/kernel": jnp.linspace(0, top, 16).reshape(4, 4)}) for top in (2, 0))
    warn_if_collapsed(fine)
    warn_if_collapsed(tx.init({"kernel": jnp.ones((4, 4)), "empty/kernel": jnp.ones((0, 3))}))
    for state in (collapsed, jax.tree.map(lambda *leaves: jnp.stack(leaves), fine, collapsed)):
        with pytest.warns(UserWarning, match=r"\['dead/kernel'\]"):
            warn_if_collapsed((optax.EmptyState(), state))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(warn_if_collapsed)(collapsed)


def test_snip_scores_add_up_over_batches_and_install():
    def loss_fn(params, batch):
        return jnp.sum(jnp.tanh(batch @ params["kernel"]))

    params = {"kernel": jnp.asarray(DRAW.normal(size=(5, 6)), jnp.float32)}
    batches = [jnp.asarray(DRAW.normal(size=(7, 5)), jnp.float32) for _ in range(3)]
    w = np.asarray(params["kernel"], np.float64)
    total = sum(np.asarray(b, np.float64).T @ (1 - np.tanh(np.asarray(b, np.float64) @ w) ** 2) for b in batches)
    scores = methods.snip_scores(loss_fn, params, batches)
    np.testing.assert_allclose(scores["kernel"], np.abs(w * total), rtol=2e-4, atol=1e-5)
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.7)
    state = set_masks(tx.init(params), methods.masks_from_scores(scores, 0.7))
    mask = oracles.top_mask(np.asarray(scores["kernel"]), 9)
    np.testing.assert_array_equal(get_masks(state)["kernel"], mask)
    np.testing.assert_array_equal(apply_masks(params, state)["kernel"], np.asarray(params["kernel"]) * mask)
    with pytest.raises(ValueError, match="at least one batch"):
        methods.snip_scores(loss_fn, params, [])


def test_grasp_scores_sum_gradients_before_the_hessian_product():
    """Against a dense Hessian in float64; per-batch products of per-batch gradients would differ."""
    with jax.enable_x64(True):
        params = jnp.asarray(DRAW.normal(size=(4, 3)))
        batches = [(jnp.asarray(DRAW.normal(size=(6, 4))), jnp.asarray(DRAW.integers(0, 3, 6))) for _ in range(2)]

        def loss(flat_params, batch, temperature):
            logits = batch[0] @ flat_params.reshape(4, 3) / temperature
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        for temperature in (1.0, 200.0):
            w = params.ravel()
            grads = sum(jax.grad(loss)(w, b, temperature) for b in batches)
            hessian = sum(jax.hessian(loss)(w, b, temperature) for b in batches)
            got = methods.grasp_scores(lambda p, x: x @ p, params, batches, temperature=temperature)
            np.testing.assert_allclose(got.ravel(), w * (hessian @ grads), rtol=1e-10, atol=1e-20)
            once = methods.grasp_scores(lambda p, x: x @ p, params, iter(batches), temperature=temperature)
            np.testing.assert_array_equal(once, got)
    with pytest.raises(ValueError, match="at least one batch"):
        methods.grasp_scores(lambda p, x: x @ p, params, [])


def snip_in_bf16(batches):
    """Of one weight, with a gradient of 1 on every batch."""
    one = jnp.ones(1, jnp.bfloat16)
    return methods.snip_scores(lambda w, x: jnp.sum(w * x), one, [one] * batches)


def grasp_in_bf16(batches):
    """Per batch, as the Hessian product of a sum of gradients grows with the square of their number."""
    params, batch = jnp.ones((1, 2), jnp.bfloat16), (jnp.ones((1, 1), jnp.bfloat16), jnp.array([0]))
    return methods.grasp_scores(lambda w, x: x @ (w * w), params, [batch] * batches, temperature=1.0) / batches


@pytest.mark.parametrize("scores", [snip_in_bf16, grasp_in_bf16])
def test_scores_over_many_batches_add_up_in_bfloat16(scores):
    """A sum in bfloat16 stays at 256 once its next summand is 1."""
    np.testing.assert_allclose(scores(600), 600 / 300 * scores(300), rtol=1e-2)


def test_snip_ranks_float16_weights_by_products_that_float16_lacks():
    w, g = DRAW.normal(size=(30, 30)) * 1e-3, DRAW.normal(size=(30, 30)) * 1e-5
    params, grads = ({"kernel": jnp.asarray(x, jnp.float16)} for x in (w, g))
    tx = sparsify(optax.sgd(0.1), methods.snip(), sparsity=0.5)
    _, state = tx.update(grads, tx.init(params), params)
    exact = np.abs(np.asarray(params["kernel"], np.float64) * np.asarray(grads["kernel"], np.float64))
    np.testing.assert_array_equal(state.masks["kernel"], oracles.top_mask(exact, 450))


@pytest.mark.parametrize("keep_at_least", [0, 30])
@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_a_clock_that_fires_again_costs_one_shot_methods_no_step(name, keep_at_least):
    """Even where keep_at_least leaves more than the sparsity asks for."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 10)))}
    grad_fn = jax.grad(lambda p: jnp.sum(jnp.sin(3 * p["kernel"])))
    tx = sparsify(optax.sgd(0.1), getattr(methods, name)(keep_at_least=keep_at_least), sparsity=0.8, when=Every(0, 2))
    state, masks = tx.init(params), []
    for call in range(4):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        masks.append(np.asarray(state.masks["kernel"]))
        expected = -0.1 * np.asarray(grad_fn(params)["kernel"]) if call else -np.asarray(params["kernel"])
        live = masks[0] if call else ~masks[0]
        np.testing.assert_allclose(updates["kernel"], np.where(live, expected, 0), rtol=1e-6)
        params = optax.apply_updates(params, updates)
    assert [int(mask.sum()) for mask in masks] == 4 * [max(12, keep_at_least)]


def test_one_shot_pruning_of_nothing_is_refused():
    flat = {"weights": jnp.arange(6.0)}
    for prune in (
        lambda: methods.masks_from_scores(flat, 0.5),
        lambda: next(methods.lottery_rounds(lambda params, masks, number: params, flat, sparsity=0.5)),
    ):
        with pytest.raises(ValueError, match="Nothing is prunable"):
            prune()


def test_grasp_that_sees_some_leaves_says_so():
    sparse = sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.5, prunable=lambda path, leaf: True)
    tx = optax.partition({"some": sparse, "rest": optax.sgd(0.1)}, {"a": "some", "b": "rest"})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"grasp takes a gradient at all parameters, and optax\.masked .* hides some"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p: {"a": p["b"], "b": p["a"]})

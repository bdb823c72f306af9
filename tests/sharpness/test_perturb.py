"""perturb: gradients of no length or direction, what it must not differentiate or copy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from misfits import SGD, missing_leaf, static, two_kernels, untyped, wrong_shape

from s2sam_jax import (
    TrainState,
    apply_masks,
    check_masks,
    checked,
    esam,
    get_masks,
    gsam,
    looksam,
    make_train_step,
    methods,
    msam,
    perturb,
    s2sam,
    s2sam_wrapper,
    sam,
    set_masks,
    sparsify,
    ssam,
    update_masks,
    warn_if_collapsed,
)

LEAVES = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


@pytest.mark.parametrize(
    "make", [sam, gsam, looksam, esam, lambda **o: ssam(sparsity=0.5, mask="dynamic", total_steps=9, **o)]
)
def test_a_zero_gradient_without_eps_moves_nothing(make):
    tx, weights = make(rho=0.1, eps=0.0), jnp.ones(4)
    updates, _ = tx.update(jnp.zeros(4), tx.init(weights), weights, grad_fn=lambda w: w)
    np.testing.assert_array_equal(updates, weights)


@pytest.mark.parametrize("compat", ["paper", "authors"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_first_step_without_eps_moves_nothing(adaptive, compat):
    weights = jnp.ones(2)
    np.testing.assert_array_equal(
        perturb(weights, s2sam(0.1, eps=0.0, adaptive=adaptive, compat=compat).init(weights)), 1
    )
    by_momentum = optax.chain(msam(0.1, eps=0.0), optax.sgd(0.1, momentum=0.9))
    np.testing.assert_array_equal(perturb(weights, by_momentum.init(weights)), 1)
    wrapped = s2sam_wrapper(optax.sgd(0.1), eps=0.0)
    np.testing.assert_array_equal(wrapped.update(jnp.zeros(2), wrapped.init(weights), weights)[0], 0)
    for tx in (optax.chain(s2sam(0.1, eps=0.0, adaptive=adaptive, compat=compat), optax.sgd(0.1)), by_momentum):
        checked(tx).update(weights, tx.init(weights), weights)  # raises at a fault


def test_gradients_whose_squares_vanish_are_no_direction():
    tx, weights = s2sam(0.1, eps=1e-30), jnp.ones(2)
    _, state = tx.update(jnp.full(2, 1e-25), tx.init(weights), weights)
    np.testing.assert_allclose(perturb(weights, state), 1)
    checked(tx).update(weights, state, weights)


def test_a_nan_in_the_last_gradient_is_not_hidden():
    tx, weights = s2sam(0.1), jnp.ones(2)
    _, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(weights), weights)
    assert np.isnan(perturb(weights, state)).all()


def test_the_momentum_of_a_train_state_is_the_optimizers():
    tx = optax.chain(msam(0.1), optax.sgd(0.1, momentum=0.9))
    looks_like = optax.ScaleByAdamState(jnp.zeros(()), jnp.ones(3), jnp.ones(3))  # has a field mu
    state = TrainState.create(LEAVES, tx, model_state=looks_like)
    jax.tree.map(np.testing.assert_array_equal, perturb(state.params, state), perturb(state.params, state.opt_state))


FINDERS = {
    "perturb": (lambda state: perturb(two_kernels(), state), r"perturb found no S2SAMState .*restore it into the"),
    "get_masks": (get_masks, r"get_masks found no SparseState"),
    "set_masks": (
        lambda state: set_masks(state, jax.tree.map(lambda x: x > 0, two_kernels())), r"set_masks found no SparseState"
    ),
    "apply_masks": (lambda state: apply_masks(two_kernels(), state), r"apply_masks found no SparseState"),
    "check_masks": (lambda state: check_masks(two_kernels(), state), r"check_masks found no SparseState"),
    "warn_if_collapsed": (warn_if_collapsed, r"warn_if_collapsed found no SparseState"),
    "update_masks": (
        lambda state: update_masks(SGD, two_kernels(), state, two_kernels()), r"update_masks found no SparseState"
    ),
}  # fmt: skip


@pytest.mark.parametrize("restored", [False, True], ids=["plain_sgd", "untyped"])
@pytest.mark.parametrize(("call", "text"), FINDERS.values(), ids=FINDERS.keys())
def test_no_state(call, text, restored):
    state = untyped(static(s2sam()).init(two_kernels())) if restored else SGD.init(two_kernels())
    with pytest.raises(ValueError, match=text):
        call(state)


@pytest.mark.parametrize(
    "build", [lambda: optax.chain(s2sam(), s2sam(), SGD), lambda: static(optax.chain(s2sam(), s2sam()))]
)
def test_two_s2sam_on_one_leaf(build):
    with pytest.raises(ValueError, match=r"two S2SAMStates claim the leaf a/bias; use one s2sam\(\)"):
        perturb(two_kernels(), build().init(two_kernels()))


def test_perturb_of_another_model():
    state = s2sam().init(two_kernels())
    with pytest.raises(ValueError, match=r"gradient a/kernel\(4, 4\) that params lack"):
        perturb(wrong_shape(), state)
    with pytest.raises(ValueError, match=r"gradient b/kernel\(4, 4\) that params lack"):
        perturb(missing_leaf(), state)
    with pytest.raises(ValueError, match=r"that params lack"):
        perturb(two_kernels(), optax.flatten(s2sam()).init(two_kernels()))


WITH_GAIN = {"dense": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}, "gain": jnp.ones(4)}


def only(name):
    return {"dense": {"kernel": name == "dense"}, "gain": name == "gain"}


BEHIND = {
    "momentum": optax.chain(SGD, s2sam()),
    "moments": optax.chain(optax.scale_by_adam(), s2sam(), optax.scale(-0.1)),
    "second_moments": optax.chain(optax.scale_by_rms(), s2sam()),
    "nested": optax.chain(optax.clip(1.0), optax.chain(SGD, optax.chain(s2sam()))),
    "sparse": sparsify(optax.chain(SGD, s2sam()), methods.static(), sparsity=0.5),
    "same_group": optax.chain(optax.masked(SGD, only("gain")), optax.masked(s2sam(), only("gain"))),
}


FIRST = {
    "first": optax.chain(s2sam(), SGD),
    "without_arrays_before": optax.chain(optax.zero_nans(), optax.clip(1.0), s2sam(), SGD),
    "other_group": optax.chain(optax.masked(SGD, only("dense")), optax.masked(optax.chain(s2sam(), SGD), only("gain"))),
    "groups": optax.multi_transform(
        {"a": optax.chain(s2sam(), SGD), "b": SGD}, {"dense": {"kernel": "b"}, "gain": "a"}
    ),
    "schedule_free": optax.contrib.schedule_free(optax.chain(s2sam(), optax.sgd(0.1)), 0.1),
}


@pytest.mark.parametrize("tx", BEHIND.values(), ids=BEHIND)
def test_s2sam_behind_an_optimizer_is_refused(tx):
    with pytest.raises(ValueError, match=r"s2sam\(\) stands behind an optimizer .* put s2sam\(\) first"):
        perturb(WITH_GAIN, tx.init(WITH_GAIN))


@pytest.mark.parametrize("tx", FIRST.values(), ids=FIRST)
def test_s2sam_before_an_optimizer_is_not(tx):
    """Before the first gradient there is nothing to perturb along."""
    jax.tree.map(np.testing.assert_array_equal, perturb(WITH_GAIN, tx.init(WITH_GAIN)), WITH_GAIN)


TWICE = {
    "s2sam": optax.chain(s2sam(), sam(), SGD),
    "msam": optax.chain(sam(), msam(), SGD),
    "s2sam_wrapper": optax.chain(sam(), s2sam_wrapper(SGD)),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_would_perturb_twice_is_refused(name):
    tx = TWICE[name]
    step = make_train_step(lambda params, rest, batch, key: (jnp.sum(params["gain"] * batch), (rest, {})), tx)
    with pytest.raises(ValueError, match=rf"^{name} together with one of sam, .* would perturb twice"):
        step(TrainState.create(WITH_GAIN, tx), jnp.ones(4))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_perturbation_is_a_constant(adaptive):
    """Both ways to write it: the gradient at the perturbed point, and that of the loss there."""
    scales = jnp.array([1.0, 2.0, 4.0])
    loss, weights = lambda w: 0.5 * jnp.sum(scales * w * w), jnp.array([1.0, -2.0, 0.5])
    tx = s2sam(rho=0.5, adaptive=adaptive)
    _, state = tx.update(jax.grad(loss)(weights), tx.init(weights), weights)
    there = jax.grad(loss)(perturb(weights, state))
    np.testing.assert_allclose(jax.grad(lambda w: loss(perturb(w, state)))(weights), there, rtol=1e-6)


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def test_a_whole_nnx_model_is_perturbed_only_where_it_keeps_nothing_else():
    """Its statistics and random counts would change in the copy alone: in silence, for a whole run."""
    tx = optax.chain(s2sam(0.5), optax.sgd(0.1))

    class Net(nnx.Module):
        def __init__(self, *layers):
            self.layers = nnx.List(layers)

    def perturbed(model):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
        return perturb(model, optimizer.opt_state)

    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    epsilon = np.asarray(perturbed(Net(linear)).layers[0].kernel[...] - linear.kernel[...])
    np.testing.assert_allclose(epsilon, 0.5 / np.sqrt(6), rtol=1e-5)  # six gradients of one
    for layer, name in ((nnx.BatchNorm(2, rngs=nnx.Rngs(0)), "mean"), (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "count")):
        with pytest.raises(ValueError, match=rf"layers/1/\S*{name}(.|\n)*nnx.split"):
            perturbed(Net(linear, layer))


def test_memory_in_float8():
    tx = s2sam(rho=0.5, grad_dtype=jnp.float8_e4m3fn)
    _, state = tx.update(jnp.array([0.0, 2.0]), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(perturb(jnp.array([3.0, 4.0]), state), [3.0, 4.5])


@pytest.mark.parametrize(
    ("around", "name"),
    [
        (lambda tx: optax.apply_if_finite(tx, 5), "apply_if_finite"),
        (lambda tx: optax.MultiSteps(tx, 2), "MultiSteps"),
    ],
)
def test_s2sam_beside_a_wrapper_that_holds_gradients_back_is_refused(around, name):
    apart = optax.chain(s2sam(0.1), around(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=rf"s2sam\(\) stands beside optax\.{name}"):
        perturb(KERNEL, apart.init(KERNEL))
    perturb(KERNEL, around(optax.chain(s2sam(0.1), optax.sgd(0.1))).init(KERNEL))
    parted = optax.partition({"a": s2sam(0.1), "b": around(optax.sgd(0.1))}, {"x": "a", "y": "b"})
    two = {"x": jnp.ones(2), "y": jnp.ones(2)}
    perturb(two, parted.init(two))  # of other leaves

"""checked: a clean run passes and is the same bit by bit, whatever its optimizer leaves behind masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checking import AS_USUAL, BATCHES, SGD, loss, one_leaf, rigl, sparse_start, static, stepper
from jax.experimental import checkify

from s2sam_jax import TrainState, check_masks, checked, esam, gsam, looksam, make_train_step, msam, s2sam, sam, ssam

OPTIMIZERS = {
    "sgd": lambda: SGD,
    "s2sam": lambda: optax.chain(s2sam(0.1), SGD),
    "s2sam_adaptive": lambda: optax.chain(s2sam(0.1, adaptive=True), SGD),
    "sam": lambda: optax.chain(sam(0.1), SGD),
    "ssam": lambda: optax.chain(ssam(0.1, total_steps=9, update_every=2), SGD),
    "msam": lambda: optax.chain(msam(0.1), SGD),
    "looksam": lambda: optax.chain(looksam(0.1, every=2), SGD),
    "gsam": lambda: optax.chain(gsam(0.1), SGD),
    "esam": lambda: optax.chain(esam(0.1), SGD),
}


PERTURBING = ("s2sam", "s2sam_adaptive", "msam")


def trained(tx, perturbs=False, check=False, faults=(0.0, 0.0, 0.0, 0.0, 0.0)):
    step = stepper(checked(tx) if check else tx, perturbs)
    run = jax.jit(checkify.checkify(step) if check else lambda *x: (None, step(*x)), compiler_options=AS_USUAL)
    params, state = sparse_start(tx, one_leaf())
    for batch, fault in zip(BATCHES, faults, strict=True):
        error, (params, state) = run(params, state, batch, fault)
        if check:
            error.throw()
    return params, state


def bits(tree):
    keys = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key), tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.tree.map(raw, tree, keys))]


def raw(x, is_key):
    return jax.random.key_data(x) if is_key else x


@pytest.mark.parametrize("sparse", [static, rigl])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_clean_run_passes_and_is_the_same_bit_by_bit(optimizer, sparse):
    tx, perturbs = sparse(OPTIMIZERS[optimizer]()), optimizer in PERTURBING
    assert bits(trained(tx, perturbs, check=True)) == bits(trained(tx, perturbs))


@pytest.mark.parametrize("outer", [lambda tx: tx, optax.chain], ids=["alone", "chain"])
def test_the_state_is_that_of_the_optimizer(outer):
    tx = static(optax.chain(s2sam(), optax.adam(0.1)))
    assert bits(checked(outer(tx)).init(one_leaf())) == bits(outer(tx).init(one_leaf()))
    want, have = (jax.tree.structure(x.init(one_leaf())) for x in (outer(tx), checked(outer(tx))))
    assert want == have


@pytest.mark.parametrize(
    ("tx", "perturbs"),
    [
        (rigl(optax.adamax(0.1)), False),
        (static(optax.chain(s2sam(0.1, perturb_pruned=True), SGD), mask_grads=False), True),
        (rigl(optax.chain(s2sam(0.1), SGD), mask_grads=False), True),
    ],
    ids=["adamax", "dense_perturbation", "dense_momentum"],
)
def test_what_an_optimizer_leaves_behind_its_masks_is_no_fault(tx, perturbs):
    """Adamax leaves its epsilon there, and RigL's skipped steps clear it; ``mask_grads=False`` keeps all momentum."""
    params, state = trained(tx, perturbs, check=True)
    pruned = ~state.masks["kernel"]
    assert any((x[pruned] != 0).any() for x in jax.tree.leaves(state.inner_state) if x.shape == pruned.shape)
    check_masks(params, state)


def test_a_lone_number_may_start_at_infinity():
    """As the best loss so far does."""
    _, state = trained(static(optax.chain(SGD, optax.contrib.reduce_on_plateau())), check=True)
    assert np.isinf(optax.contrib.reduce_on_plateau().init(one_leaf()).best_value)
    assert int(state.step) == len(BATCHES)


def test_under_apply_if_finite_a_bad_gradient_or_loss_is_no_fault():
    _, state = trained(optax.apply_if_finite(static(SGD), 5), check=True, faults=(0.0, jnp.nan, 0.0, 0.0, 0.0))
    assert int(state.total_notfinite) == 1


def test_behind_a_mask_a_gradient_may_be_anything():
    tx = checked(static(SGD))
    params, state = sparse_start(tx, one_leaf())
    grads = {"kernel": jnp.where(state.masks["kernel"], params["kernel"], jnp.nan)}
    error, (updates, _) = jax.jit(checkify.checkify(tx.update))(grads, state, params)
    error.throw()
    assert np.isfinite(updates["kernel"]).all()


def train_loss(params, model_state, batch, key):
    return loss(params, batch), (model_state, {})


def test_the_train_step_freezes_as_ever_and_says_why():
    tx = checked(static(optax.chain(s2sam(0.1), SGD)))
    step = jax.jit(checkify.checkify(make_train_step(train_loss, tx)))
    start = TrainState.create(one_leaf(), tx)
    error, (state, _) = step(start, BATCHES[0])
    error.throw()
    error, (frozen, metrics) = step(state, BATCHES[1] * np.nan)
    with pytest.raises(checkify.JaxRuntimeError, match="kernel: 15 entries of the gradient are not finite"):
        error.throw()
    assert int(metrics["first_bad_step"]) == 1
    assert bits(frozen.params) == bits(state.params) != bits(start.params)


def test_without_checkify():
    tx = checked(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"checkify\.check which was not functionalized"):
        make_train_step(train_loss, tx)(TrainState.create(one_leaf(), tx), BATCHES[0])
    params = {"a{0}": jnp.array([1.0, jnp.nan])}
    with pytest.raises(checkify.JaxRuntimeError, match=r"  a\{0\}: 1 weights .*\n  loss: not finite \("):
        tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, value=jnp.array(jnp.inf))

"""What the compiler counts: operations, bytes and memory of the programs, which no machine's load can change."""

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.benchmarks.timing import memory
from s2sam_jax import Every, TrainState, make_train_step, methods, s2sam, select, sparsify

PARAMS = {f"kernel{i}": jnp.full((256, 256), 0.1) for i in range(4)}
COPY = sum(p.nbytes for p in jax.tree.leaves(PARAMS))  # the bytes of the parameters


def chain(*sharpness):
    return optax.chain(*sharpness, optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))


def sparse(inner, method=None):
    return sparsify(inner, method or methods.rigl(), sparsity=0.9, when=Every(100, 100, 10_000))


def compiled_step(tx):
    """A whole train step of a network whose activations need more than its weights."""

    def loss_fn(params, model_state, batch, key):
        x = batch
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2), (model_state, {})

    step = make_train_step(loss_fn, tx)
    state = TrainState.create(PARAMS, tx)
    return jax.jit(lambda s, b: step(s, b), donate_argnums=0).lower(state, jnp.ones((16384, 256))).compile()


def peak_where_weights_dominate(tx, **options):
    """Of the train step, in copies of the parameters, which these few examples are small beside."""

    def loss_fn(params, model_state, batch, key):
        for kernel in params.values():
            batch = jnp.tanh(batch @ kernel)
        return jnp.mean(batch**2), (model_state, {})

    step = make_train_step(loss_fn, tx, **options)
    state = TrainState.create(PARAMS, tx)
    return memory(jax.jit(step, donate_argnums=0).lower(state, jnp.ones((8, 256))).compile()).peak / COPY


def compiled_update(tx, **extra):
    """The optimizer alone."""
    update = optax.with_extra_args_support(tx).update

    def step(params, state, grads):
        updates, state = update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, tx.init(PARAMS), PARAMS).compile()


def flops(compiled):
    return compiled.cost_analysis()["flops"]


def copies(compiled):
    return compiled.cost_analysis()["bytes accessed"] / COPY


def test_s2sam_computes_no_second_gradient():
    sgd, s2 = compiled_step(chain()), compiled_step(chain(s2sam(0.05)))
    assert flops(s2) / flops(sgd) < 1.01


def test_as_one_program_s2sam_holds_one_gradient_more():
    """On a network of convolutions; in bfloat16 it is half of one."""
    params = {f"conv{index}": jnp.full((3, 3, 64, 64), 0.01) for index in range(4)}
    copy = sum(p.nbytes for p in params.values())

    def loss_fn(params, model_state, batch, key):
        for kernel in params.values():
            batch = jnp.tanh(jax.lax.conv(batch, kernel.transpose(3, 2, 0, 1), (1, 1), "SAME"))
        return jnp.mean(batch**2), (model_state, {})

    peaks = []
    for sharpness in ((), (s2sam(0.05),), (s2sam(0.05, grad_dtype=jnp.bfloat16),)):
        tx = chain(*sharpness)
        step, state = make_train_step(loss_fn, tx), TrainState.create(params, tx)
        one = jax.jit(lambda s, b, step=step: step(s, b), donate_argnums=0)
        peaks.append(memory(one.lower(state, jnp.ones((16, 64, 16, 16))).compile()).peak)
    assert 0.9 < (peaks[1] - peaks[0]) / copy < 1.05
    assert 0.4 < (peaks[2] - peaks[0]) / copy < 0.55


def test_perturbing_and_remembering_costs_few_passes():
    """The last gradient is read for its norm and for the perturbation, and written; weights are read and written."""
    most = 8 if jax.__version_info__ > (0, 10, 0) else 11  # the compiler of 0.10.0 fuses less
    assert copies(compiled_step(chain(s2sam(0.05)))) - copies(compiled_step(chain())) < most


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_sparsify_adds_little_but_its_masks_to_a_plain_update(name):
    inner = chain() if name == "sgd" else optax.adam(1e-3)
    bare, wrapped = copies(compiled_update(inner)), copies(compiled_update(sparse(inner), refresh_masks=False))
    masks = 0.25  # a byte a weight, read by each of the fused passes that need it
    assert bare < wrapped <= bare + 4 * masks


def test_masks_take_a_byte_a_weight():
    masks = sparse(chain()).init(PARAMS).masks
    assert sum(m.nbytes for m in jax.tree.leaves(masks)) * 4 == COPY


def test_selection_holds_a_few_copies_of_the_scores():
    compiled = jax.jit(lambda s: select(s, sparsity=0.9)).lower(PARAMS).compile()
    assert memory(compiled).temporary <= 2.3 * COPY  # the scores' image, and the places of ties


@pytest.mark.parametrize(("method", "most"), [("gmp", 3.0), ("rigl", 4.6), ("set", 7.0)])
def test_a_mask_update_inside_a_step_holds_a_few_copies_of_the_weights(method, most):
    tx = sparse(chain(s2sam(0.05)), getattr(methods, method)())
    state = 3.25  # parameters, last gradient, momentum and masks
    assert peak_where_weights_dominate(tx) <= state + most


@pytest.mark.parametrize("inner", [chain(s2sam(0.05)), optax.chain(s2sam(0.05), optax.adam(1e-3))], ids=["sgd", "adam"])
def test_a_step_that_cannot_freeze_keeps_no_state_before_it(inner):
    frozen, free = (peak_where_weights_dominate(inner, freeze=freeze) for freeze in (True, False))
    assert free < frozen - 1.4
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(inner.init(PARAMS))) / COPY
    assert free < 1 + kept + 1.1


def test_a_mask_update_is_no_second_gradient():
    tx = sparse(chain(s2sam(0.05)))
    step = compiled_step(tx)
    assert flops(step) / flops(compiled_step(chain())) < 1.1

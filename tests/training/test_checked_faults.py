"""checked: every seeded fault is found and named with its leaf."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checking import BATCHES, SGD, Case, at, loss, one_leaf, sparse_start, static, three_leaves
from jax.experimental import checkify

from experiments.training.checkpoint import Checkpoints
from s2sam_jax import TrainState, apply_masks, check_masks, checked, get_masks, perturb, s2sam, set_masks


def bits(tree):
    keys = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key), tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.tree.map(raw, tree, keys))]


def raw(x, is_key):
    return jax.random.key_data(x) if is_key else x


def flipped(mask):
    """One dead weight is declared alive."""
    index = np.argwhere(~np.asarray(mask))[0]
    return mask.at[tuple(index)].set(True)


def swapped(masks):
    return {"a": masks["a"] | {"kernel": masks["b"]["kernel"]}, "b": {"kernel": masks["a"]["kernel"]}}


def swapped_unequal(params, state, grads):
    """Of b three quarters were alive, of a one half."""
    state = set_masks(state, static(SGD, overrides={"b/kernel": 0.25}).init(params).masks)
    return apply_masks(params, state), state._replace(masks=swapped(state.masks)), grads


# name: (what is changed of (params, state, grads), text)
FAULTS = {
    "dense_params": (
        lambda p, s, g: (three_leaves(), s, g),
        r"^checked found before the update:\n"
        r"  a/kernel: 18 pruned weights are not zero; call apply_masks\(params, opt_state\) after init or a restore\n"
        r"  b/kernel: 18 pruned weights are not zero; call apply_masks\(params, opt_state\) after init or a restore \(",
    ),
    "masks_swapped": (
        lambda p, s, g: (p, s._replace(masks=swapped(s.masks)), g),
        r"update:\n  a/kernel: 7 pruned weights are not zero.*\n  b/kernel: 7 pruned weights are not zero",
    ),
    "masks_swapped_unequal": (
        swapped_unequal,
        r"update:\n  a/kernel: the mask has 27 ones, 18 at the last mask update; only set_masks.* may change it\n"
        r"(.*\n)+?  b/kernel: the mask has 18 ones, 27 at",
    ),
    "bit_flipped": (
        lambda p, s, g: (p, s._replace(masks=at(s.masks, "b/kernel", flipped)), g),
        r"update:\n  b/kernel: the mask has 19 ones, 18 at the last mask update; only set_masks.* change it \(",
    ),
    "momentum": (
        lambda p, s, g: (p, at(s, "trace/b/kernel", lambda v: v + 1), g),
        r"^checked found state that no update leaves:\n"
        r"  opt_state/inner_state/1/0/trace/b/kernel: 18 entries of pruned weights were not zero; restore the whole",
    ),
    "last_gradient": (
        lambda p, s, g: (p, at(s, "last_grad/b/kernel", lambda v: v + 1), g),
        r"update:\n  b/kernel: the last gradient of s2sam\(\) is not zero at 18 pruned weights; set_masks\(",
    ),
    "nan_gradient": (
        lambda p, s, g: (p, s, at(g, "a/bias", lambda v: v.at[2].set(jnp.nan))),
        r"update:\n  a/bias: 1 entries of the gradient are not finite \(",
    ),
    "infinite_weight": (
        lambda p, s, g: (at(p, "a/bias", lambda v: v.at[2].set(jnp.inf)), s, g),
        r"update:\n  a/bias: 1 weights are not finite \(",
    ),
    "nan_momentum": (
        lambda p, s, g: (p, at(s, "trace/a/bias", lambda v: v * jnp.nan), g),
        r"update:\n  opt_state/inner_state/1/0/trace/a/bias: 6 entries are not finite \(",
    ),
    "perturbation": (
        lambda p, s, g: (p, at(s, "last_grad/a/bias", lambda v: v + 1e30), g),
        r"^checked found a perturbation of another length than rho says:\n"
        r"  S2SAMState of a/bias, a/kernel, b/kernel: its perturbation has norm 0\.0, not 0\.1",
    ),
    "rho": (
        lambda p, s, g: (p, at(s, "rho", lambda v: -v), g), r"its perturbation has norm 0\.(1|09)\d*, not -0\.1\d*; rho"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    tx = static(optax.chain(s2sam(0.1), SGD))
    gradient = jax.jit(jax.grad(loss))

    def update(params, state, grads):
        return checked(tx).update(grads, state, params, grad_fn=lambda params: jax.grad(loss)(params, BATCHES[1]))

    update = jax.jit(checkify.checkify(update))
    params, state = sparse_start(tx, three_leaves())
    error, (updates, state) = update(params, state, gradient(params, BATCHES[1]))
    error.throw()
    return Case(optax.apply_updates(params, updates), state, gradient, update)


@pytest.mark.parametrize(("seed", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_found_and_named(case, seed, text):
    grads = case.gradient(perturb(case.params, case.state), BATCHES[1])
    case.update(case.params, case.state, grads)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match=text):
        case.update(*seed(case.params, case.state, grads))[0].throw()


@pytest.mark.parametrize("batch", [0, 1], ids=["another_batch", "not_perturbed"])
def test_a_gradient_taken_elsewhere_is_found(case, batch):
    """At the clean parameters, where ``perturb`` was forgotten, or of another batch than ``grad_fn``."""
    point = case.params if batch == 1 else perturb(case.params, case.state)
    error, _ = case.update(case.params, case.state, case.gradient(point, BATCHES[batch]))
    text = (
        r"^checked found a gradient that was not taken at perturb\(params, opt_state\), or a grad_fn of another batch:"
        r"\n(  .*\n)*  b/kernel: differs by \d\.\d+, where rounding explains 0\.000\d+; take the gradient at perturb\("
    )
    with pytest.raises(checkify.JaxRuntimeError, match=text):
        error.throw()


def test_an_update_that_breaks_its_promises_is_found():
    """What stands outside of ``sparsify``, where its state does not tell, brings back pruned weights, or overflows."""
    for spoil, text in (
        (lambda u: u + 1, "after the update:\n  kernel: 15 pruned weights are not zero; an update has brought them"),
        (lambda u: u.at[0, 0].set(jnp.inf), "kernel: 1 entries of the update are not finite"),
        (lambda u: u * 1e30, r"after the update:\n  update: its norm is not finite \("),
    ):
        outside = optax.masked(optax.stateless(lambda u, _, spoil=spoil: jax.tree.map(spoil, u)), True)
        tx = checked(optax.chain(static(SGD), outside))
        params, state = sparse_start(tx, one_leaf())
        error, _ = jax.jit(checkify.checkify(tx.update))(params, state, params)
        with pytest.raises(checkify.JaxRuntimeError, match=text):
            error.throw()


def untyped(state):
    """What a checkpoint restored without a target looks like."""
    return {k: untyped(v) for k, v in state._asdict().items()} if hasattr(state, "_asdict") else state


def without_b(params):
    return {"a": params["a"]}


def shorter(x):
    return jax.ShapeDtypeStruct((5, 6), x.dtype)


# name: (what is changed of (grads, state, params), text)
TREES = {
    "no_params": (lambda g, s, p: (g, s, None), r"checked needs params: call tx\.update\(grads, state, params\)"),
    "grads": (lambda g, s, p: (without_b(g), s, p), r"b/kernel: missing in grads"),
    "grads_shape": (
        lambda g, s, p: (at(g, "b/kernel", shorter), s, p), r"b/kernel: shape \(5, 6\) in grads, \(6, 6\) in params"
    ),
    "state_of_another_tree": (
        lambda g, s, p: (g, jax.eval_shape(static(SGD).init, without_b(p)), p),
        r"inner_state/0/trace/b/kernel: missing in opt_state",
    ),
    "state_of_another_shape": (
        lambda g, s, p: (g, at(s, "trace/b/kernel", shorter), p),
        r"inner_state/0/trace/b/kernel: shape \(5, 6\) in opt_state, \(6, 6\) in tx\.init\(params\)",
    ),
    "state_of_another_optimizer": (
        lambda g, s, p: (g, jax.eval_shape(static(optax.adam(0.1)).init, p), p),
        r"inner_state/0/mu/b/kernel: not in tx\.init\(params\)",
    ),
    "untyped": (lambda g, s, p: (g, untyped(s), p), r"(?s)opt_state is not a state of this tx.*expected.*got"),
}  # fmt: skip


@pytest.mark.parametrize(("seed", "text"), TREES.values(), ids=TREES.keys())
def test_trees_that_do_not_fit_are_refused_while_tracing(seed, text):
    tx = checked(static(SGD))
    params = jax.eval_shape(three_leaves)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(checkify.checkify(tx.update), *seed(params, jax.eval_shape(tx.init, params), params))


def test_check_masks_looks_at_the_perturbation_and_not_at_momentum(case):
    stray = at(case.state, "trace/b/kernel", lambda v: v + 1)
    check_masks(case.params, stray)
    stray = at(case.state, "last_grad/b/kernel", lambda v: v + 1)
    with pytest.raises(ValueError, match=r"found:\n  b/kernel: the last gradient of s2sam\(\) is not zero at 18"):
        check_masks(case.params, stray)
    check_masks(case.params, set_masks(stray, get_masks(stray)))
    dense = static(optax.chain(s2sam(0.1, perturb_pruned=True), SGD)).init(case.params)
    check_masks(case.params, at(dense._replace(masks=case.state.masks), "last_grad/tree/b/kernel", lambda v: v + 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_a_truncated_checkpoint_is_named_and_the_one_before_it_passes(case, tmp_path):
    """Orbax leaves coroutines behind where reading fails."""
    tx = static(optax.chain(s2sam(0.1), SGD))
    states = [TrainState.create(three_leaves(), tx), TrainState.create(case.params, tx)._replace(opt_state=case.state)]
    with Checkpoints(tmp_path / "checkpoints") as kept:
        for epoch, state in enumerate(states):
            kept.save(epoch, state, {"epoch": epoch}, None)
    (largest,) = sorted((tmp_path / "checkpoints" / "1" / "state").rglob("*"), key=lambda p: p.stat().st_size)[-1:]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    like = jax.eval_shape(lambda: TrainState.create(three_leaves(), tx))
    with Checkpoints(tmp_path / "checkpoints") as kept:
        with pytest.raises(ValueError, match=rf"The checkpoint {tmp_path}/checkpoints/1 is damaged"):
            kept.restore(1, like)
        gc.collect()
        state, _ = kept.restore(0, like)
    assert bits(state) == bits(states[0])
    case.update(state.params, state.opt_state, case.gradient(state.params, BATCHES[1]))[0].throw()

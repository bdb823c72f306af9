"""checked: a clean run passes and is the same bit by bit; every seeded fault is found and named with its leaf."""

import contextlib
import gc
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from experiments import train
from experiments.training import loop
from experiments.training.checkpoint import Checkpoints
from s2sam_jax import (
    Every,
    SparseState,
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
    sam,
    set_masks,
    sparsify,
    ssam,
)
from s2sam_jax._base.tree import find_states

# Without its fusion emitters XLA fuses multiplying and adding as it happens.
AS_USUAL = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
BATCHES = np.random.default_rng(0).normal(size=(5, 7, 6)).astype(np.float32)
SGD = optax.sgd(0.1, momentum=0.9)

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


def static(inner, **options):
    return sparsify(inner, methods.static(), **{"sparsity": 0.5, **options})


def rigl(inner, **options):
    return sparsify(inner, methods.rigl(0.5), sparsity=0.5, when=Every(1, 2, 10), **options)


def one_leaf():
    return {"kernel": jax.random.normal(jax.random.key(1), (6, 5))}


def three_leaves():
    keys = jax.random.split(jax.random.key(2), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (6, 6)), "bias": jnp.zeros(6)},
        "b": {"kernel": jax.random.normal(keys[1], (6, 6))},
    }


def loss(params, batch):
    if "kernel" in params:
        return jnp.mean(jnp.square(batch @ params["kernel"] - 1))
    hidden = jnp.tanh(batch @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["b"]["kernel"] - 1))


def sparse_start(tx, params):
    state = tx.init(params)
    return apply_masks(params, state), state


def start(tx):
    params = one_leaf()
    return sparse_start(tx, params) if find_states(tx.init(params), SparseState) else (params, tx.init(params))


def stepper(tx, perturbs):
    def step(params, state, batch, fault):
        def grad_fn(params):
            return jax.tree.map(lambda g: g + fault, jax.grad(loss)(params, batch))

        grads = grad_fn(perturb(params, state) if perturbs else params)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, grad_fn=grad_fn, value=fault)
        return optax.apply_updates(params, updates), state

    return step


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


# What is no fault


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


IN_FRONT = {
    "decay": optax.add_decayed_weights(0.01),
    "clip": optax.clip(1e-3),
    "centralize": optax.centralize(),
    "clip_by_global_norm": optax.clip_by_global_norm(1e-3),
    "scale": optax.scale(0.3),
}


def at_every_call(inner):
    """As a method that looks at every gradient."""
    return sparsify(inner, methods.rigl(0.5, skip_step=False), sparsity=0.5, when=Every(0, 1, 10))


@pytest.mark.parametrize(
    "sparse", [static, rigl, at_every_call, lambda tx: tx], ids=["static", "rigl", "at_every_call", "dense"]
)
@pytest.mark.parametrize("name", IN_FRONT)
def test_what_turns_the_gradient_in_front_of_s2sam_is_found(name, sparse):
    """What only stretches it is not, as S2-SAM takes its direction."""
    tx = sparse(optax.chain(IN_FRONT[name], s2sam(0.1), SGD))
    step = jax.jit(checkify.checkify(stepper(checked(tx), perturbs=True)))
    error, _ = step(*start(tx), BATCHES[0], 0.0)
    found = "checked found an s2sam that does not come first:\n  kernel: s2sam has remembered a direction that differs"
    turned = pytest.raises(checkify.JaxRuntimeError, match=found)
    with contextlib.nullcontext() if name in ("clip_by_global_norm", "scale") else turned:
        error.throw()


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(s2sam(0.1), optax.add_decayed_weights(0.1), optax.clip(0.01), SGD),
        rigl(optax.chain(s2sam(0.1, grad_dtype=jnp.bfloat16), SGD)),
        static(optax.chain(s2sam(0.1, perturb_pruned=True), SGD), mask_grads=False),
        optax.MultiSteps(static(optax.chain(s2sam(0.1), SGD)), 2).gradient_transformation(),
        optax.apply_if_finite(rigl(optax.chain(s2sam(0.1), SGD)), 2),
        optax.multi_transform({"on": optax.chain(s2sam(0.1), SGD), "off": SGD}, {"kernel": "on"}),
    ],
    ids=["behind", "bfloat16", "dense_memory", "MultiSteps", "apply_if_finite", "multi_transform"],
)
def test_an_s2sam_that_comes_first_is_no_fault(tx):
    run = jax.jit(checkify.checkify(stepper(checked(tx), perturbs=True)))
    held = start(tx)
    for batch in BATCHES:
        error, held = run(*held, batch, 0.0)
        error.throw()


def test_in_other_wrappers_and_transformations():
    """In a ``lax.cond``, a ``scan`` and a ``vmap``, clean and with a fault."""
    tx = optax.MultiSteps(checked(static(SGD)), 2).gradient_transformation()
    start = sparse_start(tx, one_leaf())

    def scanned(fault):
        return jax.lax.scan(lambda carry, batch: (stepper(tx, False)(*carry, batch, fault), None), start, BATCHES[:2])

    run = jax.jit(checkify.checkify(jax.vmap(scanned)))
    run(jnp.array([0.0, 0.0]))[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="kernel: 15 entries of the gradient are not finite"):
        run(jnp.array([0.0, jnp.nan]))[0].throw()


# Seeded faults


def at(tree, path, change):
    """The tree with one leaf changed."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: change(x) if jax.tree_util.keystr(keys, simple=True, separator="/").endswith(path) else x, tree
    )


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


class Case(NamedTuple):
    """A state in mid-training, and a program that checks an update from there."""

    params: Any
    state: Any
    gradient: Any
    update: Any


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
    """What stands outside of ``sparsify`` brings back pruned weights, or overflows."""
    for spoil, text in (
        (lambda u: u + 1, "after the update:\n  kernel: 15 pruned weights are not zero; an update has brought them"),
        (lambda u: u.at[0, 0].set(jnp.inf), "kernel: 1 entries of the update are not finite"),
        (lambda u: u * 1e30, r"after the update:\n  update: its norm is not finite \("),
    ):
        tx = checked(optax.chain(static(SGD), optax.stateless(lambda u, _, spoil=spoil: jax.tree.map(spoil, u))))
        params, state = sparse_start(tx, one_leaf())
        error, _ = jax.jit(checkify.checkify(tx.update))(params, state, params)
        with pytest.raises(checkify.JaxRuntimeError, match=text):
            error.throw()


# How it is used


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


def test_the_command_line_ends_with_a_line_that_names_the_fault(toy, tmp_path, monkeypatch):
    short = ["--subset", "64", "--epochs", "1", "--out", str(tmp_path), "--method", "static", "--debug"]
    fresh = loop.initial_state

    def dense(*arguments):
        state = fresh(*arguments)
        return state._replace(params=at(state.params, "head/kernel", lambda w: w + 1))

    monkeypatch.setattr(loop, "initial_state", dense)
    with pytest.raises(SystemExit) as stopped:
        train.main(short)
    line = r"error: checked found before the update: head/kernel: \d+ pruned weights are not zero; call apply_masks.*"
    assert re.fullmatch(line, str(stopped.value))
    with pytest.raises(SystemExit, match="--debug checks one run at a time; leave out --vmap"):
        train.main([*short, "--vmap", "--seeds", "0", "1"])


# The same on the host, and from disk


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

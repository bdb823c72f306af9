"""sparsify around every optimizer, inside every wrapper, over every kind of tree."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    INPUTS,
    KERNELS,
    OUTER,
    RHO,
    STEPS,
    BatchNormNet,
    Net,
    assert_trees_close,
    find,
    labels,
    loss_fn,
    make_params,
    named,
    norm,
    on_host,
    planned,
    rigl,
    run,
    s2sgd,
    squared,
)
from flax import nnx

from s2sam_jax import (
    Every,
    SparseState,
    SSAMState,
    apply_masks,
    check_masks,
    get_masks,
    methods,
    perturb,
    s2sam,
    sam,
    sparsify,
    ssam,
)

# The optimizer, and how many of its state leaves mirror a kernel of make_params().
INNERS = {
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9), 3),
    "adam": (lambda: optax.adam(0.05), 6),
    "adamw": (lambda: optax.adamw(0.05, weight_decay=0.1), 6),
    "lion": (lambda: optax.lion(0.01, weight_decay=0.1), 3),
    "muon": (lambda: optax.contrib.muon(0.05, weight_decay=0.1), 3),
    "adafactor": (lambda: optax.adafactor(0.05, momentum=0.9, weight_decay_rate=1e-3), 6),
    "schedule_free": (lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1), 3),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), 3),
    "multi_transform": (
        lambda: optax.multi_transform({"left": optax.adam(0.05), "right": optax.sgd(0.1, momentum=0.9)}, labels), 4,
    ),
    "masked": (lambda: optax.masked(optax.adam(0.05), lambda p: jax.tree.map(lambda x: x == "left", labels(p))), 2),
}  # fmt: skip


ADAFACTOR_EPS = 1e-30  # what it adds to every square; the rule takes it away before the next update


def mirrors(tree: Any, masks: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Floating state leaves that mirror a kernel, with its name: the longest parameter path that ends theirs."""
    found = []
    for path, leaf in named(tree).items():
        owners = [name for name in masks if path == name or path.endswith("/" + name)]
        owner = max(owners, key=len, default=None)
        if owner is not None and np.issubdtype(leaf.dtype, np.floating) and leaf.shape == masks[owner].shape:
            found.append((owner, leaf))
    return found


def assert_sparse(history, params, expected_mirrors=None, kernel_names=KERNELS, moves=True):
    """Exact zeros, planned counts, the state rule, and nothing but zero for what has just grown."""
    counts, changed, old = planned(params), 0, None
    for step in history:
        state = find(step.opt_state, SparseState)
        masks, weights, points = named(state.masks), named(step.params), named(step.point)
        assert {name: m.sum() for name, m in masks.items()} == counts
        assert dict(zip(masks, state.nnz.tolist(), strict=True)) == counts
        for name, mask in masks.items():
            assert (weights[name][~mask] == 0.0).all(), name
            assert old is None or (points[name][~old[name]] == 0.0).all(), name
        for name, leaf in (mirrored := mirrors(state.inner_state, masks)):
            assert (leaf[~masks[name]] <= ADAFACTOR_EPS).all(), name
            if old is not None:
                assert (leaf[masks[name] & ~old[name]] <= ADAFACTOR_EPS).all(), name
        after = named(perturb(step.params, step.opt_state))
        assert all((after[name][~mask] == 0.0).all() for name, mask in masks.items())
        changed += old is not None and sum(int((masks[name] & ~old[name]).sum()) for name in masks)
        old = masks
    assert changed > 0 or not moves, "the masks never moved"
    if expected_mirrors is not None:
        assert sum(name in kernel_names for name, _ in mirrored) == expected_mirrors


@pytest.mark.parametrize(("inner", "count"), INNERS.values(), ids=INNERS.keys())
def test_rigl_around_optimizer(inner, count):
    params = make_params()
    history = run(rigl(optax.chain(s2sam(RHO), inner())), params)
    assert_sparse(history, make_params(), count + len(KERNELS))
    alive = [
        any((leaf != 0).any() for _, leaf in mirrors(s.opt_state.inner_state, named(s.opt_state.masks)))
        for s in history
    ]
    assert alive[-1]


def noisy_momentum():
    """Momentum that fills up behind the masks, and how much of that the next update sees."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda p: p == p, params), jnp.zeros(())

    def update(updates, state, params=None, *, masks, **_):
        momentum, old, _ = state
        stray = jax.tree.map(lambda v, m, o: jnp.abs(jnp.where(m & o, 0.0, v)).sum(), momentum, masks, old)
        momentum = jax.tree.map(lambda v, u: 0.9 * v + u + 1.0, momentum, updates)
        return momentum, (momentum, masks, sum(jax.tree.leaves(stray)))

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("skip_step", [True, False])
def test_no_optimizer_sees_state_off_its_mask_or_on_a_weight_just_grown(skip_step):
    method = methods.rigl(0.5, skip_step=skip_step)
    tx = sparsify(noisy_momentum(), method, sparsity=0.7, when=Every(0, 2, 100))
    params = make_params()
    state, update = tx.init(params), jax.jit(tx.update)
    params, changed = apply_masks(params, state), 0
    for key in jax.random.split(jax.random.key(0), 8):
        grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
        before = named(state.masks)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        changed += sum(int((m & ~before[name]).sum()) for name, m in named(state.masks).items())
        momentum, _, stray = state.inner_state
        assert float(stray) == 0.0
    assert changed > 0
    assert any((leaf[~named(state.masks)[name]] != 0).any() for name, leaf in named(momentum).items()), "no noise"


def test_schedule_free_evaluates_at_sparse_weights():
    tx = rigl(optax.chain(s2sam(RHO), optax.contrib.schedule_free(optax.sgd(0.1), 0.1)))
    for step in run(tx, make_params()):
        inner = find(step.opt_state, optax.contrib.ScheduleFreeState)
        average = named(optax.contrib.schedule_free_eval_params(inner, step.params))
        assert all((average[name][~mask] == 0.0).all() for name, mask in named(get_masks(step.opt_state)).items())


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER.keys())
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_rigl_inside_wrapper(outer, inner):
    tx = outer(rigl(optax.chain(s2sam(RHO), INNERS[inner][0]())))
    assert_sparse(run(tx, make_params()), make_params(), INNERS[inner][1] + len(KERNELS))


def test_nan_step_under_apply_if_finite_flips_no_mask():
    history = run(optax.apply_if_finite(rigl(s2sgd()), 5), make_params(), bad=(2, 3))
    for index in (2, 3):
        assert_trees_close(get_masks(history[index].opt_state), get_masks(history[1].opt_state), 0, 0)
        assert_trees_close(history[index].params, history[1].params, 0, 0)
    assert_sparse(history, make_params())
    assert int(find(history[3].opt_state, SparseState).step) == 2


def linen_params():
    return Net().init(jax.random.key(0), INPUTS)["params"]


def nnx_params():
    return nnx.state(BatchNormNet(nnx.Rngs(0)), nnx.Param)


def eqx_params():
    return eqx.filter(eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0)), eqx.is_inexact_array)


TREES = {
    "linen": linen_params,
    "nnx_state": nnx_params,
    "nnx_pure_dict": lambda: nnx.to_pure_dict(nnx_params()),
    "equinox": eqx_params,
    "list": lambda: [jnp.ones((4, 4)), (jnp.ones((4, 4)), jnp.ones(3)), {"0": jnp.ones((4, 4))}],
    "dict": make_params,
    "one_array": lambda: jnp.ones((5, 5)),
}


class Attention(NamedTuple):
    query: Any
    value: jax.Array


@pytest.mark.parametrize(
    ("query", "names"),
    [(jnp.ones(4), ["scale/query"]), ({"a": jnp.ones(4)}, ["scale/query/a"]), (optax.MaskedNode(), []), (None, [])],
    ids=["array", "tree", "hidden", "none"],
)
def test_a_field_called_value_keeps_its_name(query, names):
    """Flax's variables have such a field, too, and it alone, which is left out of names."""
    params = {"scale": Attention(query, jnp.ones((4, 4))), "boxed": nnx.Param(jnp.ones((4, 4)))}
    seen = []
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, prunable=lambda name, _: seen.append(name) or True)
    masks = tx.init(params).masks
    assert sorted(set(seen)) == ["boxed", *names, "scale/value"]
    assert int(masks["scale"].value.sum()) == 8


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_rigl_over_parameter_tree(tree):
    tx = rigl(optax.chain(s2sam(RHO), optax.adam(0.05)))
    kernels = [name for name, p in named(tree()).items() if p.ndim >= 2]
    history = run(tx, tree())
    if tuple(kernels) != ("",):
        assert_sparse(history, tree(), 3 * len(kernels), kernels, moves=False)  # tiny leaves may regrow what they drop
    for step in history:
        check_masks(step.params, step.opt_state)
        for mask, weights in zip(jax.tree.leaves(get_masks(step.opt_state)), jax.tree.leaves(step.params), strict=True):
            assert (weights[~mask] == 0.0).all()
    assert jax.tree.structure(history[-1].params) == jax.tree.structure(tree())


SHARP = {
    "sam": lambda: sam(RHO),
    "asam": lambda: sam(RHO, adaptive=True),
    "ssam_dynamic": lambda: ssam(RHO, mask="dynamic", update_every=2, total_steps=10),
    "ssam_fisher": lambda: ssam(RHO, mask="fisher", update_every=2),
    "ssam_dynamic_authors": lambda: ssam(RHO, mask="dynamic", update_every=2, total_steps=10, compat="authors"),
    "ssam_fisher_authors": lambda: ssam(RHO, mask="fisher", update_every=2, compat="authors"),
}


@pytest.mark.parametrize("name", SHARP)
def test_sam_and_ssam_inside_rigl(name):
    """The second gradient is taken at a sparse point, on every step, and the extra state is live too."""
    tx = rigl(optax.chain(SHARP[name](), optax.sgd(0.1, momentum=0.9)), when=Every(1, 2, 100))
    params = make_params()
    opt_state = tx.init(params)
    params = apply_masks(params, opt_state)
    traces, moved, old = [], [], on_host(get_masks(opt_state))
    live = sum(planned(params).values())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        traces.append(1)
        points = []

        def grad_fn(point):
            points.append(point)
            return jax.grad(loss_fn)(point)

        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn, fisher_fn=lambda p: squared(jax.grad(loss_fn)(p))
        )
        return optax.apply_updates(params, updates), opt_state, points[1]

    for index in range(STEPS):
        before = named(params)
        params, opt_state, point = step(params, opt_state)
        masks, point = named(get_masks(opt_state)), named(point)
        check_masks(params, opt_state)
        for owner, leaf in mirrors(opt_state.inner_state, masks):
            assert (leaf[~masks[owner]] == 0.0).all(), owner
        assert all((point[name][~mask] == 0.0).all() for name, mask in masks.items())
        moved.append(norm(point[name] - np.where(mask, before[name], 0) for name, mask in masks.items()))
        assert (masks["kernel"] != named(old)["kernel"]).any() == (index % 2 == 1)
        assert not np.array_equal(before["kernel"], named(params)["kernel"])
        old = on_host(get_masks(opt_state))
        if "ssam" in name:
            state = find(opt_state, SSAMState)
            assert int(state.step) == (index + 2) // 2  # mask updates are skipped
            assert sum(int(m.sum()) for m in jax.tree.leaves(state.perturb_masks)) <= live // 2
    assert len(traces) == 1
    if name == "sam":
        np.testing.assert_allclose(moved, RHO, 1e-3)
    assert max(moved) > RHO / 10
    assert name == "asam" or max(moved) < RHO * 1.001

"""The library inside other people's loops, wrappers, optimizers and parameter trees."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

from s2sam_jax import (
    Every,
    SparseState,
    SSAMState,
    TrainState,
    apply_masks,
    check_masks,
    empirical_fisher,
    erdos_renyi_kernel,
    eval_params,
    get_masks,
    make_train_step,
    methods,
    perturb,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    sparsify,
    ssam,
    update_masks,
)

RHO, SPARSITY, STEPS = 0.1, 0.6, 6


# ---- parameters, a loss, and trees as {"path": array} -------------------------------------------------------------


def make_params() -> Any:
    """Modules of one name at three depths and with one shape, so that a confusion of paths would show."""
    shapes = {
        "a": {"kernel": (6, 6), "bias": (6,)},
        "b": {"a": {"kernel": (6, 6)}},
        "kernel": (6, 6),
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return treedef.unflatten([jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)])


KERNELS = ("a/kernel", "b/a/kernel", "kernel")


def loss_fn(params: Any) -> jax.Array:
    """Smooth and convex, with another target for every weight."""
    leaves = jax.tree.leaves(params)
    targets = [2 + jnp.cos(jnp.arange(w.size) + 5.0 * index).reshape(w.shape) for index, w in enumerate(leaves)]
    return sum(jnp.sum(jnp.log(jnp.cosh(w - t))) for w, t in zip(leaves, targets, strict=True))


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
    return {name: fetch(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}


def fetch(leaf: Any) -> np.ndarray:
    """A copy on the host: a view would hold on to the buffer and prevent its donation."""
    return np.array(jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf)


def on_host(tree: Any) -> Any:
    return jax.tree.map(fetch, tree)


def find(tree: Any, kind: type) -> Any:
    """The one state of a type inside an optimizer state."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    (state,) = (leaf for leaf in leaves if isinstance(leaf, kind))
    return state


def norm(leaves: Any) -> float:
    return math.sqrt(sum(float(np.square(np.float64(x)).sum()) for x in leaves))


def assert_trees_close(a: Any, b: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    a, b = named(a), named(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(np.float64(a[name]), np.float64(b[name]), rtol, atol, err_msg=name)


class Step(NamedTuple):
    clean: Any
    point: Any
    grads: Any
    params: Any
    opt_state: Any


def run(tx, params, *, loss=loss_fn, steps=STEPS, bad=(), **extras) -> list[Step]:
    """A jitted, donating S2-SAM loop: one trace, one gradient a step. ``bad`` steps get NaN gradients."""
    tx = optax.with_extra_args_support(tx)
    traces, evaluations, history = [], [], []

    def counted(params):
        jax.debug.callback(lambda: evaluations.append(1))
        return loss(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, fault):
        traces.append(1)
        point = perturb(params, opt_state)
        value, grads = jax.value_and_grad(counted)(point)
        grads = jax.tree.map(lambda g: g + fault, grads)
        updates, opt_state = tx.update(grads, opt_state, params, value=value, **extras)
        return point, grads, optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)  # not jitted: an alias between params and state would break donation
    if any(
        isinstance(x, SparseState) for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparseState))
    ):
        params = apply_masks(params, opt_state)
    for index in range(steps):
        clean, donated = on_host(params), (params, opt_state)
        point, grads, params, opt_state = step(params, opt_state, jnp.nan if index in bad else 0.0)
        assert all(x.is_deleted() for x in jax.tree.leaves(donated) if x.size > 1)
        history.append(Step(clean, *on_host((point, grads, params, opt_state))))
    jax.effects_barrier()
    assert len(traces) == 1, "compiled again"
    assert len(evaluations) == steps, "not one gradient a step"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    return history


# ---- a. s2sam and perturb under every host ------------------------------------------------------------------------


def falling(step):
    return 0.2 - 0.02 * step


def labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "left" if path[0].key == "a" else "right", params)


def s2sgd(rho=RHO):
    return optax.chain(s2sam(rho), optax.sgd(0.1, momentum=0.9))


def previous(history, index):
    """The gradient behind the perturbation of a step: that of the step before."""
    return None if index == 0 else history[index - 1].grads


def previous_pair(history, index):
    if index < 2:
        return None
    last = index // 2 * 2
    return jax.tree.map(lambda a, b: (a + b) / 2, history[last - 2].grads, history[last - 1].grads)


def previous_masked(history, index):
    if index == 0:
        return None
    last = history[index - 1]
    return jax.tree.map(lambda m, g: np.where(m, g, 0), get_masks(last.opt_state), last.grads)


class Host(NamedTuple):
    """A way to build the optimizer, with the radius of each group of leaves (by prefix) at each step."""

    build: Callable[[], Any]
    radii: dict[str, Callable[[int], float]] = {"": lambda step: RHO}  # noqa: RUF012
    remembered: Callable[[list[Step], int], Any] = previous


HOSTS = {
    "chain_sgd": Host(s2sgd),
    "clip_adamw": Host(lambda: optax.chain(s2sam(RHO), optax.clip_by_global_norm(0.5), optax.adamw(0.01))),
    "multi_steps": Host(lambda: optax.MultiSteps(s2sgd(), 2).gradient_transformation(), remembered=previous_pair),
    "apply_if_finite": Host(lambda: optax.apply_if_finite(s2sgd(), 3)),
    "masked": Host(
        lambda: optax.chain(
            optax.masked(s2sam(RHO), lambda p: jax.tree.map(lambda x: x == "left", labels(p))), optax.sgd(0.1)
        ),
        {"a/": lambda step: RHO},
    ),
    "multi_transform": Host(
        lambda: optax.multi_transform({"left": s2sgd(0.1), "right": s2sgd(0.3)}, labels),
        {"a/": lambda step: 0.1, ("b/", "kernel"): lambda step: 0.3},
    ),
    # inject_hyperparams evaluates its schedules when an update begins, so the radius is one step behind.
    "inject_hyperparams": Host(
        lambda: optax.inject_hyperparams(s2sgd)(rho=falling), {"": lambda step: falling(max(step - 1, 0))}
    ),
    "rho_schedule": Host(lambda: s2sgd(falling), {"": falling}),
    "schedule_free": Host(lambda: optax.contrib.schedule_free(optax.chain(s2sam(RHO), optax.sgd(0.1)), 0.1)),
    "reduce_on_plateau": Host(lambda: optax.chain(s2sgd(), optax.contrib.reduce_on_plateau(patience=1))),
    "muon": Host(lambda: optax.chain(s2sam(RHO), optax.contrib.muon(0.01))),
    "named_chain": Host(lambda: optax.named_chain(("s2sam", s2sam(RHO)), ("sgd", optax.sgd(0.1)))),
    "sparsify": Host(lambda: sparsify(s2sgd(), methods.static(), sparsity=SPARSITY), remembered=previous_masked),
    "lion": Host(lambda: optax.chain(s2sam(RHO), optax.lion(0.01))),
    "adafactor": Host(lambda: optax.chain(s2sam(RHO), optax.adafactor(0.01, min_dim_size_to_factor=4))),
    "nested_chain": Host(lambda: optax.chain(optax.chain(s2sgd()), optax.scale(0.5))),
}


def assert_perturbed(history, index, radii, remembered=previous):
    """The perturbation of a step has the right radius and direction, group by group."""
    step = history[index]
    clean, point, grads = named(step.clean), named(step.point), remembered(history, index)
    moved = {name: np.float64(point[name]) - clean[name] for name in clean}
    if grads is None:
        assert all((d == 0).all() for d in moved.values()), "the first step must not be perturbed"
        return
    grads, rest = named(grads), dict(moved)
    for prefix, radius in radii.items():
        group = [name for name in moved if name.startswith(prefix)]
        length = norm(grads[name] for name in group)
        np.testing.assert_allclose(norm(moved[name] for name in group), radius(index), 1e-4)
        for name in group:
            np.testing.assert_allclose(moved[name], radius(index) * grads[name] / length, 1e-3, 2e-6, err_msg=name)
            del rest[name]
    assert all((d == 0).all() for d in rest.values()), "leaves without s2sam must not move"


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
def test_s2sam_under_host(host):
    history = run(host.build(), make_params())
    for index in range(STEPS):
        assert_perturbed(history, index, host.radii, host.remembered)


def test_apply_if_finite_keeps_the_last_good_gradient():
    history = run(optax.apply_if_finite(s2sgd(), 5), make_params(), bad=(2,))
    assert_trees_close(history[2].params, history[2].clean, 0, 0)
    assert_perturbed(history, 3, {"": lambda step: RHO}, lambda h, i: h[1].grads)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(jax.nn.tanh(linen.Dense(4)(x)))


INPUTS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def test_s2sam_under_linen_train_state():
    model = Net()
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), INPUTS)["params"], tx=s2sgd()
    )
    history = []
    for _ in range(STEPS):
        point = perturb(state.params, state.opt_state)
        grads = jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, INPUTS) - 1) ** 2))(point)
        new = state.apply_gradients(grads=grads)
        history.append(Step(state.params, point, grads, new.params, new.opt_state))
        state = new
    for index in range(STEPS):
        assert_perturbed(history, index, {"": lambda step: RHO})


class BatchNormNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rigl"])
def test_s2sam_under_nnx_optimizer_with_batch_norm(sparse):
    tx = sparsify(s2sgd(), methods.rigl(0.5), sparsity=0.4, when=Every(2, 2, 10)) if sparse else s2sgd()
    model = BatchNormNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    if sparse:
        nnx.update(model, apply_masks(nnx.state(model, nnx.Param), optimizer.opt_state))
    graph, state = nnx.split((model, optimizer))
    traces, history = [], []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        traces.append(1)
        model, optimizer = nnx.merge(graph, state)
        clean = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
        point = perturb(clean, optimizer.opt_state)
        nnx.update(model, point)
        grads = nnx.grad(lambda m: jnp.mean((m(INPUTS) - 1) ** 2))(model)
        nnx.update(model, clean)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), clean, point, grads

    for _ in range(STEPS):
        state, clean, point, grads = step(state)
        model, optimizer = nnx.merge(graph, state)
        params, opt_state = nnx.state(model, nnx.Param), optimizer.opt_state
        if sparse:
            check_masks(params, opt_state)
            for name, mask in named(get_masks(opt_state)).items():
                assert (named(perturb(params, opt_state))[name][~mask] == 0).all()
            assert_trees_close(get_masks(opt_state), get_masks(opt_state, params), 0, 0)
        history.append(on_host(Step(clean, point, grads, params, None)))
    assert len(traces) == 1
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0
    for index in range(0 if sparse else STEPS):
        assert_perturbed(history, index, {"": lambda step: RHO})


# ---- b. sparsify around every optimizer, inside every wrapper, over every kind of tree ----------------------------

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


def rigl(inner, **options):
    options = {"sparsity": SPARSITY, "when": Every(0, 2, 100), **options}
    return sparsify(inner, methods.rigl(0.5), **options)


def planned(params: Any, sparsity: float = SPARSITY) -> dict[str, int]:
    """Ones per leaf: ``N - floor(S N)``."""
    plan = named(erdos_renyi_kernel(params, sparsity))
    return {name: p.size - math.floor(round(plan[name].item() * p.size, 6)) for name, p in named(params).items()}


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
        assert {name: int(n) for name, n in named(state.nnz).items()} == counts
        for name, mask in masks.items():
            assert (weights[name][~mask] == 0.0).all(), name
            assert old is None or (points[name][~old[name]] == 0.0).all(), name
        for name, leaf in (mirrored := mirrors(state.inner_state, masks)):
            assert (leaf[~masks[name]] == 0.0).all(), name
            if old is not None:
                assert (leaf[masks[name] & ~old[name]] == 0.0).all(), name
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


def test_schedule_free_evaluates_at_sparse_weights():
    tx = rigl(optax.chain(s2sam(RHO), optax.contrib.schedule_free(optax.sgd(0.1), 0.1)))
    for step in run(tx, make_params()):
        inner = find(step.opt_state, optax.contrib.ScheduleFreeState)
        average = named(optax.contrib.schedule_free_eval_params(inner, step.params))
        assert all((average[name][~mask] == 0.0).all() for name, mask in named(get_masks(step.opt_state)).items())


OUTER = {
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(
        rate=1.0
    ),
    "named_chain": lambda tx: optax.named_chain(("sparse", tx)),
}


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


def test_sparsify_on_a_subset_of_leaves():
    tx = optax.chain(optax.masked(rigl(s2sgd()), lambda p: jax.tree.map(lambda x: x == "right", labels(p))))
    for step in run(tx, make_params()):
        masks = named(get_masks(step.opt_state, step.params))
        assert masks["a/kernel"].all()
        assert not masks["kernel"].all()
        assert all((named(step.params)[name][~mask] == 0.0).all() for name, mask in masks.items())
        check_masks(step.params, step.opt_state)


def test_two_sparsify_on_disjoint_leaves():
    def build(rho):
        return rigl(s2sgd(rho), seed=int(10 * rho))

    tx = optax.multi_transform({"left": build(0.1), "right": build(0.3)}, labels)
    for step in run(tx, make_params()):
        masks = named(get_masks(step.opt_state, step.params))
        assert all((named(step.params)[name][~mask] == 0.0).all() for name, mask in masks.items())
        assert not any(masks[name].all() for name in KERNELS)
        check_masks(step.params, step.opt_state)


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


@pytest.mark.parametrize("field", ["mu", "nu"])
def test_a_module_named_like_a_state_field_is_not_confused(field):
    """``state.mu["kernel"]`` belongs to ``kernel``, also where there is a module ``mu`` with a kernel."""
    params = {field: {"kernel": jnp.ones((8, 8))}, "kernel": jnp.full((8, 8), 2.0)}
    history = run(rigl(optax.chain(s2sam(RHO), optax.adam(0.05))), params)
    for step in history:
        adam, masks = find(step.opt_state, optax.ScaleByAdamState), get_masks(step.opt_state)
        for moment in (adam.mu, adam.nu):
            for leaf, mask in zip(jax.tree.leaves(moment), jax.tree.leaves(masks), strict=True):
                assert (leaf[~mask] == 0.0).all()
    used = jax.tree.map(lambda m, v: bool((v[m] != 0).any()), masks, adam.nu)
    assert all(jax.tree.leaves(used))


def test_growing_without_skipping_starts_momentum_from_the_gradient():
    tx = sparsify(s2sgd(), methods.rigl(0.5, skip_step=False), sparsity=SPARSITY, when=Every(2, 2, 100))
    history = run(tx, make_params())
    trace, old, new = (
        named(find(history[2].opt_state, optax.TraceState).trace),
        named(get_masks(history[1].opt_state)),
        named(get_masks(history[2].opt_state)),
    )
    grown = {name: new[name] & ~old[name] for name in KERNELS}
    assert all(grown[name].any() for name in KERNELS)
    for name in KERNELS:
        np.testing.assert_allclose(trace[name][grown[name]], named(history[2].grads)[name][grown[name]], 1e-6)
        np.testing.assert_allclose(named(history[2].params)[name][grown[name]], -0.1 * trace[name][grown[name]], 1e-6)


def test_inner_optimizer_sees_live_gradients_only():
    """The norm that clipping divides by is that of the masked gradient."""
    tx = sparsify(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)), methods.static(), sparsity=SPARSITY)
    params = make_params()
    opt_state = tx.init(params)
    params = apply_masks(params, opt_state)
    updates, _ = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    np.testing.assert_allclose(norm(jax.tree.leaves(updates)), 0.1, 1e-5)


SHARP = {
    "sam": lambda: sam(RHO),
    "asam": lambda: sam(RHO, adaptive=True),
    "ssam_dynamic": lambda: ssam(RHO, mask="dynamic", update_every=2, total_steps=10),
    "ssam_fisher": lambda: ssam(RHO, mask="fisher", update_every=2),
    "ssam_dynamic_authors": lambda: ssam(RHO, mask="dynamic", update_every=2, total_steps=10, compat="authors"),
    "ssam_fisher_authors": lambda: ssam(RHO, mask="fisher", update_every=2, compat="authors"),
}


def squared(tree):
    return jax.tree.map(jnp.square, tree)


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


def test_update_masks_is_one_more_update():
    tx = rigl(s2sgd(), when=Every(1000, 1000, 10_000))
    params = make_params()
    opt_state = tx.init(params)
    params = apply_masks(params, opt_state)
    old = get_masks(opt_state)
    params, opt_state = update_masks(tx, jax.grad(loss_fn)(params), opt_state, params)
    check_masks(params, opt_state)
    assert (get_masks(opt_state)["kernel"] != old["kernel"]).any()


# ---- c. reductions and transformations ----------------------------------------------------------------------------


def plain(tx, params, steps=5, point=lambda params, state: params, loss=loss_fn):
    """A loop that knows nothing: the parameters after each step, and the last state."""
    tx = optax.with_extra_args_support(tx)
    opt_state, path = tx.init(params), []

    @jax.jit
    def step(params, opt_state):
        at = point(params, opt_state)
        updates, opt_state = tx.update(
            jax.grad(loss)(at), opt_state, params, grad_fn=jax.grad(loss),
            fisher_fn=lambda p: squared(jax.grad(loss)(p)),
        )  # fmt: skip
        return optax.apply_updates(params, updates), opt_state, at

    for _ in range(steps):
        params, opt_state, at = step(params, opt_state)
        path.append((params, at))
    return path, opt_state


MOMENTUM = functools.partial(optax.sgd, 0.1, momentum=0.9)


def without_radius(rho=0.0):
    return {
        "s2sam": (optax.chain(s2sam(rho), MOMENTUM()), perturb),
        "s2sam_adaptive": (optax.chain(s2sam(rho, adaptive=True), MOMENTUM()), perturb),
        "sam": (optax.chain(sam(rho), MOMENTUM()), lambda p, s: p),
        "asam": (optax.chain(sam(rho, adaptive=True), MOMENTUM()), lambda p, s: p),
        "ssam_dynamic": (optax.chain(ssam(rho, total_steps=10), MOMENTUM()), lambda p, s: p),
        "ssam_fisher": (optax.chain(ssam(rho, mask="fisher"), MOMENTUM()), lambda p, s: p),
        "s2sam_wrapper": (s2sam_wrapper(MOMENTUM(), rho), lambda p, s: p),
    }


@pytest.mark.parametrize("name", without_radius())
def test_zero_radius_is_the_inner_optimizer(name):
    tx, point = without_radius()[name]
    (path, opt_state), (want, _) = plain(tx, make_params(), point=point), plain(MOMENTUM(), make_params())
    assert_trees_close(eval_params(path[-1][0], opt_state), want[-1][0])


@pytest.mark.parametrize("name", without_radius())
def test_zero_gradient_gives_no_nan(name):
    tx, point = without_radius(0.5)[name]
    path, _ = plain(tx, make_params(), point=point, loss=lambda p: 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(p)))
    assert_trees_close(path[-1], (make_params(), make_params()), 0, 0)


@pytest.mark.parametrize("method", [methods.static(), methods.rigl(0.5, skip_step=False)], ids=["static", "rigl"])
def test_zero_sparsity_is_the_inner_optimizer(method):
    tx = sparsify(optax.adamw(0.05), method, sparsity=0.0, when=Every(0, 2, 10))
    path, opt_state = plain(tx, make_params())
    assert_trees_close(path[-1][0], plain(optax.adamw(0.05), make_params())[0][-1][0])
    assert all(m.all() for m in jax.tree.leaves(get_masks(opt_state)))


@pytest.mark.parametrize("name", ["s2sam", "s2sam_adaptive", "s2sam_wrapper"])
def test_first_step_of_s2sam_is_the_inner_optimizer(name):
    tx, point = without_radius(0.5)[name]
    path, opt_state = plain(tx, make_params(), steps=1, point=point)
    assert_trees_close(eval_params(path[0][0], opt_state), plain(MOMENTUM(), make_params(), steps=1)[0][0][0])
    assert_trees_close(path[0][1], make_params(), 0, 0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rigl"])
def test_wrapper_walks_along_the_perturbed_points(sparse):
    """Where a mask update is no gradient step, S2-SAM has no new gradient either; so masks change without skipping."""

    def build(inner):
        method = methods.rigl(0.5, skip_step=False)
        return sparsify(inner, method, sparsity=SPARSITY, when=Every(0, 3, 10)) if sparse else inner

    start = make_params()
    if sparse:
        start = apply_masks(start, build(MOMENTUM()).init(start))
    split, split_state = plain(build(s2sgd()), start, steps=STEPS, point=perturb)
    for steps in (1, 3, STEPS):
        wrapped, state = plain(s2sam_wrapper(build(MOMENTUM()), RHO), start, steps=steps)
        assert_trees_close(eval_params(wrapped[-1][0], state), split[steps - 1][0], 1e-5, 1e-5)
        if steps < STEPS:
            assert_trees_close(wrapped[-1][0], split[steps][1], 1e-5, 1e-5)
    assert_trees_close(wrapped[-1][0], perturb(split[-1][0], split_state), 1e-5, 1e-5)


def test_wrapper_keeps_a_wide_copy_of_narrow_parameters():
    def narrow(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    def narrow_perturb(params, opt_state):
        return narrow(perturb(params, opt_state))

    start = narrow(make_params())
    wrapped, state = plain(s2sam_wrapper(MOMENTUM(), RHO, clean_dtype=jnp.float32), start)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    tx, params = s2sgd(), wide
    want = tx.init(params)
    for _ in range(5):
        grads = jax.jit(jax.grad(loss_fn))(narrow_perturb(params, want))
        updates, want = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), want, params)
        params = optax.apply_updates(params, updates)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(wrapped[-1][0]))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.clean))
    assert_trees_close(state.clean, params, 2e-2, 2e-2)
    assert_trees_close(wrapped[-1][0], perturb(params, want), 3e-2, 3e-2)


def test_wrapper_around_sparsify_is_sparse_from_the_first_moment():
    state = TrainState.create(make_params(), s2sam_wrapper(rigl(MOMENTUM()), RHO))
    evaluated = named(eval_params(state.params, state.opt_state))
    assert all((evaluated[name][~mask] == 0.0).all() for name, mask in named(get_masks(state.opt_state)).items())


def test_vmap_over_keys_gives_different_masks():
    def train(seed):
        tx = rigl(s2sgd(), seed=seed)
        params = make_params()
        opt_state = tx.init(params)
        params = apply_masks(params, opt_state)
        for _ in range(2):
            grads = jax.grad(loss_fn)(perturb(params, opt_state))
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return get_masks(opt_state), params

    masks, params = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 4))
    for name, count in planned(make_params()).items():
        rows, weights = named(masks)[name], named(params)[name]
        assert (rows.reshape(4, -1).sum(1) == count).all()
        assert (weights[~rows] == 0.0).all()
        if name in KERNELS:
            assert len(np.unique(rows.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize("kind", ["sparsify", "ssam"])
def test_vmap_over_integer_seeds_gives_different_masks(kind):
    def masks(seed):
        if kind == "ssam":
            return ssam(total_steps=9, sparsity=0.6, seed=seed).init(make_params()).perturb_masks
        return get_masks(sparsify(MOMENTUM(), methods.static(), sparsity=0.6, seed=seed).init(make_params()))["kernel"]

    leaves = jax.tree.leaves(jax.jit(jax.vmap(masks))(jnp.arange(4)))
    flat = np.concatenate([np.asarray(m).reshape(4, -1) for m in leaves], axis=1)
    assert len(np.unique(flat, axis=0)) == 4
    assert (flat.sum(1) == {"ssam": 45, "sparsify": 15}[kind]).all()  # of 114 and of 36, at 60 %


def test_scan_equals_a_python_loop():
    tx = rigl(s2sgd())
    params = make_params()
    opt_state = tx.init(params)
    start = (apply_masks(params, opt_state), opt_state)

    def step(carry, _):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss_fn)(perturb(params, opt_state)), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS)[0])(start)
    looped = start
    for _ in range(STEPS):
        looped, _ = jax.jit(step)(looped, None)
    assert_trees_close(scanned[0], looped[0])
    assert_trees_close(get_masks(scanned[1]), get_masks(looped[1]), 0, 0)


@pytest.fixture
def mesh():
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        yield mesh


def sharded_params(mesh):
    spec = {"a": jax.P("x", "y"), "b": jax.P(None, "y"), "c": jax.P("x")}
    shape = {"a": (8, 8), "b": (4, 8), "c": (8,)}
    keys = dict(zip(shape, jax.random.split(jax.random.key(1), 3), strict=True))
    plain = {name: np.asarray(jax.random.normal(keys[name], shape[name])) for name in shape}
    placed = {name: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec[name])) for name, x in plain.items()}
    return plain, placed


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_select_under_explicit_sharding(mesh, scope):
    plain, placed = sharded_params(mesh)
    plain, placed = jax.tree.map(np.round, plain), jax.tree.map(jnp.round, placed)  # so that there are ties
    masks = jax.jit(lambda x: select(x, sparsity=0.5, scope=scope))(placed)
    for name, mask in masks.items():
        assert jax.typeof(mask).sharding.spec == jax.typeof(placed[name]).sharding.spec
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        want = jax.jit(lambda x: select(x, sparsity=0.5, scope=scope))(plain)
    assert_trees_close(masks, want, 0, 0)


def quadratic(params):
    return sum(jnp.sum(jnp.square(p - 1.5)) for p in jax.tree.leaves(params))


SHARDED = {
    "s2sam": s2sgd,
    "s2sam_rigl": lambda: rigl(s2sgd()),
    "ssam_static": lambda: sparsify(
        optax.chain(ssam(RHO, total_steps=9, update_every=2), MOMENTUM()), methods.static(), sparsity=SPARSITY
    ),
}


def short_run(build, params):
    tx = optax.with_extra_args_support(build())
    kinds = str(jax.eval_shape(tx.init, params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        point = perturb(params, opt_state) if "S2SAMState" in kinds else params
        updates, opt_state = tx.update(jax.grad(quadratic)(point), opt_state, params, grad_fn=jax.grad(quadratic))
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init)(params)
    if "SparseState" in kinds:
        params = apply_masks(params, opt_state)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    return params, get_masks(opt_state) if "SparseState" in kinds else params


@pytest.mark.parametrize("build", SHARDED.values(), ids=SHARDED.keys())
def test_training_under_explicit_sharding(mesh, build):
    plain, placed = sharded_params(mesh)
    shardings = {name: jax.typeof(x).sharding for name, x in placed.items()}
    params, masks = short_run(build, placed)
    assert {name: jax.typeof(x).sharding for name, x in params.items()} == shardings
    assert {name: jax.typeof(x).sharding for name, x in masks.items()} == shardings
    assert all(len(x.addressable_shards[0].data) * 2 == len(x) for x in (masks["a"], masks["c"]))
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        want = short_run(build, jax.tree.map(jnp.array, plain))
    assert_trees_close((params, masks), want, 1e-5, 1e-5)


# ---- d. make_train_step -------------------------------------------------------------------------------------------


def mlp_params():
    keys = jax.random.split(jax.random.key(5), 2)
    return {"one": {"kernel": jax.random.normal(keys[0], (3, 8)), "bias": jnp.zeros(8)},
            "two": {"kernel": jax.random.normal(keys[1], (8, 2)), "bias": jnp.zeros(2)}}  # fmt: skip


def mlp_loss(params, model_state, batch, key):
    hidden = jax.nn.tanh(batch @ params["one"]["kernel"] + params["one"]["bias"])
    outputs = hidden @ params["two"]["kernel"] + params["two"]["bias"]
    return jnp.mean(jnp.square(outputs - 1)), (model_state + 1, {"largest": jnp.max(jnp.abs(outputs))})


BATCHES = np.random.default_rng(1).normal(size=(5, 8, 3)).astype(np.float32)

OPTIMIZERS = {
    "sgd": (lambda wrap: wrap(MOMENTUM()), 1),
    "adamw": (lambda wrap: wrap(optax.adamw(0.05)), 1),
    "s2sam": (lambda wrap: wrap(s2sgd()), 1),
    "s2sam_wrapper": (lambda wrap: s2sam_wrapper(wrap(MOMENTUM()), RHO), 1),
    "sam": (lambda wrap: wrap(optax.chain(sam(RHO), MOMENTUM())), 2),
    "ssam_dynamic": (lambda wrap: wrap(optax.chain(ssam(RHO, total_steps=9, update_every=3), MOMENTUM())), 2),
    "ssam_fisher": (lambda wrap: wrap(optax.chain(ssam(RHO, mask="fisher", update_every=3), MOMENTUM())), 2),
}
SPARSE = {
    "dense": lambda inner: inner,
    "static": lambda inner: sparsify(inner, methods.static(), sparsity=0.5),
    "rigl": lambda inner: sparsify(inner, methods.rigl(0.5), sparsity=0.5, when=Every(1, 2, 10)),
}


def start(tx):
    return TrainState.create(mlp_params(), tx, model_state=jnp.zeros(()))


def train(tx, loss=mlp_loss, after=lambda: None, **options):
    step, state, rows = make_train_step(loss, tx, **options), start(tx), []
    for batch in BATCHES:
        state, metrics = step(state, batch)
        rows.append(metrics)
        after()
    return state, rows


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_train_step_in_python_and_in_scan(optimizer, sparse):
    """Equal results; one gradient for SGD and S2-SAM, two for SAM and SSAM, Fisher examples on refresh steps alone."""
    build, per_step = OPTIMIZERS[optimizer]
    tx, evaluations, counts = build(SPARSE[sparse]), [], []

    def counted(params, model_state, batch, key):
        jax.debug.callback(lambda _: evaluations.append(1), batch[0, 0])
        return mlp_loss(params, model_state, batch, key)

    def tally():
        jax.effects_barrier()
        counts.append(len(evaluations))
        evaluations.clear()

    state, rows = train(tx, counted, tally, fisher_examples=4)
    scan = jax.jit(lambda state: jax.lax.scan(make_train_step(counted, tx, fisher_examples=4), state, BATCHES))
    scanned, metrics = scan(start(tx))
    tally()

    assert_trees_close(state._replace(key=()), scanned._replace(key=()), 1e-5, 1e-5)
    assert_trees_close(jax.tree.map(lambda *x: np.stack(x), *rows), metrics, 1e-4, 1e-5)
    assert (int(state.step), float(state.model_state), int(state.first_bad_step)) == (5, 5.0, -1)
    assert ("rho" in metrics) == (optimizer not in ("sgd", "adamw", "s2sam_wrapper"))
    if sparse != "rigl":  # whose mask updates need no second gradient
        fisher = [4 * (optimizer == "ssam_fisher" and index % 3 == 0) for index in range(5)]
        assert counts == [*(per_step + extra for extra in fisher), 5 * per_step + sum(fisher)]
    if sparse != "dense":
        check_masks(eval_params(state.params, state.opt_state), state.opt_state)
        check_masks(state.params, state.opt_state)
        zeros = 50 - sum(planned(mlp_params(), 0.5).values())
        np.testing.assert_allclose(metrics["sparsity"], zeros / 50, 1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "s2sam", "sam", "ssam_dynamic", "ssam_fisher"])
def test_accumulation_equals_the_whole_batch(optimizer):
    def loss(params, model_state, batch, key):
        return mlp_loss(params, model_state, batch, key)[0], (model_state, {})

    build = OPTIMIZERS[optimizer][0]
    (whole, rows), (parts, micro) = (train(build(SPARSE["static"]), loss, accumulate=parts) for parts in (1, 4))
    assert_trees_close(whole.params, parts.params, 1e-4, 1e-5)
    assert_trees_close(rows, micro, 1e-4, 1e-5)


@pytest.mark.parametrize("outer", ["multi_steps", "apply_if_finite"])
def test_train_step_with_an_outer_wrapper(outer):
    tx = OUTER[outer](SPARSE["rigl"](s2sgd()))
    state, _ = train(tx)
    check_masks(state.params, state.opt_state)


def test_empirical_fisher_chunks_do_not_matter():
    def one(params, example):
        return mlp_loss(params, jnp.zeros(()), example[None], None)[0]

    whole, cut = (empirical_fisher(one, chunk_size=size)(mlp_params(), BATCHES[0]) for size in (8, 3))
    assert_trees_close(whole, cut, 1e-5)

"""s2sam and perturb under every host: donated, traced once, one gradient a step, the right radius and direction."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    INPUTS,
    RHO,
    SPARSITY,
    STEPS,
    BatchNormNet,
    Net,
    Step,
    assert_trees_close,
    labels,
    make_params,
    named,
    norm,
    on_host,
    run,
    s2sgd,
)
from flax import nnx
from flax.training import train_state

from s2sam_jax import Every, apply_masks, check_masks, get_masks, methods, msam, perturb, s2sam, sparsify


def falling(step):
    return 0.2 - 0.02 * step


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


CONSTANT: dict[str, Callable[[int], float]] = {"": lambda step: RHO}


class Host(NamedTuple):
    """A way to build the optimizer, with the radius of each group of leaves (by prefix) at each step."""

    build: Callable[[], Any]
    radii: dict[str, Callable[[int], float]] = CONSTANT
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


def test_injected_eta_and_eps_act_one_step_late():
    """Like an injected radius; in a loop that lets optax set them, they must not stay what they were at first."""
    rising = {"eta": lambda step: 1.0 + step, "eps": lambda step: 0.1 * step}
    tx = optax.inject_hyperparams(s2sam, static_args=("adaptive",))(rho=1.0, adaptive=True, **rising)
    weights, grads = jnp.array([3.0, -4.0]), jnp.array([2.0, 1.0])
    state = tx.init(weights)
    for step in range(3):
        _, state = tx.update(grads, state, weights)
        lengths = np.array([3.0, 4.0]) + rising["eta"](step)
        expected = lengths**2 * [2.0, 1.0] / (np.linalg.norm(lengths * [2.0, 1.0]) + rising["eps"](step))
        np.testing.assert_allclose(perturb(weights, state) - weights, expected, rtol=1e-5)
    momentum = optax.chain(optax.inject_hyperparams(msam)(rho=1.0, eps=lambda step: 5.0 * step), optax.trace(0.0))
    state = momentum.init(weights)
    for length in (5.0, 10.0):  # 5 of the gradient (3, 4), and eps
        _, state = momentum.update(jnp.array([3.0, 4.0]), state, weights)
        np.testing.assert_allclose(perturb(weights, state) - weights, [-3 / length, -4 / length], rtol=1e-5)


def test_apply_if_finite_keeps_the_last_good_gradient():
    history = run(optax.apply_if_finite(s2sgd(), 5), make_params(), bad=(2,))
    assert_trees_close(history[2].params, history[2].clean, 0, 0)
    assert_perturbed(history, 3, {"": lambda step: RHO}, lambda h, i: h[1].grads)


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

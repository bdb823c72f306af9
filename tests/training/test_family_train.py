"""Momentum-SAM, LookSAM, GSAM and ESAM in the train step and under their hosts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    BATCHES,
    INPUTS,
    MOMENTUM,
    RHO,
    BatchNormNet,
    Net,
    assert_trees_close,
    labels,
    make_params,
    mlp_loss,
    named,
    norm,
    on_host,
    rigl,
    run,
    start,
    train,
)
from flax import nnx
from flax.training import train_state

from s2sam_jax import (
    Every,
    MaskUpdate,
    SparseMethod,
    TrainState,
    check_masks,
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
    sparsify,
)
from s2sam_jax._training.host_clock import HostClock


def msgd(rho=RHO):
    return optax.chain(msam(rho), optax.sgd(0.1, momentum=0.9))


HOSTS = {
    "sgd": (msgd, {"": RHO}),
    "nesterov": (lambda: optax.chain(msam(RHO), optax.sgd(0.1, momentum=0.9, nesterov=True)), {"": RHO}),
    "adamw": (lambda: optax.chain(msam(RHO), optax.clip_by_global_norm(1e9), optax.adamw(0.1)), {"": RHO}),
    "lion": (lambda: optax.chain(msam(RHO), optax.lion(0.1)), {"": RHO}),
    "after_it": (lambda: optax.chain(optax.sgd(0.1, momentum=0.9), msam(RHO)), {"": RHO}),
    "multi_steps": (lambda: optax.MultiSteps(msgd(), 1).gradient_transformation(), {"": RHO}),
    "apply_if_finite": (lambda: optax.apply_if_finite(msgd(), 3), {"": RHO}),
    # optax sets injected values when an update begins, so that they act one step late
    "inject_hyperparams": (lambda: optax.inject_hyperparams(msgd)(rho=lambda step: 0.2 - 0.1 * step), {"": 0.2}),
    "schedule": (lambda: msgd(lambda step: 0.2 - 0.1 * step), {"": 0.1}),
    "groups": (lambda: optax.multi_transform({"left": msgd(0.1), "right": msgd(0.3)}, labels), {"a": 0.1, "bk": 0.3}),
    "group": (lambda: optax.multi_transform({"left": msgd(0.1), "right": MOMENTUM()}, labels), {"a": 0.1}),
    "around_groups": (
        lambda: optax.chain(msam(RHO), optax.multi_transform({"left": MOMENTUM(), "right": optax.adam(0.1)}, labels)),
        None,
    ),
    "muon": (lambda: optax.chain(msam(RHO), optax.contrib.muon(0.1)), None),
}


@pytest.mark.parametrize("name", HOSTS)
def test_msam_under_host(name):
    """After one step every momentum is along the gradient; several of them have one norm."""
    build, radii = HOSTS[name]
    params, tx = make_params(), build()
    grads = jax.tree.map(jnp.cos, params)
    _, state = tx.update(grads, tx.init(params), params)
    moved = {k: np.float64(v) - named(params)[k] for k, v in named(perturb(params, state)).items()}
    if radii is None:
        np.testing.assert_allclose(norm(moved.values()), RHO, rtol=1e-5)
        return
    grads = named(grads)
    for prefix, radius in radii.items():
        group = [k for k in moved if not prefix or k[0] in prefix]
        length = norm(grads[k] for k in group)
        for k in group:
            np.testing.assert_allclose(moved.pop(k), -radius * grads[k] / length, rtol=1e-3, atol=1e-6)
    assert all((d == 0).all() for d in moved.values())


def test_msam_under_rigl_takes_one_gradient_and_no_copy():
    """Donated, traced once, and at each step against a momentum that is on the masks."""
    history = run(rigl(msgd()), make_params())
    for last, step in itertools.pairwise(history):
        momentum, masks = named(last.opt_state.inner_state[1][0].trace), named(get_masks(last.opt_state))
        assert all((momentum[k][~masks[k]] == 0).all() for k in masks)
        for k, v in momentum.items():
            want = named(step.clean)[k] - RHO * v / max(norm(momentum.values()), 1e-9)
            np.testing.assert_allclose(named(step.point)[k], want, rtol=1e-5, atol=1e-6)
    assert norm(momentum.values()) > 0
    assert len(jax.tree.leaves(msam().init(make_params()))) == 3


def test_msam_under_linen_train_state():
    model = Net()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=msgd())
    grads = jax.tree.map(jnp.cos, params)
    state = state.apply_gradients(grads=grads)
    moved = jax.tree.map(lambda a, b: a - b, perturb(state.params, state.opt_state), state.params)
    length = norm(jax.tree.leaves(grads))
    assert_trees_close(moved, jax.tree.map(lambda g: -RHO * g / length, grads), 1e-4, 1e-6)


def test_msam_under_nnx_optimizer():
    tx = sparsify(msgd(), methods.static(), sparsity=0.4)
    model = BatchNormNet(nnx.Rngs(0))
    graph, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        model, optimizer = nnx.merge(graph, state)
        clean = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
        definition, _, rest = nnx.split(model, nnx.Param, ...)

        def grad_fn(params):
            return jax.grad(lambda p: jnp.mean((nnx.merge(definition, p, rest, copy=True)(INPUTS) - 1) ** 2))(params)

        point = perturb(clean, optimizer.opt_state)
        optimizer.update(model, grad_fn(point))
        return nnx.state((model, optimizer)), clean, point

    for _ in range(2):
        state, clean, point = step(state)
    model, optimizer = nnx.merge(graph, state)
    check_masks(nnx.state(model, nnx.Param), optimizer.opt_state)
    length = norm(a - b for a, b in zip(*(named(t).values() for t in on_host((clean, point))), strict=True))
    np.testing.assert_allclose(length, RHO, rtol=1e-4)


FAMILY = {
    "msam": lambda: msam(RHO),
    "looksam": lambda: looksam(RHO, every=3),
    "gsam": lambda: gsam(RHO),
    "esam": lambda: esam(RHO, beta=0.5),
}


FRACTION, EXAMPLES, STEPS = 0.25, len(BATCHES[0]), len(BATCHES)


def mlp_examples(params, model_state, batch, key):
    one = jax.vmap(lambda example: mlp_loss(params, model_state, example[None], key)[0])
    return one(batch)


def counting(sharp):
    """The loss, and the sizes of the batches that it was traced and evaluated on."""
    traces, rows = [], []

    def loss(params, model_state, batch, key):
        traces.append(len(batch))
        jax.debug.callback(lambda x: rows.append(len(x)), batch[:, 0])
        return mlp_loss(params, model_state, batch, key)

    options = dict(sharpest_fraction=FRACTION, example_loss_fn=mlp_examples) if sharp == "esam" else {}
    return loss, options, traces, rows


SECOND = {"msam": [], "looksam": [EXAMPLES], "gsam": [EXAMPLES], "esam": [int(EXAMPLES * FRACTION)]}


@pytest.mark.parametrize("sharp", FAMILY)
def test_gradient_evaluations(sharp):
    """MSAM one, GSAM two, LookSAM's second on every third step, ESAM's on a fraction; each program is traced once."""
    loss, options, traces, rows = counting(sharp)
    sizes = []

    def tally():
        jax.effects_barrier()
        sizes.append(sorted(rows, reverse=True))
        rows.clear()

    _, metrics = train(optax.chain(FAMILY[sharp](), MOMENTUM()), loss, tally, **options)
    second = SECOND[sharp]
    assert sizes == [[EXAMPLES, *(second if sharp != "looksam" or i % 3 == 0 else [])] for i in range(STEPS)]
    assert traces == [EXAMPLES, *second]
    np.testing.assert_allclose([m["rho"] for m in metrics], [RHO] * STEPS, rtol=1e-6)


def rolling():
    """Masks that move on by a weight: as cheap to compile as changing masks can be."""

    def init(x):
        return MaskUpdate(jax.tree.map(lambda m: m & (jnp.arange(m.size).reshape(m.shape) % 3 > 0), x.masks))

    def update(x, state):
        return MaskUpdate(jax.tree.map(lambda m: jnp.roll(m, 1), x.masks), state)

    return SparseMethod(init, update, "per_layer")


def test_looksam_in_python_and_in_scan_under_changing_masks():
    """The host's clock against the state's own; and the direction kept stays on the masks."""
    loss, options, _, rows = counting("looksam")
    tx = sparsify(optax.chain(FAMILY["looksam"](), MOMENTUM()), rolling(), sparsity=0.3, when=Every(1, 2))
    assert dict(HostClock().flags(start(tx).opt_state)) == {"refresh_masks": False, "refresh_sam": True}
    state, metrics = train(tx, loss, **options)
    jax.effects_barrier()
    stepwise = sorted(rows)
    rows.clear()
    scanned, stacked = jax.jit(lambda s: jax.lax.scan(make_train_step(loss, tx, **options), s, BATCHES))(start(tx))
    jax.effects_barrier()
    assert sorted(rows) == stepwise
    assert_trees_close(state._replace(key=()), scanned._replace(key=()), 1e-5, 1e-5)
    np.testing.assert_allclose([m["loss"] for m in metrics], stacked["loss"], rtol=1e-4, atol=1e-6)
    check_masks(state.params, state.opt_state)
    g_v, masks = state.opt_state.inner_state[0].g_v, get_masks(state.opt_state)
    assert all((named(g_v)[k][~m] == 0).all() for k, m in named(masks).items())
    assert norm(jax.tree.leaves(g_v)) > 0


DRAW = np.random.default_rng(0)
LINEAR = [(DRAW.normal(size=(12, 5)), DRAW.normal(size=12)) for _ in range(4)]
WEIGHTS = DRAW.normal(size=5)


def linear_losses(params, model_state, batch, key):
    return 0.5 * (batch[0] @ params["kernel"] - batch[1]) ** 2


def linear_loss(params, model_state, batch, key):
    return jnp.mean(linear_losses(params, model_state, batch, key)), (model_state, {})


SGD = optax.sgd(0.1, momentum=0.9)
HALF = dict(sharpest_fraction=0.5, example_loss_fn=linear_losses)


REFUSED = {
    "fraction": (SGD, {"sharpest_fraction": 0.0}, r"fraction of sharpest examples must lie in \(0, 1\]; got 0\.0"),
    "no_example_loss": (SGD, {"sharpest_fraction": 0.5}, r"sharpest_fraction=0\.5 needs example_loss_fn, \(par"),
    "accumulate": (SGD, {"accumulate": 2, **HALF}, r"accumulate and sharpness_parts have to be 1; got 2 and 1"),
    "parts": (optax.chain(sam(), SGD), {"sharpness_parts": 3, **HALF}, r"have to be 1; got 1 and 3"),
    "s2sam": (optax.chain(s2sam(), SGD), HALF, r"second gradient of sam, .* and tx has none"),
    "msam": (optax.chain(msam(), SGD), HALF, r"second gradient of sam, .* and tx has none"),
    "msam_parts": (optax.chain(msam(), SGD), {"sharpness_parts": 3}, r"tx has none .* msam along the momentum"),
    **{
        f"{name}_multi_steps": (
            optax.MultiSteps(optax.chain(FAMILY[name](), SGD), 2).gradient_transformation(), {},
            r"looksam, gsam or esam inside optax\.MultiSteps .*accumulate=k",
        )
        for name in ("looksam", "gsam", "esam")
    },
}  # fmt: skip


@pytest.mark.parametrize(("tx", "options", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_train_step_refuses(tx, options, text):
    state = TrainState.create({"kernel": jnp.asarray(WEIGHTS, jnp.float32)}, tx)
    with pytest.raises(ValueError, match=text):
        make_train_step(linear_loss, tx, **options)(state, LINEAR[0])

"""The train step on several devices: the results of one, wherever the arrays lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from s2sam_jax import (
    Every,
    S2SAMState,
    TrainState,
    get_masks,
    make_train_step,
    methods,
    perturb,
    s2sam,
    sam,
    sparsify,
    ssam,
)

SHAPES = {"a": (8, 16), "b": (16, 4)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("climb", [s2sam, sam], ids=["s2sam", "sam"])
def test_the_train_step_on_a_mesh(climb, kind):
    def loss_fn(params, model_state, batch, key):
        hidden = jnp.tanh(batch @ params["a"])
        return jnp.mean((hidden @ params["b"]) ** 2), (model_state, {})

    def run(place, place_batch):
        state, step = place(jax.tree.map(jnp.array, first)), make_train_step(loss_fn, tx)
        for batch in batches:
            state, _ = step(state, place_batch(batch))
        return state

    def lies(leaf):
        return NamedSharding(mesh, P("fsdp", None) if leaf.ndim == 2 else P())

    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for _ in range(6)]
    sharpness = optax.chain(climb(0.1), optax.sgd(0.1, momentum=0.9))
    tx = sparsify(sharpness, methods.rigl(0.5), sparsity=0.5, when=Every(0, 2, 8))
    first = TrainState.create({name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}, tx)
    reference = run(lambda state: state, lambda batch: batch)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        state = run(
            lambda state: jax.tree.map(lambda x: jax.device_put(x, lies(x)), state),
            lambda batch: jax.device_put(batch, NamedSharding(mesh, P("data", None))),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, reference.params)
    jax.tree.map(np.testing.assert_array_equal, get_masks(state.opt_state), get_masks(reference.opt_state))
    for leaf in jax.tree.leaves((state.params, get_masks(state.opt_state))):
        assert leaf.sharding.is_equivalent_to(lies(leaf), 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_every_device_has_its_share_of_each_micro_batch(kind):
    """Else devices wait for each other, or compute the same; and no example moves to another device."""

    def loss_fn(params, model_state, batch, key):
        return jnp.mean((batch @ params) ** 2), (model_state, {})

    mesh, tx = jax.make_mesh((8,), ("data",), axis_types=(kind,)), optax.chain(s2sam(0.1), optax.sgd(0.1))
    state = jax.device_put(TrainState.create(jnp.ones((32, 32)), tx), NamedSharding(mesh, P()))
    batch = jax.device_put(jnp.ones((512, 32)), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        whole, cut = (
            jax.jit(make_train_step(loss_fn, tx, accumulate=parts)).lower(state, batch).compile() for parts in (1, 4)
        )
    assert cut.cost_analysis()["flops"] < 1.3 * whole.cost_analysis()["flops"]
    assert not any(moved in cut.as_text() for moved in ("all-to-all", "collective-permute", "all-gather"))


EXPLICIT = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)


def product_loss(params, model_state, batch, key):
    return jnp.mean(jnp.square(batch @ params["kernel"])), (model_state, {})


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (s2sam(0.1), {"accumulate": 2}),
        (s2sam(0.1), {"accumulate": 4}),  # micro-batches of 4 do not go onto 8 devices
        (sam(0.1), {"sharpness_parts": 8}),
        (sam(0.1), {"sharpness_parts": 2}),
        (ssam(0.1, mask="fisher"), {"fisher_examples": 4}),
        (sam(0.1), {"sharpest_fraction": 0.5,
                    "example_loss_fn": lambda p, s, b, k: jnp.mean(jnp.square(b @ p["kernel"]), axis=1)}),
    ],
)  # fmt: skip
def test_a_batch_whose_type_says_how_it_is_sharded(inner, options):
    """As on the meshes that ``jax.make_mesh`` makes by default."""
    tx = sparsify(optax.chain(inner, optax.sgd(0.1)), methods.rigl(0.5), sparsity=0.5, when=Every(0, 1, 9))
    found = []
    for batch in (IMAGES, jax.device_put(IMAGES, jax.NamedSharding(EXPLICIT, PartitionSpec("data")))):
        state, step = TrainState.create({"kernel": jnp.ones((4, 8))}, tx), make_train_step(product_loss, tx, **options)
        if batch is not IMAGES:
            state = jax.device_put(state, jax.NamedSharding(EXPLICIT, PartitionSpec()))
        for _ in range(3):
            state, metrics = step(state, batch)
        found.append((jax.device_get(state.params["kernel"]), float(metrics["loss"])))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)


def test_several_networks_stay_where_they_are_told_to():
    mesh = jax.make_mesh((8,), ("networks",), axis_types=(AxisType.Auto,))
    states = jax.vmap(lambda key: TrainState.create({"kernel": jax.random.normal(key, (4, 6))}, optax.sgd(0.1)))(
        jax.random.split(jax.random.key(0), 8)
    )
    spec = jax.tree.map(lambda _: jax.NamedSharding(mesh, PartitionSpec()), states)
    spec = spec._replace(params={"kernel": jax.NamedSharding(mesh, PartitionSpec("networks"))})
    step = make_train_step(product_loss, optax.sgd(0.1), vmap=True, state_sharding=spec)
    batches = jnp.broadcast_to(IMAGES, (8, 16, 4))
    state, _ = step(states, batches)
    assert state.params["kernel"].sharding.spec == PartitionSpec("networks")
    state, _ = jax.jit(step)(state, batches)
    assert state.params["kernel"].sharding.spec == PartitionSpec("networks")


@pytest.mark.parametrize("tx", [optax.chain(s2sam(0.1), optax.sgd(0.1)), optax.chain(sam(0.1), optax.sgd(0.1))])
def test_gradients_averaged_by_hand_over_devices_are_those_of_the_whole_batch(tx):
    """Under ``pmap``, the second gradient too."""
    batches = jax.random.normal(jax.random.key(0), (3, 4, 5, 6))  # steps, devices, examples, features

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def step(params, state, batch, mean=lambda grads: grads):
        def grad_fn(w):
            return mean(jax.grad(loss)(w, batch))

        point = perturb(params, state) if isinstance(state[0], S2SAMState) else params
        updates, state = tx.update(grad_fn(point), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    alone = params = jnp.linspace(-1, 1, 6)
    state = tx.init(alone)
    many = jax.tree.map(lambda x: jnp.stack([x] * 4), (params, state))
    of_device = jax.pmap(functools.partial(step, mean=lambda grads: jax.lax.pmean(grads, "data")), "data")
    for batch in batches:
        alone, state = step(alone, state, batch.reshape(20, 6))
        many = of_device(*many, batch)
    np.testing.assert_allclose(many[0], jnp.stack([alone] * 4), rtol=1e-5)

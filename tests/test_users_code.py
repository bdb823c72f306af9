"""What models, optimizers and loops of users do that the library's own tests would not."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import named
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from s2sam_jax import (
    Every,
    S2SAMState,
    TrainState,
    analysis,
    apply_masks,
    check_masks,
    eval_params,
    get_masks,
    looksam,
    make_train_step,
    methods,
    perturb,
    recalibrate_batch_stats,
    s2sam,
    s2sam_wrapper,
    sam,
    select,
    set_masks,
    sparsify,
    ssam,
)

PARAMS = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def loss_fn(params, model_state, batch, key):
    return jnp.sum(params["kernel"] ** 2) * jnp.mean(batch), (model_state, {})


# Models


def test_biases_of_attention_and_of_scanned_layers_stay_dense():
    attention = nnx.MultiHeadAttention(2, 4, 8, rngs=nnx.Rngs(0))
    scanned = nnx.vmap(lambda rngs: nnx.LayerNorm(8, rngs=rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))
    params = {"attention": nnx.state(attention, nnx.Param), "scanned": nnx.state(scanned, nnx.Param)}
    masks = get_masks(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params))
    several = {path: bool(mask.all()) for path, mask in named(masks).items() if mask.ndim > 1}
    assert sorted(several.values()) == [False] * 4 + [True] * 5
    assert all(dense == path.endswith(("bias", "scale")) for path, dense in several.items())


def test_set_masks_through_nnx_optimizer():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = sparsify(optax.adam(0.1), methods.static(), sparsity=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    masks = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 4 == 0, nnx.state(model, nnx.Param))
    optimizer.opt_state = set_masks(optimizer.opt_state, masks)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))(model))
    assert int((model.kernel[...] != 0).sum()) == 6
    check_masks(nnx.state(model, nnx.Param), optimizer.opt_state)


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


def test_what_is_no_moving_average_survives_recalibration():
    """A spectral norm's vector, and the factor that follows from it, beside a mean and a key."""

    def step(params, state, batch, key):
        vector = batch.T @ (batch @ state["vector"])
        vector /= jnp.linalg.norm(vector) + 1e-12
        factor = jnp.linalg.norm(batch @ vector)
        mean = 0.9 * state["mean"] + 0.1 * jnp.mean(batch / state["factor"])
        return jnp.sum(batch), ({"vector": vector, "factor": factor, "mean": mean, "key": state["key"]}, {})

    draw = np.random.default_rng(0)
    batches = [jnp.asarray(draw.normal(size=(6, 3)) + 1, jnp.float32) for _ in range(4)]
    state = {"vector": jnp.array([1.0, 0.0, 0.0]), "factor": jnp.float32(2), "mean": jnp.float32(0.3)}
    with pytest.warns(UserWarning, match="kept .*'factor', .*'vector'"):
        found = recalibrate_batch_stats(step, None, state | {"key": jax.random.key(1)}, batches)
    np.testing.assert_array_equal(found["vector"], state["vector"])
    assert float(found["factor"]) == 2
    assert found["key"] == jax.random.key(1)


# Optimizers


def test_grown_weights_start_as_their_optimizer_starts():
    """Rprop's steps shrink and grow by factors, so a step size of zero would stay zero."""
    tx = sparsify(optax.rprop(0.01), methods.rigl(0.5, skip_step=False), sparsity=0.5, when=Every(3, 100, 100))
    params, target = {"kernel": jnp.zeros((8, 8))}, jnp.where(jnp.arange(64).reshape(8, 8) % 3 == 0, 1.0, -2.0)
    state = tx.init(params)
    update, first = jax.jit(tx.update), get_masks(tx.init(params))["kernel"]
    for _ in range(20):
        updates, state = update({"kernel": params["kernel"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    grown = get_masks(state)["kernel"] & ~first
    assert int(grown.sum()) > 0
    assert float(jnp.abs(params["kernel"])[grown].min()) > 0.1


@pytest.mark.parametrize("eta", [None, 0.01])
def test_sam_takes_a_whole_model_of_which_some_leaves_have_no_gradient(eta):
    """As ``eqx.filter_grad`` gives them, for functions, integers and frozen layers."""
    model = {"act": jnp.tanh, "frozen": jnp.ones(3), "w": jnp.array([3.0, 4.0]), "n": jnp.arange(2)}
    points = []

    def grad_fn(at):
        points.append(at)
        return model | {"act": None, "frozen": None, "w": 2 * at["w"], "n": None}

    tx = sam(0.5) if eta is None else sam(0.5, adaptive=True, eta=eta)
    grads = {"act": None, "frozen": None, "w": jnp.array([1.0, 2.0]), "n": None}
    updates, _ = tx.update(grads, tx.init(None), model, grad_fn=grad_fn)
    w, g = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    scale = np.ones(2) if eta is None else w + eta
    expected = w + 0.5 * scale**2 * g / np.linalg.norm(scale * g)
    np.testing.assert_allclose(points[0]["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], 2 * expected, rtol=1e-6)
    assert all(points[0][name] is model[name] for name in ("act", "frozen", "n"))


def test_multisteps_as_an_object_keeps_extra_arguments():
    tx = optax.MultiSteps(sparsify(optax.sgd(0.1), methods.grasp(), sparsity=0.5), 1)
    step, state = make_train_step(loss_fn, tx), TrainState.create(PARAMS, tx)
    state, _ = step(state, jnp.ones(4))
    assert int((state.params["kernel"] == 0).sum()) == 50


# Randomness


def test_one_seed_is_not_one_key():
    """Growth by SET, SSAM's first coordinates and a dropout of weights, all by default, have nothing in common."""
    params = {"kernel": jnp.ones((100, 100))}
    tx = sparsify(ssam(0.1, mask="dynamic", sparsity=0.5, total_steps=10), methods.static(), sparsity=0.5)
    state = TrainState.create(params, tx)
    keys = [state.key, state.opt_state.key, state.opt_state.inner_state.key]
    draws = [np.ravel(jax.random.uniform(key, (10_000,))) for key in keys]
    correlations = np.corrcoef(draws)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.05


# Clocks


@pytest.mark.parametrize("jitted", [False, True])
def test_a_restored_state_fires_as_planned_and_then_by_the_new_clock(jitted):
    def tx(every):
        return sparsify(optax.sgd(0.0), methods.set(0.5), sparsity=0.5, when=Every(0, every, 100))

    def fired(tx, state, calls):
        step = make_train_step(loss_fn, tx)
        step, found = jax.jit(step) if jitted else step, []
        for _ in range(calls):
            now, before = int(state.opt_state.step), np.array(get_masks(state.opt_state)["kernel"])
            state, _ = step(state, jnp.ones(4))
            found += [now] if (before != get_masks(state.opt_state)["kernel"]).any() else []
        return state, found

    state, first = fired(tx(4), TrainState.create(PARAMS, tx(4)), 3)
    _, later = fired(tx(3), state, 8)
    assert (first, later) == ([0], [4, 6, 9])


@pytest.mark.parametrize("jitted", [False, True])
def test_a_firing_that_was_held_back_comes_when_it_may(jitted):
    """By the clock on the host, and by the one in the program."""
    tx = sparsify(optax.sgd(0.0), methods.set(0.5), sparsity=0.5, when=Every(0, 2, 100))
    state = TrainState.create(PARAMS, tx)
    _, opt_state = tx.update(state.params, state.opt_state, state.params, refresh_masks=False)
    _, opt_state = tx.update(state.params, opt_state, state.params, refresh_masks=False)
    assert (opt_state.masks["kernel"] == state.opt_state.masks["kernel"]).all()
    step, before = make_train_step(loss_fn, tx), np.array(opt_state.masks["kernel"])
    step = jax.jit(step) if jitted else step
    state, _ = step(state._replace(opt_state=opt_state), jnp.ones(4))
    assert (before != state.opt_state.masks["kernel"]).any()
    assert int(state.opt_state.next_update) == 4


@pytest.mark.parametrize(
    "make",
    [lambda k: ssam(0.1, mask="dynamic", update_every=k, total_steps=99), lambda k: looksam(0.1, every=k)],
    ids=["ssam", "looksam"],
)
def test_so_do_the_clocks_of_perturbations(make):
    params = {"kernel": jnp.ones((3, 3))}
    state = make(5).init(params)
    for _ in range(3):
        _, state = make(5).update(params, state, params, grad_fn=lambda p: p)
    planned = []
    for _ in range(5):
        _, state = make(2).update(params, state, params, grad_fn=lambda p: p)
        planned.append(int(state.next_update))
    assert planned == [5, 5, 6, 8, 8]


# Sizes, types, names


def test_more_than_two_to_the_31_weights_are_traced():
    leaf = jax.ShapeDtypeStruct((2**14, 2**14), jnp.float32)
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    step = make_train_step(lambda p, s, b, k: (jnp.sum(p["0"]) * b.sum(), (s, {})), tx)

    def one(params, batch):
        return step(TrainState.create(params, tx), batch)[1]["sparsity"]

    found = jax.eval_shape(one, {str(i): leaf for i in range(9)}, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert (found.shape, found.dtype) == ((), jnp.float32)


def test_what_int32_cannot_count_is_refused():
    leaves = [jax.ShapeDtypeStruct((2**28,), jnp.float32)] * 8
    jax.eval_shape(lambda *x: select(list(x), sparsity=0.5), *leaves)
    with pytest.raises(ValueError, match="select counts in int32, and 2147483648 scores are to be ranked together"):
        jax.eval_shape(lambda *x: select(list(x), sparsity=0.5, scope="global"), *leaves)
    stack = {"layers": {"kernel": jax.ShapeDtypeStruct((40, 5120, 13824), jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"in int32, and these have more: {'layers/kernel': 2831155200}. Cut them"):
        jax.eval_shape(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init, stack)


def test_selection_in_shard_map():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,))
    spec = PartitionSpec("x")
    scores = jax.random.normal(jax.random.key(0), (8, 6))
    one = functools.partial(select, sparsity=0.5)
    found = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(scores)
    np.testing.assert_array_equal(found, jnp.concatenate([one(scores[:4]), one(scores[4:])]))


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"these parameters are complex: \['a/b'\]"):
        TrainState.create({"a": {"b": jnp.ones(2, jnp.complex64)}}, optax.sgd(0.1))


def test_a_metric_that_the_step_has_itself_is_refused():
    def named(params, model_state, batch, key):
        return jnp.sum(params["kernel"]), (model_state, {"loss": 1.0, "mine": 2.0})

    step = make_train_step(named, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"has itself: \['loss'\]"):
        step(TrainState.create(PARAMS, optax.sgd(0.1)), jnp.ones(4))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_a_model_state_that_was_forgotten_is_asked_for(options):
    def with_statistics(params, model_state, batch, key):
        return loss_fn(params, (), batch, key)[0], ({"batch_stats": jnp.ones(3)}, {})

    step = make_train_step(with_statistics, optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match=r"loss_fn returns a model state .*'batch_stats'.* model_state=\.\.\."):
        step(TrainState.create(PARAMS, optax.sgd(0.1)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (
            lambda loss: loss,
            TypeError,
            r"must return \(loss, \(model_state, metrics\)\), .* of arrays, \(\)\.",
        ),
        (lambda loss: (loss, {}), TypeError, r"arrays, \(\(\), \{\}\)\."),
        (lambda loss: (loss, {"a": loss}), TypeError, r"arrays, \(\(\), \{'a': \(\)\}\)\."),
        (lambda loss: (loss, ({"a": loss}, ())), TypeError, "metrics a dict, and"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_a_loss_that_returns_something_else_is_told_what(returned, error, text, options):
    step = make_train_step(lambda p, m, b, k: returned(jnp.sum(p["kernel"])), optax.sgd(0.1), **options)
    with pytest.raises(error, match=text):
        step(TrainState.create(PARAMS, optax.sgd(0.1)), jnp.ones((4, 2)))


def test_a_state_that_was_restored_without_its_structure_is_refused():
    step, state = make_train_step(loss_fn, optax.sgd(0.1)), TrainState.create(PARAMS, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"needs a TrainState; got a dict\. Restore .*TrainState\.create\(params, tx\)"):
        step(state._asdict(), jnp.ones((4, 2)))


def test_numbers_of_numpy():
    assert Every(np.int64(0), np.int32(100), np.int64(200)) == Every(0, 100, 200)
    with pytest.raises(TypeError, match=r"Every counts calls in integers; got 0, 1\.5"):
        Every(0, 1.5)
    with pytest.raises(TypeError, match=r"when=Every\(start, every, end\), .* got 100"):
        sparsify(optax.sgd(0.1), methods.set(), sparsity=0.5, when=100)
    for make in (s2sam, sam):
        with pytest.raises(ValueError, match="rho must be"):
            make(np.float32(-1))
    with pytest.raises(ValueError, match=r"grad_dtype must be a floating type.* got int8"):
        s2sam(grad_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"clean_dtype must be a floating type.* got int32"):
        s2sam_wrapper(optax.sgd(0.1), clean_dtype=jnp.int32)


# Programs

LOOKS = {
    "hessian": lambda loss, w, batches: analysis.hessian_trace(loss, w, jax.random.key(0), batches, samples=2)[0],
    "sharpness": lambda loss, w, batches: analysis.sam_sharpness(loss, w, batches, rho=0.1),
    "surface": lambda loss, w, batches: analysis.loss_surface(loss, w, [w], batches, n=3).max(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_loss_that_closes_over_other_values_is_another_loss(look):
    """As one in evaluation mode does over BatchNorm statistics. A call is one program for all its batches."""
    stats, traces = {"scale": 1.0}, []

    def loss(w, batch):
        traces.append(1)
        return stats["scale"] * jnp.sum(batch * w**2)

    batches = [jnp.ones(3)] * 4
    first, traced = look(loss, jnp.ones(3), batches), len(traces)
    stats["scale"] = 10.0
    np.testing.assert_allclose(look(loss, jnp.ones(3), batches), 10 * first, rtol=1e-5)
    assert len(traces) == 2 * traced < 8


def test_recalibrating_traces_once_a_call_and_names_what_it_keeps():
    traces = []

    def loss(params, state, batch, key):
        traces.append(1)
        vector = jnp.tanh(params * state["vector"])
        h = batch / jnp.sum(vector)
        return jnp.sum(params), ({"vector": vector, "mean": 0.9 * state["mean"] + 0.1 * jnp.mean(h)}, {})

    state = {"vector": jnp.full(3, 0.3), "mean": jnp.zeros(())}
    with pytest.warns(UserWarning, match=r"recalibrate_batch_stats kept \['mean', 'vector'\]"):
        recalibrate_batch_stats(loss, 2 * jnp.ones(3), state, [jnp.ones(3), jnp.zeros(3)])
    assert len(traces) == 1


# States and clocks


@pytest.mark.parametrize("inner", [optax.contrib.schedule_free_sgd(1e-3), optax.rprop(0.1)], ids=["free", "rprop"])
def test_masks_set_on_a_fresh_state_leave_their_weights_alone(inner):
    old = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, seed=1).init(PARAMS)
    params, tx = apply_masks(PARAMS, old), sparsify(inner, methods.static(), sparsity=0.5)
    state = set_masks(tx.init(params), get_masks(old))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["kernel"], params["kernel"], rtol=1e-6)
    for _ in range(2):  # steps that move: not only the weights, the state of the optimizer is live as well
        updates, state = tx.update(params, state, params)
    moved = np.asarray(updates["kernel"] != 0)
    np.testing.assert_array_equal(moved, np.asarray(get_masks(old)["kernel"]))


def skip_spikes(inner, most):
    """A wrapper as users write them, which leaves everything as it was where the gradient is large."""
    inner = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, **extra_args):
        updates, new = inner.update(grads, state, params, **extra_args)
        bad = optax.tree.norm(grads) > most
        updates = jax.tree.map(lambda u: jnp.where(bad, 0 * u, u), updates)
        return updates, jax.tree.map(lambda before, after: jnp.where(bad, before, after), state, new)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def test_the_clock_on_the_host_waits_for_a_users_wrapper():
    tx = skip_spikes(sparsify(optax.sgd(1e-3), methods.set(0.5), sparsity=0.5, when=Every(5, 5, 20)), most=100.0)
    step, state, fired = make_train_step(loss_fn, tx), TrainState.create(PARAMS, tx), []
    for call in range(20):
        before = np.asarray(get_masks(state.opt_state)["kernel"])
        state, _ = step(state, jnp.full(4, 1e6 if call in (1, 3) else 1.0))
        if (np.asarray(get_masks(state.opt_state)["kernel"]) != before).any():
            fired.append(call)
    assert fired == [7, 12, 17]  # two calls later than without the two that were skipped


def test_options_of_numpy_and_large_seeds_and_ends():
    tx = sparsify(optax.sgd(0.1), methods.set(), sparsity=np.float32(0.8), when=Every(1, 2, sys.maxsize), seed=2**40)
    state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)[1]
    assert int(state.nnz[0]) == 20
    assert TrainState.create(PARAMS, tx, seed=2**32 - 1).key.shape == ()
    with pytest.raises(ValueError, match=r"start and every must be below 2\*\*31 - 1"):
        Every(2**31)


@pytest.mark.parametrize("name", ["rigl", "set", "itop", "mest", "gmp"])
def test_strict_promotion(name):
    tx = sparsify(optax.sgd(0.1), getattr(methods, name)(), sparsity=0.5, when=Every(0, 2, 20))
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(PARAMS)
        _, state = jax.jit(tx.update)(PARAMS, state, apply_masks(PARAMS, state))
    check = 100 if name == "gmp" else 50
    assert int(state.nnz[0]) == check


def test_memory_in_float8():
    tx = s2sam(rho=0.5, grad_dtype=jnp.float8_e4m3fn)
    _, state = tx.update(jnp.array([0.0, 2.0]), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_allclose(perturb(jnp.array([3.0, 4.0]), state), [3.0, 4.5])


def test_masks_of_several_networks_are_looked_at_one_by_one():
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    states = jax.vmap(lambda key: TrainState.create(PARAMS, tx, seed=key))(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="check_masks looks at one network"):
        check_masks(states.params, states)
    one = jax.tree.map(lambda x: x[1], states)
    check_masks(one.params, one)


# Meshes, wrappers, precision, and derivatives of training itself

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


def test_a_batch_leaf_without_examples_is_named():
    def loss(params, model_state, batch, key):
        return product_loss(params, model_state, batch["x"], key)

    tx = optax.chain(ssam(0.1, mask="fisher"), optax.sgd(0.1))
    state = TrainState.create({"kernel": jnp.ones((4, 8))}, tx)
    with pytest.raises(ValueError, match=r"fisher_examples chooses examples, but a batch leaf has none"):
        make_train_step(loss, tx)(state, {"x": IMAGES, "epoch": jnp.int32(1)})


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
        perturb(PARAMS, apart.init(PARAMS))
    perturb(PARAMS, around(optax.chain(s2sam(0.1), optax.sgd(0.1))).init(PARAMS))
    parted = optax.partition({"a": s2sam(0.1), "b": around(optax.sgd(0.1))}, {"x": "a", "y": "b"})
    two = {"x": jnp.ones(2), "y": jnp.ones(2)}
    perturb(two, parted.init(two))  # of other leaves


def test_derivatives_of_training_are_the_same_forwards_and_backwards():
    tx = optax.chain(s2sam(0.1), optax.sgd(0.1))

    def trained(w):
        def body(carry, _):
            w, state = carry
            grads = jax.grad(lambda w: jnp.sum(w**4))(perturb(w, state))
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(body, (w, tx.init(w)), None, length=3)
        return jnp.sum(w**4)

    start = jnp.array([0.3, 0.4, 0.5, 0.6])
    backwards = jax.grad(trained)(start)
    assert jnp.isfinite(backwards).all()
    np.testing.assert_allclose(jax.jacfwd(trained)(start), backwards, rtol=1e-5)


def test_eigenvalues_of_bfloat16_weights_are_those_of_float32():
    curvature = jnp.concatenate([jnp.array([100.0, 5, 4, 3, 2]), jnp.linspace(0, 1, 95)])

    def loss(w, batch):
        return 0.5 * jnp.sum(batch * w.astype(jnp.float32) ** 2)

    values, bounds = analysis.top_eigenvalues(
        loss, jnp.ones(100, jnp.bfloat16), jax.random.key(0), [curvature], steps=60
    )
    np.testing.assert_allclose(values, [100, 5, 4, 3, 2], rtol=1e-4)
    assert (bounds < 1e-2).all()


def test_analyses_say_what_is_wrong_with_their_input():
    key, one = jax.random.key(0), [jnp.ones(3)]
    with pytest.raises(FloatingPointError, match="product with the Hessian is not finite"):
        analysis.top_eigenvalues(lambda w, b: jnp.sum(jnp.sqrt(w - b)), jnp.ones(3), key, one, k=1)
    with pytest.raises(ValueError, match="needs weights that are live"):
        analysis.hessian_spectrum(lambda w, b: jnp.sum(w**2), jnp.ones(3), key, one, masks=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="rho must be"):
        analysis.sam_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(3), one, rho=-0.1)
    exact = analysis.sam_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(3), one, rho=0.5)
    assert analysis.sam_sharpness(lambda w, b: jnp.sum(w**2), jnp.ones(3), one, rho=jnp.float32(0.5)) == exact


def test_offsets_of_haikus_norms_stay_dense():
    params = {"batch_norm": {"offset": jnp.zeros((1, 1, 1, 8)), "scale": jnp.ones((1, 1, 1, 8))}, **PARAMS}
    masks = get_masks(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params))
    assert all(bool(mask.all()) for mask in masks["batch_norm"].values())
    assert int(masks["kernel"].sum()) == 50


def test_a_clock_that_was_set_by_hand_is_heard():
    tx = sparsify(optax.sgd(0.1), methods.set(0.5), sparsity=0.5, when=Every(50, 50, 100))
    state, step = TrainState.create(PARAMS, tx), make_train_step(loss_fn, tx)
    for _ in range(3):
        state, _ = step(state, jnp.ones(2))
    state = state._replace(opt_state=state.opt_state._replace(next_update=jnp.int32(3)))
    before = jax.device_get(get_masks(state.opt_state)["kernel"])
    state, _ = step(state, jnp.ones(2))
    assert int(state.opt_state.next_update) == 50
    assert (before != get_masks(state.opt_state)["kernel"]).any()


def test_a_wrapper_of_some_leaves_has_their_clean_weights():
    tx = optax.partition({"w": s2sam_wrapper(optax.sgd(0.1), rho=0.5), "s": optax.sgd(0.1)}, {"a": "w", "b": "s"})
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    clean = eval_params(params, state)
    np.testing.assert_allclose(clean["a"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(params["a"], 0.9 + 0.5 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(clean["b"], params["b"])


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

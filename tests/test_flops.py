"""FLOPs of layers counted by hand, of published networks, and of training by the papers' figures."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec
from rich.console import Console

from experiments import tasks
from experiments.config import Config
from experiments.training import flops, sparse_methods
from s2sam_jax import ChannelAxis, ChannelGroup, apply_masks, sparsify
from s2sam_jax.analysis import layer_flops, masked_flops, training_flops


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **{"window_strides": (1, 1), "padding": "SAME"} | options
    )


# Layers by hand


def two_layers(p, x):
    return jax.nn.relu(x @ p["one"] + p["bias"]) @ p["two"]


def test_dense_layers():
    params = {"one": shape(3, 8), "bias": shape(8), "two": shape(8, 2)}
    assert layer_flops(two_layers, params, shape(1, 3)) == {"one": 2 * 3 * 8, "two": 2 * 8 * 2}
    assert layer_flops(two_layers, params, shape(5, 3)) == {"one": 5 * 48, "two": 5 * 32}
    assert layer_flops(lambda w, x: jnp.dot(x, w), shape(7), shape(4, 7)) == {"": 2 * 4 * 7}


@pytest.mark.parametrize(
    ("kernel", "options", "expected"),
    [
        ((3, 3, 4, 6), {}, 7 * 7 * 6 * 9 * 4),
        ((3, 3, 4, 6), {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))}, 4 * 4 * 6 * 9 * 4),
        ((3, 3, 4, 6), {"padding": "VALID"}, 5 * 5 * 6 * 9 * 4),
        ((3, 3, 1, 4), {"feature_group_count": 4}, 7 * 7 * 4 * 9),  # depthwise
        ((1, 1, 2, 6), {"feature_group_count": 2}, 7 * 7 * 6 * 2),
    ],
)
def test_convolutions(kernel, options, expected):
    got = layer_flops(lambda p, x: conv(x, p["kernel"], **options), {"kernel": shape(*kernel)}, shape(2, 7, 7, 4))
    assert got == {"kernel": 2 * 2 * expected}


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("strides", "kernel"), [((2, 2), (2, 2, 4, 6)), ((3, 2), (3, 3, 4, 6)), ((1, 2), (1, 5, 4, 6))]
)
def test_every_input_of_a_transposed_convolution_meets_every_tap(strides, kernel, padding):
    def net(p, x):
        return jax.lax.conv_transpose(x, p["kernel"], strides, padding)

    assert layer_flops(net, {"kernel": shape(*kernel)}, shape(2, 5, 7, 4)) == {
        "kernel": 2 * 2 * 5 * 7 * np.prod(kernel)
    }


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_and_its_gradient_by_the_image_have_the_same_products(groups):
    options = {"window_strides": (2, 3), "padding": ((1, 1), (1, 1)), "feature_group_count": groups}

    def forward(p, x):
        return conv(x, p, **options)

    kernel, image, output = shape(3, 3, 4 // groups, 8), shape(2, 7, 7, 4), shape(2, 4, 3, 8)
    expected = {"": 2 * 2 * (4 * 3) * 9 * (4 // groups) * 8}
    assert layer_flops(forward, kernel, image) == expected

    def back(p, y):
        return jax.linear_transpose(lambda x: forward(p, x), image)(y)

    assert layer_flops(back, kernel, output) == expected


def heads(x):
    return x.reshape(*x.shape[:2], 2, -1)


def test_attention_counts_products_of_activations_apart():
    params = {name: shape(8, 8) for name in ("query", "key", "value", "out")}

    def net(p, x):
        query, key, value = (heads(x @ p[name]) for name in ("query", "key", "value"))
        return jax.nn.dot_product_attention(query, key, value).reshape(x.shape) @ p["out"]

    got = layer_flops(net, params, shape(3, 5, 8))
    activations = got.pop("(activations)")
    assert activations == 2 * (2 * 3 * 5 * 5 * 8)  # scores, and sums of values
    assert got == dict.fromkeys(params, 2 * 3 * 5 * 8 * 8)


MASK = np.eye(4, dtype=bool)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.astype(jnp.bfloat16),
        lambda w: jnp.where(MASK, w, 0.0),
        lambda w: w * MASK,
        lambda w: w.T,
        lambda w: w.reshape(2, 8).reshape(4, 4),
        lambda w: w / jnp.linalg.norm(w, axis=0),
        lambda w: jax.lax.stop_gradient(w) + 0.1 * jax.nn.softplus(w),
        lambda w: jax.jit(lambda v: 2 * v)(w),
    ],
)
def test_a_changed_parameter_is_still_that_parameter(change):
    got = layer_flops(lambda p, x: jnp.matmul(x, change(p["w"])), {"w": shape(4, 4)}, shape(1, 4))
    assert got == {"w": 32}


def test_masks_may_be_inputs_of_where():
    mask = shape(4, 4, dtype=jnp.bool_)
    assert layer_flops(lambda w, m, x: x @ jnp.where(m, w, 0.0), shape(4, 4), mask, shape(1, 4)) == {"": 32}


def test_a_batch_of_matrices_and_one_that_is_broadcast():
    got = layer_flops(lambda w, x: jnp.einsum("bi,bij->bj", x, w), shape(6, 3, 5), shape(6, 3))
    assert got == {"": 2 * 6 * 15}
    got = layer_flops(
        lambda w, x: jnp.einsum("bi,bij->bj", x, jnp.broadcast_to(w, (6, 3, 5))), shape(3, 5), shape(6, 3)
    )
    assert got == {"": 2 * 6 * 15}


def test_in_a_mixture_of_experts_each_row_meets_one_expert():
    params = {"experts": jnp.ones((2, 3, 5))}

    def net(params, x, sizes):
        return jax.lax.ragged_dot(x, params["experts"], sizes)

    arguments = params, jnp.ones((4, 3)), jnp.array([1, 3])
    assert layer_flops(net, *arguments) == {"experts": 2 * 4 * 3 * 5}
    both = layer_flops(jax.grad(lambda *args: net(*args).sum()), *arguments)
    assert sum(both.values()) == 2 * 2 * 4 * 3 * 5  # the product, if it is kept, and its gradient by the experts


def test_parameters_that_touch_activations_own_no_product():
    """The scale, the positions and the embedding are larger than the kernel behind them."""
    params = {"embedding": shape(50, 3), "position": shape(10, 3), "scale": shape(7, 10, 3), "w": shape(3, 2)}

    def net(p, tokens):
        return (p["scale"] * (p["embedding"][tokens] + p["position"])) @ p["w"]

    assert layer_flops(net, params, shape(7, 10, dtype=jnp.int32)) == {"w": 7 * 10 * 12}


def test_a_parameter_used_twice_counts_twice_and_of_two_the_larger():
    params = {"scale": shape(3), "w": shape(4, 3)}
    assert layer_flops(lambda p, x: (x @ p["w"]) @ p["w"].T, params, shape(1, 4)) == {"w": 2 * 24}
    assert layer_flops(lambda p, x: x @ (p["scale"] * p["w"]), params, shape(1, 4)) == {"w": 24}


# Programs inside programs

W = {"w": shape(4, 4), "u": shape(4, 4)}


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, jnp.broadcast_to(p["w"], (3, 4, 4)))[0], {"w": 96}),
        (lambda p, x: jax.lax.fori_loop(0, 5, lambda _, h: h @ p["w"], x), {"w": 160}),
        (lambda p, x: jax.lax.fori_loop(0, 5, lambda _, h: jax.lax.fori_loop(0, 2, lambda _, h: h @ p["w"], h), x),
         {"w": 320}),
        (lambda p, x: jax.checkpoint(lambda h: jax.nn.relu(h @ p["w"]))(x), {"w": 32}),
        (lambda p, x: product(x, p["w"]), {"w": 32}),
        (lambda p, x: jax.jit(lambda h, w: h @ w)(x, p["w"]), {"w": 32}),
        (lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["u"] @ p["u"], lambda: x @ p["w"]), {"u": 64}),
        (lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["u"] @ p["u"]), {"u": 64}),
        (lambda p, x: jax.lax.while_loop(lambda h: h[0, 0] < 9, lambda h: h + 1, x) @ p["w"], {"w": 32}),
        (lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), {"w": 32}),
    ],
)  # fmt: skip
def test_nested_programs(net, expected):
    assert layer_flops(net, W, shape(1, 4)) == expected


def test_scan_over_stacked_layers():
    params = {"kernel": shape(6, 4, 4), "bias": shape(6, 4)}

    def layer(h, p):
        return jnp.tanh(h @ p["kernel"] + p["bias"]), h

    assert layer_flops(lambda p, x: jax.lax.scan(layer, x, p), params, shape(2, 4)) == {"kernel": 6 * 2 * 32}


def test_a_carry_that_becomes_an_activation_on_a_later_turn():
    """It starts as a parameter larger than the kernel."""

    def net(p, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]) + x, None), p["start"], length=3)[0]

    assert layer_flops(net, {"start": shape(9, 4), "w": shape(4, 4)}, shape(9, 4)) == {"w": 3 * 9 * 32}


def test_shard_map_counts_all_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    net = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    assert layer_flops(net, shape(4, 4), shape(8, 4)) == {"": 8 * 32}


def test_products_that_run_nobody_knows_how_often():
    def net(p, x):
        return jax.lax.while_loop(lambda h: h[0, 0] < 9, lambda h: h @ p["w"], x)

    with pytest.raises(ValueError, match=r"'while'.*lax\.scan"):
        layer_flops(net, W, shape(1, 4))


# Frameworks


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Conv(6, (3, 3), strides=2, padding=1)(x))
        return linen.Dense(5)(linen.LayerNorm()(x.mean((1, 2))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), strides=2, padding=1, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(jax.nn.relu(self.conv(x)).mean((1, 2))))


def test_frameworks_agree():
    x = shape(1, 8, 8, 4)
    expected = [2 * 4 * 4 * 6 * 9 * 4, 2 * 6 * 5]
    params = {"a": shape(3, 3, 4, 6), "b": shape(6), "c": shape(6, 5)}

    def net(p, x):
        x = conv(x, p["a"], window_strides=(2, 2), padding=((1, 1), (1, 1)))
        return jax.nn.relu(x + p["b"]).mean((1, 2)) @ p["c"]

    assert layer_flops(net, params, x) == dict(zip("ac", expected, strict=True))

    variables = jax.eval_shape(Linen().init, jax.random.key(0), x)
    got = layer_flops(Linen().apply, variables, x)
    assert got == dict(zip(["params/Conv_0/kernel", "params/Dense_0/kernel"], expected, strict=True))

    graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
    for params in (state, nnx.as_pure(state)):
        got = layer_flops(lambda p, x: nnx.merge(graph, p)(x), params, x)
        assert got == dict(zip(["conv/kernel", "dense/kernel"], expected, strict=True))


def test_equinox():
    import equinox as eqx

    net = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)
    got = layer_flops(lambda p, x: eqx.combine(p, static)(x), params, shape(3))
    assert got == {"layers/0/weight": 48, "layers/1/weight": 32}


# Masks


def test_masked_flops():
    params = {"one": shape(3, 8), "bias": shape(8), "two": shape(8, 2)}
    masks = {"one": np.arange(24).reshape(3, 8) % 4 == 0, "bias": np.ones(8, bool), "two": np.eye(8, 2, dtype=bool)}
    layers = layer_flops(two_layers, params, shape(1, 3))
    assert masked_flops(layers, masks) == {"one": 12.0, "two": 4.0}
    assert masked_flops(layers | {"(activations)": 7}, masks)["(activations)"] == 7
    with pytest.raises(ValueError, match=r"\['two'\]"):
        masked_flops(layers, {"one": masks["one"]})
    with pytest.raises(TypeError, match=r"\['one'\]"):
        masked_flops(layers, masks | {"one": np.ones((3, 8))})


# Training


def cubic(start, end, steps):
    """Gradual pruning at each step, as if masks changed at all of them."""
    return 1 - (1 - np.clip((np.arange(steps) - start) / (end - start), 0, 1)) ** 3


PHASES = {"s2sam": (100, 130), "mest": (90, 120)}


def soft_bound(phases):
    """Densities of the 160 epochs of EM&S at 90 %."""
    return np.select([np.arange(160) < phases[0], np.arange(160) < phases[1]], [0.15, 0.125], 0.1)


def test_training_formulas_give_the_published_figures():
    def ratio(sparse, **options):
        return training_flops(1.0, sparse, **options) / training_flops(1.0, 1.0)

    assert training_flops(8.2e9, 8.2e9) == 3 * 8.2e9
    assert f"{training_flops(8.2e9, 8.2e9) * 32_000 * 4096:.1e}" == "3.2e+18"
    assert ratio(0.23) == pytest.approx(0.23)
    assert round(ratio(0.23, dense_gradient_every=100), 4) == 0.2325
    assert round(ratio(0.42, dense_gradient_every=100), 4) == 0.4219
    assert round(ratio(0.42, dense_gradient_every=0), 3) == 0.613  # SNFS
    assert ratio(0.23, gradients=2) == pytest.approx(0.46)
    assert round(ratio(soft_bound(PHASES["s2sam"])), 4) == 0.1359
    assert round(ratio(soft_bound(PHASES["mest"])), 4) == 0.1328
    chase = 0.1 + 0.05 * (1 + np.cos(np.pi * np.linspace(0, 1, 5))) / 2
    np.testing.assert_allclose(chase, [0.15, 0.1427, 0.125, 0.1073, 0.1], atol=5e-5)
    assert ratio(chase) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1.0, 2.0), {}, "sparse <= dense"),
        ((1.0, []), {}, "sparse <= dense"),
        ((1.0, [0.5, np.nan]), {}, "sparse <= dense"),
        ((1.0, -0.1), {}, "sparse <= dense"),
        ((1.0, 0.5), {"gradients": 0}, "gradients > 0"),
        ((1.0, 0.5), {"dense_gradient_every": -1}, "dense_gradient_every >= 0"),
    ],
)
def test_training_flops_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        training_flops(*arguments, **options)


# The ledger of a run


@functools.cache
def network_of(config):
    networks = []

    def build():
        networks.append(tasks.build(config))
        return networks[0][:2]

    params, model_state = jax.eval_shape(build)
    return networks[0]._replace(params=params, model_state=model_state)


def by_name(config, steps=100, **options):
    network = network_of(dataclasses.replace(config, optimizer="sgd", method="dense"))
    return {entry.name: entry for entry in flops.ledger(config, network, steps, **options)}


RESNET50 = Config(
    dataset="imagenet2012", model="resnet50", optimizer="sgd", batch_size=4096, epochs=100, update_every=100 / 320
)


@pytest.mark.parametrize(("sparsity", "erk"), [(0.8, 0.414), (0.9, 0.242), (0.95, 0.122)])
def test_resnet50(sparsity, erk):
    got = by_name(dataclasses.replace(RESNET50, sparsity=sparsity), steps=320)
    forward = got[flops.FORWARD]
    assert f"{forward.dense:.1e}" == "8.2e+09"
    assert round(forward.sparse / forward.dense, 3) == erk
    run = got[flops.RUN]
    assert f"{run.dense:.1e}" == "3.2e+18"
    expected = (3 * forward.sparse * 100 + 2 * forward.sparse + forward.dense) / 101
    assert run.sparse / run.dense == pytest.approx(expected / (3 * forward.dense))


@pytest.mark.parametrize(("model", "mega"), [("resnet32", 551), ("vgg19", 796)])
def test_networks_for_cifar(model, mega):
    got = by_name(Config(dataset="cifar10", model=model, sparsity=0.9))
    assert round(got[flops.FORWARD].dense / 1e6) == mega
    if model == "resnet32":
        assert round(got[flops.FORWARD].sparse / got[flops.FORWARD].dense, 3) == 0.175


def test_gmp_of_resnet50_takes_0_56_of_the_dense_training():
    """In RigL's comparison the first layer stays dense."""
    got = by_name(dataclasses.replace(RESNET50, method="dense"))
    total, stem = got[flops.FORWARD].dense, got["stem/kernel"].dense
    trace = cubic(10_000, 25_000, 32_000)
    ratio = training_flops(total, stem + (total - stem) * (1 - 0.8 * trace)) / (3 * total)
    assert round(ratio, 2) == 0.56


DIGITS = Config(width=4, epochs=10, batch_size=50, optimizer="sgd")


@pytest.mark.parametrize(
    ("optimizer", "ssam_sparsity", "relative"),
    [("sgd", 0.5, 1.0), ("s2sam", 0.5, 1.0), ("msam", 0.5, 1.0), ("sam", 0.5, 2.0), ("asam", 0.5, 2.0)]
    + [("gsam", 0.5, 2.0), ("looksam", 0.5, 1.2), ("esam", 0.5, 2.17)]
    + [("ssam-f", s, r) for s, r in zip((0.5, 0.8, 0.9, 0.95, 0.98, 0.99), (1.65, 1.44, 1.36, 1.33, 1.31, 1.30),
                                        strict=True)]
    + [("ssam-d", 0.5, 1.65)],
)  # fmt: skip
def test_relative_cost_of_the_optimizers(optimizer, ssam_sparsity, relative):
    config = dataclasses.replace(DIGITS, optimizer=optimizer, ssam_sparsity=ssam_sparsity)
    assert round(flops.gradient_evaluations(config), 2) == relative


def test_optimizer_and_method_multiply():
    def cost(**changes):
        return by_name(dataclasses.replace(DIGITS, **changes))[flops.TRAINING].sparse

    dense = cost(method="dense")
    assert dense == by_name(DIGITS)[flops.TRAINING].dense
    assert cost(method="static") < cost(method="rigl") < 1.05 * cost(method="static")
    assert cost(method="mest-em") == cost(method="set") == cost(method="static")
    assert cost(method="rigl", optimizer="sam") == 2 * cost(method="rigl", optimizer="s2sam")
    assert cost(method="dense", optimizer="sam") == 2 * dense
    assert cost(method="static", optimizer="s2sam-released") == dense  # it perturbs pruned weights


@pytest.mark.parametrize("method", ["gmp", "mest-ems", "lottery"])
def test_planned_zeros_are_those_of_the_masks(method):
    config = Config(method=method, sparsity=0.8, epochs=20, update_every=1, rewind_epochs=0.5 * (method == "lottery"))
    steps = 8
    clock = sparse_methods.clock(config, steps)
    tx = sparsify(optax.sgd(0.01), sparse_methods.make(config), sparsity=0.8, distribution="uniform", when=clock)
    params = {"kernel": jax.random.normal(jax.random.key(0), (20, 50))}
    state = tx.init(params)
    update = jax.jit(lambda p, s: tx.update(p, s, p, refresh_masks=None))
    params, zeros = apply_masks(params, state), []
    for _ in range(config.epochs * steps):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        zeros.append(1 - int(state.nnz.sum()) / 1000)
    share = flops.pruned_share(config, steps)
    np.testing.assert_allclose(share, np.asarray(zeros) / 0.8, atol=5e-3)  # counts are whole
    assert share[-1] == 1.0


def test_a_density_that_nobody_planned_must_be_recorded():
    group, config = (
        ChannelGroup("hidden", filters=(ChannelAxis("kernel", -1),)),
        dataclasses.replace(DIGITS, method="chase"),
    )
    assert flops.pruned_share(config, 10, [group]) is None
    with pytest.raises(ValueError, match=r"chase needs a sparsity an epoch, 10; got 3"):
        flops.pruned_share(config, 10, [group], [0.0, 0.3, 0.6])
    unknown = by_name(dataclasses.replace(DIGITS, method="chex", sparsity=0.6))
    assert np.isnan([unknown[flops.TRAINING].sparse, unknown[flops.RUN].sparse]).all()
    assert unknown[flops.FORWARD].sparse > 0
    assert "unknown" in [str(cell) for cell in flops.table(list(unknown.values())).columns[2].cells]


def test_recorded_sparsities_and_masks():
    config = dataclasses.replace(DIGITS, method="chex", sparsity=0.6)
    network = network_of(dataclasses.replace(config, method="dense"))
    masks = jax.tree.map(lambda p: np.arange(np.prod(p.shape)).reshape(p.shape) % 4 == 0, network.params)
    got = {
        e.name: e for e in flops.ledger(config, network, 28, masks=masks, sparsities=[0.0] * 4 + [0.3] * 3 + [0.6] * 3)
    }
    dense, sparse = got[flops.FORWARD].dense, got[flops.FORWARD].sparse
    assert sparse == dense / 4
    assert got[flops.TRAINING].sparse == pytest.approx(3 * (0.4 * dense + 0.3 * (dense + sparse) / 2 + 0.3 * sparse))
    assert got[flops.RUN].sparse == pytest.approx(got[flops.TRAINING].sparse * 10 * 28 * 50)
    planned = dataclasses.replace(config, method="gmp")  # how often a run looks changes nothing there
    ledgers = [flops.ledger(planned, network, 28, masks=masks, sparsities=s) for s in (None, [0.6])]
    assert ledgers[0] == ledgers[1]


def test_memory_in_copies_of_the_parameters():
    def copies(**changes):
        return by_name(dataclasses.replace(DIGITS, **changes))[flops.STATE].sparse

    sgd = copies(method="dense")
    assert sgd == pytest.approx(1, abs=0.01)  # the momentum
    assert copies(method="dense", optimizer="s2sam") - sgd == pytest.approx(1, abs=0.01)
    assert copies(method="dense", optimizer="sam") - sgd == pytest.approx(0, abs=0.01)
    assert copies(method="dense", optimizer="ssam-d") - sgd == pytest.approx(0.25, abs=0.01)
    assert copies(method="rigl") - sgd == pytest.approx(0.25, abs=0.02)  # masks, and nothing of its own
    assert copies(method="lottery", sparsity=0.5) - sgd == pytest.approx(2.25, abs=0.03)  # weights and momentum
    assert copies(method="rigl", optimizer="s2sam") - sgd == pytest.approx(1.25, abs=0.02)


def test_text():
    config = Config(
        dataset="wmt14", model="transformer-base", width=64, vocabulary=50, max_length=7, optimizer="sgd",
        method="gmp", sparsity=0.8, epochs=10,
    )  # fmt: skip
    got = by_name(config)
    assert got["(activations)"].dense == got["(activations)"].sparse == 18 * 2 * (2 * 7 * 7 * 64)
    assert got["embedding"].dense == 2 * 7 * 64 * 50  # as the last layer alone
    assert got["encoder/0/feed_forward/inner/kernel"].dense == 2 * 7 * 64 * 256
    matrices = 6 * (4 + 8) + 6 * (8 + 8)  # of width by width
    assert got[flops.FORWARD].dense == 2 * 7 * (64 * 64 * matrices + 64 * 50) + got["(activations)"].dense
    assert got[flops.TRAINING].sparse > 3 * got[flops.FORWARD].sparse


def test_table():
    config = dataclasses.replace(DIGITS, width=8)
    entries = flops.ledger(config, network_of(config), 28)
    assert (entries[0].name, entries[0].dense) == ("stem/kernel", 2 * 64 * 9 * 8)

    def printed(*args, **options):
        console = Console(width=120, file=io.StringIO())
        console.print(flops.table(*args, **options))
        return console.file.getvalue()

    short, long = printed(entries), printed(entries, layers=True)
    assert "stem/kernel" not in short
    assert "stem/kernel" in long
    assert "9.22 kFLOP" in long
    for name in (flops.FORWARD, flops.TRAINING, flops.RUN, flops.STATE):
        assert name in short

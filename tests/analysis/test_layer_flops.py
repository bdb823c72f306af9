"""FLOPs of layers, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

from s2sam_jax.analysis import layer_flops, masked_flops


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **{"window_strides": (1, 1), "padding": "SAME"} | options
    )


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

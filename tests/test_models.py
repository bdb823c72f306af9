"""The models: published sizes, layer densities and operation counts, and what each must do in training."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import named, numbers
from flax import nnx
from oracles_models import batch_norm, close, convolve, layer_norm

from experiments import models, tasks
from experiments.config import Config
from experiments.models import (
    layers,
    resnet,
    transformer,
)
from s2sam_jax import channel_masks, erdos_renyi_kernel, materialize
from s2sam_jax._sparsity.channels import group_sizes


def shapes(name, classes=None, width=None, dtype=jnp.float32):
    """A model without its numbers: shapes of parameters and state, and ``apply``."""
    return _shapes(name, classes or models.MODELS[name].classes, width, dtype)


@functools.cache
def _shapes(name, classes, width, dtype):
    return abstract(name, width=width, classes=classes, dtype=dtype)


def abstract(name, **options):
    networks = []

    def build():
        networks.append(models.build(name, channels=None if models.MODELS[name].text else 3, seed=0, **options))
        return networks[0][:2]

    return models.Network(*jax.eval_shape(build), *networks[0][2:])


def inputs_of(name, size=None):
    spec = models.MODELS[name]
    if spec.text:
        return tuple(jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (9, 7))
    size = size or spec.image_size
    return jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)


def forward(network, inputs):
    """The program of a training step's forward pass, and the shapes of logits and state."""

    def call(params, state, inputs):
        return network.apply(params, state, inputs, True, jax.random.key(0))

    closed, results = jax.make_jaxpr(call, return_shape=True)(*network[:2], inputs)
    return closed.jaxpr, *results


@functools.cache
def full_size(name, dtype=jnp.float32):
    return forward(shapes(name, dtype=dtype), inputs_of(name))


def equations(jaxpr):
    """Convolutions and matrix products, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def flops(name):
    """Twice the multiply-adds of each kernel, for one example of a batch of two."""
    jaxpr = full_size(name)[0]
    names = dict(zip(jaxpr.invars, named_shapes(shapes(name).params), strict=False))
    return {
        names[eqn.invars[1]]: eqn.outvars[0].aval.size * eqn.invars[1].aval.size // eqn.invars[1].aval.shape[-1]
        for eqn in equations(jaxpr)
    }


def named_shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# Sizes


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet8", 10, 78_042),
        ("resnet20", 10, 272_474),
        ("resnet32", 10, 1_860_522),
        ("resnet32", 100, 1_872_132),
        ("wrn28x10", 10, 36_479_194),
        ("resnet18-cifar", 10, 11_173_962),
        ("resnet34-cifar", 10, 21_282_122),
        ("resnet34", 1000, 21_797_672),
        ("resnet50", 1000, 25_557_032),
        ("vgg19", 10, 20_035_018),
        ("vgg19", 100, 20_081_188),
        ("mobilenet-v2-cifar", 10, 2_296_922),
        ("efficientnet-b0", 1000, 5_288_548),
        ("vit-small-cifar", 10, 5_362_762),
        ("vit-small", 1000, 5_717_416),  # DeiT-Ti
        ("transformer-base", 37_000, 63_045_632),
    ],
)
def test_published_size(name, classes, expected):
    assert count(shapes(name, classes).params) == expected


def test_vit_of_twice_the_width_has_the_size_of_deit_s():
    assert count(shapes("vit-small", width=384).params) == 22_050_664


def test_transformer_size_by_hand():
    attention, feed_forward, norm = 4 * 512**2, 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    assert count(shapes("transformer-base").params) == 6 * (encoder + decoder) + 37_000 * 512


# One name for each class and form of block.
NARROW = {
    "resnet8": 4,
    "wrn28x10": 4,
    "resnet18-cifar": 2,
    "resnet50": 2,
    "vgg19": 4,
    "mobilenet-v2-cifar": 4,
    "efficientnet-b0": 4,
    "vit-small-cifar": 8,
    "transformer-base": 8,
}


@pytest.mark.parametrize("name", models.MODELS)
def test_full_size_in_float32(name):
    products = list(equations(full_size(name)[0]))
    assert products
    assert {eqn.params["precision"] for eqn in products} == {(jax.lax.Precision.HIGHEST,) * 2}
    check_types(name, jnp.float32)


@pytest.mark.parametrize("name", NARROW)
def test_full_size_in_bfloat16(name):
    products = list(equations(full_size(name, jnp.bfloat16)[0]))
    assert len(products) == len(list(equations(full_size(name)[0])))
    wide = [eqn for eqn in products if {x.aval.dtype for x in eqn.invars} != {jnp.dtype("bfloat16")}]
    assert len(wide) == (0 if models.MODELS[name].text else 1), "only the classifier is in float32"
    check_types(name, jnp.bfloat16)


@pytest.mark.parametrize(
    ("compute", "precision"), [("float32", "HIGHEST"), ("tensorfloat32", "HIGH"), ("bfloat16", None)]
)
def test_precision_of_convolutions(compute, precision):
    """GPUs take TF32 for what is less than the highest."""
    network = tasks.build(Config(model="resnet8", width=2, compute=compute))
    traced = jax.make_jaxpr(lambda p, s, x: network.apply(p, s, x, True)[0])
    inputs = jnp.zeros((2, 8, 8, 1))
    found = [
        e
        for e in equations(traced(network.params, network.model_state, inputs).jaxpr)
        if "conv_general" in str(e.primitive)
    ]
    wanted = None if precision is None else (getattr(jax.lax.Precision, precision),) * 2
    assert found
    assert {e.params["precision"] for e in found} == {wanted}


def check_types(name, dtype):
    """Logits and parameters are float32; all that is state is BatchNorm's, in float32."""
    network, spec = shapes(name, dtype=dtype), models.MODELS[name]
    _, logits, state = full_size(name, dtype)
    assert logits.shape == ((2, 7, spec.classes) if spec.text else (2, spec.classes))
    assert logits.dtype == jnp.float32
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, network.model_state)]
    assert kinds[0] == kinds[1]
    assert {x.dtype for x in jax.tree.leaves((network.params, state))} == {jnp.dtype("float32")}
    assert {path.rsplit("/")[-1] for path in named_shapes(state)} <= {"mean", "var"}


def test_gradients_have_the_precision_of_the_forward_pass():
    network = shapes("transformer-base", width=8, classes=11)

    def loss(params, state, inputs):
        return network.apply(params, state, inputs, False)[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(*network[:2], inputs_of("transformer-base")).jaxpr
    assert {eqn.params["precision"][0] for eqn in equations(jaxpr)} == {jax.lax.Precision.HIGHEST}


# Densities and operations


def densities(name, classes, sparsity):
    plan = named_shapes(erdos_renyi_kernel(shapes(name, classes).params, sparsity))
    leaves = named_shapes(shapes(name, classes).params)
    return {path: 1 - plan[path] for path, leaf in leaves.items() if leaf.ndim >= 2}


def epsilon(name, classes, sparsity):
    """What multiplies (sum of the dimensions) / (product of the dimensions); the same in every layer that is sparse."""
    leaves = named_shapes(shapes(name, classes).params)
    found = [
        density * leaves[path].size / sum(leaves[path].shape)
        for path, density in densities(name, classes, sparsity).items()
        if density < 1
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-9)
    return found[0]


def dense(name, classes, sparsity):
    return {path for path, density in densities(name, classes, sparsity).items() if density == 1}


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet32", 10, (38.1215, 18.6876, 7.3754)),
        ("resnet32", 100, (36.8660, 18.2183, 7.2907)),
        ("vgg19", 10, (189.656, 94.503, 37.411)),
    ],
)
def test_erk_scale(name, classes, expected):
    got = [epsilon(name, classes, sparsity) for sparsity in (0.9, 0.95, 0.98)]
    np.testing.assert_allclose(got, expected, rtol=1.5e-5)  # their last digit


def test_erk_of_resnet32():
    plan = densities("resnet32", 10, 0.9)
    assert len(plan) == 34
    assert dense("resnet32", 10, 0.9) == {"stem/kernel", "blocks/5/shortcut/kernel", "head/kernel"}
    assert dense("resnet32", 10, 0.95) == {"head/kernel"}
    assert not dense("resnet32", 10, 0.98)
    paths = ["blocks/0/conv1", "blocks/6/conv1", "blocks/12/conv2", "blocks/5/conv1", "blocks/10/conv1"]
    got = [plan[f"{path}/kernel"] for path in [*paths, "blocks/10/shortcut"]]
    np.testing.assert_allclose(got, [0.28955, 0.13857, 0.06773, 0.21096, 0.10238, 0.90278], atol=5e-6)
    work = flops("resnet32")
    assert round(sum(work.values()) / 1e6) == 551
    assert round(sum(plan[path] * work[path] for path in work) / sum(work.values()), 3) == 0.175


def test_erk_of_vgg19():
    for sparsity in (0.9, 0.95, 0.98):
        assert dense("vgg19", 10, sparsity) == {"stages/0/0/conv1/kernel", "head/kernel"}
    work = flops("vgg19")
    assert round(sum(work.values()) / 1e6) == 796


def test_operations_are_the_published_ones():
    """Multiply-adds: of strides that come too early or too late there would be others, but as many parameters."""
    published = {"wrn28x10": 5.2, "resnet18-cifar": 0.56, "resnet34": 3.7, "efficientnet-b0": 0.39}
    found = {name: sum(flops(name).values()) / 2e9 for name in published}
    assert found == pytest.approx(published, rel=0.015)
    side, inputs, total = 32, 32, 32**2 * 27 * 32
    groups = [(1, 16, 1), (6, 24, 1), (6, 24, 1), *[(6, 32, s) for s in (2, 1, 1)], *[(6, 64, s) for s in (2, 1, 1, 1)],
              *[(6, 96, 1)] * 3, *[(6, 160, s) for s in (2, 1, 1)], (6, 320, 1)]  # fmt: skip
    for expansion, outputs, stride in groups:
        inner, after = expansion * inputs, side // stride
        total += side**2 * inputs * inner + after**2 * (9 * inner + inner * outputs)
        total += after**2 * inputs * outputs if stride == 1 and inputs != outputs else 0
        side, inputs = after, outputs
    assert sum(flops("mobilenet-v2-cifar").values()) == 2 * (total + 4**2 * 320 * 1280 + 1280 * 10)


def test_erk_of_resnet50():
    first = {f"blocks/{block}/{conv}/kernel" for block in range(3) for conv in ("conv1", "conv3")}
    assert dense("resnet50", 1000, 0.8) == first | {"blocks/0/shortcut/kernel", "blocks/3/conv1/kernel"}
    assert dense("resnet50", 1000, 0.9) == {"blocks/0/conv1/kernel"}
    work = flops("resnet50")
    assert round(sum(work.values()) / 1e9, 1) == 8.2
    for sparsity, erk, uniform in ((0.8, 0.414, 0.223), (0.9, 0.242, 0.126), (0.95, 0.122, 0.077)):
        plan = densities("resnet50", 1000, sparsity)
        ratio = sum(plan[path] * work[path] for path in work) / sum(work.values())
        assert round(ratio, 3) == erk
        rest = 1 - work["stem/kernel"] / sum(work.values())
        assert abs(1 - rest * sparsity - uniform) < 1e-3  # of a dense first layer


# Behaviour, in narrow forms

# Their gradient is zero: BatchNorm behind a 1x1 convolution, and the softmax, undo a shift.
UNDONE = {
    "mobilenet-v2-cifar": ("norm3/bias", "shortcut_norm/bias"),
    "efficientnet-b0": ("norm3/bias",),
    "vit-small-cifar": ("key/bias",),
}


@pytest.mark.parametrize("name", NARROW)
def test_training_and_evaluation(name, shallow):
    spec, rng = models.MODELS[name], np.random.default_rng(0)
    network = models.build(name, width=NARROW[name], channels=None if spec.text else 3, classes=10, seed=0)
    shape = (8, 6) if spec.text else (8, 32, 32, 3)
    inputs = (rng.integers(1, 10, shape),) * 2 if spec.text else rng.normal(size=shape).astype(np.float32)
    labels = inputs[1] if spec.text else np.arange(8)

    @jax.jit
    def run(params, key):
        def loss(params):
            logits, state = network.apply(params, network.model_state, inputs, True, key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), (logits, state)

        grads, (logits, state) = jax.grad(loss, has_aux=True)(params)
        return grads, logits, state, network.apply(params, network.model_state, inputs, False, key)

    grads, logits, state, (at_rest, kept) = jax.device_get(run(network.params, jax.random.key(0)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, logits, state, at_rest)))
    for path, grad in named(grads).items():
        assert grad.any() or path.endswith(UNDONE.get(name, ())), path
    before, after = named(network.model_state), named(state)
    assert before.keys() == after.keys()
    assert all((before[path] != after[path]).any() for path in before)
    jax.tree.map(np.testing.assert_array_equal, network.model_state, kept)

    _, again, _, (at_rest_again, _) = run(network.params, jax.random.key(1))
    assert (logits != again).any() == (name in ("efficientnet-b0", "transformer-base"))
    np.testing.assert_array_equal(at_rest, at_rest_again)


# Channels, by hand from the publications.
HIDDEN = {
    "resnet8": [16, 32, 64],
    "resnet20": [16] * 3 + [32] * 3 + [64] * 3,
    "resnet32": [32] * 5 + [64] * 5 + [128] * 5,
    "wrn28x10": [160] * 4 + [320] * 4 + [640] * 4,
    "resnet18-cifar": [64] * 2 + [128] * 2 + [256] * 2 + [512] * 2,
    "resnet34-cifar": [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3,
    "resnet34": [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3,
    "resnet50": [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6,
    "vgg19": [64] * 2 + [128] * 2 + [256] * 4 + [512] * 7,
    "mobilenet-v2-cifar": [32, 96] + [144] * 2 + [192] * 3 + [384] * 4 + [576] * 3 + [960] * 3,
    "efficientnet-b0": [96] + [144] * 2 + [240] * 2 + [480] * 3 + [672] * 3 + [1152] * 4,
    "vit-small-cifar": [768] * 12,
    "vit-small": [768] * 12,
    "transformer-base": [2048] * 12,
}


@pytest.mark.parametrize("name", models.MODELS)
def test_hidden_channels(name):
    network = shapes(name)
    sizes = group_sizes(network.params, network.groups, statistics=network.model_state)
    assert list(sizes.values()) == HIDDEN[name]
    assert all(group.name + "/kernel" == group.filters[0].path for group in network.groups)


def random_like(tree):
    """Norms and their statistics, biases and positions too: what is zero or one at first would hide a mistake."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        match jax.tree_util.keystr(path[-1:], simple=True):
            case "kernel":
                return 2 * noise / np.sqrt(np.float32(noise[..., 0].size))
            case "var":
                return np.abs(noise) + np.float32(0.1)
            case _:
                return noise

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize("name", NARROW)
def test_removing_channels_is_masking_them(name, shallow):
    """In evaluation, on everything random."""
    text, rng = models.MODELS[name].text, np.random.default_rng(1)
    network = abstract(name, width=NARROW[name], classes=10)
    inputs = (rng.integers(1, 10, (4, 6)),) * 2 if text else rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    params, state = random_like(network[:2])
    sizes = group_sizes(params, network.groups)
    alive = {group: rng.permutation(size) < (size + 1) // 2 for group, size in sizes.items()}
    masks = channel_masks(params, network.groups, alive)
    masked = jax.tree.map(lambda p, m: np.where(m, p, np.float32(0)), params, masks)

    small = materialize(masked, state, network.groups, masks)
    assert small.widths == {group: (size + 1) // 2 for group, size in sizes.items()}
    assert jax.tree.all(jax.tree.map(np.all, small.masks))
    rebuilt = abstract(name, width=NARROW[name], classes=10, widths=small.widths)
    assert jax.tree.map(jnp.shape, small[:2]) == jax.tree.map(jnp.shape, rebuilt[:2])
    assert group_sizes(small.params, rebuilt.groups, statistics=small.model_state) == small.widths

    full = jax.jit(lambda params: network.apply(params, state, inputs, False)[0])
    expected, dense = full(masked), full(params)
    got = jax.jit(lambda *weights: rebuilt.apply(*weights, inputs, False)[0])(*small[:2])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(dense - expected).max() > 0.01 * scale


def test_dropout_needs_a_key():
    network = shapes("efficientnet-b0")
    with pytest.raises(ValueError, match="efficientnet-b0 has dropout: in training, apply needs a key"):
        network.apply(*network[:2], None, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet9", "channels": 3}, "Unknown model 'resnet9'; there are resnet8, .*transformer-base"),
        ({"name": "resnet8", "channels": 3, "width": 0}, "width must be at least 1; got 0"),
        (
            {"name": "resnet8", "channels": 3, "widths": {"blocks/3/conv1": 4}},
            r"resnet8 has no channel groups \['blocks/3/conv1'\]; there are blocks/0/conv1, .*blocks/2/conv1",
        ),
        (
            {"name": "resnet8", "channels": 3, "widths": {"blocks/0/conv1": 0, "blocks/1/conv1": 1}},
            "resnet8 can have from 1 to {'blocks/0/conv1': 16} channels in these groups; got {'blocks/0/conv1': 0}",
        ),
        (
            {"name": "resnet8", "channels": 3, "widths": {"blocks/1/conv1": 33}},
            "resnet8 can have from 1 to {'blocks/1/conv1': 32} channels in these groups; got {'blocks/1/conv1': 33}",
        ),
        ({"name": "resnet8"}, "resnet8 needs the channels of its images; got channels=None"),
        ({"name": "transformer-base", "channels": 3}, "transformer-base needs no channels, being of text; got"),
        ({"name": "transformer-base", "width": 7}, "width must be even.*got width=7"),
        ({"name": "vit-small", "channels": 3, "width": 200}, "a multiple of its 3 attention heads; got width=200"),
    ],
)
def test_build_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: models.build(**arguments, classes=10, seed=0)[:2])


def test_vit_takes_images_of_its_size_only():
    with pytest.raises(ValueError, match=r"images of 32x32 pixels; got the shape \(2, 8, 8, 3\)"):
        forward(shapes("vit-small-cifar"), inputs_of("vit-small-cifar", size=8))


@pytest.mark.parametrize("name", ["vgg19", "resnet50"])
def test_pooling_leaves_something_of_small_images(name):
    """8x8 pixels, which four poolings would halve to none."""
    network = shapes(name, width=4, classes=10)
    jaxpr, logits, _ = forward(network, inputs_of(name, size=8))
    assert logits.shape == (2, 10)
    assert all(min(eqn.outvars[0].aval.shape) > 0 for eqn in equations(jaxpr))


# Against NumPy


def test_residual_block_against_numpy():
    block, p = numbers(lambda: resnet.Block("block", 3, 4, 2, widths={}, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 3))
    y = np.maximum(batch_norm(convolve(x, p["conv1/kernel"], 2), p, "norm1"), 0)
    y = batch_norm(convolve(y, p["conv2/kernel"], 1), p, "norm2")
    shortcut = batch_norm(convolve(x, p["shortcut/kernel"], 2), p, "shortcut_norm")
    close(block(jnp.float32(x), train=True), np.maximum(shortcut + y, 0))


def test_encoder_layer_against_numpy():
    """Two heads, and the last token masked."""
    layer, p = numbers(
        lambda: transformer.EncoderLayer("layer", 128, 0.1, widths={}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    x = np.random.default_rng(1).normal(size=(5, 128))
    query, key, value = (x @ p[f"attention/{name}/kernel"] for name in ("query", "key", "value"))
    heads = []
    for part in (slice(0, 64), slice(64, 128)):
        scores = query[:, part] @ key[:-1, part].T / 8
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:-1, part])
    y = layer_norm(x + np.concatenate(heads, -1) @ p["attention/out/kernel"], p, "norm1")
    inner = np.maximum(y @ p["feed_forward/inner/kernel"] + p["feed_forward/inner/bias"], 0)
    expected = layer_norm(y + inner @ p["feed_forward/outer/kernel"] + p["feed_forward/outer/bias"], p, "norm2")
    mask = jnp.arange(5)[None, None, None] < 4
    close(layer(jnp.float32(x)[None], mask, train=False, rngs=None)[0], expected)


def test_sinusoids_alternate():
    got = transformer.sinusoids(50, 6)
    for position, feature in ((0, 0), (0, 1), (7, 2), (49, 5)):
        angle = position / 10_000 ** (2 * (feature // 2) / 6)
        np.testing.assert_allclose(got[position, feature], (np.sin, np.cos)[feature % 2](angle), atol=1e-5)


def test_batch_norm_computes_in_float32():
    """On inputs, statistics and a scale that bfloat16 would round away from each other."""
    norm = layers.BatchNorm(3, rngs=nnx.Rngs(0))
    x = jnp.asarray(10 + np.random.default_rng(0).normal(size=(64, 4, 4, 3)), jnp.bfloat16)
    exact = np.float64(x)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    for train in (True, False):
        y = norm(x, use_running_average=not train)
        expected = (exact - mean) / np.sqrt(var + 1e-5) * np.float64(norm.scale[...])
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-4)
        if train:
            close(norm.mean[...], 0.1 * mean)
            close(norm.var[...], 0.9 + 0.1 * var)
            mean, var = np.float64(norm.mean[...]), np.float64(norm.var[...])
            norm.scale[...] = jnp.full(3, 1.003)


def test_batch_norm_is_that_of_flax():
    """Outputs, statistics and gradients, which none takes through the running statistics."""
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (32, 4, 4, 3)), jnp.float32)

    def run(kind):
        norm = kind(3, momentum=0.9, epsilon=1e-3, rngs=nnx.Rngs(0))
        graphdef, params, stats = nnx.split(norm, nnx.Param, ...)
        params = jax.tree.map(lambda p: p + jnp.linspace(-0.5, 0.5, 3), nnx.as_pure(params))

        def loss(params, x):
            norm = nnx.merge(graphdef, params, nnx.as_pure(stats))
            y = norm(norm(x, use_running_average=False), use_running_average=True)
            return jnp.sum(jnp.sin(y)), (y, nnx.as_pure(nnx.split(norm, nnx.Param, ...)[2]))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        *map(run, (nnx.BatchNorm, layers.BatchNorm)),
    )
    with pytest.raises(ValueError, match="whole batches; got a mask"):
        layers.BatchNorm(3, rngs=nnx.Rngs(0))(x, mask=x > 0)


@pytest.mark.parametrize(("size", "groups", "variance"), [(3, 1, 2 / (9 * 64)), (1, 1, 2 / 64)])
def test_convolutions_start_with_the_variance_of_he(size, groups, variance):
    kernel = layers.conv(64, 64, size, groups=groups, dtype=jnp.float32, rngs=nnx.Rngs(0)).kernel[...]
    assert abs(kernel.var() / variance - 1) < 0.1


# The Transformer


@pytest.fixture(scope="module")
def translator():
    model = transformer.Transformer(2, 0.1, width=8, classes=11, widths={}, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return jax.jit(partial(model, train=False))


SOURCES = np.array([[3, 4, 5, 6, 0, 0], [7, 8, 9, 1, 2, 3]])
TARGETS = np.array([[1, 5, 2, 6, 4], [1, 3, 9, 0, 0]])


def test_no_token_sees_a_later_one(translator):
    before = translator(SOURCES, TARGETS)
    changed = TARGETS.copy()
    changed[:, 3] = 8
    after = translator(SOURCES, changed)
    close(after[:, :3], before[:, :3])
    assert (np.abs(after - before)[:, 3:].max((1, 2)) > 1e-3).all()


def test_padding_changes_nothing(translator):
    padded = translator(np.pad(SOURCES, ((0, 0), (0, 3))), np.pad(TARGETS, ((0, 0), (0, 2))))
    close(padded[:, :5], translator(SOURCES, TARGETS))
    close(translator(SOURCES[:1, :4], TARGETS[:1])[0], padded[0, :5])
    assert np.isfinite(translator(np.zeros((1, 4), int), TARGETS[:1])).all()


def test_a_token_of_the_source_changes_its_own_sentence_only(translator):
    changed = SOURCES.copy()
    changed[0, 1] = 10
    difference = np.abs(translator(changed, TARGETS) - translator(SOURCES, TARGETS))
    assert difference[0].max() > 1e-3
    close(difference[1], 0)


def test_encoding_once_and_decoding_is_a_call(shallow):
    network = models.build("transformer-base", width=4, classes=11, seed=0)
    apply = jax.jit(partial(network.apply, network.params, network.model_state), static_argnames=("train", "method"))
    memory, _ = apply((SOURCES,), train=False, method="encode")
    logits, _ = apply((memory, SOURCES, TARGETS), train=False, method="decode")
    close(logits, apply((SOURCES, TARGETS), train=False)[0])

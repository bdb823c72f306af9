"""The models: published sizes, precision, and what each must do in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from abstract import NARROW, count, equations, flops, forward, full_size, inputs_of, named_shapes, shapes
from common import named

from experiments import models, tasks
from experiments.config import Config


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


def test_wide_resnet32_has_the_published_size():
    shapes = jax.eval_shape(lambda: models.build("resnet32", width=32, channels=3, classes=10, seed=0)[:2])
    assert sum(x.size for x in jax.tree.leaves(shapes[0])) == 1_860_522

"""What networks start from: the published initialisation of every weight, and what is dropped only in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import numbers
from flax import nnx

from experiments import models
from experiments.models import efficientnet, layers, transformer, vit


def he(shape):
    """Normal, by fan-out; a depthwise kernel, of one input channel, is that of one group."""
    return "normal", 2 / (np.prod(shape[:-2]) * (1 if shape[-2] == 1 else shape[-1]))


def torch_default(shape):
    """Uniform within 1 / sqrt(fan-in)."""
    return "uniform", 1 / (3 * np.prod(shape[:-1]))


def normal(deviation):
    return lambda shape: ("normal", deviation**2)


def glorot(shape):
    return "uniform", 2 / sum(shape)


HE_AND = {"depthwise": he, "conv": he, "linear": he}


STARTS = {
    "resnet8": HE_AND | {"head": normal(0.01)},
    "vgg19": HE_AND | {"head": normal(0.01)},
    "wrn28x10": HE_AND | {"head": torch_default},
    "resnet50": HE_AND | {"head": torch_default},
    "mobilenet-v2-cifar": dict.fromkeys(("depthwise", "conv", "head"), torch_default),
    "efficientnet-b0": HE_AND | {"head": lambda shape: ("uniform", 1 / (3 * shape[-1]))},
    "vit-small-cifar": {
        "conv": lambda shape: ("truncated", 1 / np.prod(shape[:-1])),
        **dict.fromkeys(("linear", "head"), normal(0.02)),
    },
    "transformer-base": {"linear": glorot},
}


def check(x, kind, variance):
    """The variance within five deviations of what samples have; the kind of a distribution by its tails."""
    x = np.asarray(x, np.float64)
    assert abs(np.mean(x**2) / variance - 1) < 5 * np.sqrt(2 / x.size)
    assert abs(x.mean()) < 5 * np.sqrt(variance / x.size)
    low, high = {"normal": (2.3, np.inf), "truncated": (1.8, 2.3), "uniform": (1.7, np.sqrt(3) + 1e-6)}[kind]
    assert x.size < 1000 or low < np.abs(x).max() / np.sqrt(variance) <= high


def role(shape, place, count):
    if len(shape) == 2:
        return "head" if place == count - 1 else "linear"
    return "depthwise" if shape[0] > 1 and shape[-2] == 1 else "conv"


@pytest.mark.parametrize("name", STARTS)
def test_weights_start_as_published(name, shallow, monkeypatch):
    """Of every role in a network the largest kernel; the head comes last, but for the one that is the embedding."""
    made, text = [], models.MODELS[name].text
    for kind in (nnx.Conv, nnx.Linear):

        def init(self, *sizes, original=kind.__init__, kernel_init, **options):
            original(self, *sizes, kernel_init=kernel_init, **options)
            made.append((kernel_init, self.kernel.shape))

        monkeypatch.setattr(kind, "__init__", init)
    options = {} if text else {"channels": 3}
    jax.eval_shape(lambda: models.build(name, width=32, classes=40, seed=0, **options)[0])
    roles = {}
    for place, (kernel_init, shape) in enumerate(made):
        roles.setdefault(role(shape, place, np.inf if text else len(made)), []).append((kernel_init, shape))
    assert roles.keys() <= STARTS[name].keys()
    for what, found in roles.items():
        kernel_init, shape = max(found, key=lambda one: np.prod(one[1]))
        check(kernel_init(jax.random.key(0), shape, jnp.float32), *STARTS[name][what](shape))
        assert what == "depthwise" or all(other is kernel_init for other, _ in found)


def test_what_is_no_kernel_starts_as_published():
    """An embedding has rows of length one, the token and the positions of a ViT are small; norms are the identity."""
    options = {"widths": {}, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    check(transformer.Transformer(0, 0.1, width=64, classes=40, **options).embedding[...], "normal", 1 / 64)
    network = vit.ViT(4, 32, 0, width=64, channels=3, classes=5, **options)
    for leaf in (network.token, network.positions):
        check(leaf[...], "normal", 0.02**2)
    for norm in (network.norm, layers.BatchNorm(4, rngs=nnx.Rngs(0))):
        np.testing.assert_array_equal(norm.scale[...], 1)
        np.testing.assert_array_equal(norm.bias[...], 0)


def test_blocks_are_dropped_the_more_the_deeper(shallow):
    """Linearly up to 0.2, which one block more would have."""
    options = {"width": 4, "channels": 3, "classes": 10, "widths": {}, "dtype": jnp.float32}
    network = nnx.eval_shape(lambda: efficientnet.EfficientNetB0(**options, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose([block.drop.rate for block in network.blocks], [0, 0.2 / 3, 0.4 / 3])


def test_an_example_loses_its_block_as_a_whole_and_only_in_training():
    """What is left is scaled up, so that the mean over draws is the block's output; the shortcut stays."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 4, 4, 3)), jnp.float32)

    def run(drop, train, keys=(0,)):
        sizes = (3, 3, 2, 3, 1, drop)
        block, _ = numbers(lambda: efficientnet.Block("block", *sizes, widths={}, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(block)
        call = jax.jit(lambda state, key: nnx.merge(graphdef, state)(x, train=train, rngs=nnx.Rngs(key)) - x)
        return [np.asarray(call(state, jax.random.key(key))) for key in keys]

    (whole,), (dropped, other) = run(0.0, True), run(0.75, True, keys=(0, 1))
    lost = (dropped == 0).all(axis=(1, 2, 3))
    np.testing.assert_allclose(dropped[~lost], 4 * whole[~lost], rtol=1e-3, atol=1e-4)
    assert 20 <= lost.sum() < 40
    assert (lost != (other == 0).all(axis=(1, 2, 3))).any()
    assert (run(0.75, False)[0] != 0).mean() > 0.95


def test_a_fifth_of_the_features_is_dropped_before_the_last_layer_in_training(monkeypatch):
    """Of the network without its blocks, whose last layer hands on what it is given."""
    monkeypatch.setattr(efficientnet, "_GROUPS", ())
    options = {"width": 16, "channels": 3, "classes": 2, "widths": {}, "dtype": jnp.float32}
    network, _ = numbers(lambda: efficientnet.EfficientNetB0(**options, rngs=nnx.Rngs(0)))
    network.head = lambda features: features
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    dropped, rest = (np.asarray(network(x, train=train, rngs=nnx.Rngs(1))) for train in (True, False))
    network.dropout.rate = 0.0
    whole = np.asarray(network(x, train=True, rngs=nnx.Rngs(1)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.8, rtol=1e-5)
    assert 0.75 < kept.mean() < 0.85
    assert (rest != 0).mean() > 0.95

"""What networks start from: the published initialisation of every weight, and what is dropped only in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import named
from flax import nnx
from oracles_models import numbers
from shallow import shallow

from experiments import models
from experiments.models import efficientnet

__all__ = ["shallow"]


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


# By the end of the path; the first that fits.
STARTS = {
    "resnet8": {"head/kernel": normal(0.01), "kernel": he},
    "vgg19": {"head/kernel": normal(0.01), "kernel": he},
    "wrn28x10": {"head/kernel": torch_default, "kernel": he},
    "resnet50": {"head/kernel": torch_default, "kernel": he},
    "mobilenet-v2-cifar": {"kernel": torch_default},
    "efficientnet-b0": {"head/kernel": lambda shape: ("uniform", 1 / (3 * shape[-1])), "kernel": he},
    "vit-small-cifar": {
        "patches/kernel": lambda shape: ("truncated", 1 / np.prod(shape[:-1])),
        **dict.fromkeys(("kernel", "token", "positions"), normal(0.02)),
    },
    "transformer-base": {"embedding": lambda shape: ("normal", 1 / shape[-1]), "kernel": glorot},
}
WIDTHS = {"resnet8": 16, "vgg19": 8, "wrn28x10": 20, "resnet50": 8, "vit-small-cifar": 32, "transformer-base": 32}


@pytest.mark.parametrize("name", STARTS)
def test_every_weight_starts_as_published(name, shallow):
    """Variances within five deviations of what samples have; the kind of a distribution by its tails."""
    text, width = models.MODELS[name].text, WIDTHS.get(name, 16)
    with jax.default_prng_impl("unsafe_rbg"):  # compiles faster
        params = jax.jit(
            lambda: models.build(name, width=width, channels=None if text else 3, classes=40, seed=0).params
        )()
    judged = 0
    for path, leaf in named(params).items():
        x = np.asarray(leaf, np.float64)
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(x, path.endswith("scale"))
            continue
        kind, variance = next(start(x.shape) for end, start in STARTS[name].items() if path.endswith(end))
        assert abs(np.mean(x**2) / variance - 1) < 5 * np.sqrt(2 / x.size), path
        assert abs(x.mean()) < 5 * np.sqrt(variance / x.size), path
        if x.size >= 1000:
            far = np.abs(x) / np.sqrt(variance)
            limits = {"normal": (2.3, np.inf), "truncated": (1.8, 2.3), "uniform": (1.7, np.sqrt(3) + 1e-6)}
            low, high = limits[kind]
            assert low < far.max() <= high, path
            judged += 1
    assert judged


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

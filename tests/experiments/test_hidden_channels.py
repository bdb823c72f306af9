"""The channels that each model may lose: removing them is masking them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract import NARROW, abstract, densities, shapes

from experiments import models
from s2sam_jax import channel_masks, materialize
from s2sam_jax._sparsity.channels import group_sizes


def dense(name, classes, sparsity):
    return {path for path, density in densities(name, classes, sparsity).items() if density == 1}


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

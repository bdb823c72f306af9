"""Layers and blocks of the models against NumPy and Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import numbers
from flax import nnx
from oracles_models import batch_norm, close, convolve, depthwise, layer_norm, sigmoid
from scipy.special import erf

from experiments.models import efficientnet, layers, mobilenet, resnet, transformer, vit, wide_resnet


def make(kind, *sizes, **options):
    return numbers(lambda: kind(*sizes, widths={}, dtype=jnp.float32, rngs=nnx.Rngs(0), **options))


def images(channels):
    return np.random.default_rng(1).normal(size=(2, 6, 6, channels))


def run(block, *inputs, **options):
    graphdef, state = nnx.split(block)
    inputs = [jnp.float32(x) if x.dtype == float else x for x in inputs]
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs, **options))(state, *inputs)


def relu(x):
    return np.maximum(x, 0)


def test_wide_block():
    """Norms come first, and the shortcut reads what the first one makes; nothing follows the sum."""
    block, p = make(wide_resnet.Block, "block", 3, 4, 2)
    y = relu(batch_norm(x := images(3), p, "norm1"))
    inner = relu(batch_norm(convolve(y, p["conv1/kernel"], 2), p, "norm2"))
    close(run(block, x, train=True), convolve(y, p["shortcut/kernel"], 2) + convolve(inner, p["conv2/kernel"], 1))


def test_bottleneck():
    block, p = make(resnet.Bottleneck, "block", 3, 8, 2)
    y = relu(batch_norm(convolve(x := images(3), p["conv1/kernel"], 1), p, "norm1"))
    y = relu(batch_norm(convolve(y, p["conv2/kernel"], 2), p, "norm2"))
    y = batch_norm(convolve(y, p["conv3/kernel"], 1), p, "norm3")
    close(run(block, x, train=True), relu(y + batch_norm(convolve(x, p["shortcut/kernel"], 2), p, "shortcut_norm")))


@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (4, 2), (3, 1)])
def test_inverted_residual(outputs, stride):
    """Nothing is cut off behind the projection; a shortcut wherever there is no stride."""
    block, p = make(mobilenet.Block, "block", 3, outputs, 2, stride)
    y = relu(batch_norm(convolve(x := images(3), p["conv1/kernel"], 1), p, "norm1"))
    y = relu(batch_norm(depthwise(y, p["conv2/kernel"], stride), p, "norm2"))
    y = batch_norm(convolve(y, p["conv3/kernel"], 1), p, "norm3")
    if stride == 1:
        y += x if outputs == 3 else batch_norm(convolve(x, p["shortcut/kernel"], 1), p, "shortcut_norm")
    close(run(block, x, train=True), y)


@pytest.mark.parametrize(("expansion", "stride"), [(2, 1), (1, 2)])
def test_efficientnet_block(expansion, stride):
    block, p = make(efficientnet.Block, "block", 4, 4, expansion, 5, stride, 0.0)
    y = x = images(4)
    if expansion > 1:
        y = batch_norm(convolve(y, p["conv1/kernel"], 1), p, "norm1", 1e-3)
        y = y * sigmoid(y)
    y = batch_norm(depthwise(y, p["conv2/kernel"], stride), p, "norm2", 1e-3)
    y = y * sigmoid(y)
    squeezed = y.mean((1, 2)) @ p["attention/squeeze/kernel"] + p["attention/squeeze/bias"]
    excited = (squeezed * sigmoid(squeezed)) @ p["attention/excite/kernel"] + p["attention/excite/bias"]
    y = batch_norm(convolve(y * sigmoid(excited)[:, None, None], p["conv3/kernel"], 1), p, "norm3", 1e-3)
    close(run(block, x, train=True, rngs=None), x + y if stride == 1 else y)
    assert block.norm1.momentum == 0.99 if expansion > 1 else block.norm2.momentum == 0.99


def test_vit_block():
    """Norms come first; one head, of fewer than 64 features; GELU by the error function."""
    block, p = make(vit.Block, "block", 8)
    x = start = np.random.default_rng(1).normal(size=(5, 8))
    y = layer_norm(x, p, "norm1")
    query, key, value = (
        y @ p[f"attention/{name}/kernel"] + p[f"attention/{name}/bias"] for name in ("query", "key", "value")
    )
    weights = np.exp((query @ key.T - (query @ key.T).max(-1, keepdims=True)) / np.sqrt(8))
    y = weights / weights.sum(-1, keepdims=True) @ value
    x = x + y @ p["attention/out/kernel"] + p["attention/out/bias"]
    inner = layer_norm(x, p, "norm2") @ p["feed_forward/inner/kernel"] + p["feed_forward/inner/bias"]
    inner *= (1 + erf(inner / np.sqrt(2))) / 2
    expected = x + inner @ p["feed_forward/outer/kernel"] + p["feed_forward/outer/bias"]
    close(run(block, start[None])[0], expected)


def test_vit_reads_its_token_which_has_a_position_too():
    """Without blocks no image reaches it."""
    network, p = make(vit.ViT, 2, 6, 0, width=8, channels=3, classes=5)
    expected = layer_norm(p["token"] + p["positions"][0], p, "norm") @ p["head/kernel"] + p["head/bias"]
    close(run(network, images(3), train=True), np.stack([expected] * 2))
    assert p["positions"].shape == (10, 8)


def attend(x, other, p, name, allowed):
    """One head, without biases."""
    query, key, value = (
        x @ p[f"{name}/query/kernel"],
        other @ p[f"{name}/key/kernel"],
        other @ p[f"{name}/value/kernel"],
    )
    weights = np.where(allowed, np.exp(query @ key.T / np.sqrt(x.shape[-1])), 0)
    return weights / weights.sum(-1, keepdims=True) @ value @ p[f"{name}/out/kernel"]


def test_decoder_layer():
    """Each sum is normalised: with the tokens so far, then with the sources but their padding, then by itself."""
    layer, p = make(transformer.DecoderLayer, "layer", 8, 0.1)
    x, memory = (np.random.default_rng(seed).normal(size=(length, 8)) for seed, length in ((1, 4), (2, 5)))
    causal, mask = np.tril(np.ones((1, 1, 4, 4), bool)), np.arange(5)[None, None, None] < 3
    got = run(layer, x[None], memory[None], causal, mask, train=False, rngs=None)[0]
    x = layer_norm(x + attend(x, x, p, "attention", causal[0, 0]), p, "norm1")
    x = layer_norm(x + attend(x, memory, p, "cross_attention", mask[0, 0]), p, "norm2")
    inner = relu(x @ p["feed_forward/inner/kernel"] + p["feed_forward/inner/bias"])
    x = layer_norm(x + inner @ p["feed_forward/outer/kernel"] + p["feed_forward/outer/bias"], p, "norm3")
    close(got, x)


def test_tokens_are_embedded_by_their_scaled_rows_and_places():
    """Without layers; logits are by the same rows, unscaled."""
    network, p = make(transformer.Transformer, 0, 0.1, width=6, classes=11)
    tokens = np.array([[1, 5, 2, 6, 4]])
    places = np.arange(5)[:, None] / 10_000 ** (np.array([0, 0, 2, 2, 4, 4]) / 6)
    x = p["embedding"][tokens[0]] * np.sqrt(6) + np.where(np.arange(6) % 2, np.cos(places), np.sin(places))
    close(run(network, tokens, tokens, train=False)[0], x @ p["embedding"].T)


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

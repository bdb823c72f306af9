"""Layers of the models in NumPy, with the numbers that a module is given. Never imports what it judges."""

import jax
import jax.numpy as jnp
import numpy as np
from common import named
from flax import nnx


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def numbers(make):
    """The module that is made, with random values for every parameter, biases and scales too, and those by name."""
    rng = np.random.default_rng(0)
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), nnx.as_pure(params))
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.as_pure(rest))
    return nnx.merge(graphdef, params, rest), {path: np.float64(x) for path, x in named(params).items()}


def convolve(x, kernel, stride):
    size = kernel.shape[0]
    pad = (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = (x.shape[1] - size) // stride + 1
    windows = [
        [x[:, i : i + stride * rows : stride, j : j + stride * rows : stride][:, :rows, :rows] for j in range(size)]
        for i in range(size)
    ]
    return sum(windows[i][j] @ kernel[i, j] for i in range(size) for j in range(size))


def batch_norm(x, p, name, eps=1e-5):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + eps) * p[f"{name}/scale"] + p[f"{name}/bias"]


def depthwise(x, kernel, stride):
    """Each channel by itself."""
    channels = [convolve(x[..., c : c + 1], kernel[..., c : c + 1], stride) for c in range(x.shape[-1])]
    return np.concatenate(channels, axis=-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, p, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]

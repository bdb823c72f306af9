"""Layers of the models in NumPy, of numbers by their names. Never imports what it judges."""

import numpy as np


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


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

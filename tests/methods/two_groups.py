"""Convolution, norm, convolution, norm, convolution, with two groups of channels; trajectories on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax import ChannelAxis, ChannelGroup, Every, sparsify

WHEN, LAST = Every(1, 2, 22), 21
LR, MOMENTUM = 0.1, 0.9
SIZES = [6, 9]


SHAPES = {"conv1": (3, 3, 2, 6), "conv2": (2, 2, 6, 9), "conv3": (1, 1, 9, 3),
          "norm1": {"bias": (6,), "scale": (6,)}, "norm2": {"bias": (9,), "scale": (9,)}}  # fmt: skip


KERNELS = ("conv1", "conv2", "conv3")


def group(number):
    return ChannelGroup(
        f"channels{number}",
        filters=(ChannelAxis(f"conv{number}", -1),),
        scales=(ChannelAxis(f"norm{number}/scale", 0),),
        biases=(ChannelAxis(f"norm{number}/bias", 0),),
        inputs=(ChannelAxis(f"conv{number + 1}", -2),),
    )


GROUPS = [group(1), group(2)]


def tree(seed, dtype=None):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(draw.normal(size=s), dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )


def on_host(x):
    return jax.tree.map(np.array, x)


def network_masks(first, second):
    """Elementwise masks when these channels live."""
    return {
        "conv1": np.broadcast_to(first, SHAPES["conv1"]),
        "conv2": np.broadcast_to(first[:, None] & second, SHAPES["conv2"]),
        "conv3": np.broadcast_to(second[:, None], SHAPES["conv3"]),
        "norm1": {"bias": first, "scale": first},
        "norm2": {"bias": second, "scale": second},
    }


def live_channels(masks):
    return [np.array(masks[norm]["scale"]) for norm in ("norm1", "norm2")]


def optimizer(method, sparsity=0.5, when=WHEN, **kwargs):
    return sparsify(optax.sgd(LR, momentum=MOMENTUM), method, sparsity=sparsity, when=when, **kwargs)


def trajectory(tx, expected):
    """Updates in float64 with random gradients, by the state rule: no momentum off the old mask, nor off the new one.

    ``expected(old state, weights, grads)`` gives the new masks and the weights to go on from, ``None`` between updates.
    """
    with jax.enable_x64(True):
        params = tree(0)
        state, update = tx.init(params), jax.jit(tx.update)
        weights = jax.tree.map(lambda m, w: np.where(m, w, 0), state.masks, params)
        momenta = jax.tree.map(np.zeros_like, weights)
        for step in range(LAST + 3):
            grads = tree(step + 1)
            due = step >= WHEN.start and (step - WHEN.start) % WHEN.every == 0 and step <= WHEN.end
            masks = on_host(state.masks)
            if due:
                new, weights = expected(state, weights, on_host(grads))
                momenta = jax.tree.map(lambda a, b, v: v * (a & b), masks, new, momenta)
                masks = new
            updates, new_state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            jax.tree.map(np.testing.assert_array_equal, new_state.masks, masks)
            momenta = jax.tree.map(lambda m, v, g: (MOMENTUM * v + np.array(g)) * m, masks, momenta, grads)
            weights = jax.tree.map(lambda m, w, v: (w - LR * v) * m, masks, weights, momenta)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
            jax.tree.map(close, params, weights)
            jax.tree.map(close, new_state.inner_state[0].trace, momenta)
            for m, w, v in zip(*map(jax.tree.leaves, (masks, params, new_state.inner_state[0].trace)), strict=True):
                assert not np.any(np.asarray(w)[~m])
                assert not np.any(np.asarray(v)[~m])
            yield due, state, new_state
            state = new_state

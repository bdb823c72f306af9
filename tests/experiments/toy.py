"""A small network in place of the models, for tests of what is around them; it compiles in no time."""

import jax
import jax.numpy as jnp

from experiments.models import Network
from s2sam_jax import ChannelAxis, ChannelGroup

WIDTH = 96
GROUPS = (
    ChannelGroup(
        "hidden",
        filters=(ChannelAxis("hidden/kernel", -1),),
        scales=(ChannelAxis("hidden/scale", 0),),
        biases=(ChannelAxis("hidden/bias", 0),),
        inputs=(ChannelAxis("head/kernel", -2),),
        statistics=(ChannelAxis("mean", 0),),
    ),
)


def build(config):
    """Two layers on 8x8 images, with a running mean in between; its size is above that of leaves not worth cutting."""
    keys = jax.random.split(jax.random.key(config.seed))
    params = {
        "hidden": {
            "kernel": jax.random.normal(keys[0], (64, WIDTH)) / 8,
            "scale": jnp.ones(WIDTH),
            "bias": jnp.zeros(WIDTH),
        },
        "head": {"kernel": jax.random.normal(keys[1], (WIDTH, 10)) / 10},
    }

    def apply(params, model_state, images, train, key=None):
        hidden = images.reshape(len(images), -1) @ params["hidden"]["kernel"]
        mean = hidden.mean(0) if train else model_state["mean"]
        new = {"mean": 0.9 * model_state["mean"] + 0.1 * mean} if train else model_state
        hidden = (hidden - mean) * params["hidden"]["scale"] + params["hidden"]["bias"]
        return jnp.tanh(hidden) @ params["head"]["kernel"], new

    return Network(params, {"mean": jnp.zeros(WIDTH)}, apply, GROUPS)

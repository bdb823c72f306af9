"""CHEX and Chase with S2-SAM, with their clocks in the program, and on bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import run
from two_groups import GROUPS, WHEN, live_channels, network_masks, optimizer, tree

from s2sam_jax import ChannelAxis, ChannelGroup, Every, check_masks, methods, s2sam, sparsify


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def network_loss(params):
    images = jnp.asarray(np.random.default_rng(5).normal(size=(4, 4, 4, 2)), params["conv1"].dtype)
    hidden = images
    for number in (1, 2):
        hidden = conv(hidden, params[f"conv{number}"])
        hidden = (hidden - hidden.mean((0, 1, 2))) * jax.lax.rsqrt(hidden.var((0, 1, 2)) + 1e-3)
        norm = params[f"norm{number}"]
        hidden = jax.nn.relu(hidden * norm["scale"] + norm["bias"])
    return jnp.mean(jnp.square(conv(hidden, params["conv3"]) - 1)).astype(jnp.float32)


METHODS = {"chex": lambda: methods.chex(GROUPS, explore=0.3), "chase": lambda: methods.chase(GROUPS)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_channels_go_with_s2sam_and_the_clock_in_the_program(name, dtype):
    """Exact counts, and zeros in weights, momentum, last gradient and the point where the gradient is taken."""
    inner = optax.chain(s2sam(0.05), optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))
    tx = sparsify(inner, METHODS[name](), sparsity=0.5, when=Every(0, 2, 12))
    totals = []
    for step in run(tx, tree(0, dtype), loss=network_loss, steps=16):
        check_masks(step.params, step.opt_state)
        masks = step.opt_state.masks
        mirrored = [step.params, step.opt_state.inner_state[0].last_grad, step.opt_state.inner_state[2][0].trace]
        for values in mirrored:
            assert not any(np.any(v[~m]) for m, v in zip(*map(jax.tree.leaves, (masks, values)), strict=True))
        alive = live_channels(masks)
        if name == "chex":
            jax.tree.map(np.testing.assert_array_equal, masks, network_masks(*alive))
        totals.append(sum(int(a.sum()) for a in alive))
    assert totals[-4:] == [8] * 4
    assert totals[0] > 8


def started(method, sparsity=0.5, when=WHEN, **kwargs):
    return lambda: optimizer(method(), sparsity, when, **kwargs).init(tree(0))


BARE = ChannelGroup("bare", filters=(ChannelAxis("conv1", -1),))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: methods.chex([]), r"chex needs a sequence of ChannelGroups, at least one; got \[\]"),
        (lambda: methods.chase(["conv1"]), "chase needs a sequence of ChannelGroups"),
        (lambda: methods.chex(GROUPS, compat="code"), "compat must be 'paper' or 'authors'; got 'code'"),
        (lambda: methods.chex([*GROUPS, BARE]), r"by the scales of the norms, .* have none: \['bare'\]"),
        (
            started(lambda: methods.chex(GROUPS, explore=0.6)),
            "0 <= explore <= sparsity; got explore=0.6 at sparsity 0.5",
        ),
        (started(lambda: methods.chex(GROUPS, explore=-0.1)), "0 <= explore <= sparsity; got explore=-0.1"),
        (started(lambda: methods.chex(GROUPS), 0.95), r"chex: a channel sparsity of 0.95 leaves 1 of 15 channels"),
        (
            started(lambda: methods.chex(GROUPS), overrides={"conv1": 0.3}),
            "must be the same for all; got {'conv1': 0.3",
        ),
        (started(lambda: methods.chex(GROUPS), distribution="erk"), "Use distribution='uniform'"),
        (started(lambda: methods.chex(GROUPS), when=Every()), "chex follows the clock to its end: give when="),
        (
            started(lambda: methods.chex([BARE._replace(scales=(ChannelAxis("conv1", 0),))])),
            "Channel groups do not fit",
        ),
        (lambda: methods.chase(GROUPS, channel_sparsity=1.0), r"channel_sparsity is the fraction of zeros"),
        (lambda: methods.chase(GROUPS, min_width=1.5), "chase needs 0 <= min_width <= 1; got 1.5"),
        (lambda: methods.chase(GROUPS, drop_fraction=-1), "chase needs 0 <= drop_fraction <= 1; got -1"),
        (lambda: methods.chase(GROUPS, channel_every=0), "chase needs channel_every >= 1; got 0"),
        (started(lambda: methods.chase(GROUPS), when=Every()), "chase follows the clock to its end: give when="),
        (started(lambda: methods.chase(GROUPS, channel_every=9)), "no time to remove channels: .* 18 calls after"),
        (started(lambda: methods.chase(GROUPS, channel_sparsity=0.95)), "chase: a channel sparsity of 0.95 leaves 1"),
    ],
)
def test_bad_input_is_told_what_was_expected(build, message):
    with pytest.raises(ValueError, match=message):
        build()

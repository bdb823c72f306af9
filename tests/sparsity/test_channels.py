"""Groups of channels: their sizes, and masks of whole channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2sam_jax import ChannelAxis, ChannelGroup, channel_masks, materialize
from s2sam_jax._sparsity.channels import group_sizes

FIRST = ChannelGroup(
    "first",
    filters=(ChannelAxis("conv1/kernel", -1),),
    scales=(ChannelAxis("norm/scale", 0),),
    biases=(ChannelAxis("norm/bias", 0),),
    inputs=(ChannelAxis("conv2/kernel", -2),),
    statistics=(ChannelAxis("norm/mean", 0),),
)


SECOND = ChannelGroup("second", filters=(ChannelAxis("conv2/kernel", 3),), inputs=(ChannelAxis("head", 0),))


def make_params():
    """Two convolutions, of 4 and 5 channels, and a layer that reads the second."""
    shapes = {
        "conv1": {"kernel": (3, 3, 2, 4)},
        "norm": {"scale": (4,), "bias": (4,)},
        "conv2": {"kernel": (3, 3, 4, 5)},
        "head": (5, 4),
    }
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_masks_of_channels_by_hand():
    alive = {"first": jnp.array([True, False, True, True]), "second": jnp.array([False, True, True, True, False])}
    masks = channel_masks(make_params(), [FIRST, SECOND], alive)
    expected = jax.tree.map(lambda x: np.ones(x.shape, bool), make_params())
    expected["conv1"]["kernel"][..., 1] = False
    expected["norm"]["scale"][1] = expected["norm"]["bias"][1] = False
    expected["conv2"]["kernel"][:, :, 1, :] = False
    expected["conv2"]["kernel"][..., [0, 4]] = False
    expected["head"][[0, 4]] = False
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_groups_that_are_left_out_keep_all():
    masks = channel_masks(make_params(), [FIRST, SECOND], {"second": jnp.zeros(5, bool)})
    assert masks["conv1"]["kernel"].all()
    assert not masks["conv2"]["kernel"].any()
    assert not masks["head"].any()


def test_masks_can_be_traced():
    alive = {"first": jnp.array([True, False, False, True])}
    params = make_params()
    traced = jax.jit(lambda alive: channel_masks(params, [FIRST], alive))(alive)
    jax.tree.map(np.testing.assert_array_equal, traced, channel_masks(params, [FIRST], alive))


def test_sizes():
    assert group_sizes(make_params(), [FIRST, SECOND]) == {"first": 4, "second": 5}
    assert group_sizes(make_params(), [FIRST], statistics={"norm": {"mean": jnp.ones(4)}}) == {"first": 4}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([ChannelGroup("empty", filters=())], "empty: has no filters"),
        ([FIRST._replace(inputs=(ChannelAxis("conv3/kernel", -2),))], "first: no leaf 'conv3/kernel' with an axis -2"),
        ([FIRST._replace(scales=(ChannelAxis("norm/scale", 1),))], "first: no leaf 'norm/scale' with an axis 1"),
        ([FIRST._replace(inputs=(ChannelAxis("head", 0),))], "first: 'head' has 5 on axis 0, not 4"),
        ([FIRST], "first: 'norm/mean' has 3 on axis 0, not 4"),
        ([SECOND, SECOND], "second: named twice"),
    ],
)
def test_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=f"do not fit the parameters:\n(.*\n)*  {message}"):
        group_sizes(make_params(), groups, statistics={"norm": {"mean": jnp.ones(3)}})


@pytest.mark.parametrize("alive", [{"third": jnp.ones(4, bool)}, {"first": jnp.ones(5, bool)}])
def test_channels_that_do_not_fit(alive):
    with pytest.raises(ValueError, match=r"bool\[channels\] by group, of {'first': 4}; these do not fit: {'"):
        channel_masks(make_params(), [FIRST], alive)


def test_channels_that_two_groups_name():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3)), "gamma": jnp.ones(3), "delta": jnp.ones(3)}
    masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    groups = [
        ChannelGroup(
            "g1", (ChannelAxis("a", -1),), scales=(ChannelAxis("gamma", 0),), statistics=(ChannelAxis("m", 0),)
        ),
        ChannelGroup(
            "g2", (ChannelAxis("b", -1),), scales=(ChannelAxis("delta", 0),), statistics=(ChannelAxis("m", -1),)
        ),
    ]
    with pytest.raises(ValueError, match="m: axis 0 is in two groups, g1 and g2"):
        materialize(params, {"m": jnp.ones(3)}, groups, masks)


def test_an_axis_that_a_group_names_twice_is_cut_once():
    params = {"a": jnp.array([[1.0, 0.0, 3.0]])}
    group = ChannelGroup("g", (ChannelAxis("a", -1), ChannelAxis("a", 1)))
    small = materialize(params, None, [group], {"a": params["a"] != 0})
    np.testing.assert_array_equal(small.params["a"], [[1.0, 3.0]])

"""Slicing dead channels out: what goes, what stays, and that the function stays the same."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from s2sam_jax import ChannelAxis, ChannelGroup, channel_masks, materialize

NORMED = ChannelGroup(
    "normed",
    filters=(ChannelAxis("first", -1),),
    scales=(ChannelAxis("scale", 0),),
    biases=(ChannelAxis("bias", 0),),
    inputs=(ChannelAxis("second", -2),),
    statistics=(ChannelAxis("mean", 0), ChannelAxis("var", 0)),
)


PLAIN = ChannelGroup(
    "plain",
    filters=(ChannelAxis("second", -1),),
    biases=(ChannelAxis("offset", 0),),
    inputs=(ChannelAxis("third", -2),),
)


GROUPS = [NORMED, PLAIN]


def make_network():
    """Three matrices, with a norm behind the first and biases behind the second, and its running statistics."""
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 6), "scale": (6,), "bias": (6,), "second": (6, 5), "offset": (5,), "third": (5, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    state = {name: jnp.asarray(rng.uniform(0.5, 2, 6), jnp.float32) for name in ("mean", "var")}
    return params, state | {"steps": jnp.zeros((), jnp.int32)}


def forward(params, state, x):
    """In float64, with an activation that is zero at zero only."""
    p, s = ({name: np.float64(leaf) for name, leaf in tree.items()} for tree in (params, state))
    y = np.tanh((x @ p["first"] - s["mean"]) / np.sqrt(s["var"]) * p["scale"] + p["bias"])
    return np.tanh(y @ p["second"] + p["offset"]) @ p["third"]


INPUTS = np.random.default_rng(1).normal(size=(7, 3))


def sparse_masks(params):
    """Half of the weights at random, and channel 1 and 4 of the norm, 0 and 3 behind the second matrix."""
    rng = np.random.default_rng(2)
    masks = {name: rng.random(leaf.shape) < (0.5 if leaf.ndim == 2 else 2) for name, leaf in params.items()}
    masks["scale"][[1, 4]] = masks["bias"][[1, 4]] = False
    masks["second"][:, [0, 3]] = masks["offset"][[0, 3]] = False
    # Alive all the same: a filter without weights has a bias of its norm, one weight is enough.
    masks["first"][:, 2] = masks["scale"][2] = False
    masks["second"][:, 1] = False
    masks["second"][5, 1] = True
    masks["offset"][1] = False
    return jax.tree.map(jnp.asarray, masks)


def masked(params, masks):
    return jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks)


def test_removes_exactly_the_dead_channels():
    params, state = make_network()
    masks = sparse_masks(params)
    params = masked(params, masks)
    small = materialize(params, state, GROUPS, masks)
    normed, plain = [0, 2, 3, 5], [1, 2, 4]
    assert small.widths == {"normed": 4, "plain": 3}
    for got, full in ((small.params, params), (small.masks, masks)):
        expected = {
            "first": full["first"][:, normed],
            "scale": full["scale"][jnp.array(normed)],
            "bias": full["bias"][jnp.array(normed)],
            "second": full["second"][np.ix_(normed, plain)],
            "offset": full["offset"][jnp.array(plain)],
            "third": full["third"][jnp.array(plain)],
        }
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.map(jnp.shape, small.model_state) == {"mean": (4,), "var": (4,), "steps": ()}
    np.testing.assert_array_equal(small.model_state["mean"], np.asarray(state["mean"])[normed])
    assert 0 < small.masks["first"].mean() < 1, "sparse inside"
    np.testing.assert_allclose(forward(small.params, small.model_state, INPUTS), forward(params, state, INPUTS))
    assert np.abs(forward(params, state, INPUTS)).max() > 0.1


@pytest.mark.parametrize("kept", range(6))
def test_what_a_channel_computes_is_used_while_it_lives(kept):
    """All other channels are dead; the criterion is the scale or the bias, and never the filter or its readers."""
    params, state = make_network()
    alive = jnp.arange(6) == kept
    masks = channel_masks(params, [NORMED], {"normed": alive})
    either = masks | {"scale" if kept % 2 else "bias": jnp.zeros(6, bool), "first": jnp.ones((3, 6), bool)}
    small = materialize(masked(params, either), state, [NORMED], either)
    assert small.widths == {"normed": 1}
    np.testing.assert_array_equal(small.params["second"], params["second"][kept : kept + 1])
    full = forward(masked(params, either), state, INPUTS)
    np.testing.assert_allclose(forward(small.params, small.model_state, INPUTS), full)


def test_a_group_keeps_a_channel():
    params, state = make_network()
    masks = channel_masks(params, GROUPS, {"normed": jnp.zeros(6, bool), "plain": jnp.zeros(5, bool)})
    small = materialize(masked(params, masks), state, GROUPS, masks)
    assert small.widths == {"normed": 1, "plain": 1}
    assert not any(leaf.any() for leaf in jax.tree.leaves((small.masks, small.params)))
    assert not forward(small.params, small.model_state, INPUTS).any()


def test_nothing_to_remove_is_the_identity():
    params, state = make_network()
    masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    small = materialize(params, state, GROUPS, masks)
    for new, old in zip(small, (params, state, {"normed": 6, "plain": 5}, masks), strict=True):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b or a == b, new, old))


def test_one_leaf_on_both_axes():
    """The weights of a recurrence compute the channels and read them."""
    params = {"inputs": jnp.ones((2, 3)), "again": jnp.arange(9.0).reshape(3, 3)}
    group = ChannelGroup(
        "hidden", (ChannelAxis("inputs", -1), ChannelAxis("again", -1)), inputs=(ChannelAxis("again", 0),)
    )
    masks = channel_masks(params, [group], {"hidden": jnp.array([True, False, True])})
    small = materialize(masked(params, masks), None, [group], masks)
    np.testing.assert_array_equal(small.params["again"], [[0, 2], [6, 8]])
    assert small.params["inputs"].shape == (2, 2)


def test_types_and_wrappers_are_kept():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = {"a": nnx.state(module), "b": np.ones((3, 2), ml_dtypes.bfloat16)}
    group = ChannelGroup(
        "a", (ChannelAxis("a/kernel", -1),), biases=(ChannelAxis("a/bias", 0),), inputs=(ChannelAxis("b", 0),)
    )
    masks = channel_masks(params, [group], {"a": jnp.array([False, True, True])})
    params = masked(params, masks) | {"b": np.where(np.asarray(masks["b"]), params["b"], 0)}
    small = materialize(params, (), [group], masks).params
    assert jax.tree.structure(small) == jax.tree.structure(params)
    assert isinstance(small["b"], np.ndarray)
    assert small["b"].shape == (2, 2)
    assert small["b"].dtype == ml_dtypes.bfloat16
    assert isinstance(small["a"]["kernel"].get_value(), jax.Array)


def changed(**leaves):
    params, _ = make_network()
    return jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params) | leaves


@pytest.mark.parametrize(
    ("groups", "masks", "message"),
    [
        ([NORMED._replace(inputs=(ChannelAxis("third", 0),))], changed(), "normed: 'third' has 5 on axis 0, not 6"),
        ([NORMED._replace(statistics=(ChannelAxis("std", 0),))], changed(), "normed: no leaf 'std' with an axis 0"),
        ([PLAIN, PLAIN._replace(name="again")], changed(), "third: axis 0 is in two groups, plain and again"),
        (
            [NORMED._replace(scales=(), biases=())],
            changed(),
            "normed: has statistics but no scales; without one, a norm of zeros puts out its running mean",
        ),
        (GROUPS, {"first": jnp.ones((3, 6), bool)}, "masks must have the leaves of params, but:\n.*missing in masks"),
        (GROUPS, changed(third=jnp.ones((2, 5), bool)), r"third: shape \(2, 5\) in masks, \(5, 2\) in params"),
        (GROUPS, changed(offset=jnp.ones(5)), "offset: its mask must be bool; got float32"),
        (GROUPS, changed(scale=jnp.arange(6) > 1), "scale: 2 weights are masked but not zero; call apply_masks"),
    ],
)
def test_says_what_does_not_fit(groups, masks, message):
    with pytest.raises(ValueError, match=message):
        materialize(*make_network(), groups, masks)


def test_masks_must_not_be_traced():
    params, state = make_network()
    with pytest.raises(ValueError, match=r"outside jit, as shapes depend on the values.*traced: \['bias', "):
        jax.jit(lambda masks: materialize(params, state, GROUPS, masks).params)(changed())


NET = {
    "conv": {"kernel": jnp.array([[1.0, 0.0, 2.0]]), "bias": jnp.array([1.0, 0.0, 1.0])},
    "norm": {"scale": jnp.array([1.0, 0.0, 1.0]), "bias": jnp.array([1.0, 0.0, 1.0])},
    "head": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
}


STATISTICS = {"batch_stats": {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}}}


GROUP = ChannelGroup(
    "hidden",
    filters=(ChannelAxis("conv/kernel", -1),),
    scales=(ChannelAxis("norm/scale", 0),),
    biases=(ChannelAxis("norm/bias", 0), ChannelAxis("conv/bias", 0)),
    inputs=(ChannelAxis("head/kernel", -2),),
    statistics=(ChannelAxis("batch_stats/norm/mean", 0), ChannelAxis("batch_stats/norm/var", 0)),
)


def live():
    masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), NET)
    dead = {"conv": {name: NET["conv"][name] != 0 for name in NET["conv"]}}
    return masks | dead | {"norm": {name: NET["norm"][name] != 0 for name in NET["norm"]}}


@pytest.mark.filterwarnings("error")
def test_materialize_is_quiet_where_all_is_named():
    """The head has a bias as long as the channels, but it only reads them."""
    assert materialize(NET, STATISTICS, [GROUP], live()).widths == {"hidden": 2}


@pytest.mark.parametrize(
    ("group", "forgotten"),
    [
        (GROUP._replace(biases=GROUP.biases[:1]), "conv/bias, beside the group hidden"),
        (GROUP._replace(statistics=GROUP.statistics[:1]), "batch_stats/norm/var, beside the group hidden"),
    ],
    ids=["bias", "statistics"],
)
def test_materialize_names_forgotten_leaves(group, forgotten):
    with pytest.warns(UserWarning, match=forgotten):
        materialize(NET, STATISTICS, [group], live())

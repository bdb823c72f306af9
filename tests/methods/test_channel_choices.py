"""Which channels CHEX and Chase choose in small cases worked by hand, and the options of the papers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import ChannelAxis, ChannelGroup, Every, methods, set_masks, sparsify

LONG = Every(0, 1, 1000)


def groups_of(*names):
    return [
        ChannelGroup(n, filters=(ChannelAxis(f"{n}/kernel", -1),), scales=(ChannelAxis(f"{n}/scale", 0),))
        for n in names
    ]


def layer(kernel, scale):
    return {"kernel": jnp.asarray(kernel, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}


def living(state, *names):
    return ["".join(str(int(m)) for m in state.masks[n]["scale"]) for n in names]


def updated(tx, params, step=0):
    """The state after one update of the dense network."""
    dense = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    state = set_masks(tx.init(params), dense)._replace(step=jnp.int32(step))
    return jax.jit(functools.partial(tx.update, refresh_masks=True))(params, state, params)[1]


def chex(groups, sparsity=0.5, explore=0.0, compat="paper", **options):
    method = methods.chex(groups, explore=explore, compat=compat)
    return sparsify(optax.sgd(0.0), method, sparsity=sparsity, when=LONG, **options)


def test_chex_starts_from_the_largest_sums_of_magnitudes():
    """3 against 1 + 1 + 1 + 1 and the like, which squares would rank the other way round."""
    params = {"a": layer([[3, 1, 0, -1], [0, -1, 0, -1], [0, 1, 2.9, -1], [0, 1, 0, 0.5]], np.ones(4))}
    assert living(chex(groups_of("a")).init(params), "a") == ["0101"]


@pytest.mark.parametrize(("compat", "first"), [("paper", ["1", "111000000000"]), ("authors", ["1", "111000000000"])])
def test_chex_leaves_every_group_a_channel(compat, first):
    """Of one channel and twelve, by size the one would get none; nor by its scale, the smallest."""
    params = {"a": layer(np.ones((2, 1)), [0.1]), "b": layer(np.ones((2, 12)), np.arange(12.0, 0, -1))}
    tx = chex(groups_of("a", "b"), sparsity=0.75, compat=compat)
    assert living(tx.init(params), "a", "b") == first
    if compat == "paper":
        assert living(updated(tx, params), "a", "b") == first


def test_chex_grows_none_of_those_it_keeps():
    """Of weights so small that all are as likely: nine of ten live, not fewer."""
    kernel = 1e-4 * np.random.default_rng(0).normal(size=(12, 10))
    tx = chex(groups_of("a"), explore=0.4)
    assert living(updated(tx, {"a": layer(kernel, np.ones(10))}), "a")[0].count("1") == 9


def test_the_first_filter_and_the_first_norm_of_a_group_decide():
    """Behind them stand a depthwise kernel and a norm, and a plan for these, that say the opposite."""
    groups = [
        ChannelGroup(
            n,
            filters=(ChannelAxis(f"{n}/kernel", -1), ChannelAxis(f"{n}/depthwise", -1)),
            scales=(ChannelAxis(f"{n}/scale", 0), ChannelAxis(f"{n}/scale2", 0)),
        )
        for n in "ab"
    ]
    up, down = np.arange(1.0, 5), np.arange(4.0, 0, -1)
    params = {
        n: layer([up], scale) | {"depthwise": jnp.float32([[[down]]]), "scale2": jnp.float32(9 - scale)}
        for n, scale in (("a", up + 4), ("b", up))
    }
    tx = chex(groups, overrides={"*/depthwise": 0.0})
    assert living(tx.init(params), "a", "b") == ["0011", "0011"]
    assert living(updated(tx, params), "a", "b") == ["0111", "0001"]
    chase = methods.chase(groups, min_width=0.0, removal_end=1.0)
    state = updated(sparsify(optax.sgd(0.0), chase, sparsity=0.1, when=LONG), params, step=1000)
    assert living(state, "a", "b") == ["0011", "0011"]


@pytest.mark.parametrize(("min_width", "left"), [(0.0, (1, 7)), (0.8, (3, 5))])
def test_chase_leaves_a_group_its_share_of_a_uniform_cut(min_width, left):
    """Half of eight would be four; all weights of the first group are smaller than those of the second."""
    params = {n: layer(np.full((2, 8), size) + np.arange(8) / 10, np.ones(8)) for n, size in (("a", 1), ("b", 9))}
    method = methods.chase(groups_of("a", "b"), min_width=min_width, removal_end=1.0)
    state = updated(sparsify(optax.sgd(0.0), method, sparsity=0.1, when=LONG), params, step=1000)
    assert living(state, "a", "b") == ["0" * (8 - n) + "1" * n for n in left]


def test_chase_comes_down_to_its_budget_even_where_it_drops_nothing():
    """Five weights from the time of exploring, a budget of four: the smallest goes."""
    params = {"kernel": jnp.array([[0.5, 0.1, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0]])}
    groups = [ChannelGroup("all", filters=(ChannelAxis("kernel", 1),))]
    options = {"channel_sparsity": 0.0, "exploration_end": 0.0, "drop_fraction": 0.0, "final_fraction": 0.0}
    tx = sparsify(optax.sgd(0.0), methods.chase(groups, **options), sparsity=0.5, when=LONG)
    state = set_masks(tx.init(params), {"kernel": params["kernel"] != 0})
    _, state = tx.update(params, state, params, refresh_masks=True)
    assert state.masks["kernel"].astype(int).tolist() == [[1, 0, 1, 1, 1, 0, 0, 0]]


def test_defaults_are_the_papers():
    """Chase: beta 0.5, channels go until epoch 130 of 160, weights move from then on, from a half to 0.5 %."""
    chex, chase = (
        {p.name: p.default for p in inspect.signature(method).parameters.values() if p.name != "groups"}
        for method in (methods.chex, methods.chase)
    )
    assert chex == {"explore": 0.2, "compat": "paper"}
    assert chase == {
        "channel_sparsity": 0.5, "channel_every": 1, "min_width": 0.5, "removal_end": 0.8125, "extra": 0.05,
        "exploration_end": 0.8125, "drop_fraction": 0.5, "final_fraction": 0.005, "compat": "paper",
    }  # fmt: skip

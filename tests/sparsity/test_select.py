"""Exact top-k by bit-bisection against a sort that breaks ties by index, also on sharded scores."""

import functools
import math
import re

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from s2sam_jax import select
from s2sam_jax._base import select as select_module
from s2sam_jax._base.select import keep_best, random_scores

COLLECTIVES = r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\("
DTYPES = ["float32", "float16", "bfloat16", "float64"]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 65504.0, np.inf, -np.inf, 1.0, 1.0]


def check(scores, count, among=None):
    got = np.asarray(select(jnp.asarray(scores), count=count, among=None if among is None else jnp.asarray(among)))
    np.testing.assert_array_equal(got, oracles.top_mask(np.asarray(scores, np.float64), count, among))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 5, 8, 11])
def test_special_values(dtype, count):
    with jax.enable_x64(dtype == "float64"):
        check(jnp.asarray(SPECIAL, dtype), count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (4, 5, 3), (3, 1, 2, 2)])
def test_every_count_of_every_shape(dtype, shape):
    with jax.enable_x64(dtype == "float64"):
        scores = jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), dtype)
        for count in range(scores.size + 1):
            check(scores, count)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    hnp.arrays(np.float32, (3, 7), elements=st.floats(width=32, allow_nan=True)),
    hnp.arrays(bool, (3, 7)),
    st.integers(0, 21),
)
def test_any_floats_among_any_entries(scores, among, count):
    check(scores, min(count, int(among.sum())), among)


def test_nan_ranks_below_minus_infinity():
    scores = jnp.array([jnp.nan, -jnp.inf, jnp.nan, 1.0])
    np.testing.assert_array_equal(select(scores, count=2), [False, True, False, True])
    np.testing.assert_array_equal(select(scores, count=3), [True, True, False, True])


def test_nan_is_an_error_in_debug_mode():
    error, _ = jax.jit(checkify.checkify(lambda s: select(s, count=1)))(jnp.array([jnp.nan, 1.0]))
    with pytest.raises(checkify.JaxRuntimeError, match="NaN among the scores"):
        error.throw()


def test_fewer_eligible_than_asked_selects_them_all():
    mask = select(jnp.ones(4), count=3, among=jnp.array([False, True, False, True]))
    np.testing.assert_array_equal(mask, [False, True, False, True])


def test_global_ranks_over_all_leaves_in_order():
    tree = {"a": np.array([[1.0, 3.0], [3.0, 0.0]], np.float32), "b": np.array([3.0, 2.0, 3.0], np.float32)}
    flat = np.concatenate([tree["a"].ravel(), tree["b"]])
    for count in range(8):
        got = select(jax.tree.map(jnp.asarray, tree), count=count, scope="global")
        want = oracles.top_mask(flat, count)
        np.testing.assert_array_equal(np.concatenate([np.asarray(got["a"]).ravel(), got["b"]]), want)


def test_global_over_mixed_dtypes_compares_values():
    got = select({"a": jnp.array([1.0, 4.0], jnp.bfloat16), "b": jnp.array([2.0, 3.0])}, count=2, scope="global")
    chex.assert_trees_all_equal(got, {"a": jnp.array([False, True]), "b": jnp.array([False, True])})


def test_leaves_of_mixed_dtypes_each_use_their_bits():
    tree = {"a": jnp.array([1.0, -4.0, 2.0], jnp.bfloat16), "b": jnp.array([2.0, 3.0, -1e30])}
    got = select(tree, count={"a": 2, "b": 1})
    chex.assert_trees_all_equal(got, {"a": jnp.array([True, False, True]), "b": jnp.array([False, True, False])})


def test_counts_may_be_traced():
    scores = jnp.array([2.0, 5.0, 1.0, 5.0])
    masks = jax.jit(jax.vmap(lambda k: select(scores, count=k)))(jnp.arange(5))
    for count in range(5):
        np.testing.assert_array_equal(masks[count], oracles.top_mask(np.asarray(scores), count))


def test_random_scores_of_large_leaves_are_drawn_where_they_lie(monkeypatch):
    def moved(sizes):
        like = {name: jax.ShapeDtypeStruct((size, 8), jnp.float32, sharding=spread) for name, size in sizes.items()}
        draw = jax.jit(lambda key: random_scores(key, like), out_shardings=spread)
        return re.findall(COLLECTIVES, draw.lower(jax.random.key(0)).compile().as_text())

    spread = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    sizes = {"large": 64, "larger": 96}
    assert moved(sizes)
    monkeypatch.setattr(select_module, "LARGE", 512)
    assert not moved(sizes)


def test_random_scores_of_small_leaves_do_not_depend_on_large_ones(monkeypatch):
    monkeypatch.setattr(select_module, "LARGE", 1000)
    like = {"a": jnp.ones((3, 5)), "b": jnp.ones((40, 50)), "c": jnp.ones(7), "d": jnp.ones((50, 40))}
    scores = random_scores(jax.random.key(3), like)
    small = random_scores(jax.random.key(3), {name: like[name] for name in "ac"})
    assert all(scores[name].shape == like[name].shape for name in like)
    assert all(bool((scores[name] == small[name]).all()) for name in small)
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(scores)])
    assert len(np.unique(values)) > 4000
    np.testing.assert_allclose(np.histogram(values, 4, (0, 1))[0] / len(values), 0.25, atol=0.03)


@pytest.mark.parametrize(("sparsity", "ones"), [(0.7, 3), (0.0, 10), (1.0, 0), (0.58, 5), (0.99, 1)])
def test_sparsity_keeps_n_minus_floor(sparsity, ones):
    assert int(select(jnp.arange(10.0), sparsity=sparsity).sum()) == ones


def test_a_large_leaf_with_ties_is_exact():
    scores = np.random.default_rng(1).integers(0, 50, 100_000).astype(np.float32)
    check(scores, 33_333)


def test_no_sort_in_the_program_and_only_counts_leave_a_device():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    scores = {name: jax.device_put(jnp.ones((64, 40)), sharding) for name in "ab"}
    masks = jax.jit(lambda s: select(s, count=5))
    text = masks.lower(scores).compile().as_text()
    assert not re.search(r"\b(sort|topk|top-k)\b", text)
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(COLLECTIVES, text)]
    assert sizes
    assert max(sizes) <= 2 * 8 * 3  # rows x devices x thresholds
    assert all(mask.sharding == sharding for mask in masks(scores).values())
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        eager = select(jax.device_put(scores, NamedSharding(mesh, PartitionSpec("data"))), count=5)
        assert all(len(mask.sharding.device_set) == 8 for mask in eager.values())


def test_what_a_leaf_has_too_little_of_to_reserve_goes_to_the_others():
    scores = [jnp.array([5.0, 4.0, 3.0]), jnp.array([2.0, 1.0, 0.0])]
    among = [jnp.ones(3, bool), jnp.array([True, False, False])]
    best = keep_best(scores, 4, [1, 2], among)
    assert [mask.tolist() for mask in best] == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("method", ["leaf", "global"])
def test_too_many_scores_are_refused_before_they_are_counted(method):
    shape = {"w": jax.ShapeDtypeStruct((50_000, 50_000), jnp.float32)}
    with pytest.raises(ValueError, match="counts in int32, and 2500000000 scores"):
        jax.eval_shape(lambda s: select(s, sparsity=0.1, scope=method), shape)


def test_selection_in_shard_map():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,))
    spec = PartitionSpec("x")
    scores = jax.random.normal(jax.random.key(0), (8, 6))
    one = functools.partial(select, sparsity=0.5)
    found = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(scores)
    np.testing.assert_array_equal(found, jnp.concatenate([one(scores[:4]), one(scores[4:])]))

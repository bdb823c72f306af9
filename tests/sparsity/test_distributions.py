"""Distributions against the reference's figures and an independent fixed point; which leaves are prunable."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from common import named
from flax import nnx

from s2sam_jax import (
    Every,
    TrainState,
    erdos_renyi,
    erdos_renyi_kernel,
    get_masks,
    make_train_step,
    methods,
    select,
    sparsify,
    uniform,
)
from s2sam_jax._sparsity.distributions import is_kernel


def shapes_tree(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def resnet32(classes=10):
    """Kernel shapes of the wide CIFAR ResNet-32 (32, 64, 128 channels), HWIO."""
    shapes, width = {"stem": (3, 3, 3, 32)}, 32
    for stage, out in enumerate((32, 64, 128)):
        for block in range(5):
            shapes[f"{stage}.{block}.conv1"] = (3, 3, width, out)
            shapes[f"{stage}.{block}.conv2"] = (3, 3, out, out)
            if width != out:
                shapes[f"{stage}.{block}.shortcut"] = (1, 1, width, out)
            width = out
    return shapes | {"head": (128, classes)}


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.5, {"a": 0.777778, "b": 0.291667, "c": 1.0}),
        (0.8, {"a": 0.309028, "b": 0.115885, "c": 0.417188}),
    ],
)
def test_erk_worked_example(sparsity, expected):
    params = shapes_tree({"a": (4, 2, 3, 3), "b": (8, 4, 3, 3), "c": (10, 8)})
    got = erdos_renyi_kernel(params, sparsity)
    np.testing.assert_allclose([1 - got[k] for k in "abc"], list(expected.values()), atol=5e-7)


def test_erk_of_resnet32_matches_the_published_densities():
    shapes = resnet32()
    got = {k: 1 - s for k, s in erdos_renyi_kernel(shapes_tree(shapes), 0.9).items()}
    assert {k for k, d in got.items() if d == 1} == {"stem", "1.0.shortcut", "head"}
    stages = [got["0.1.conv1"], got["1.1.conv1"], got["2.1.conv1"], got["1.0.conv1"], got["2.0.conv1"]]
    np.testing.assert_allclose(stages, [0.28955, 0.13857, 0.06773, 0.21096, 0.10238], atol=5e-6)
    np.testing.assert_allclose(got["2.0.shortcut"], 0.90278, atol=5e-6)
    for sparsity, dense in ((0.95, {"head"}), (0.98, set())):
        assert {k for k, s in erdos_renyi_kernel(shapes_tree(shapes), sparsity).items() if s == 0} == dense


dimensions = st.lists(st.integers(1, 12), min_size=2, max_size=4)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.lists(dimensions, min_size=1, max_size=6), st.floats(0.0, 0.99))
def test_erk_meets_its_budget(shape_list, sparsity):
    shapes = {str(i): tuple(s) for i, s in enumerate(shape_list)}
    total = sum(int(np.prod(s)) for s in shapes.values())
    hypothesis.assume(round((1 - sparsity) * total, 6) >= len(shapes))
    got = erdos_renyi_kernel(shapes_tree(shapes), sparsity)
    want = oracles.erk_densities(shapes, sparsity)
    np.testing.assert_allclose([1 - got[k] for k in shapes], [want[k] for k in shapes], rtol=1e-9, atol=1e-12)
    budget = sum(int(np.prod(s)) - int(np.floor(round(sparsity * np.prod(s), 6))) for s in shapes.values())
    np.testing.assert_allclose(sum((1 - got[k]) * np.prod(s) for k, s in shapes.items()), budget, rtol=1e-9)


def test_er_uses_the_last_two_dimensions():
    shapes = {"a": (3, 3, 16, 32), "b": (3, 3, 64, 64)}
    got = erdos_renyi(shapes_tree(shapes), 0.9)
    want = oracles.erk_densities(shapes, 0.9, power=lambda s: (s[-2] + s[-1]) / (s[-2] * s[-1]))
    np.testing.assert_allclose([1 - got[k] for k in shapes], [want[k] for k in shapes], rtol=1e-12)


def test_uniform_gives_every_leaf_the_same_and_leaves_vectors_dense():
    params = shapes_tree({"kernel": (8, 8), "bias": (8,), "scalar": ()})
    assert uniform(params, 0.75) == {"kernel": 0.75, "bias": 0.0, "scalar": 0.0}
    assert not is_kernel("", jnp.zeros((0, 4)))


def test_overrides_stay_outside_the_budget():
    params = shapes_tree({"stem/kernel": (4, 4), "a/kernel": (8, 8), "b/kernel": (8, 32)})
    got = erdos_renyi_kernel(params, 0.75, overrides={"stem/*": 0.0})
    rest = erdos_renyi_kernel(shapes_tree({"a/kernel": (8, 8), "b/kernel": (8, 32)}), 0.75)
    assert got == {"stem/kernel": 0.0, **rest}
    assert uniform(params, 0.75, overrides={"a/*": 0.5, "*": 0.25}) == {
        "stem/kernel": 0.25, "a/kernel": 0.5, "b/kernel": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("method", [methods.static(), methods.rigl(0.3)])
@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_initial_masks_have_exactly_the_planned_counts(method, distribution):
    import optax

    params = {"a": jnp.ones((5, 7)), "b": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}}
    state = sparsify(
        optax.sgd(0.1), method, sparsity=0.8, distribution=distribution, when=Every(0, 10, 100)
    ).init(params)  # fmt: skip
    plan = {"uniform": uniform, "er": erdos_renyi, "erk": erdos_renyi_kernel}[distribution](params, 0.8)
    want = jax.tree.map(lambda p, s: p.size - int(np.floor(round(s * p.size, 6))), params, plan)
    assert jax.tree.map(lambda m: int(m.sum()), state.masks) == want
    assert state.nnz.tolist() == jax.tree.leaves(want)


LEAVES = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


def test_a_sparsity_may_be_an_array():
    tx = sparsify(optax.sgd(0.1), methods.rigl(0.3), sparsity=jnp.float32(0.5), when=Every(0, 2, 9))
    by_array = sparsify(optax.sgd(0.1), methods.static(), sparsity=jnp.float32(0.9))
    assert int(by_array.init({"kernel": jnp.ones((25, 40))}).nnz[0]) == 100
    step = make_train_step(lambda p, m, b, k: (jnp.sum(p["enc"] * b), (m, {})), tx)
    state, _ = step(TrainState.create({"enc": LEAVES["enc"]}, tx), jnp.ones((4, 4)))
    assert int(state.opt_state.nnz[0]) == 8
    assert int(select(jnp.arange(1000.0), sparsity=np.float32(0.9)).sum()) == 100


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_traced_sparsity_in_half_precision(dtype):
    """In float16 100,000 is infinite, and in bfloat16 no integer beyond 256 need be exact."""
    sparsity = jnp.asarray(0.9, dtype)
    mask = jax.jit(lambda s: select(jnp.arange(100_000.0), sparsity=s))(sparsity)
    assert int(mask.sum()) == 100_000 - int(float(sparsity) * 100_000)


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def test_biases_of_attention_and_of_scanned_layers_stay_dense():
    attention = nnx.MultiHeadAttention(2, 4, 8, rngs=nnx.Rngs(0))
    scanned = nnx.vmap(lambda rngs: nnx.LayerNorm(8, rngs=rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))
    params = {"attention": nnx.state(attention, nnx.Param), "scanned": nnx.state(scanned, nnx.Param)}
    masks = get_masks(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params))
    several = {path: bool(mask.all()) for path, mask in named(masks).items() if mask.ndim > 1}
    assert sorted(several.values()) == [False] * 4 + [True] * 5
    assert all(dense == path.endswith(("bias", "scale")) for path, dense in several.items())


def test_offsets_of_haikus_norms_stay_dense():
    params = {"batch_norm": {"offset": jnp.zeros((1, 1, 1, 8)), "scale": jnp.ones((1, 1, 1, 8))}, **KERNEL}
    masks = get_masks(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params))
    assert all(bool(mask.all()) for mask in masks["batch_norm"].values())
    assert int(masks["kernel"].sum()) == 50

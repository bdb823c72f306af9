"""Methods under N:M, blocks and channels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from common import find, named
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles_structure import block_of, blocks, groups_mask, pooled, spread, unit_mask

from s2sam_jax import NM, Block, Channel, Every, Unstructured, apply_masks, check_masks, get_masks, methods, sparsify

WHEN = Every(0, 1, 100)
NM_SHAPES = [(8,), (3, 3, 8, 5), (1, 1, 4, 2), (3, 3, 6, 2), (5, 3), (2, 2)]


def draw(seed, shape, ties=False):
    values = np.random.default_rng(seed).normal(size=shape)
    return np.float32(np.round(values) if ties else values)


def tree(seed, ties=False):
    """Three alike kernels, a matrix whose 7 inputs nothing divides, and a bias."""
    return {
        **{name: jnp.asarray(draw((seed, i), (3, 3, 4, 8), ties)) for i, name in enumerate("abc")},
        "head": {"kernel": jnp.asarray(draw((seed, 3), (7, 6), ties)), "bias": jnp.asarray(draw(seed, (6,), ties))},
    }


KERNELS = ("a", "b", "c", "head/kernel")


def walk(tx, steps, dtype=jnp.float32, when=None):
    """Random gradients, of many ties at every other step; yields them, the weights before, and what came of them.

    With the clock given it runs op by op, which the methods then compile but once for all.
    """
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    params = cast(tree(0))
    jit = jax.jit if when is None else lambda f: f
    state, update = jit(tx.init)(params), jit(tx.update)
    params = apply_masks(params, state)
    for step in range(steps):
        grads, before, old = cast(tree(step + 1, ties=step % 2 == 1)), params, state
        flags = {} if when is None else {"refresh_masks": bool(when.at_or_after(step) == step)}
        updates, state = update(grads, state, params, **flags)
        params = optax.apply_updates(params, updates)
        yield grads, before, old, state, params


def assert_sparse(params, state):
    check_masks(params, state)
    momentum = named(find(state, optax.TraceState).trace)
    for name, mask in named(get_masks(state)).items():
        assert (momentum[name][~mask] == 0.0).all(), name


SGD = optax.sgd(0.01, momentum=0.9)
PHASES = ((0.0, 0.1), (0.6, 0.0))


MAKE = {
    "static": methods.static,
    "magnitude": methods.magnitude,
    "gmp": methods.gmp,
    "set": lambda: methods.set(0.4),
    "rigl": lambda: methods.rigl(0.4, skip_step=False),
    "itop": methods.itop,
    "mest": lambda: methods.mest(PHASES, lam=0.1),
}


sparse_methods = pytest.mark.parametrize("name", MAKE)


@pytest.mark.parametrize("make", [methods.static, methods.magnitude, methods.rigl])
def test_two_of_every_four_for_any_shape(make):
    structure = NM(2, 4, pad=True)
    params = {str(i): jnp.asarray(draw(i, shape)) for i, shape in enumerate(NM_SHAPES) if len(shape) > 1}
    tx = sparsify(SGD, make(), sparsity=0.5, when=WHEN, structure=structure)
    masks = jax.jit(tx.init)(params).masks
    for name, mask in masks.items():
        groups = [np.asarray(mask)[at] for at in blocks(mask.shape, block_of(structure, mask.shape))]
        assert all(group.sum() == min(2, group.size) for group in groups), name
        if make is methods.magnitude:
            np.testing.assert_array_equal(mask, groups_mask(np.abs(params[name]), structure))


def test_rigl_keeps_two_of_four_over_a_hundred_updates_and_equals_its_equations():
    """Every update: the drop by a ranking of the leaf, the growth by the best of each group that has room."""
    structure = NM(2, 4, pad=True)
    tx = sparsify(SGD, MAKE["rigl"](), sparsity=0.5, when=WHEN, structure=structure)
    moved = 0
    for step, (grads, before, old, state, params) in enumerate(walk(tx, 100)):
        assert_sparse(params, state)
        fraction = 0.2 * (1 + math.cos(math.pi * step / 100))
        masks, olds, weights, grads = (named(x) for x in (state.masks, old.masks, before, grads))
        for name in KERNELS:
            mask = masks[name]
            live = int(olds[name].sum())
            keep = oracles.top_mask(np.abs(weights[name]), live - math.floor(round(live * fraction, 4)), olds[name])
            want = keep | groups_mask(np.abs(grads[name]), structure, taken=keep)
            np.testing.assert_array_equal(mask, want)
            assert all(mask[at].sum() == 2 for at in blocks(mask.shape, block_of(structure, mask.shape)))
            moved += int((mask & ~olds[name]).sum())
        assert masks["head/bias"].all()
    assert moved > 100


@sparse_methods
def test_n_of_m_under_every_method(name):
    structure = NM(1, 4, pad=True)
    tx = sparsify(SGD, MAKE[name](), sparsity=0.75, when=(when := Every(0, 1, 6)), structure=structure)
    shrunk = []
    for *_, state, params in walk(tx, 8, when=when):
        assert_sparse(params, state)
        for leaf in (named(state.masks)[key] for key in KERNELS):
            groups = [int(leaf[at].sum()) for at in blocks(leaf.shape, block_of(structure, leaf.shape))]
            if name != "gmp":
                assert set(groups) == {1}
            shrunk.append(min(groups))
    assert min(shrunk) == 1
    assert set(groups) == {1}, "where the clock has ended"


def test_gmp_under_n_of_m_keeps_the_best_of_each_group_and_follows_its_cubic():
    structure = NM(2, 4, pad=True)
    tx = sparsify(SGD, methods.gmp(), sparsity=0.5, when=Every(0, 1, 5), structure=structure)
    for step, (_, before, old, state, _) in enumerate(walk(tx, 6, jnp.bfloat16)):
        for name in ("b", "head/kernel"):
            scores, was, mask = (
                np.abs(np.float32(named(before)[name])),
                named(old.masks)[name],
                named(state.masks)[name],
            )
            zeros = sum(max(scores[at].size - 2, 0) for at in blocks(mask.shape, block_of(structure, mask.shape)))
            count = mask.size - math.floor(zeros * (1 - (1 - step / 5) ** 3) + 1e-9)
            best = groups_mask(scores, structure, among=was)
            want = best | oracles.top_mask(scores, count - int(best.sum()), was & ~best)
            np.testing.assert_array_equal(mask, want)
    assert int(mask.sum()) == mask.size - zeros


def test_a_short_group_that_keeps_all_it_has_makes_a_dense_leaf():
    params = {"kernel": jnp.ones((2, 5)), "other": jnp.ones((4, 5))}
    masks = jax.jit(sparsify(SGD, methods.static(), sparsity=0.5, structure=NM(2, 4, pad=True)).init)(params).masks
    assert bool(masks["kernel"].all())
    assert not bool(masks["other"].all())


def gmp_count(units, sparsity, step, end):
    zeros = units - oracle_kept(units, sparsity)
    return units - math.floor(zeros * (1 - (1 - min(step, end) / end) ** 3) + 1e-9)


def oracle_kept(units, sparsity):
    return units - math.floor(round(units * sparsity, 6))


@pytest.mark.parametrize("structure", [Block((2, 2), pad=True), Channel(pool="l2")], ids=str)
@sparse_methods
def test_units_live_and_die_whole_in_exact_counts(name, structure):
    end, when = 6, Every(0, 1, 6)
    overrides = {"head/*": 0.0} if isinstance(structure, Channel) else None
    tx = sparsify(
        SGD, MAKE[name](), sparsity=0.6, distribution="uniform", when=when, structure=structure,
        overrides=overrides,
    )  # fmt: skip
    sparse = KERNELS if overrides is None else KERNELS[:3]
    changed = 0
    for step, (_, _, old, state, params) in enumerate(walk(tx, 8, when=when)):
        assert_sparse(params, state)
        masks, olds = named(state.masks), named(old.masks)
        assert all(masks[key].all() for key in masks.keys() - {*sparse})
        for key in sparse:
            units = unit_mask(masks[key], structure)
            want = gmp_count(units.size, 0.6, step, end) if name == "gmp" else oracle_kept(units.size, 0.6)
            assert units.sum() == want
            changed += int((masks[key] != olds[key]).sum())
    assert (changed > 0) == (name not in ("static", "magnitude"))


@pytest.mark.parametrize(
    ("structure", "dtype"), [(Block((2, 2), pad=True), "float32"), (Channel(-1, pool="max"), "bfloat16")]
)
def test_rigl_in_units_equals_rigl_on_pooled_magnitudes(structure, dtype):
    tx = sparsify(SGD, MAKE["rigl"](), sparsity=0.5, when=WHEN, structure=structure)
    for step, (grads, before, old, state, params) in enumerate(walk(tx, 10, dtype)):
        assert_sparse(params, state)
        fraction = 0.2 * (1 + np.cos(np.pi * step / 100))
        masks, olds, weights, grads = (named(x) for x in (state.masks, old.masks, before, grads))
        for name in KERNELS:
            w, g = (np.float32(pooled(np.abs(x[name]), structure)) for x in (weights, grads))
            want = oracles.rigl_update(w, g, unit_mask(olds[name], structure), fraction)
            np.testing.assert_array_equal(unit_mask(masks[name], structure), want)


@pytest.mark.parametrize("structure", [Unstructured(), Block((2, 2)), NM(2, 4)], ids=str)
def test_mest_starts_from_zero_whatever_it_has_pruned_and_regrown(structure):
    """It keeps a quarter and grows another; over twenty seeds, often what it has just dropped."""
    params, method = {"kernel": jnp.asarray(draw(0, (4, 4)))}, methods.mest(((0.0, 0.25),))

    @jax.jit
    @jax.vmap
    def first_update(seed):
        tx = sparsify(optax.sgd(0.0), method, sparsity=0.5, when=Every(0, 1, 4), structure=structure, seed=seed)
        state = tx.init(params)
        live = apply_masks(params, state)
        updates, new = tx.update(live, state, live)
        return state.masks["kernel"], new.masks["kernel"], optax.apply_updates(live, updates)["kernel"]

    regrown = 0
    for old, new, after in zip(*first_update(jnp.arange(20)), strict=True):
        live = np.where(old, params["kernel"], 0)
        if isinstance(structure, Block):
            keep = spread(oracles.top_mask(pooled(np.abs(live), structure), 1), structure, (4, 4))
        else:
            keep = oracles.top_mask(np.abs(live), 4)
        np.testing.assert_array_equal(after, np.where(keep, live, 0))
        regrown += int((old & new & ~keep).sum())
    assert regrown > 0


def test_set_takes_blocks_without_their_sign():
    """Half of six live channels go, the smallest, though all but one are negative."""
    weights = -jnp.broadcast_to(jnp.arange(1.0, 13.0), (2, 12)).at[:, 11].multiply(-1)
    grow_last = sparsify(SGD, methods.set(0.5), sparsity=0.5, when=WHEN, structure=Channel())
    state = jax.jit(grow_last.init)({"kernel": weights})
    old = unit_mask(np.asarray(state.masks["kernel"]), Channel())
    _, new = jax.jit(grow_last.update)({"kernel": weights}, state, {"kernel": weights})
    units = unit_mask(np.asarray(new.masks["kernel"]), Channel())
    largest = oracles.top_mask(np.arange(12.0), 3, old)
    assert units[largest].all()
    assert units.sum() == 6


def test_a_sharded_run_equals_one_on_a_single_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tx = sparsify(SGD, methods.rigl(0.4), sparsity=0.5, when=WHEN, structure=NM(2, 4))
    params, grads = {"kernel": jnp.asarray(draw(0, (32, 4)))}, {"kernel": jnp.asarray(draw(1, (32, 4)))}
    state = tx.init(params)
    want, _ = jax.jit(tx.update)(grads, state, params)
    split = functools.partial(jax.tree.map, lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x)
    with jax.set_mesh(mesh):
        got, new = jax.jit(tx.update)(split(grads), split(state), split(params))
    assert new.masks["kernel"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(got["kernel"], want["kernel"])

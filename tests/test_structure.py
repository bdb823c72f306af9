"""N:M, blocks and channels: selection against loops in NumPy, and methods under each of them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from common import find, named
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles_structure import block_of, blocks, groups_mask, pooled, spread, unit_mask

from experiments.config.structures import parse
from s2sam_jax import (
    NM,
    Block,
    Channel,
    Every,
    NMPacked,
    Unstructured,
    apply_masks,
    check_masks,
    get_masks,
    methods,
    nm_pack,
    nm_unpack,
    select,
    sparsify,
)

WHEN = Every(0, 1, 100)
NM_SHAPES = [(8,), (3, 3, 8, 5), (1, 1, 4, 2), (3, 3, 6, 2), (5, 3), (2, 2)]


def draw(seed, shape, ties=False):
    values = np.random.default_rng(seed).normal(size=shape)
    return np.float32(np.round(values) if ties else values)


# select


@pytest.mark.parametrize("structure", [NM(2, 4, pad=True), NM(1, 3, axis=0, pad=True), NM(3, 5, axis=-1, pad=True)])
def test_select_n_of_every_m_equals_a_sort_of_each_group(structure):
    shapes = [s for s in NM_SHAPES if -len(s) <= structure.axis]
    scores = [draw(i, s, ties) for i, s in enumerate(shapes) for ties in (False, True)]
    scores[0].flat[:3] = [np.nan, -0.0, -np.inf]
    among = [draw(9, s.shape) > -0.5 for s in scores]
    got = jax.jit(lambda s, a: (select(s, structure=structure), select(s, structure=structure, among=a)))(scores, among)
    for free, bound, s, a in zip(*got, scores, among, strict=True):
        np.testing.assert_array_equal(free, groups_mask(s, structure))
        np.testing.assert_array_equal(bound, groups_mask(s, structure, among=a))


UNITS = [
    (Block((2, 3), pool="max", pad=True), (3, 3, 5, 7)),
    (Block((3, 3, 1, 1), pool="l2"), (3, 3, 4, 3)),
    (Block((2, 3), pad=True), (3, 7)),
    (Block((2, 3), pool="l2", pad=True), (1, 8)),
    (Channel(), (3, 3, 2, 7)),
    (Channel(-2, pool="l2"), (3, 6, 2)),
]


@pytest.mark.parametrize(("structure", "shape"), UNITS)
def test_select_units_equals_a_sort_of_pooled_scores(structure, shape):
    among = draw(4, shape) > -1.5
    allowed = np.array([among[at].all() for at in blocks(shape, block_of(structure, shape))])
    counts = jnp.arange(allowed.size + 1)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def choose(count, scores, among):
        return select(scores, count=count, among=among, structure=structure)

    for ties in (False, True):
        scores = draw(3, shape, ties)
        units = np.float32(pooled(scores, structure))  # equal where the pooled float32 are
        everywhere, within = choose(counts, scores, np.ones(shape, bool)), choose(counts, scores, among)
        for count in range(allowed.size + 1):
            free, bound = oracles.top_mask(units, count), oracles.top_mask(units, count, allowed)
            np.testing.assert_array_equal(everywhere[count], spread(free, structure, shape))
            np.testing.assert_array_equal(within[count], spread(bound, structure, shape))


def test_sparsity_counts_units_in_a_leaf_and_over_leaves():
    scores = {"a": jnp.asarray(draw(0, (8, 10))), "b": jnp.asarray(draw(1, (8, 30)))}
    for structure, units in ((Block((4, 5)), {"a": 4, "b": 12}), (Channel(), {"a": 10, "b": 30})):
        per_leaf, together = jax.jit(
            lambda s, structure=structure: (
                select(s, sparsity=0.75, structure=structure),
                select(s, count=5, scope="global", structure=structure),
            )
        )(scores)
        assert {k: int(unit_mask(np.asarray(m), structure).sum()) for k, m in per_leaf.items()} == {
            k: n - math.floor(0.75 * n) for k, n in units.items()
        }
        flat = np.concatenate([pooled(np.asarray(s), structure) for s in scores.values()])
        found = np.concatenate([unit_mask(np.asarray(m), structure) for m in together.values()])
        np.testing.assert_array_equal(found, oracles.top_mask(flat, 5))


def test_bfloat16_scores_and_no_sort():
    scores = jnp.asarray(draw(0, (8, 12)), jnp.bfloat16)
    for structure, options in ((NM(2, 4), {}), (Block((4, 4)), {"count": 3}), (Channel(), {"count": 3})):
        chosen = jax.jit(functools.partial(select, structure=structure, **options))
        assert not re.search(r"\b(sort|topk|top-k)\b", chosen.lower(scores).compile().as_text())
    np.testing.assert_array_equal(select(scores, structure=NM(2, 4)), groups_mask(np.float64(scores), NM(2, 4)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_masks_under_a_structure_are_sharded_as_their_scores(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    scores = draw(0, (32, 8))
    for structure, options in ((NM(2, 4), {}), (NM(2, 4, axis=-1), {}), (Block((4, 4)), {"count": 7})):
        choose = jax.jit(functools.partial(select, structure=structure, **options))
        mask = choose(jax.device_put(scores, sharding))
        assert mask.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(mask, choose(scores))


# sparsify under N:M


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


# sparsify in units


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


# Refusals


TWO_OF_FOUR = NM(2, 4)


def build(method, structure=TWO_OF_FOUR, sparsity=0.5, **options):
    options = {"distribution": "uniform", **options}
    tx = sparsify(SGD, method, sparsity=sparsity, when=WHEN, structure=structure, **options)
    return tx.init({"kernel": jnp.ones((8, 8)), "stem": jnp.ones((3, 3, 3, 8))})


NO_STEM = {"overrides": {"stem": 0.0}}
REFUSED = {
    "snip": (lambda: build(methods.snip()), r"structure=NM.*shares its weights out over all leaves"),
    "grasp": (lambda: build(methods.grasp(), Channel()), "shares its weights out over all leaves"),
    "lottery": (lambda: build(methods.lottery(), Block((2, 2))), "shares its weights out over all leaves"),
    "lrr": (lambda: build(methods.lrr()), "shares its weights out over all leaves"),
    "dsr": (lambda: build(methods.dsr()), "shares its weights out over all leaves"),
    "gmp_global": (lambda: build(methods.gmp("global")), "shares its weights out over all leaves"),
    "magnitude_global": (lambda: build(methods.magnitude("global")), "shares its weights out over all leaves"),
    "own": (lambda: build(methods.static()._replace(structured=False)), "decides weight by weight.*structured=True"),
    "ems": (lambda: build(methods.mest(soft_bound=True), **NO_STEM), r"grows beyond NM\(n=2, m=4.*use mest\(\)"),
    "stem": (
        lambda: build(methods.rigl()),
        r"(?s)stem of shape \(3, 3, 3, 8\): axis 2 has 3 entries, not a multiple of 4.*pad=True, another axis.*"
        r"overrides=\{'stem': 0\.0\}",
    ),
    "block": (
        lambda: build(methods.rigl(), Block((8, 4))),
        r"(?s)stem of shape .*axis 2 has 3 entries, not a multiple of 8.*pad=True, another shape",
    ),
    "block_axes": (lambda: build(methods.rigl(), Block((3, 3, 1, 1))), "kernel of .*: a block has 4 axes, the leaf 2"),
    "channel": (lambda: build(methods.rigl(), Channel(-3)), r"kernel of .*: there is no axis -3\nGive another axis"),
    "sparsity": (lambda: build(methods.rigl(), sparsity=0.9, **NO_STEM), r"has sparsity 0\.5, but planned are .*0\.9"),
    "erk": (
        lambda: build(methods.rigl(), NM(2, 4, pad=True), distribution="erk"),
        r"every sparse leaf has sparsity 0\.5, but planned are .*distribution='uniform'",
    ),
    "select_count": (lambda: select(jnp.ones(4), count=2, structure=NM(2, 4, -1)), "leave count and sparsity out"),
    "select_sparsity": (
        lambda: select(jnp.ones(4), sparsity=0.25, structure=NM(2, 4, -1)),
        r"or give sparsity=0\.5; got count=None, sparsity=0\.25",
    ),
    "select_shape": (lambda: select({"x": jnp.ones((6, 2))}, structure=NM(2, 4)), r"x of shape \(6, 2\): axis 0 has 6"),
    "select_units": (lambda: select(jnp.ones((4, 4)), count=5, structure=Channel()), "0 <= count <= 4"),
    "n": (lambda: NM(4, 4), "0 < n < m <= 256; got n=4, m=4"),
    "whole": (lambda: NM(2.0, 4), "integers with 0 < n < m <= 256; got n=2.0, m=4"),
    "pool_for_axis": (lambda: Channel("l2"), "Channel needs an integer axis, such as -1, .* got axis='l2'"),
    "pool": (lambda: Block((2, 2), pool="sum"), "Block needs pool 'mean', 'l2' or 'max'; got 'sum'"),
    "shape": (lambda: Block((2, 0)), r"shape of positive integers, such as \(4, 4\); got \(2, 0\)"),
    "parse": (lambda: parse("3:4"), "Unknown structure '3:4'; use 'unstructured', 'nm:N:M'"),
    "parse_int": (lambda: parse("channel:x"), "Cannot read structure 'channel:x'.*'channel:AXIS'"),
    "parse_nm": (lambda: parse("nm:4:2"), "0 < n < m <= 256; got n=4, m=2"),
    "pack": (
        lambda: nm_pack({"a": jnp.ones((4, 1))}, {"a": jnp.eye(4, 1, dtype=bool)}, NM(2, 4)),
        "mask of 'a' has groups of 1 to 1 weights",
    ),
    "pack_shape": (
        lambda: nm_pack({"a": jnp.ones((6, 1))}, {"a": jnp.array([[1, 1, 0, 0, 1, 1]], bool).T}, NM(2, 4)),
        "a of shape \\(6, 1\\): axis 0 has 6 entries, not a multiple of 4",
    ),
    "pack_more": (
        lambda: nm_pack({"a": jnp.ones((8, 1))}, {"a": jnp.array([[1, 1, 1, 0, 1, 0, 1, 0]], bool).T}, NM(2, 4)),
        "mask of 'a' has groups of 2 to 3 weights",
    ),
    "unpack": (
        lambda: nm_unpack({"a": NMPacked(jnp.ones((3, 1)), jnp.ones((3, 1), jnp.uint8), 4, NM(2, 4))}),
        "'a' has values .*have 2 entries on axis 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_told_what_was_expected(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("structure", [NM(2, 4), Block((2, 2)), Channel()])
def test_a_structure_may_be_static_in_jit(structure):
    assert hash(structure) == hash(eval(repr(structure)))
    with pytest.raises(AttributeError):
        structure.pad = True


def test_what_is_no_structure_is_a_type_error():
    for call in (lambda: build(methods.rigl(), "nm:2:4"), lambda: select(jnp.ones(4), count=1, structure=Channel)):
        with pytest.raises(TypeError, match=r"structure must be Unstructured\(\), NM\(n, m\)"):
            call()
    with pytest.raises(TypeError, match=r"nm_pack needs structure=NM\(n, m\); got Channel"):
        nm_pack(jnp.ones(4), jnp.ones(4, bool), Channel())


# Export and names


@pytest.mark.parametrize("structure", [NM(2, 4, pad=True), NM(3, 4, axis=-1, pad=True)])
def test_packed_weights_come_back_bit_for_bit(structure):
    """Whole groups, groups cut short above and below n, negative zeros among what lives, and a dense leaf."""
    shapes = {"conv": (3, 3, 6, 5), "matrix": (5, 8)}
    params = {name: jnp.asarray(draw(7, shape)).at[..., 0].set(-0.0) for name, shape in shapes.items()}
    params["matrix"] = params["matrix"].astype(jnp.bfloat16)
    masks = select(params, structure=structure) | {"bias": jnp.ones(3, bool)}
    params |= {"bias": jnp.ones(3)}
    sparse = {name: jnp.where(masks[name], p, 0) for name, p in params.items()}
    packed = nm_pack(sparse, masks, structure)
    weights, again = nm_unpack(packed)
    assert packed["bias"] is sparse["bias"]
    for name in params:
        np.testing.assert_array_equal(again[name], masks[name])
        assert weights[name].dtype == params[name].dtype
        assert np.asarray(weights[name]).tobytes() == np.asarray(sparse[name]).tobytes()
    for name, shape in shapes.items():
        groups = -(-shape[structure.axis] // structure.m)
        assert packed[name].values.shape[structure.axis] == groups * structure.n
        assert packed[name].indices.shape == packed[name].values.shape
        assert packed[name].indices.dtype == jnp.uint8


def test_packed_two_of_four_by_hand():
    weights = jnp.array([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]])
    packed = nm_pack(weights, weights != 0, NM(2, 4, axis=-1))
    np.testing.assert_array_equal(packed.values, [[5, 7, 1, 2]])
    np.testing.assert_array_equal(packed.indices, [[1, 3, 0, 1]])


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("unstructured", Unstructured()),
        ("nm:2:4", NM(2, 4)),
        ("nm:2:4:pad", NM(2, 4, pad=True)),
        ("block:4x4", Block((4, 4))),
        ("block:3x3x1x1:pad", Block((3, 3, 1, 1), pad=True)),
        ("channel", Channel()),
        ("channel:-2", Channel(-2)),
    ],
)
def test_parse(text, structure):
    assert parse(text) == structure

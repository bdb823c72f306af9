"""N:M, blocks and channels: selection against loops in NumPy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles_structure import block_of, blocks, groups_mask, pooled, spread, unit_mask

from experiments.config.structures import parse
from s2sam_jax import NM, Block, Channel, Every, NMPacked, Unstructured, methods, nm_pack, nm_unpack, select, sparsify

WHEN = Every(0, 1, 100)
NM_SHAPES = [(8,), (3, 3, 8, 5), (1, 1, 4, 2), (3, 3, 6, 2), (5, 3), (2, 2)]


def draw(seed, shape, ties=False):
    values = np.random.default_rng(seed).normal(size=shape)
    return np.float32(np.round(values) if ties else values)


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


SGD = optax.sgd(0.01, momentum=0.9)
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

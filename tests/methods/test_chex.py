"""CHEX against its equations, on conv, norm, conv, norm, conv."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_channels as oracle
import pytest
from two_groups import GROUPS, LAST, SIZES, live_channels, network_masks, on_host, optimizer, trajectory, tree

from s2sam_jax import ChannelAxis, ChannelGroup, Every, methods, set_masks
from s2sam_jax._base.schedules import cosine
from s2sam_jax._base.select import keep_best, random_scores
from s2sam_jax._sparsity.exploration import leverage_scores, residuals, sample, shares


def test_leverage_scores_and_residuals_of_the_worked_example():
    rows = jnp.array([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0.5, 0]])
    np.testing.assert_allclose(np.linalg.svd(rows)[1], [1.7321, 1, 0.5], atol=5e-5)
    np.testing.assert_allclose(leverage_scores(rows, 2), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(jnp.sqrt(residuals(rows, jnp.array([True, True, False]))), [0, 0, 0.5], atol=1e-6)


@pytest.mark.parametrize(("weights", "channels"), [(20, 7), (7, 7), (5, 7)])
def test_leverage_scores_and_residuals_equal_a_decomposition(weights, channels):
    """Also with dead channels, and by L1 norms where there are more channels than weights."""
    x = np.random.default_rng(weights).normal(size=(weights, channels))
    x[:, 2] = 0
    keep = np.arange(channels) % 3 == 0
    with jax.enable_x64(True):
        rows = jnp.asarray(x.T)
        for k in range(1, 6):
            np.testing.assert_allclose(jax.jit(leverage_scores)(rows, k), oracle.leverage(x, k), atol=1e-10)
        np.testing.assert_allclose(residuals(rows, jnp.asarray(keep)), oracle.residual(x, keep), atol=1e-10)


def test_short_filters_span_as_much_as_long_ones():
    """In float32: of what a kept filter of a thousandth of the others' length expresses, nothing is left over."""
    x = np.random.default_rng(0).normal(size=(288, 64)).astype(np.float32)
    x[:, 40] = x[:, 20]
    x[:, 16:32] *= 0.001
    keep = np.arange(64) < 32
    found = residuals(jnp.asarray(x.T), jnp.asarray(keep))
    np.testing.assert_allclose(found, oracle.residual(x.astype(np.float64), keep), rtol=1e-4, atol=1e-2)


def test_a_tpu_gets_a_decomposition_that_it_can_compile():
    """One call for all channels: the default there is a program of thousands of lines, in 512 channels and more."""
    rows = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    keep = jax.ShapeDtypeStruct((512,), bool)
    for function in (lambda rows, keep: leverage_scores(rows, 7), residuals):
        text = jax.jit(function).trace(rows, keep).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("stablehlo.custom_call @Eigh") == 1
        assert text.count("\n") < 200


def test_sampling_follows_the_printed_probabilities():
    """softmax(r) and softmax(r^2) for r = (.5, 1, .2): the authors' and the paper's."""
    r = jnp.array([0.5, 1.0, 0.2])
    draws = jax.jit(jax.vmap(lambda key, x: sample(key, [x], [1], [jnp.ones(3, bool)])[0], in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 40_000)
    np.testing.assert_allclose(draws(keys, r).mean(0), [0.295, 0.486, 0.219], atol=0.01)
    np.testing.assert_allclose(draws(keys, r**2).mean(0), [0.255, 0.539, 0.206], atol=0.01)


def test_explore_factor_equals_the_printed_values():
    got = [cosine(0.3, jnp.int32(epoch), 180) for epoch in (2, 90, 180)]
    np.testing.assert_allclose(got, [0.29991, 0.15, 0], atol=5e-6)


def test_shares_are_whole_and_add_up():
    draw, jitted = np.random.default_rng(0), jax.jit(lambda total, taken: shares(total, (3, 10, 4, 1), taken))
    for _ in range(50):
        taken = [int(draw.integers(0, n + 1)) for n in (3, 10, 4, 1)]
        total = int(draw.integers(0, 18))
        assert [int(n) for n in jitted(total, taken)] == oracle.shares(total, (3, 10, 4, 1), taken)
    assert [int(n) for n in shares(5, (3, 100, 4, 1), at_least=1)] == [1, 2, 1, 1]


def test_every_group_keeps_its_least():
    scores = [jnp.array([0.1, 0.2]), jnp.array([5.0, 6, 7, 8])]
    alive = [jnp.ones(2, bool), jnp.ones(4, bool)]
    first, second = keep_best(scores, 3, [1, 1], alive)
    np.testing.assert_array_equal(first, [False, True])
    np.testing.assert_array_equal(second, [False, False, True, True])


@pytest.mark.parametrize("compat", ["paper", "authors"])
def test_chex_equals_its_equations_over_a_trajectory(compat):
    """Masks, weights, momentum and the total: 15 channels, 8 for good, and floor(15 delta_t) more."""
    authors, recent = compat == "authors", None
    tx = optimizer(methods.chex(GROUPS, explore=0.4, compat=compat))

    def expected(state, weights, grads):
        nonlocal recent
        alive, step = live_channels(state.masks), int(state.step)
        recent = jax.tree.map(np.where, on_host(state.masks), weights, recent or on_host(tree(0)))
        like = [jnp.zeros(n) for n in SIZES]
        uniforms = random_scores(jax.random.fold_in(state.key, state.step), like)
        scales = [weights["norm1"]["scale"], weights["norm2"]["scale"]]
        new = oracle.chex_update(
            [weights["conv1"], weights["conv2"]], [recent["conv1"], recent["conv2"]],
            scales, alive, uniforms, 0.5, 0.4, step, LAST, authors,
        )  # fmt: skip
        masks = network_masks(*new)
        return masks, jax.tree.map(lambda m, w: np.where(m, w, 0), masks, recent)

    with jax.enable_x64(True):
        first = live_channels(tx.init(tree(0)).masks)
    want = oracle.chex_init([np.array(tree(0)[name]) for name in ("conv1", "conv2")], 0.5, 0.4, authors)
    jax.tree.map(np.testing.assert_array_equal, first, want)
    totals, returned = [], 0
    for due, old, new in trajectory(tx, expected):
        before, after = live_channels(old.masks), live_channels(new.masks)
        returned += sum(int((b & ~a).sum()) for a, b in zip(before, after, strict=True))
        assert all(a.any() for a in after)
        if due:
            totals.append(sum(int(a.sum()) for a in after))
    steps = range(1, LAST + 1, 2)
    if not authors:
        assert totals == [8 + int(15 * oracle.cosine(0.4, step, LAST)) for step in steps]
        assert totals[-1] == 8
    assert totals[-1] < totals[0]
    assert returned > 0
    explored = [np.array(m) for m in live_channels(new.masks)]
    assert sum(m.sum() for m in explored) == totals[-1]


def test_chex_brings_channels_back_with_their_last_weights_and_no_momentum():
    """Still weights at the update: what comes back is what left, in filters, norm and readers alike."""
    tx = optimizer(methods.chex(GROUPS, explore=0.5), sparsity=0.6, when=Every(0, 3, 90))
    params = tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    last, seen = on_host(params), 0
    for step in range(60):
        grads = jax.tree.map(jnp.zeros_like, params) if step % 3 == 0 else tree(step + 1)
        old = on_host(state.masks)
        last = jax.tree.map(np.where, old, on_host(params), last)
        updates, state = update(
            grads, state._replace(inner_state=jax.tree.map(jnp.zeros_like, state.inner_state)), params
        )
        params = optax.apply_updates(params, updates)
        if step % 3 == 0:
            grown = jax.tree.map(lambda a, b: np.array(b) & ~a, old, state.masks)
            seen += sum(m.sum() for m in jax.tree.leaves(grown))
            jax.tree.map(lambda m, w, p: np.testing.assert_array_equal(np.array(p)[m], w[m]), grown, last, params)
            trace = state.inner_state[0].trace
            assert not any(np.any(np.array(v)[m]) for m, v in zip(*map(jax.tree.leaves, (grown, trace)), strict=True))
    assert seen > 0


def chex_widths(compat, scales, explore=0.0, sparsity=0.5, alive=None):
    """Widths of two groups after an update in the first step of a long clock."""
    params = {"a": jnp.eye(12, len(scales[0])), "b": jnp.eye(12, len(scales[1])),
              "sa": jnp.asarray(scales[0], float), "sb": jnp.asarray(scales[1], float)}  # fmt: skip
    groups = [ChannelGroup(n, filters=(ChannelAxis(n, 1),), scales=(ChannelAxis(f"s{n}", 0),)) for n in "ab"]
    tx = optimizer(methods.chex(groups, explore=explore, compat=compat), sparsity=sparsity, when=Every(0, 1, 1000))
    dense = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
    state = set_masks(tx.init(params), dense if alive is None else alive(dense))
    _, state = jax.jit(functools.partial(tx.update, refresh_masks=True))(params, state, params)
    return int(state.masks["sa"].sum()), int(state.masks["sb"].sum())


def test_chex_authors_remove_one_channel_more():
    """A scale must exceed the threshold, which is itself the first that could stay."""
    scales = [1.0, 5, 6, 7], [2.0, 3, 4, 8]
    assert chex_widths("paper", scales) == (3, 1)
    assert chex_widths("authors", scales) == (2, 1)


def test_chex_authors_cut_widths_twice():
    """Seven of twelve scales exceed the threshold, and the code makes six of them: int(12 * (1 - 5 / 12))."""
    scales = list(range(12, 0, -1)), [100.0]
    assert chex_widths("paper", scales, sparsity=0.35) == (8, 1)
    assert chex_widths("authors", scales, sparsity=0.35) == (6, 1)


def test_chex_authors_widths_only_shrink():
    """Dead channels have no scale: none of theirs passes the threshold again. The paper's share goes by size."""
    scales = [5.0, 6, 7, 8], [1.0, 2, 3, 4]

    def alive(masks):
        live = jnp.array([True, False, False, False])
        return masks | {"b": masks["b"] & live, "sb": live}

    assert chex_widths("paper", scales, explore=0.5, sparsity=0.5, alive=alive) == (4, 4)
    assert chex_widths("authors", scales, explore=0.5, sparsity=0.5, alive=alive) == (4, 1)


def test_chex_first_masks_are_exact_where_the_authors_cut():
    """Of 15 + 15 channels 21 live at first; each half of 10.5 is cut to 10 by the code."""
    params = {"a": jnp.ones((8, 15)), "b": jnp.ones((8, 15)), "s": jnp.ones(15), "t": jnp.ones(15)}
    groups = [ChannelGroup(n, filters=(ChannelAxis(n, 1),), scales=(ChannelAxis(s, 0),)) for n, s in ("as", "bt")]
    first = {
        compat: optimizer(methods.chex(groups, compat=compat)).init(params).masks for compat in ("paper", "authors")
    }
    assert [int(first["paper"][s].sum()) for s in "st"] == [11, 10]
    assert [int(first["authors"][s].sum()) for s in "st"] == [10, 10]


def test_chex_draws_by_its_seed_under_vmap():
    def final(seed):
        tx = optimizer(methods.chex(GROUPS), when=Every(0, 1, 10), seed=seed)
        params = tree(0)
        return tx.update(tree(1), tx.init(params), params)[1].masks

    together = jax.jit(jax.vmap(final))(jnp.arange(16))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), together, jax.jit(final)(1))
    alive = np.concatenate(live_channels(together), axis=1)
    assert len({row.tobytes() for row in alive}) > 1
    assert alive.sum(1).tolist() == [8 + 3] * 16

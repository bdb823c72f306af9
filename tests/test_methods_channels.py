"""CHEX and Chase against their equations, on conv, norm, conv, norm, conv."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_channels as oracle
import pytest
from common import run

from s2sam_jax import ChannelAxis, ChannelGroup, Every, check_masks, methods, s2sam, set_masks, sparsify
from s2sam_jax._base.schedules import cosine
from s2sam_jax._base.select import keep_best, random_scores
from s2sam_jax._sparsity.exploration import leverage_scores, residuals, sample, shares

WHEN, LAST = Every(1, 2, 22), 21
LR, MOMENTUM = 0.1, 0.9
SIZES = [6, 9]
SHAPES = {"conv1": (3, 3, 2, 6), "conv2": (2, 2, 6, 9), "conv3": (1, 1, 9, 3),
          "norm1": {"bias": (6,), "scale": (6,)}, "norm2": {"bias": (9,), "scale": (9,)}}  # fmt: skip
KERNELS = ("conv1", "conv2", "conv3")


def group(number):
    return ChannelGroup(
        f"channels{number}",
        filters=(ChannelAxis(f"conv{number}", -1),),
        scales=(ChannelAxis(f"norm{number}/scale", 0),),
        biases=(ChannelAxis(f"norm{number}/bias", 0),),
        inputs=(ChannelAxis(f"conv{number + 1}", -2),),
    )


GROUPS = [group(1), group(2)]


def tree(seed, dtype=None):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(draw.normal(size=s), dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )


def on_host(x):
    return jax.tree.map(np.array, x)


def network_masks(first, second):
    """Elementwise masks when these channels live."""
    return {
        "conv1": np.broadcast_to(first, SHAPES["conv1"]),
        "conv2": np.broadcast_to(first[:, None] & second, SHAPES["conv2"]),
        "conv3": np.broadcast_to(second[:, None], SHAPES["conv3"]),
        "norm1": {"bias": first, "scale": first},
        "norm2": {"bias": second, "scale": second},
    }


def live_channels(masks):
    return [np.array(masks[norm]["scale"]) for norm in ("norm1", "norm2")]


def optimizer(method, sparsity=0.5, when=WHEN, **kwargs):
    return sparsify(optax.sgd(LR, momentum=MOMENTUM), method, sparsity=sparsity, when=when, **kwargs)


def trajectory(tx, expected):
    """Updates in float64 with random gradients, by the state rule: no momentum off the old mask, nor off the new one.

    ``expected(old state, weights, grads)`` gives the new masks and the weights to go on from, ``None`` between updates.
    """
    with jax.enable_x64(True):
        params = tree(0)
        state, update = tx.init(params), jax.jit(tx.update)
        weights = jax.tree.map(lambda m, w: np.where(m, w, 0), state.masks, params)
        momenta = jax.tree.map(np.zeros_like, weights)
        for step in range(LAST + 3):
            grads = tree(step + 1)
            due = step >= WHEN.start and (step - WHEN.start) % WHEN.every == 0 and step <= WHEN.end
            masks = on_host(state.masks)
            if due:
                new, weights = expected(state, weights, on_host(grads))
                momenta = jax.tree.map(lambda a, b, v: v * (a & b), masks, new, momenta)
                masks = new
            updates, new_state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            jax.tree.map(np.testing.assert_array_equal, new_state.masks, masks)
            momenta = jax.tree.map(lambda m, v, g: (MOMENTUM * v + np.array(g)) * m, masks, momenta, grads)
            weights = jax.tree.map(lambda m, w, v: (w - LR * v) * m, masks, weights, momenta)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
            jax.tree.map(close, params, weights)
            jax.tree.map(close, new_state.inner_state[0].trace, momenta)
            for m, w, v in zip(*map(jax.tree.leaves, (masks, params, new_state.inner_state[0].trace)), strict=True):
                assert not np.any(np.asarray(w)[~m])
                assert not np.any(np.asarray(v)[~m])
            yield due, state, new_state
            state = new_state


# CHEX


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


# Chase


def chase_reference(compat, extra, channel_every, budget, alive):
    """The oracle as ``expected`` of a trajectory; ``alive`` is updated."""
    size = sum(int(np.prod(SHAPES[name])) for name in KERNELS)
    removals = int(0.8 * LAST - 1) // (2 * channel_every)

    def expected(state, weights, grads):
        step = int(state.step)
        done = (step - 1) // (2 * channel_every)
        alive[:] = oracle.chase_channels([weights["conv1"], weights["conv2"]], alive, 0.5, 0.5, done, removals)
        masks = network_masks(*alive)
        places = [masks[name] for name in KERNELS]
        live = [np.array(state.masks[name]) & p for name, p in zip(KERNELS, places, strict=True)]
        count = sum(int(m.sum()) for m in live)
        lower, upper = oracle.chase_counts(budget, size, count, extra, 0.6, 0.5, 0.1, step, LAST)
        new, keep = oracle.chase_weights(
            [weights[name] for name in KERNELS], [grads[name] for name in KERNELS],
            live, places, lower, upper, compat == "authors",
        )  # fmt: skip
        masks |= dict(zip(KERNELS, new, strict=True))
        kept = masks | dict(zip(KERNELS, keep, strict=True))
        return masks, jax.tree.map(lambda m, w: np.where(m, w, 0), kept, weights)

    return expected


@pytest.mark.parametrize(("compat", "channel_every"), [("paper", 2), ("authors", 1)])
def test_chase_equals_its_equations_over_a_trajectory(compat, channel_every):
    """351 weights: a budget of 106, soft at first; 15 channels, of which 7 go, and never come back."""
    tx = optimizer(
        methods.chase(
            GROUPS, channel_every=channel_every, removal_end=0.8, exploration_end=0.6, final_fraction=0.1, compat=compat
        ),
        sparsity=0.7,
        distribution="uniform",
    )
    budget = sum(oracle.planned(int(np.prod(SHAPES[name])), 0.7) for name in KERNELS)
    alive = [np.ones(n, bool) for n in SIZES]
    expected = chase_reference(compat, 0.05, channel_every, budget, alive)
    widths, weights = [], []
    for due, old, new in trajectory(tx, expected):
        before, after = live_channels(old.masks), live_channels(new.masks)
        assert not any((b & ~a).any() for a, b in zip(before, after, strict=True))
        jax.tree.map(np.testing.assert_array_equal, [np.array(a) for a in new.method_state.alive], after)
        inside = [new.masks["conv1"][..., ~after[0]], new.masks["conv2"][..., ~after[1]],
                  new.masks["conv2"][:, :, ~after[0]], new.masks["conv3"][:, :, ~after[1]]]  # fmt: skip
        assert not any(m.any() for m in inside)
        if due:
            widths.append(sum(int(a.sum()) for a in after))
            weights.append(sum(int(new.masks[name].sum()) for name in KERNELS))
    assert (widths[0], widths[-1]) == (15, 8)
    assert len(set(widths)) > 2
    if compat == "paper":
        more = [int(351 * oracle.cosine(0.05, step, 13)) if step < 0.6 * LAST else 0 for step in range(1, LAST + 1, 2)]
        assert weights == [budget + n for n in more]


def test_chase_density_follows_the_printed_cosine():
    """.15, .1427, .125, .1073 and .1 of 10 000 weights."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)), jnp.float32)}
    method = methods.chase(
        [ChannelGroup("all", filters=(ChannelAxis("kernel", 1),))], channel_sparsity=0.0, exploration_end=1.0
    )
    tx = sparsify(optax.sgd(0.0), method, sparsity=0.9, when=Every(0, 1, 1000))
    first, update = tx.init(params), jax.jit(functools.partial(tx.update, refresh_masks=True))
    counts = [int(update(params, first._replace(step=jnp.int32(t)), params)[1].nnz.sum())
              for t in (0, 250, 500, 750, 1000)]  # fmt: skip
    assert counts == [1500, 1426, 1250, 1073, 1000]


def test_chase_ends_exploring_at_the_call_that_the_fraction_names():
    """0.55 * 100 is 55.00000000000001 in floating point: weights move from call 55 on all the same."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)), jnp.float32)}
    method = methods.chase(
        [ChannelGroup("all", filters=(ChannelAxis("kernel", 1),))],
        channel_sparsity=0.0,
        exploration_end=0.55,
        extra=0.0,
    )
    tx = sparsify(optax.sgd(0.0), method, sparsity=0.9, when=Every(0, 1, 100))
    first, update = tx.init(params), jax.jit(functools.partial(tx.update, refresh_masks=True))
    masks = [update(params, first._replace(step=jnp.int32(t)), params)[1].masks["kernel"] for t in (54, 55)]
    assert [bool((m == first.masks["kernel"]).all()) for m in masks] == [True, False]


def test_chase_removal_follows_the_printed_cubic():
    """0, .2891, .4375, .4922 and .5 of 1024 channels, and nothing between removals."""
    params = {
        "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 1024)), jnp.float32),
        "bias": jnp.ones(1024),
    }
    groups = [ChannelGroup("all", filters=(ChannelAxis("kernel", 1),), biases=(ChannelAxis("bias", 0),))]
    method = methods.chase(groups, channel_every=5, removal_end=0.82)
    tx = sparsify(optax.sgd(0.0), method, sparsity=0.5, when=Every(0, 10, 250))
    first, update = tx.init(params), jax.jit(functools.partial(tx.update, refresh_masks=True))
    gone = [1024 - int(update(params, first._replace(step=jnp.int32(t)), params)[1].masks["bias"].sum())
            for t in (0, 40, 50, 90, 100, 150, 200, 250)]  # fmt: skip
    assert gone == [0, 0, 296, 296, 448, 504, 512, 512]


def test_chase_never_brings_a_channel_back_even_where_all_weights_are_zero():
    """The first channels go, the smallest: 0, 2, 3, 3, 4. When all are equal, ties would prefer the first."""
    params = {"kernel": jnp.arange(1.0, 17.0).reshape(2, 8), "bias": jnp.ones(8)}
    groups = [ChannelGroup("all", filters=(ChannelAxis("kernel", 1),), biases=(ChannelAxis("bias", 0),))]
    tx = sparsify(optax.sgd(0.0), methods.chase(groups, removal_end=0.4), sparsity=0.1, when=Every(0, 1, 10))
    state, update, alive = tx.init(params), jax.jit(tx.update), []
    for step in range(6):
        _, state = update(params, state, params if step < 3 else jax.tree.map(jnp.zeros_like, params))
        alive.append("".join(str(int(m)) for m in state.masks["bias"]))
    assert alive == ["11111111", "00111111", "00011111", "00011111", "00011110", "00011110"]


def chase_step(compat, step=0, extra=0.25):
    """Eight weights, five live, a budget of four: what an update keeps and grows."""
    weights = jnp.array([[0.5, 0.1, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0]])
    grads = jnp.array([[0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 2.0, 1.0]])
    params = {"kernel": weights}
    groups = [ChannelGroup("all", filters=(ChannelAxis("kernel", 1),))]
    method = methods.chase(groups, channel_sparsity=0.0, extra=extra, compat=compat)
    tx = sparsify(optax.sgd(0.0), method, sparsity=0.5, when=Every(0, 1, 1000))
    state = set_masks(tx.init(params), {"kernel": weights != 0})
    _, state = tx.update({"kernel": grads}, state._replace(step=jnp.int32(step), next_update=jnp.int32(step)), params)
    return "".join(str(int(m)) for m in state.masks["kernel"][0])


def test_chase_authors_keep_one_weight_more_and_grow_one_less():
    """Paper: four stay, two come. Authors: the fifth equals its own threshold, and of one to come none exceeds it."""
    assert chase_step("paper") == "10111110"
    assert chase_step("authors") == "11111000"


# Both


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

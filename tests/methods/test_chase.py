"""Chase against its equations, on conv, norm, conv, norm, conv."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_channels as oracle
import pytest
from two_groups import GROUPS, KERNELS, LAST, SHAPES, SIZES, live_channels, network_masks, optimizer, trajectory

from s2sam_jax import ChannelAxis, ChannelGroup, Every, TrainState, make_train_step, methods, set_masks, sparsify


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


PARAMS = {"kernel": jnp.arange(1.0, 33.0).reshape(4, 8), "head": jnp.ones((8, 4))}
HIDDEN = [ChannelGroup("hidden", (ChannelAxis("kernel", -1),), inputs=(ChannelAxis("head", -2),))]
SHORT = Every(0, 2, 8)


def loss_fn(params, model_state, batch, key):
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["kernel"]) @ params["head"])), (model_state, {})


def train(tx, steps=4, **options):
    state, step = TrainState.create(PARAMS, tx), make_train_step(loss_fn, tx, **options)
    for seed in range(steps):
        state, _ = step(state, jax.random.normal(jax.random.key(seed), (4, 4)))
    assert int(state.first_bad_step) == -1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    return state


def test_chase_as_released_removes_channels_of_a_dense_network():
    tx = sparsify(optax.sgd(0.1), methods.chase(HIDDEN, compat="authors", removal_end=1.0), sparsity=0.0, when=SHORT)
    state = train(tx, steps=9)
    assert int((state.params["head"] != 0).any(axis=1).sum()) == 4

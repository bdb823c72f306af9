"""Mistakes that would go unnoticed: the wrong order, forgotten leaves, batches that do not count alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import (
    NM,
    ChannelAxis,
    ChannelGroup,
    TrainState,
    analysis,
    get_masks,
    looksam,
    make_train_step,
    materialize,
    methods,
    perturb,
    s2sam,
    sam,
    sparsify,
    ssam,
)

PARAMS = {"dense": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}, "gain": jnp.ones(4)}
SGD = optax.sgd(0.1, momentum=0.9)


def only(name):
    return {"dense": {"kernel": name == "dense"}, "gain": name == "gain"}


# The order of a chain

BEHIND = {
    "momentum": optax.chain(SGD, s2sam()),
    "moments": optax.chain(optax.scale_by_adam(), s2sam(), optax.scale(-0.1)),
    "second_moments": optax.chain(optax.scale_by_rms(), s2sam()),
    "nested": optax.chain(optax.clip(1.0), optax.chain(SGD, optax.chain(s2sam()))),
    "sparse": sparsify(optax.chain(SGD, s2sam()), methods.static(), sparsity=0.5),
    "same_group": optax.chain(optax.masked(SGD, only("gain")), optax.masked(s2sam(), only("gain"))),
}
FIRST = {
    "first": optax.chain(s2sam(), SGD),
    "without_arrays_before": optax.chain(optax.zero_nans(), optax.clip(1.0), s2sam(), SGD),
    "other_group": optax.chain(optax.masked(SGD, only("dense")), optax.masked(optax.chain(s2sam(), SGD), only("gain"))),
    "groups": optax.multi_transform(
        {"a": optax.chain(s2sam(), SGD), "b": SGD}, {"dense": {"kernel": "b"}, "gain": "a"}
    ),
    "schedule_free": optax.contrib.schedule_free(optax.chain(s2sam(), optax.sgd(0.1)), 0.1),
}


@pytest.mark.parametrize("tx", BEHIND.values(), ids=BEHIND)
def test_s2sam_behind_an_optimizer_is_refused(tx):
    with pytest.raises(ValueError, match=r"s2sam\(\) stands behind an optimizer .* put s2sam\(\) first"):
        perturb(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("tx", FIRST.values(), ids=FIRST)
def test_s2sam_before_an_optimizer_is_not(tx):
    """Before the first gradient there is nothing to perturb along."""
    jax.tree.map(np.testing.assert_array_equal, perturb(PARAMS, tx.init(PARAMS)), PARAMS)


def test_s2sam_and_sam_in_one_chain_are_refused():
    tx = optax.chain(s2sam(), sam(), SGD)
    step = make_train_step(lambda params, rest, batch, key: (jnp.sum(params["gain"] * batch), (rest, {})), tx)
    with pytest.raises(ValueError, match=r"tx has s2sam\(\) and one of sam, .* would perturb twice"):
        step(TrainState.create(PARAMS, tx), jnp.ones(4))


# Masks


def test_a_train_state_begins_with_given_masks():
    """Also where the method's own first masks would have pruned other weights."""
    tx = sparsify(optax.chain(s2sam(), SGD), methods.static(), sparsity=0.5)
    masks = {"dense": {"kernel": PARAMS["dense"]["kernel"] > 8}, "gain": jnp.ones(4, bool)}
    state = TrainState.create(PARAMS, tx, masks=masks)
    jax.tree.map(np.testing.assert_array_equal, get_masks(state.opt_state), masks)
    np.testing.assert_array_equal(state.params["dense"]["kernel"].ravel(), [0] * 8 + list(range(9, 17)))
    with pytest.raises(ValueError, match="set_masks"):
        TrainState.create(PARAMS, optax.sgd(0.1), masks=masks)


def test_a_traced_sparsity_is_refused_by_name():
    def nnz(sparsity):
        return sparsify(SGD, methods.static(), sparsity=sparsity).init(PARAMS).nnz

    with pytest.raises(TypeError, match=r"sparsity must be a number.* got a traced"):
        jax.jit(nnz)(0.5)


@pytest.mark.parametrize(
    ("make", "options", "static"),
    [(looksam, {}, "every"), (ssam, {"total_steps": 9}, ("sparsity", "update_every", "total_steps"))],
    ids=["looksam", "ssam"],
)
def test_what_inject_hyperparams_must_not_trace_is_told(make, options, static):
    options |= {"rho": optax.linear_schedule(0.0, 0.1, 9)}
    tx = optax.inject_hyperparams(make)(**options)
    weights = jnp.ones(4)
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(functools.partial(tx.update, grad_fn=lambda w: w))(weights, tx.init(weights), weights)
    tx = optax.inject_hyperparams(make, static_args=static)(**options)
    jax.jit(functools.partial(tx.update, grad_fn=lambda w: w))(weights, tx.init(weights), weights)


@pytest.mark.parametrize("axis", [-2, -1])
def test_ssam_perturbs_biases_whole(axis):
    tx = ssam(rho=1.0, mask="fisher", structure=NM(2, 4, axis=axis))
    params = {"bias": jnp.ones(6), "weight": jnp.arange(1.0, 17.0).reshape(4, 4)}  # 4 does not divide 6
    grad_fn = jax.grad(lambda p: 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))
    _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, fisher_fn=grad_fn)
    assert state.perturb_masks["bias"].all()
    expected = np.zeros((4, 4), bool)
    expected[(slice(2, None), slice(None)) if axis == -2 else (slice(None), slice(2, None))] = True
    np.testing.assert_array_equal(state.perturb_masks["weight"], expected)


# Channels

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


# Batches

LOOK = {
    "surface": lambda loss, w, batches: analysis.loss_surface(loss, w, [w], batches, n=3),
    "barrier": lambda loss, w, batches: analysis.error_barrier(loss, w, w, batches, n=3),
    "trace": lambda loss, w, batches: analysis.hessian_trace(loss, w, jax.random.key(0), batches),
    "sharpness": lambda loss, w, batches: analysis.sam_sharpness(loss, w, batches),
}


@pytest.mark.parametrize("look", LOOK.values(), ids=LOOK)
def test_batches_that_would_not_count_alike_are_refused(look):
    with pytest.raises(ValueError, match=r"weights all batches alike.* got \(8,\) and \(3,\)"):
        look(lambda w, batch: jnp.sum(w**2) * jnp.mean(batch), jnp.ones(3), [jnp.ones(8), jnp.ones(3)])

"""Masks in an optimizer state: read, set, applied, updated, checked, and made from scores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import loss_fn, make_params, rigl, s2sgd
from flax import nnx
from misfits import extra_leaf, static, two_kernels, wrong_shape

from s2sam_jax import (
    Every,
    SparseState,
    TrainState,
    apply_masks,
    check_masks,
    get_masks,
    methods,
    perturb,
    s2sam,
    set_masks,
    sparsify,
    update_masks,
)

LEAVES = {"enc": jnp.arange(1.0, 17.0).reshape(4, 4), "head": jnp.ones((4, 4))}


def test_masks_of_one_sparse_group_are_set_by_a_whole_tree():
    sparse = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    tx = optax.multi_transform({"sparse": sparse, "dense": optax.sgd(0.1)}, {"enc": "sparse", "head": "dense"})
    wanted = {"enc": LEAVES["enc"] > 8, "head": LEAVES["head"] > 0}
    state = set_masks(tx.init(LEAVES), wanted)
    jax.tree.map(np.testing.assert_array_equal, get_masks(state, LEAVES), wanted)
    with pytest.raises(ValueError, match="enc: missing in masks"):
        set_masks(tx.init(LEAVES), {"head": wanted["head"]})


def two_sparse():
    labels = {"a": {"kernel": "x", "bias": "x"}, "b": {"kernel": "y"}}
    return optax.multi_transform({"x": static(), "y": static()}, labels).init(two_kernels())


def test_get_masks_of_several():
    with pytest.raises(ValueError, match=r"several SparseStates; pass params"):
        get_masks(two_sparse())
    assert jax.tree.structure(get_masks(two_sparse(), two_kernels())) == jax.tree.structure(two_kernels())


def test_get_masks_for_a_tree_that_lacks_leaves_or_has_other_shapes():
    """All true would be a wrong answer about parameters that have been given other names."""
    state = static().init({"params": two_kernels()})
    with pytest.raises(ValueError, match=r"params/a/kernel: missing in params"):
        get_masks(state, two_kernels())
    with pytest.raises(ValueError, match=r"params/a/kernel: shape \(4, 5\) in params, \(4, 4\) in the masks"):
        get_masks(state, {"params": wrong_shape()})


def test_states_of_several_networks_are_told_apart_by_vmap():
    """Else counts would be over all networks, and radii broadcast along the last axis."""
    params = jax.tree.map(lambda x: jnp.stack([x] * 4), two_kernels())
    tx = static(optax.chain(s2sam(0.1), optax.sgd(0.1)))
    states = jax.vmap(tx.init)(params)
    masks = get_masks(states)
    with pytest.raises(ValueError, match=r"set_masks sets those of one network.* use jax\.vmap\(set_masks\)"):
        set_masks(states, masks)
    np.testing.assert_array_equal(jax.vmap(set_masks)(states, masks).nnz, states.nnz)
    with pytest.raises(ValueError, match=r"perturb moves one network; this S2SAMState is of several"):
        perturb(params, states)
    assert jax.tree.structure(jax.vmap(perturb)(params, states)) == jax.tree.structure(params)


def test_set_masks_misuse():
    state, masks = static().init(two_kernels()), jax.tree.map(lambda x: x > 0, two_kernels())
    with pytest.raises(TypeError, match=r"needs bool masks; these are not: \['a/bias', 'a/kernel', 'b/kernel'\]"):
        set_masks(state, two_kernels())
    with pytest.raises(ValueError, match=r"b/kernel: missing in masks"):
        set_masks(state, {"a": masks["a"]})
    with pytest.raises(ValueError, match=r"a/kernel: shape \(4, 5\) in masks, \(4, 4\) in the masks in opt_state"):
        set_masks(state, jax.tree.map(lambda x: x > 0, wrong_shape()))
    with pytest.raises(ValueError, match=r"c/kernel: not in the masks in opt_state"):
        set_masks(state, jax.tree.map(lambda x: x > 0, extra_leaf()))
    with pytest.raises(ValueError, match=r"b/kernel: missing in masks"):
        set_masks(two_sparse(), {"a": masks["a"]})
    with pytest.raises(ValueError, match=r"a/kernel"):
        set_masks(two_sparse(), jax.tree.map(lambda x: x > 0, wrong_shape()))


def sparse_pair():
    state = static().init(two_kernels())
    return apply_masks(two_kernels(), state), state


def swapped(tree, leaf):
    return {**tree, "b": {"kernel": leaf}}


def flipped(masks):
    """One dead weight is declared alive."""
    mask = np.array(masks["b"]["kernel"])
    mask[tuple(np.argwhere(~mask)[0])] = True
    return swapped(masks, jnp.array(mask))


FAULTS = {
    "count": (lambda p, s: (p, s._replace(masks=flipped(s.masks))), r"b/kernel: the mask has 9 ones, 8 at the last"),
    "stray": (
        lambda p, s: (swapped(p, jnp.where(s.masks["b"]["kernel"], p["b"]["kernel"], 1e-30)), s),
        r"b/kernel: 8 pruned weights are not zero; call apply_masks",
    ),
    "nan": (lambda p, s: (swapped(p, p["b"]["kernel"] * jnp.nan), s), r"b/kernel: 16 weights are not finite"),
    "nan_behind_the_mask": (
        lambda p, s: (swapped(p, jnp.where(s.masks["b"]["kernel"], p["b"]["kernel"], jnp.nan)), s),
        r"b/kernel: 8 pruned weights are not zero",
    ),
    "infinity": (lambda p, s: (swapped(p, p["b"]["kernel"] / 0), s), r"b/kernel: .*are not finite"),
    "shape": (
        lambda p, s: (swapped(p, jnp.ones((4, 5))), s), r"b/kernel: shape \(4, 4\) in the masks, \(4, 5\) in params"
    ),
    "missing": (lambda p, s: ({"a": p["a"]}, s), r"b/kernel"),
    "mask_shape": (
        lambda p, s: (p, s._replace(masks=swapped(s.masks, jnp.ones((2, 2), bool)))), r"b/kernel: shape \(2, 2\) in the"
    ),
    "two": (
        lambda p, s: (jax.tree.map(lambda x: x + 1, p), s._replace(masks=flipped(s.masks))),
        r"(?s)a/kernel: 8 pruned weights.*b/kernel: the mask has 9.*b/kernel: 7 pruned",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("seed", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_check_masks_names_the_fault(seed, text):
    params, state = sparse_pair()
    check_masks(params, state)
    params, state = seed(params, state)
    assert isinstance(state, SparseState)
    with pytest.raises(ValueError, match=text):
        check_masks(params, (optax.EmptyState(), state))


def test_apply_masks_to_another_tree():
    state = static().init(two_kernels())
    with pytest.raises(ValueError, match="a/kernel: missing in params"):
        apply_masks({"params": two_kernels()}, state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(tx, optax.scale_by_learning_rate(0.1)),
        lambda tx: optax.chain(optax.clip(1.0), tx, optax.contrib.reduce_on_plateau()),
        lambda tx: optax.MultiSteps(optax.chain(optax.chain(tx, optax.scale(0.5)), optax.identity()), 2),
        lambda tx: optax.multi_transform({"all": optax.chain(tx, optax.add_noise(0.1, 0.5, 0))}, "all"),
    ],
    ids=["scale", "plateau", "nested", "group"],
)
def test_what_stands_behind_sparsify_is_refused(wrap):
    """It would change the updates that take pruned weights to zero."""
    tx, params = wrap(static()), two_kernels()
    for use in (lambda state: apply_masks(params, state), get_masks, lambda state: TrainState.create(params, tx)):
        with pytest.raises(ValueError, match=r": something stands behind sparsify\(\) in its chain, .* put it inside"):
            use(tx.init(params))


def test_what_is_there_for_other_leaves_may_stand_behind_sparsify():
    params = two_kernels()
    one_each = ({"a": here, "b": not here} for here in (True, False))
    tx = optax.chain(optax.clip(1.0), *(optax.masked(static(), where) for where in one_each))
    state = tx.init(params)
    check_masks(apply_masks(params, state), state)
    one = static().init(params)
    assert get_masks((one, params)) is one.masks  # what a loop carries is no chain


def test_update_masks_inside_multi_steps():
    tx = optax.MultiSteps(static(), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"update_masks: inside optax\.MultiSteps"):
        update_masks(tx, two_kernels(), tx.init(two_kernels()), two_kernels())


WITH_GAIN = {"dense": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}, "gain": jnp.ones(4)}
SGD = optax.sgd(0.1, momentum=0.9)


def test_a_train_state_begins_with_given_masks():
    """Also where the method's own first masks would have pruned other weights."""
    tx = sparsify(optax.chain(s2sam(), SGD), methods.static(), sparsity=0.5)
    masks = {"dense": {"kernel": WITH_GAIN["dense"]["kernel"] > 8}, "gain": jnp.ones(4, bool)}
    state = TrainState.create(WITH_GAIN, tx, masks=masks)
    jax.tree.map(np.testing.assert_array_equal, get_masks(state.opt_state), masks)
    np.testing.assert_array_equal(state.params["dense"]["kernel"].ravel(), [0] * 8 + list(range(9, 17)))
    with pytest.raises(ValueError, match="set_masks"):
        TrainState.create(WITH_GAIN, optax.sgd(0.1), masks=masks)


TREE = {"bias": jnp.array([9.0, 8.0]), "deep": jnp.arange(1.0, 7.0).reshape(2, 3), "stem": jnp.full((2, 3), 10.0)}


def not_stem(path, leaf):
    return leaf.ndim > 1 and path != "stem"


def test_masks_from_scores_leaves_what_is_not_prunable():
    masks = methods.masks_from_scores(TREE, 0.5, prunable=not_stem)
    np.testing.assert_array_equal(masks["deep"], [[0, 0, 0], [1, 1, 1]])
    assert masks["stem"].all()
    assert masks["bias"].all()


def test_masks_from_scores_rounds_once_for_all_leaves():
    """Of 15 weights 7 go, not two of each five."""
    scores = {name: jnp.arange(1.0, 6.0)[:, None] for name in "abc"}
    masks = methods.masks_from_scores(scores, 0.5)
    assert sum(int(mask.sum()) for mask in masks.values()) == 8


def test_masks_from_scores_keeps_at_least_so_many_a_leaf():
    """Of 12 weights 6 stay: without it all those of the stem."""
    masks = methods.masks_from_scores(TREE, 0.5, keep_at_least=2)
    np.testing.assert_array_equal(masks["deep"], [[0, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(masks["stem"], [[1, 1, 1], [1, 0, 0]])


def test_update_masks_is_one_more_update():
    tx = rigl(s2sgd(), when=Every(1000, 1000, 10_000))
    params = make_params()
    opt_state = tx.init(params)
    params = apply_masks(params, opt_state)
    old = get_masks(opt_state)
    params, opt_state = update_masks(tx, jax.grad(loss_fn)(params), opt_state, params)
    check_masks(params, opt_state)
    assert (get_masks(opt_state)["kernel"] != old["kernel"]).any()


KERNEL = {"kernel": jnp.linspace(0.1, 1.0, 100).reshape(10, 10)}


def test_set_masks_through_nnx_optimizer():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = sparsify(optax.adam(0.1), methods.static(), sparsity=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    masks = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 4 == 0, nnx.state(model, nnx.Param))
    optimizer.opt_state = set_masks(optimizer.opt_state, masks)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))(model))
    assert int((model.kernel[...] != 0).sum()) == 6
    check_masks(nnx.state(model, nnx.Param), optimizer.opt_state)


@pytest.mark.parametrize("inner", [optax.contrib.schedule_free_sgd(1e-3), optax.rprop(0.1)], ids=["free", "rprop"])
def test_masks_set_on_a_fresh_state_leave_their_weights_alone(inner):
    old = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5, seed=1).init(KERNEL)
    params, tx = apply_masks(KERNEL, old), sparsify(inner, methods.static(), sparsity=0.5)
    state = set_masks(tx.init(params), get_masks(old))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["kernel"], params["kernel"], rtol=1e-6)
    for _ in range(2):  # steps that move: not only the weights, the state of the optimizer is live as well
        updates, state = tx.update(params, state, params)
    moved = np.asarray(updates["kernel"] != 0)
    np.testing.assert_array_equal(moved, np.asarray(get_masks(old)["kernel"]))


def test_masks_of_several_networks_are_looked_at_one_by_one():
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    states = jax.vmap(lambda key: TrainState.create(KERNEL, tx, seed=key))(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="check_masks looks at one network"):
        check_masks(states.params, states)
    one = jax.tree.map(lambda x: x[1], states)
    check_masks(one.params, one)

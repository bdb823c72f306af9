"""Options that few use, each against what it is to do, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax import analysis, methods

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


def test_lottery_rounds_without_rewinding_go_on_from_trained_weights():
    started = []

    def train(params, masks, number):
        started.append(np.asarray(params["deep"]))
        return jax.tree.map(lambda p: -2 * p, params)

    rounds = list(
        methods.lottery_rounds(train, TREE, sparsity=0.5, prune_fraction=0.5, rewind=False, prunable=not_stem)
    )
    assert [(one.number, one.remaining) for one in rounds] == [(0, 6), (1, 3)]
    np.testing.assert_array_equal(started[1], [[0, 0, 0], [-8, -10, -12]])
    assert rounds[1].masks["stem"].all()


def test_a_masked_product_with_the_hessian():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(5, 5))
    hessian, vector, live = half + half.T, rng.normal(size=5), np.array([True, False, True, True, False])
    found = analysis.hvp(
        lambda w, batch: 0.5 * w @ batch @ w, jnp.ones(5), jnp.float32(vector), hessian, masks=jnp.asarray(live)
    )
    np.testing.assert_allclose(found, live * (hessian @ (live * vector)), rtol=1e-5, atol=1e-6)


def test_directions_along_another_axis():
    """Each filter has the length of the weights' filter, which may lie along the first axis."""
    weights = jax.random.normal(jax.random.key(0), (4, 3))
    for axis, others in ((0, 1), (-1, 0)):
        (direction,) = analysis.filter_normalized_directions(weights, jax.random.key(1), count=1, axis=axis)
        lengths = [np.linalg.norm(np.asarray(x), axis=others) for x in (direction, weights)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)

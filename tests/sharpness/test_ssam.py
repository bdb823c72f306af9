"""The perturbation masks of SSAM: which coordinates, how many, when."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from s2sam_jax import NM, Block, Every, empirical_fisher, methods, sparsify, ssam
from s2sam_jax._sharpness.ssam_masks import move, move_as_released


def grads_like(params, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params)


PARAMS = {"kernel": jnp.ones((5, 6)), "bias": jnp.ones(7)}


def run(tx, steps, params=PARAMS, **extra):
    state, states = tx.init(params), []
    update = jax.jit(lambda g, s: tx.update(g, s, params, grad_fn=lambda p: p, **extra))
    for step in range(steps):
        _, state = update(grads_like(params, step), state)
        states.append(state)
    return states


def flat(masks):
    return np.concatenate([np.asarray(m).ravel() for m in jax.tree.leaves(masks)])


def test_fisher_worked_example():
    fisher = {"w": jnp.array([0.04, 0.01, 0.25, 0.09, 0.0, 0.16])}
    params = {"w": jnp.zeros(6)}
    tx = ssam(mask="fisher", sparsity=0.5)
    _, state = tx.update(params, tx.init(params), params, grad_fn=lambda p: p, fisher_fn=lambda p: fisher)
    np.testing.assert_array_equal(state.perturb_masks["w"], [0, 0, 1, 1, 0, 1])


def test_fisher_ranks_over_all_leaves_and_refreshes_on_time():
    tx = ssam(mask="fisher", sparsity=0.7, update_every=4)
    state, history, calls = tx.init(PARAMS), [], []
    for step in range(12):

        def fisher_fn(params, step=step):
            calls.append(step)
            return jax.tree.map(jnp.square, grads_like(params, 100 + step))

        _, state = tx.update(
            grads_like(PARAMS, step), state, PARAMS, grad_fn=lambda p: p, fisher_fn=fisher_fn,
            refresh_perturbation=step % 4 == 0,
        )  # fmt: skip
        history.append(flat(state.perturb_masks))
    assert calls == [0, 4, 8]
    for step, mask in enumerate(history):
        scores = flat(jax.tree.map(jnp.square, grads_like(PARAMS, 100 + step // 4 * 4)))
        np.testing.assert_array_equal(mask, oracles.top_mask(scores, int(37 * 0.3)))


def test_the_clock_in_the_state_agrees_with_the_flag():
    tx = ssam(mask="fisher", sparsity=0.7, update_every=3)
    states = run(tx, 8, fisher_fn=lambda p: jax.tree.map(jnp.square, p))
    assert [int(s.next_update) for s in states] == [3, 3, 3, 6, 6, 6, 9, 9]


def test_dynamic_keeps_its_count_and_moves_as_many_as_the_cosine_says(monkeypatch):
    """What is dropped grows again elsewhere, so that it can be counted."""

    def elsewhere(key, masks):
        return jax.tree.map(lambda m: jnp.where(m, 0.0, jax.random.uniform(key, m.shape)), masks)

    monkeypatch.setattr("s2sam_jax._sharpness.ssam_masks.random_scores", elsewhere)
    tx = ssam(mask="dynamic", sparsity=0.6, update_every=5, total_steps=103, drop_fraction=0.5)
    previous = flat(tx.init(PARAMS).perturb_masks)
    kept = int(round(37 * 0.4, 6))
    assert previous.sum() == kept
    for step, state in enumerate(run(tx, 60)):
        mask = flat(state.perturb_masks)
        assert mask.sum() == kept
        if step % 5:
            np.testing.assert_array_equal(mask, previous)
        else:
            drop = int(kept * 0.25 * (1 + np.cos(np.pi * step / 103)))
            stay = oracles.top_mask(np.abs(flat(grads_like(PARAMS, step))), kept - drop, previous)
            assert (mask & stay).sum() == kept - drop  # the largest gradients stay
            assert (previous & ~mask).sum() == drop
        previous = mask


def test_dynamic_worked_example_of_the_released_code(monkeypatch):
    """Two truncated counts: at epoch 0 of 200 the mask shrinks from three ones to two."""
    grads = {"w": jnp.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.6])}
    masks = {"w": jnp.array([True, True, True, False, False, False])}
    draws = {"w": jnp.array([0.9, 0.1, 0.2, 0.3, 0.8, 0.6])}
    monkeypatch.setattr("s2sam_jax._sharpness.ssam_masks.random_scores", lambda key, like: draws)
    first = move_as_released(grads, masks, None, 0.5, None, 0.5)
    later = move_as_released(grads, masks, None, 0.25, None, 0.5)
    np.testing.assert_array_equal(first["w"], [0, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(later["w"], [1, 0, 1, 0, 0, 0])
    # a = 3, drop floor(1.5) = 1 (coordinate 1), grow one: its draw 0.1 loses to 0.8.
    paper = move(grads, masks, None, 0.5, None, 0.5)
    np.testing.assert_array_equal(paper["w"], [1, 0, 1, 0, 1, 0])
    # In the paper what has just been dropped may come back; in the released code it may not.
    draws["w"] = jnp.array([0.1, 0.9, 0.2, 0.3, 0.8, 0.6])
    np.testing.assert_array_equal(move(grads, masks, None, 0.5, None, 0.5)["w"], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(move_as_released(grads, masks, None, 0.5, None, 0.5)["w"], first["w"])


def test_dynamic_authors_let_a_new_mask_act_from_the_next_step():
    """Same seed, same masks at first: the paper's step 0 already uses the moved mask, the released code's does not."""
    params, grads = {"w": jnp.zeros(8)}, {"w": jnp.arange(1.0, 9.0)}
    moved = {}
    for compat in ("paper", "authors"):
        tx = ssam(rho=1.0, mask="dynamic", sparsity=0.5, total_steps=10, drop_fraction=1.0, compat=compat)
        before = tx.init(params)
        point, after = tx.update(grads, before, params, grad_fn=lambda p: p)
        moved[compat] = (point["w"] != 0, before.perturb_masks["w"], after.perturb_masks["w"])
    np.testing.assert_array_equal(moved["paper"][0], moved["paper"][2])
    np.testing.assert_array_equal(moved["authors"][0], moved["authors"][1])
    assert not np.array_equal(moved["paper"][1], moved["paper"][2])
    assert not np.array_equal(moved["authors"][1], moved["authors"][2])


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_counts_live_weights_only_in_a_sparse_network(mask):
    inner = optax.chain(ssam(mask=mask, sparsity=0.5, update_every=2, total_steps=40), optax.sgd(0.1))
    tx = sparsify(inner, methods.rigl(0.3), sparsity=0.8, when=Every(0, 4, 30))
    params = {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(10)}
    state = tx.init(params)

    def fisher_fn(p):
        return jax.tree.map(jnp.square, grads_like(p, 5))

    update = jax.jit(lambda g, s: tx.update(g, s, params, grad_fn=lambda p: p, fisher_fn=fisher_fn))
    for step in range(12):
        _, state = update(grads_like(params, step), state)
        inner_steps = int(state.inner_state[0].step)
        chosen, live = flat(state.inner_state[0].perturb_masks), flat(state.masks)
        assert live.sum() == 30
        if step % 4 and inner_steps % 2 == 1:  # just refreshed, under the present masks
            assert chosen.sum() == 15
            assert not (chosen & ~live).any()


GROUPED = {"conv": jnp.ones((3, 3, 8, 5)), "kernel": jnp.ones((12, 6)), "bias": jnp.ones(6)}


def in_groups(mask):
    """Ones of each run of four input channels."""
    return np.moveaxis(np.asarray(mask), -2, -1).reshape(-1, 4).sum(axis=1)


def test_fisher_in_groups_keeps_the_best_two_of_four():
    tx = ssam(mask="fisher", structure=NM(2, 4))
    (state,) = run(tx, 1, GROUPED, fisher_fn=lambda p: grads_like(p, 9))
    masks = state.perturb_masks
    assert np.all(masks["bias"])
    for name, scores in grads_like(GROUPED, 9).items():
        if name != "bias":
            assert set(in_groups(masks[name])) == {2}
            groups = np.moveaxis(np.asarray(scores), -2, -1).reshape(-1, 4)
            chosen = np.moveaxis(np.asarray(masks[name]), -2, -1).reshape(-1, 4)
            np.testing.assert_array_equal(np.sort(np.where(chosen, groups, -9))[:, 2:], np.sort(groups)[:, 2:])


def test_dynamic_in_groups_keeps_the_pattern_while_it_moves():
    tx = ssam(mask="dynamic", structure=NM(2, 4), update_every=1, total_steps=40, drop_fraction=0.5)
    previous = tx.init(GROUPED).perturb_masks
    for step, state in enumerate(run(tx, 20, GROUPED)):
        masks = state.perturb_masks
        assert np.all(masks["bias"])
        assert {*in_groups(masks["conv"]), *in_groups(masks["kernel"])} == {2}
        drop = int(flat(previous).sum() * 0.25 * (1 + np.cos(np.pi * step / 40)))
        stay = oracles.top_mask(np.abs(flat(grads_like(GROUPED, step))), flat(previous).sum() - drop, flat(previous))
        assert not (stay & ~flat(masks)).any()  # the largest gradients stay
        assert (flat(masks) != flat(previous)).any()
        previous = masks


def test_groups_of_a_sparse_network_have_at_most_two_and_live_ones():
    inner = ssam(mask="dynamic", structure=NM(2, 4), update_every=1, total_steps=40)
    tx = sparsify(inner, methods.rigl(0.3), sparsity=0.8, when=Every(0, 4, 30))
    state = tx.init(GROUPED)
    update = jax.jit(lambda g, s: tx.update(g, s, GROUPED, grad_fn=lambda p: p))
    for step in range(8):
        _, state = update(grads_like(GROUPED, step), state)
        chosen, live = state.inner_state.perturb_masks, state.masks
        if step % 4:
            assert not (flat(chosen) & ~flat(live)).any()
            for name in ("conv", "kernel"):
                np.testing.assert_array_equal(in_groups(chosen[name]), np.minimum(in_groups(live[name]), 2))


def test_structures_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"structure must be NM\(n, m\) or Unstructured\(\); got Block"):
        ssam(structure=Block((2, 2)))
    with pytest.raises(ValueError, match=r"has sparsity 0\.75; got sparsity=0\.5"):
        ssam(structure=NM(1, 4), total_steps=10)
    with pytest.raises(ValueError, match="needs compat='paper'"):
        ssam(structure=NM(2, 4), total_steps=10, compat="authors")
    with pytest.raises(ValueError, match="stem of shape \\(3, 3, 3, 8\\): axis 2 has 3 entries, not a multiple of 4"):
        ssam(structure=NM(2, 4), total_steps=10).init({"stem": jnp.ones((3, 3, 3, 8))})


def test_empirical_fisher_is_the_sum_of_squared_per_example_gradients():
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(10, 3)), draw.normal(size=3)
    y = draw.normal(size=10)

    def loss(w, example):
        return 0.5 * (example["x"] @ w - example["y"]) ** 2

    want = sum(((x[i] @ w - y[i]) * x[i]) ** 2 for i in range(10))
    with jax.enable_x64(True):
        batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
        for chunk in (1, 3, 10, 64):
            got = empirical_fisher(loss, chunk_size=chunk)(jnp.asarray(w), batch)
            np.testing.assert_allclose(got, want, rtol=1e-12)


def test_fisher_information_of_small_half_precision_gradients_is_not_lost():
    fisher = empirical_fisher(lambda w, x: jnp.dot(w, x))
    found = fisher(jnp.zeros(2, jnp.float16), jnp.tile(jnp.array([1e-4, 2e-4], jnp.float16), (64, 1)))
    expected = 64 * np.square(np.array([1e-4, 2e-4], np.float16).astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


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

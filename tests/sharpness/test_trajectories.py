"""float64 trajectories of the sharpness-aware transforms against the equations and hand-worked numbers."""

import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from quadratics import COUPLED, DIAGONAL, EXACT, MASK, PRINTED, START, first_leaf, joined, quadratic, sgd, split, train

from s2sam_jax import apply_masks, eval_params, methods, perturb, s2sam, s2sam_wrapper, sam, set_masks, sparsify, ssam

OPTIMIZERS = [dict(momentum=0.0, decay=0.0), dict(momentum=0.9, decay=0.0), dict(momentum=0.9, decay=5e-4)]
pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_s2sam_equals_its_equations(optimizer):
    tx = optax.chain(s2sam(rho=0.1), sgd(**optimizer))
    path, _ = train(tx, COUPLED, 20, perturbs=True)
    want = oracles.s2sam_trajectory(lambda w: COUPLED @ w, START, 20, rho=0.1, lr=0.1, **optimizer)
    np.testing.assert_allclose(path, want, **EXACT)


@pytest.mark.parametrize(
    ("momentum", "worked"),
    [
        (0.0, [(0.9, -1.6, 0.3), (0.8078178, -1.2625426, 0.1625426), (0.7245835, -0.9920774, 0.0828969)]),
        (0.9, [(0.9, -1.6, 0.3), (0.7178178, -0.9025426, -0.0174574), (0.4796195, -0.0763657, -0.3108148)]),
    ],
)
def test_s2sam_worked_numbers(momentum, worked):
    path, _ = train(optax.chain(s2sam(rho=0.1), sgd(momentum)), DIAGONAL, 3, perturbs=True)
    np.testing.assert_allclose(path, worked, **PRINTED)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_s2sam_wrapper_walks_the_same_clean_path(optimizer):
    tx, grad_fn = s2sam_wrapper(sgd(**optimizer), rho=0.1), quadratic(COUPLED)
    params = split(START)
    state, path = tx.init(params), []
    for _ in range(20):
        updates, state = tx.update(grad_fn(params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(joined(eval_params(params, state)))
    want = oracles.s2sam_trajectory(lambda w: COUPLED @ w, START, 20, rho=0.1, lr=0.1, **optimizer)
    np.testing.assert_allclose(path, want, **EXACT)


def test_s2sam_adaptive_is_asam_of_the_last_gradient():
    tx = optax.chain(s2sam(rho=0.1, adaptive=True, eta=0.01), sgd(0.9))
    path, _ = train(tx, COUPLED, 20, perturbs=True)

    def ascend(g, w):
        return oracles.asam_ascent(g, w, 0.1, 0.01)

    want = oracles.s2sam_trajectory(lambda w: COUPLED @ w, START, 20, rho=0.1, lr=0.1, momentum=0.9, ascend=ascend)
    np.testing.assert_allclose(path, want, **EXACT)


@pytest.mark.parametrize(
    ("compat", "eta", "worked"),
    [
        ("authors", 0.0, (0.0123091, -0.7877855, 0.0984732)),  # cube of the gradient over ||u g||
        ("paper", 0.0, None),  # T**2 g over ||T g||, at the present weights
    ],
)
def test_s2sam_adaptive_compat(compat, eta, worked):
    tx = optax.chain(s2sam(rho=0.1, adaptive=True, eta=eta, compat=compat), sgd())
    path, state = train(tx, DIAGONAL, 1, perturbs=True)
    epsilon = joined(perturb(split(path[0]), state)) - path[0]
    want = worked if worked else oracles.asam_ascent(DIAGONAL @ START, path[0], 0.1, 0.0)
    np.testing.assert_allclose(epsilon, want, rtol=0, atol=6e-8)


def test_s2sam_rho_schedule_is_that_of_the_gradient_taken():
    def rho(step):
        return 0.1 / jnp.sqrt(1.0 + step)

    steps = iter(range(10))

    def ascend(g, w):
        return oracles.ascent(g, 0.1 / np.sqrt(1.0 + next(steps)))

    path, _ = train(optax.chain(s2sam(rho=rho), sgd(0.9)), COUPLED, 10, perturbs=True)
    want = oracles.s2sam_trajectory(lambda w: COUPLED @ w, START, 10, rho=None, lr=0.1, momentum=0.9, ascend=ascend)
    np.testing.assert_allclose(path, want, **EXACT)


def masked_run(tx, steps=3):
    """Three steps from masked weights, with the third coordinate pruned."""
    params = split(START)
    state = set_masks(tx.init(params), {"a": jnp.ones((2, 1), bool), "b": jnp.zeros(1, bool)})
    return train(tx, COUPLED, steps, params=apply_masks(params, state), state=state, perturbs=True)


def sparse_sgd(perturb_pruned, mask_grads, momentum=0.9):
    inner = optax.chain(s2sam(rho=0.1, perturb_pruned=perturb_pruned), sgd(momentum))
    return sparsify(inner, methods.static(), sparsity=0.0, prunable=first_leaf, mask_grads=mask_grads)


def test_masked_s2sam_perturbs_live_weights_only():
    path, state = masked_run(sparse_sgd(perturb_pruned=False, mask_grads=True))
    np.testing.assert_allclose(path[1:], [(0.7175746, -0.9005971, 0), (0.4790069, -0.0717179, 0)], **PRINTED)
    assert float(state.inner_state[1][1][0].trace["b"][0]) == 0.0
    want = oracles.s2sam_trajectory(lambda w: COUPLED @ w, START, 3, rho=0.1, lr=0.1, momentum=0.9, mask=MASK)
    np.testing.assert_allclose(path, want, **EXACT)


def test_masked_s2sam_as_the_authors_run_it():
    path, state = masked_run(sparse_sgd(perturb_pruned=True, mask_grads=False))
    np.testing.assert_allclose(path[1:], [(0.7169904, -0.9007383, 0), (0.4772484, -0.0721665, 0)], **PRINTED)
    np.testing.assert_allclose(state.inner_state[1][1][0].trace["b"][0], 1.2931638, **PRINTED)
    want, _ = oracles.s2sam_authors_trajectory(
        lambda w: COUPLED @ w, START, 3, rho=0.1, lr=0.1, momentum=0.9, decay=0.0, mask=MASK
    )
    np.testing.assert_allclose(path, want, **EXACT)


def test_dense_perturbation_with_masked_momentum():
    """``perturb_pruned`` alone: the dense gradient steers the perturbation, the momentum stays on the mask."""
    path, state = masked_run(sparse_sgd(perturb_pruned=True, mask_grads=True))
    w, v, last = START * MASK, np.zeros(3), np.zeros(3)
    for got in path:
        last = COUPLED @ (w + oracles.ascent(last, 0.1))
        w, v = oracles.sgd_step(w, last * MASK, v, lr=0.1, momentum=0.9, decay=0.0)
        np.testing.assert_allclose(got, w, **EXACT)
    assert float(state.inner_state[1][1][0].trace["b"][0]) == 0.0


def test_dense_momentum_with_a_masked_perturbation():
    """``mask_grads=False`` alone: momentum is dense, the perturbation is on the mask."""
    path, _ = masked_run(sparse_sgd(perturb_pruned=False, mask_grads=False))
    w, v, last = START * MASK, np.zeros(3), np.zeros(3)
    for got in path:
        grad = COUPLED @ (w + oracles.ascent(last, 0.1))
        last = grad * MASK
        w, v = oracles.sgd_step(w, grad, v, lr=0.1, momentum=0.9, decay=0.0)
        w = w * MASK
        np.testing.assert_allclose(got, w, **EXACT)


@pytest.mark.parametrize("eta", [None, 0.5])
def test_eps_is_added_to_the_norm(eta):
    def ascent(w):
        g = DIAGONAL @ START
        return oracles.ascent(g, 0.1, 1.0) if eta is None else oracles.asam_ascent(g, w, 0.1, eta, 1.0)

    options = dict(rho=0.1, eps=1.0, adaptive=eta is not None, eta=eta or 0.0)
    (first,), state = train(optax.chain(s2sam(**options), sgd()), DIAGONAL, 1, perturbs=True)
    np.testing.assert_allclose(joined(perturb(split(first), state)) - first, ascent(first), **EXACT)
    (first,), _ = train(optax.chain(sam(**options), sgd()), DIAGONAL, 1)
    np.testing.assert_allclose(first, START - 0.1 * DIAGONAL @ (START + ascent(START)), **EXACT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("eta", [None, 0.01])
def test_sam_and_asam_equal_their_equations(optimizer, eta):
    tx = optax.chain(sam(rho=0.1, adaptive=eta is not None, eta=eta or 0.0), sgd(**optimizer))
    path, _ = train(tx, COUPLED, 20)
    want = oracles.sam_trajectory(lambda w: COUPLED @ w, START, 20, rho=0.1, lr=0.1, eta=eta, **optimizer)
    np.testing.assert_allclose(path, want, **EXACT)


@pytest.mark.parametrize("name", ["sam", "asam", "ssam"])
def test_a_rho_schedule_of_two_gradients_is_that_of_their_step(name):
    def rho(step):
        return 0.2 / (1.0 + step)

    build, options = {
        "sam": (sam(rho), {}),
        "asam": (sam(rho, adaptive=True), {"eta": 0.01}),
        "ssam": (ssam(rho, mask="fisher", sparsity=0.5, update_every=4), {"perturb_mask": np.array([0, 1, 0])}),
    }[name]
    path, _ = train(optax.chain(build, sgd(0.9)), COUPLED, 6, fisher_fn=fisher_of([0.1, 0.5, 0.4]))
    want = oracles.sam_trajectory(lambda w: COUPLED @ w, START, 6, rho=rho, lr=0.1, momentum=0.9, **options)
    np.testing.assert_allclose(path, want, **EXACT)


def test_sam_worked_numbers():
    path, _ = train(optax.chain(sam(rho=0.1), sgd(0.9, 0.01)), DIAGONAL, 2)
    np.testing.assert_allclose(
        path, [(0.8968178, -1.5805426, 0.2820426), (0.7107938, -0.8671439, -0.0402076)], **PRINTED
    )


@pytest.mark.parametrize(
    ("eta", "worked"), [(0.01, (0.898751, -1.5604258, 0.2974522)), (0.0, (0.8987691, -1.5606107, 0.2975382))]
)
def test_asam_worked_numbers(eta, worked):
    path, _ = train(optax.chain(sam(rho=0.1, adaptive=True, eta=eta), sgd()), DIAGONAL, 1)
    np.testing.assert_allclose(path[0], worked, **PRINTED)


def fisher_of(values):
    """A Fisher function with fixed information, so that the mask is known."""
    return lambda params: split(np.asarray(values))


def test_ssam_worked_numbers():
    """Mask (0, 1, 1): the norm is the full gradient's, so the perturbation is shorter than rho."""
    tx = optax.chain(ssam(rho=0.1, mask="fisher", sparsity=0.3), sgd())
    path, _ = train(tx, DIAGONAL, 1, fisher_fn=fisher_of([0.1, 0.5, 0.4]))
    np.testing.assert_allclose(path[0], (0.9, -1.5825426, 0.2825426), **PRINTED)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ssam_fisher_equals_its_equations(optimizer):
    tx = optax.chain(ssam(rho=0.1, mask="fisher", sparsity=0.5, update_every=4), sgd(**optimizer))
    path, _ = train(tx, COUPLED, 20, fisher_fn=fisher_of([0.1, 0.5, 0.4]))
    want = oracles.sam_trajectory(
        lambda w: COUPLED @ w, START, 20, rho=0.1, lr=0.1, perturb_mask=np.array([0, 1, 0]), **optimizer
    )
    np.testing.assert_allclose(path, want, **EXACT)


def test_ssam_fisher_authors_start_with_a_plain_step():
    """The released code refreshes its all-zero mask after the first step, so that step is SGD."""
    tx = optax.chain(ssam(rho=0.1, mask="fisher", sparsity=0.5, update_every=4, compat="authors"), sgd(0.9))
    path, _ = train(tx, COUPLED, 10, fisher_fn=fisher_of([0.1, 0.5, 0.4]))
    want = oracles.sam_trajectory(
        lambda w: COUPLED @ w, START, 10, rho=0.1, lr=0.1, momentum=0.9,
        perturb_mask=lambda step: np.array([0, 1, 0]) * (step > 0),
    )  # fmt: skip
    np.testing.assert_allclose(path, want, **EXACT)


def test_masked_sam_masks_both_gradients():
    inner = optax.chain(sam(rho=0.1), sgd(0.9))
    path, _ = train_masked_sam(inner)
    want = oracles.sam_trajectory(lambda w: COUPLED @ w, START, 5, rho=0.1, lr=0.1, momentum=0.9, mask=MASK)
    np.testing.assert_allclose(path, want, **EXACT)


def train_masked_sam(inner):
    tx = sparsify(inner, methods.static(), sparsity=0.0, prunable=first_leaf)
    params = split(START)
    state = set_masks(tx.init(params), {"a": jnp.ones((2, 1), bool), "b": jnp.zeros(1, bool)})
    return train(tx, COUPLED, 5, params=apply_masks(params, state), state=state)

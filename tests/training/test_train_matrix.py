"""make_train_step over every optimizer and method, in Python and in scan; accumulation and gradient counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import BATCHES, MOMENTUM, OUTER, RHO, assert_trees_close, mlp_loss, mlp_params, planned, s2sgd, start, train

from s2sam_jax import (
    Every,
    check_masks,
    empirical_fisher,
    eval_params,
    make_train_step,
    methods,
    s2sam_wrapper,
    sam,
    sparsify,
    ssam,
)

OPTIMIZERS = {
    "sgd": (lambda wrap: wrap(MOMENTUM()), 1),
    "adamw": (lambda wrap: wrap(optax.adamw(0.05)), 1),
    "s2sam": (lambda wrap: wrap(s2sgd()), 1),
    "s2sam_wrapper": (lambda wrap: s2sam_wrapper(wrap(MOMENTUM()), RHO), 1),
    "sam": (lambda wrap: wrap(optax.chain(sam(RHO), MOMENTUM())), 2),
    "ssam_dynamic": (lambda wrap: wrap(optax.chain(ssam(RHO, total_steps=9, update_every=3), MOMENTUM())), 2),
    "ssam_fisher": (lambda wrap: wrap(optax.chain(ssam(RHO, mask="fisher", update_every=3), MOMENTUM())), 2),
}


SPARSE = {
    "dense": lambda inner: inner,
    "static": lambda inner: sparsify(inner, methods.static(), sparsity=0.5),
    "rigl": lambda inner: sparsify(inner, methods.rigl(0.5), sparsity=0.5, when=Every(1, 2, 10)),
}


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_train_step_in_python_and_in_scan(optimizer, sparse):
    """Equal results; one gradient for SGD and S2-SAM, two for SAM and SSAM, Fisher examples on refresh steps alone."""
    build, per_step = OPTIMIZERS[optimizer]
    tx, evaluations, counts = build(SPARSE[sparse]), [], []

    def counted(params, model_state, batch, key):
        jax.debug.callback(lambda _: evaluations.append(1), batch[0, 0])
        return mlp_loss(params, model_state, batch, key)

    def tally():
        jax.effects_barrier()
        counts.append(len(evaluations))
        evaluations.clear()

    state, rows = train(tx, counted, tally, fisher_examples=4)
    scan = jax.jit(lambda state: jax.lax.scan(make_train_step(counted, tx, fisher_examples=4), state, BATCHES))
    scanned, metrics = scan(start(tx))
    tally()

    assert_trees_close(state._replace(key=()), scanned._replace(key=()), 1e-5, 1e-5)
    assert_trees_close(jax.tree.map(lambda *x: np.stack(x), *rows), metrics, 1e-4, 1e-5)
    assert (int(state.step), float(state.model_state), int(state.first_bad_step)) == (5, 5.0, -1)
    assert ("rho" in metrics) == (optimizer not in ("sgd", "adamw"))
    if sparse != "rigl":  # whose mask updates need no second gradient
        fisher = [4 * (optimizer == "ssam_fisher" and index % 3 == 0) for index in range(5)]
        assert counts == [*(per_step + extra for extra in fisher), 5 * per_step + sum(fisher)]
    if sparse != "dense":
        check_masks(eval_params(state.params, state.opt_state), state.opt_state)
        check_masks(state.params, state.opt_state)
        zeros = 50 - sum(planned(mlp_params(), 0.5).values())
        np.testing.assert_allclose(metrics["sparsity"], zeros / 50, 1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "s2sam", "sam", "ssam_dynamic", "ssam_fisher"])
def test_accumulation_equals_the_whole_batch(optimizer):
    def loss(params, model_state, batch, key):
        return mlp_loss(params, model_state, batch, key)[0], (model_state, {})

    build = OPTIMIZERS[optimizer][0]
    (whole, rows), (parts, micro) = (train(build(SPARSE["static"]), loss, accumulate=parts) for parts in (1, 4))
    assert_trees_close(whole.params, parts.params, 1e-4, 1e-5)
    assert_trees_close(rows, micro, 1e-4, 1e-5)


@pytest.mark.parametrize("outer", ["multi_steps", "apply_if_finite"])
def test_train_step_with_an_outer_wrapper(outer):
    tx = OUTER[outer](SPARSE["rigl"](s2sgd()))
    state, _ = train(tx)
    check_masks(state.params, state.opt_state)


def test_empirical_fisher_chunks_do_not_matter():
    def one(params, example):
        return mlp_loss(params, jnp.zeros(()), example[None], None)[0]

    whole, cut = (empirical_fisher(one, chunk_size=size)(mlp_params(), BATCHES[0]) for size in (8, 3))
    assert_trees_close(whole, cut, 1e-5)

"""What must reduce to what: no radius, no gradient, no sparsity, the first step."""

import jax
import jax.numpy as jnp
import optax
import pytest
from common import MOMENTUM, assert_trees_close, make_params
from plain import plain

from s2sam_jax import Every, eval_params, get_masks, methods, perturb, s2sam, s2sam_wrapper, sam, sparsify, ssam


def without_radius(rho=0.0):
    return {
        "s2sam": (optax.chain(s2sam(rho), MOMENTUM()), perturb),
        "s2sam_adaptive": (optax.chain(s2sam(rho, adaptive=True), MOMENTUM()), perturb),
        "sam": (optax.chain(sam(rho), MOMENTUM()), lambda p, s: p),
        "asam": (optax.chain(sam(rho, adaptive=True), MOMENTUM()), lambda p, s: p),
        "ssam_dynamic": (optax.chain(ssam(rho, total_steps=10), MOMENTUM()), lambda p, s: p),
        "ssam_fisher": (optax.chain(ssam(rho, mask="fisher"), MOMENTUM()), lambda p, s: p),
        "s2sam_wrapper": (s2sam_wrapper(MOMENTUM(), rho), lambda p, s: p),
    }


@pytest.mark.parametrize("name", without_radius())
def test_zero_radius_is_the_inner_optimizer(name):
    tx, point = without_radius()[name]
    (path, opt_state), (want, _) = plain(tx, make_params(), point=point), plain(MOMENTUM(), make_params())
    assert_trees_close(eval_params(path[-1][0], opt_state), want[-1][0])


@pytest.mark.parametrize("name", without_radius())
def test_zero_gradient_gives_no_nan(name):
    tx, point = without_radius(0.5)[name]
    path, _ = plain(tx, make_params(), point=point, loss=lambda p: 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(p)))
    assert_trees_close(path[-1], (make_params(), make_params()), 0, 0)


@pytest.mark.parametrize("method", [methods.static(), methods.rigl(0.5, skip_step=False)], ids=["static", "rigl"])
def test_zero_sparsity_is_the_inner_optimizer(method):
    tx = sparsify(optax.adamw(0.05), method, sparsity=0.0, when=Every(0, 2, 10))
    path, opt_state = plain(tx, make_params())
    assert_trees_close(path[-1][0], plain(optax.adamw(0.05), make_params())[0][-1][0])
    assert all(m.all() for m in jax.tree.leaves(get_masks(opt_state)))


@pytest.mark.parametrize("name", ["s2sam", "s2sam_adaptive", "s2sam_wrapper"])
def test_first_step_of_s2sam_is_the_inner_optimizer(name):
    tx, point = without_radius(0.5)[name]
    path, opt_state = plain(tx, make_params(), steps=1, point=point)
    assert_trees_close(eval_params(path[0][0], opt_state), plain(MOMENTUM(), make_params(), steps=1)[0][0][0])
    assert_trees_close(path[0][1], make_params(), 0, 0)

"""Counts that int32 or float32 cannot hold."""

import jax
import jax.numpy as jnp
import optax
import pytest

from s2sam_jax import TrainState, make_train_step, methods, select, sparsify
from s2sam_jax._base.counts import part, rounded_down, rounded_up


@pytest.mark.parametrize(
    ("size", "fraction", "up", "down"),
    [(100, 0.3, 30, 30), (100, 0.6, 60, 60), (100, 0.53, 53, 53), (7, 0.5, 4, 3), (10_007, 0.25, 2502, 2501)]
    + [(n, 1.0, n, n) for n in (1, 2**16 - 1, 2**21 + 1, 10_000_001, 2**24 - 1)],
)
def test_counts_lose_nothing_to_rounding(size, fraction, up, down):
    """In float32 0.3 * 100 lies above 30 and 0.53 * 100 below 53; a slack relative to a large count is more than 1."""
    product = jnp.float32(size) * jnp.float32(fraction)
    assert (int(rounded_up(product)), int(rounded_down(product))) == (up, down)
    assert (rounded_up(size * fraction), rounded_down(size * fraction)) == (up, down)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_parts_of_counts_that_float32_cannot_hold(fraction):
    """2**24 + 3 is 2**24 + 4 in float32: more than all would be dropped, and another weight grown for it."""
    for number in (2**24 + 3, 2**26 + 5, 2**31 - 1):
        found = int(part(jnp.int32(number), fraction))
        assert abs(found - fraction * number) <= number * 2**-24 + 1
        assert found <= number


def test_more_than_two_to_the_31_weights_are_traced():
    leaf = jax.ShapeDtypeStruct((2**14, 2**14), jnp.float32)
    tx = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5)
    step = make_train_step(lambda p, s, b, k: (jnp.sum(p["0"]) * b.sum(), (s, {})), tx)

    def one(params, batch):
        return step(TrainState.create(params, tx), batch)[1]["sparsity"]

    found = jax.eval_shape(one, {str(i): leaf for i in range(9)}, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert (found.shape, found.dtype) == ((), jnp.float32)


def test_what_int32_cannot_count_is_refused():
    leaves = [jax.ShapeDtypeStruct((2**28,), jnp.float32)] * 8
    jax.eval_shape(lambda *x: select(list(x), sparsity=0.5), *leaves)
    with pytest.raises(ValueError, match="select counts in int32, and 2147483648 scores are to be ranked together"):
        jax.eval_shape(lambda *x: select(list(x), sparsity=0.5, scope="global"), *leaves)
    stack = {"layers": {"kernel": jax.ShapeDtypeStruct((40, 5120, 13824), jnp.bfloat16)}}
    with pytest.raises(ValueError, match=r"in int32, and these have more: {'layers/kernel': 2831155200}. Cut them"):
        jax.eval_shape(sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init, stack)

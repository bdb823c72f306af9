"""Clocks and flags that are traced: under jit, vmap and scan they change what a plain loop in Python changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2sam_jax import Every, looksam, methods, sparsify, ssam

STEPS, WHEN = 9, Every(1, 3, 7)
PARAMS = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32), "b": jnp.ones(5)}
GRADS = [
    jax.tree.map(lambda p, s=s: jnp.asarray(np.random.default_rng(s).normal(size=p.shape), jnp.float32), PARAMS)
    for s in range(1, STEPS + 1)
]
# Two networks' own: beside the clock, twice in a row, and the first call.
FLAGS = np.array([[0, 1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1, 0, 0]], bool)


def sparse(method):
    return lambda seed: sparsify(optax.sgd(0.1, momentum=0.9), method(), sparsity=0.5, when=WHEN, seed=seed)


MAKE = {
    "rigl": (sparse(lambda: methods.rigl(0.5)), "refresh_masks"),
    "set": (sparse(lambda: methods.set(0.5)), "refresh_masks"),
    "ssam": (lambda seed: ssam(sparsity=0.6, update_every=3, total_steps=40, seed=seed), "refresh_perturbation"),
    "looksam": (lambda seed: looksam(every=3), "refresh_sam"),
}


def grad_fn(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p), params)


@pytest.mark.parametrize(("name", "told"), [("set", True), ("rigl", False), ("ssam", True), ("looksam", True)])
def test_traced_flags_and_clocks_are_those_of_a_loop(name, told):
    """Seeds side by side in a scan, each with flags of its own; the loop gets Python's, worked out by hand."""
    make, keyword = MAKE[name]
    clock = WHEN if keyword == "refresh_masks" else Every(0, 3)

    def take(params, state, grads, flag):
        flags = {} if flag is None else {keyword: flag}
        updates, state = make(0).update(grads, state, params, grad_fn=grad_fn, **flags)
        return optax.apply_updates(params, updates), state

    @jax.jit
    @jax.vmap
    def together(seed, flags):
        def step(carry, grads_and_flag):
            grads, flag = grads_and_flag
            return take(*carry, grads, flag if told else None), ()

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)
        return jax.lax.scan(step, (PARAMS, make(seed).init(PARAMS)), (stacked, flags))[0]

    several, update = together(jnp.arange(2), FLAGS), jax.jit(take, static_argnums=3)
    for seed, flags in enumerate(FLAGS):
        carry, due = (PARAMS, make(seed).init(PARAMS)), clock.start
        for step, (grads, flag) in enumerate(zip(GRADS, flags.tolist(), strict=True)):
            fires = flag if told else step == due
            carry = update(*carry, grads, fires)
            later = [c for c in range(clock.start, (clock.end or 99) + 1, clock.every) if c > step]
            due = (later[0] if later else np.iinfo(np.int32).max) if fires else due
        assert (int(carry[1].step), int(carry[1].next_update)) == (STEPS, due)
        one = jax.tree.map(lambda x, seed=seed: x[seed], several)
        for got, want in zip(*map(jax.tree.leaves, (one, carry)), strict=True):
            if jnp.issubdtype(want.dtype, jnp.floating):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
            else:
                assert (got == want).all()

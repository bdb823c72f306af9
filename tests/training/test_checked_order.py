"""checked: what stands before S2-SAM in its chain, and around it."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from checking import BATCHES, SGD, one_leaf, rigl, sparse_start, start, static, stepper
from jax.experimental import checkify

from s2sam_jax import Every, checked, methods, s2sam, sparsify

IN_FRONT = {
    "decay": optax.add_decayed_weights(0.01),
    "clip": optax.clip(1e-3),
    "centralize": optax.centralize(),
    "clip_by_global_norm": optax.clip_by_global_norm(1e-3),
    "scale": optax.scale(0.3),
}


def at_every_call(inner):
    """As a method that looks at every gradient."""
    return sparsify(inner, methods.rigl(0.5, skip_step=False), sparsity=0.5, when=Every(0, 1, 10))


@pytest.mark.parametrize(
    "sparse", [static, rigl, at_every_call, lambda tx: tx], ids=["static", "rigl", "at_every_call", "dense"]
)
@pytest.mark.parametrize("name", IN_FRONT)
def test_what_turns_the_gradient_in_front_of_s2sam_is_found(name, sparse):
    """What only stretches it is not, as S2-SAM takes its direction."""
    tx = sparse(optax.chain(IN_FRONT[name], s2sam(0.1), SGD))
    step = jax.jit(checkify.checkify(stepper(checked(tx), perturbs=True)))
    error, _ = step(*start(tx), BATCHES[0], 0.0)
    found = "checked found an s2sam that does not come first:\n  kernel: s2sam has remembered a direction that differs"
    turned = pytest.raises(checkify.JaxRuntimeError, match=found)
    with contextlib.nullcontext() if name in ("clip_by_global_norm", "scale") else turned:
        error.throw()


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(s2sam(0.1), optax.add_decayed_weights(0.1), optax.clip(0.01), SGD),
        rigl(optax.chain(s2sam(0.1, grad_dtype=jnp.bfloat16), SGD)),
        static(optax.chain(s2sam(0.1, perturb_pruned=True), SGD), mask_grads=False),
        optax.MultiSteps(static(optax.chain(s2sam(0.1), SGD)), 2).gradient_transformation(),
        optax.apply_if_finite(rigl(optax.chain(s2sam(0.1), SGD)), 2),
        optax.multi_transform({"on": optax.chain(s2sam(0.1), SGD), "off": SGD}, {"kernel": "on"}),
    ],
    ids=["behind", "bfloat16", "dense_memory", "MultiSteps", "apply_if_finite", "multi_transform"],
)
def test_an_s2sam_that_comes_first_is_no_fault(tx):
    run = jax.jit(checkify.checkify(stepper(checked(tx), perturbs=True)))
    held = start(tx)
    for batch in BATCHES:
        error, held = run(*held, batch, 0.0)
        error.throw()


def test_in_other_wrappers_and_transformations():
    """In a ``lax.cond``, a ``scan`` and a ``vmap``, clean and with a fault."""
    tx = optax.MultiSteps(checked(static(SGD)), 2).gradient_transformation()
    start = sparse_start(tx, one_leaf())

    def scanned(fault):
        return jax.lax.scan(lambda carry, batch: (stepper(tx, False)(*carry, batch, fault), None), start, BATCHES[:2])

    run = jax.jit(checkify.checkify(jax.vmap(scanned)))
    run(jnp.array([0.0, 0.0]))[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="kernel: 15 entries of the gradient are not finite"):
        run(jnp.array([0.0, jnp.nan]))[0].throw()

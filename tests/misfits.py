"""Trees that do not fit, and states without their types."""

import jax.numpy as jnp
import optax

from s2sam_jax import (
    methods,
    sparsify,
)

SGD = optax.sgd(0.1, momentum=0.9)


def two_kernels():
    return {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.full((4, 4), 2.0)}}


def static(inner=SGD, **options):
    return sparsify(inner, methods.static(), **{"sparsity": 0.5, **options})


def wrong_shape():
    params = two_kernels()
    params["a"]["kernel"] = jnp.ones((4, 5))
    return params


def missing_leaf():
    params = two_kernels()
    del params["b"]
    return params


def extra_leaf():
    return two_kernels() | {"c": {"kernel": jnp.ones((4, 4))}}


def untyped(state):
    """What a checkpoint restored without a target looks like."""
    if hasattr(state, "_asdict"):
        return {key: untyped(value) for key, value in state._asdict().items()}
    if isinstance(state, tuple | list):
        return [untyped(value) for value in state]
    return state

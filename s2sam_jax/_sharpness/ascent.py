"""The ascent vector that every sharpness-aware method adds to its weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from s2sam_jax._base.tree import at_least_f32, norm
from s2sam_jax._base.types import Params


def ascent(
    grads: Sequence[jax.Array],
    params: Sequence[jax.Array] = (),
    *,
    rho: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eta: jax.typing.ArrayLike | None = None,
) -> list[jax.Array]:
    """``rho * g / (||g|| + eps)``, or with ``eta`` ASAM's ``rho * T**2 g / (||T g|| + eps)``, ``T = |w| + eta``.

    Only ASAM needs ``params``. One norm over all leaves, in float32 or wider; the vectors are of that precision.
    A zero gradient gives a zero vector.
    """
    grads = [at_least_f32(g) for g in grads]
    if eta is None:
        scale = jnp.asarray(rho) / divisor(norm(grads), eps)
        return [times(scale, g) for g in grads]
    lengths = [jnp.abs(at_least_f32(w)) for w in params]
    scales = [length + jnp.asarray(eta, length.dtype) for length in lengths]
    scaled = [t * g for t, g in zip(scales, grads, strict=True)]
    scale = jnp.asarray(rho) / divisor(norm(scaled), eps)
    return [times(scale, t) * tg for t, tg in zip(scales, scaled, strict=True)]


def times(scale: jax.Array, x: jax.Array) -> jax.Array:
    """``scale * x`` in the precision of ``x``, also where 64-bit types are enabled and a schedule is in float64."""
    return scale.astype(jnp.finfo(x.dtype).dtype) * x


def divisor(length: jax.Array, eps: jax.typing.ArrayLike) -> jax.Array:
    """``length + eps``, by which a vector is divided; 1 for a zero vector, also where ``eps`` is 0."""
    return jnp.where(length == 0, 1, length + eps)


def ascent_point(
    params: Params,
    grads: Params,
    *,
    rho: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eta: jax.typing.ArrayLike | None = None,
) -> Params:
    """The parameters moved by :func:`ascent`. What has no gradient stays, as the functions in an Equinox model."""
    leaves, treedef = jax.tree.flatten(params)
    pairs = list(zip(leaves, treedef.flatten_up_to(grads), strict=True))
    moving = [(w, g) for w, g in pairs if g is not None]
    epsilon = iter(ascent([g for _, g in moving], [w for w, _ in moving], rho=rho, eps=eps, eta=eta))
    return treedef.unflatten([w if g is None else add(w, next(epsilon)) for w, g in pairs])


def perpendicular(tree: Params, to: Params) -> Params:
    """What is left of ``tree`` without its projection on ``to``, over all leaves together, in float32 or wider."""
    length = norm(to)
    length = jnp.where(length > 0, length, 1.0)  # nothing is along a zero vector
    unit = jax.tree.map(lambda x: times(1 / length, at_least_f32(x)), to)
    parts = jax.tree.map(lambda x, u: jnp.real(jnp.sum(at_least_f32(x) * jnp.conj(u))), tree, unit)
    along = sum(jax.tree.leaves(parts), jnp.zeros((), jnp.float32))
    return jax.tree.map(lambda x, u: at_least_f32(x) - times(along, u), tree, unit)


def add(param: jax.Array, step: jax.Array) -> jax.Array:
    """``param + step`` computed in the wider precision and stored in the parameter's."""
    return (at_least_f32(param) + at_least_f32(step)).astype(param.dtype)

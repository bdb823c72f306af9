"""Parts of a batch, also of one whose type says how it is sharded (the meshes that ``jax.make_mesh`` makes)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.tree import explicit_sharding

Batch = Any  # a pytree whose leaves have the examples along their leading axis


def first_examples(batch: Batch, count: int) -> Batch:
    """The first ``count`` examples of a batch, or all if it has fewer."""
    size = _number_of_examples(batch, "fisher_examples")
    return take_examples(batch, jnp.arange(min(count, size)), "fisher_examples")


def take_examples(batch: Batch, rows: jax.Array, option: str) -> Batch:
    _number_of_examples(batch, option)

    def chosen(x):
        x = jnp.asarray(x)  # NumPy's cannot be indexed by traced rows
        sharding = explicit_sharding(x)
        if sharding is None:
            return x[rows]
        return x.at[rows].get(out_sharding=_fitting(sharding, (len(rows), *x.shape[1:]), sharding.spec))

    return jax.tree.map(chosen, batch)


def split_batch(batch: Batch, parts: int, option: str, *, strided: bool) -> Batch:
    """``[parts, size, ...]``: neighbours together, or, if ``strided``, part i has every ``parts``-th example from i on.

    In a batch that is sharded in blocks, neighbours lie on one device. Parts of neighbours are for devices to compute
    side by side; of each strided part every device has its share, and no example moves.
    """
    _number_of_examples(batch, option)

    def cut(x):
        if x.shape[0] % parts:
            raise ValueError(f"{option}={parts} does not divide a batch leaf of shape {x.shape} along its first axis.")
        size = x.shape[0] // parts
        shape = (*((size, parts) if strided else (parts, size)), *x.shape[1:])
        sharding = explicit_sharding(x)
        if sharding is None:
            return x.reshape(shape)
        examples, *rest = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
        return jax.lax.reshape(x, shape, out_sharding=_fitting(sharding, shape, (examples, None, *rest)))

    pieces = jax.tree.map(cut, batch)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), pieces) if strided else pieces


def _number_of_examples(batch: Batch, option: str) -> int:
    """The length of every leaf's first axis."""
    shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree.leaves_with_path(batch)}
    if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
        raise ValueError(
            f"{option} takes some of the examples, which lie along the first axis of every leaf of the batch, but "
            f"these leaves have different numbers of them: {shapes}. What is no example, as weights of classes, "
            "loss_fn gets by a closure or in the model state; several to each example go along a second axis."
        )
    return next(iter(shapes.values()), (0,))[0]


def _fitting(sharding: Any, shape: tuple[int, ...], spec: Any) -> Any:
    """The sharding, but with axes that it does not divide left whole."""

    def devices(names):
        return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ()))

    fits = [names if size % devices(names) == 0 else None for size, names in zip(shape, spec, strict=False)]
    return sharding.update(spec=jax.sharding.PartitionSpec(*fits))


def shard_like(pieces: Batch, tree: Any) -> Any:
    """Shards ``tree`` along its first axis like the parts, as ``vmap`` requires on meshes with explicit sharding."""
    sharding = next((s for s in map(explicit_sharding, jax.tree.leaves(pieces)) if s is not None), None)
    if sharding is None:
        return tree

    def placed(x):
        own = explicit_sharding(x) or sharding.update(spec=jax.sharding.PartitionSpec())
        rest = (*own.spec[1:], *[None] * (x.ndim - max(len(own.spec), 1)))
        return jax.sharding.reshard(x, own.update(spec=jax.sharding.PartitionSpec(sharding.spec[0], *rest)))

    return jax.tree.map(placed, tree)


def replicated(x: jax.Array) -> jax.Array:
    """A copy on every device of meshes with explicit sharding: sorting needs all entries."""
    sharding = explicit_sharding(x)
    return x if sharding is None else jax.sharding.reshard(x, sharding.update(spec=jax.sharding.PartitionSpec()))

"""Structures: what they require of a plan, and how any method comes to decide about whole units."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2sam_jax._base.blocks import any_in_block, pool, spread
from s2sam_jax._base.select import map_alike, ones
from s2sam_jax._base.structure import NM, UNSTRUCTURED, Block, Channel, Structure, Unstructured, check_fits, same
from s2sam_jax._base.tree import map_named
from s2sam_jax._base.types import MaskInputs, MaskUpdate, Params, SparseMethod
from s2sam_jax._sparsity.plan import replace_sparse, sparse_leaves


def structured(method: SparseMethod, structure: Structure) -> SparseMethod:
    """The method under a structure, which under N:M it reads from its inputs."""
    if isinstance(structure, Unstructured):
        return method
    if not method.structured:
        shared = method.ranks == "global" or method.invariant == "total"
        reason = "it shares its weights out over all leaves" if shared else "it decides weight by weight"
        raise ValueError(
            f"This method has no structure={structure}: {reason}. Use methods.static, magnitude or gmp within leaves, "
            "set, rigl, itop or mest, or leave structure out; a method of your own says structured=True."
        )
    return method if isinstance(structure, NM) else in_units(method, structure)


def fit_plan(structure: Structure, params: Params, plan: Any) -> Any:
    """The planned sparsities, checked against what the structure allows.

    Under N:M a padded leaf gets the sparsity that its short groups leave it, so that counts by sparsity are exact.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    map_named(lambda name, p, s: shapes.update({name: p.shape}) if s > 0 else None, params, plan)
    check_fits(structure, shapes)
    if not isinstance(structure, NM):
        return plan
    wrong: dict[str, float] = {}
    map_named(lambda name, s: wrong.update({name: s}) if s > 0 and not same(s, structure.sparsity) else None, plan)
    if wrong:
        raise ValueError(
            f"{structure} keeps {structure.n} of every {structure.m}, so every sparse leaf has sparsity "
            f"{structure.sparsity:g}, but planned are {wrong}. Give sparsity={structure.sparsity:g} with "
            "distribution='uniform'; overrides of 0.0 keep a leaf dense."
        )
    return map_named(lambda _, p, s: structure.sparsity_along(p.shape[structure.axis]) if s > 0 else s, params, plan)


def in_units(method: SparseMethod, structure: Block | Channel) -> SparseMethod:
    """The method on one weight per unit: pooled magnitudes of weights and gradients, masks and counts of units.

    Leaves that stay dense are seen as they are. Sparsities are the planned ones, so that counts are exact in units.
    """

    def per_leaf(fn: Callable[..., jax.Array], x: MaskInputs, tree: Any, *rest: Any) -> Any:
        """``fn`` on the sparse leaves; the others are the very same arrays."""
        return replace_sparse(x, tree, map_alike(fn, *(sparse_leaves(x, each) for each in (tree, *rest))))

    def magnitudes(x: MaskInputs, tree: Any) -> Any:
        return per_leaf(lambda w: pool(jnp.abs(w), structure), x, tree)

    def seen(x: MaskInputs) -> MaskInputs:
        masks = per_leaf(lambda m: any_in_block(m, structure), x, x.masks)
        return x._replace(
            params=magnitudes(x, x.params),
            grads=None if x.grads is None else magnitudes(x, x.grads),
            masks=masks,
            nnz=replace_sparse(x, x.nnz, ones(sparse_leaves(x, masks))),
            grad_fn=None,
            inner_state=None,
            structure=UNSTRUCTURED,
        )

    def whole(x: MaskInputs, new: MaskUpdate) -> MaskUpdate:
        def entries(units: Any) -> Any:
            return per_leaf(lambda m, w: spread(m, structure, w), x, units, x.params)

        return new._replace(masks=entries(new.masks), restart=None if new.restart is None else entries(new.restart))

    def init(x: MaskInputs) -> MaskUpdate:
        return whole(x, method.init(seen(x)))

    if (change := method.update) is None:
        return method._replace(init=init)
    return method._replace(init=init, update=lambda x, state: whole(x, change(seen(x), state)))

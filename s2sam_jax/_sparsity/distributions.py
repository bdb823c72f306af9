"""How sparse each layer is: uniform, Erdős–Rényi, and the Erdős–Rényi kernel form."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from s2sam_jax._base.arguments import check_sparsity
from s2sam_jax._base.counts import rounded_down
from s2sam_jax._base.structure import NM, Structure
from s2sam_jax._base.tree import by_name, map_named
from s2sam_jax._base.types import Params, Rank

Prunable = Callable[[str, Any], bool]
DistributionName = Literal["uniform", "er", "erk"]
Distribution = Callable[..., Any]


# Attention has biases per head, and scanned layers have an extra axis: the number of dimensions is not enough.
NO_KERNELS = ("bias", "scale", "offset", "beta", "gamma")


def is_kernel(path: str, leaf: Any) -> bool:
    """The default ``prunable``: floating-point leaves of two or more dimensions, except biases and scales by name."""
    name = path.rpartition("/")[2].lower()
    if name in NO_KERNELS or name.endswith(("_bias", "_scale")):
        return False
    return leaf.ndim >= 2 and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def uniform(
    params: Params, sparsity: float, *, prunable: Prunable = is_kernel, overrides: Mapping[str, float] | None = None
) -> Any:
    r"""The same sparsity in every prunable leaf.

    .. math:: S_l = S

    Args:
      params: pytree of arrays (or of shapes, as from ``jax.eval_shape``).
      sparsity: fraction of zeros in ``[0, 1)``.
      prunable: ``(path, leaf) -> bool``, with paths such as ``"conv1/kernel"``.
      overrides: sparsity by path pattern (``fnmatch``: ``"*.stem/kernel"``); the first pattern that matches wins.
        Leaves that match are left out of the distribution; ``0.0`` keeps them dense.

    Returns:
      A tree like ``params`` of Python floats: the fraction of zeros per leaf, 0.0 where dense.

    Raises:
      ValueError: if the sparsity is out of range or unreachable, nothing is prunable, or a pattern matches no prunable
        leaf.

    Reference:
      Evci et al., "Rigging the Lottery", ICML 2020, §3.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import uniform
      >>> uniform({"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, 0.75)
      {'bias': 0.0, 'kernel': 0.75}
    """
    return _distribute(params, sparsity, prunable, overrides)


def erdos_renyi(
    params: Params, sparsity: float, *, prunable: Prunable = is_kernel, overrides: Mapping[str, float] | None = None
) -> Any:
    r"""Sparsity by the fan-in and fan-out of each layer: large layers become sparser.

    .. math:: 1 - S_l = \varepsilon\, (n_{in} + n_{out}) / (n_{in}\, n_{out})

    with the last two dimensions as :math:`n_{in}, n_{out}`, and :math:`\varepsilon` such that the total sparsity is
    met. A layer whose density would exceed 1 stays dense, and the others become sparser to make up for it.

    Args:
      params: as in :func:`uniform`.
      sparsity: fraction of zeros over all distributed leaves together, in ``[0, 1)``.
      prunable: as in :func:`uniform`.
      overrides: as in :func:`uniform`.

    Returns:
      The same as :func:`uniform`.

    Raises:
      ValueError: as in :func:`uniform`.

    Reference:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import erdos_renyi
      >>> erdos_renyi({"a": jnp.ones((8, 8)), "b": jnp.ones((8, 32))}, 0.75)
      {'a': 0.6428571428571428, 'b': 0.7767857142857143}
    """

    def density(shape: tuple[int, ...]) -> float:
        return max(sum(shape[-2:]), 1) / math.prod(shape[-2:])

    return _distribute(params, sparsity, prunable, overrides, density)


def erdos_renyi_kernel(
    params: Params, sparsity: float, *, prunable: Prunable = is_kernel, overrides: Mapping[str, float] | None = None
) -> Any:
    r"""Erdős–Rényi with kernel sizes (ERK), the distribution of the strongest RigL results.

    .. math:: 1 - S_l = \varepsilon \sum_d n_{l,d} / \prod_d n_{l,d}

    over all dimensions of the leaf. A layer whose density would exceed 1 stays dense, and the others become sparser to
    make up for it.

    Args:
      params: as in :func:`uniform`.
      sparsity: fraction of zeros over all distributed leaves together, in ``[0, 1)``.
      prunable: as in :func:`uniform`.
      overrides: as in :func:`uniform`.

    Returns:
      The same as :func:`uniform`.

    Raises:
      ValueError: as in :func:`uniform`.

    Reference:
      Evci et al., "Rigging the Lottery", ICML 2020, §3.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import erdos_renyi_kernel
      >>> shapes = {"a": jnp.ones((4, 2, 3, 3)), "b": jnp.ones((8, 4, 3, 3)), "c": jnp.ones((10, 8))}
      >>> {name: round(1 - s, 6) for name, s in erdos_renyi_kernel(shapes, 0.5).items()}
      {'a': 0.777778, 'b': 0.291667, 'c': 1.0}
    """

    def density(shape: tuple[int, ...]) -> float:
        return max(sum(shape), 1) / math.prod(shape)

    return _distribute(params, sparsity, prunable, overrides, density)


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "er": erdos_renyi, "erk": erdos_renyi_kernel}


def _distribute(
    params: Params,
    sparsity: float,
    prunable: Prunable,
    overrides: Mapping[str, float] | None,
    density: Callable[[tuple[int, ...]], float] | None = None,
) -> Any:
    """By a density for each shape, scaled to the budget; without one, the same sparsity everywhere."""
    check_sparsity(sparsity, "sparsity")
    shapes = _prunable_shapes(params, prunable)
    chosen = _overridden(shapes, overrides or {})
    free = {name: shape for name, shape in shapes.items() if name not in chosen}
    _check_reachable(free, sparsity)
    if density is None or not sparsity:
        chosen |= dict.fromkeys(free, float(sparsity))
    else:
        raw = {name: density(shape) for name, shape in free.items()}
        densities = _solve(raw, {name: math.prod(shape) for name, shape in free.items()}, sparsity)
        chosen |= {name: 1.0 - solved for name, solved in densities.items()}
    return map_named(lambda name, _: chosen.get(name, 0.0), params)


def same_everywhere(params: Params, sparsity: float, prunable: Prunable) -> Any:
    """As :func:`uniform`, for rankings of all leaves together, which may leave one without a weight."""
    check_sparsity(sparsity, "sparsity")
    shapes = _prunable_shapes(params, prunable)
    return map_named(lambda name, _: float(sparsity) if name in shapes else 0.0, params)


def _prunable_shapes(params: Params, prunable: Prunable) -> dict[str, tuple[int, ...]]:
    shapes = {name: leaf.shape for name, leaf in by_name(params).items() if leaf.size and prunable(name, leaf)}
    if jax.tree.leaves(params) and not shapes:
        raise ValueError("Nothing is prunable: prunable(path, leaf) is False on every leaf of params.")
    return shapes


def _overridden(shapes: Mapping[str, Any], overrides: Mapping[str, float]) -> dict[str, float]:
    for pattern, value in overrides.items():
        check_sparsity(value, f"overrides[{pattern!r}]")
        if shapes and not fnmatch.filter(shapes, pattern):
            raise ValueError(f"overrides[{pattern!r}] matches no prunable leaf; they are {sorted(shapes)}.")
    matches = {name: [p for p in overrides if fnmatch.fnmatch(name, p)] for name in shapes}
    return {name: float(overrides[found[0]]) for name, found in matches.items() if found}


def _check_reachable(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> None:
    """Every leaf keeps at least one weight, which bounds what small trees can reach."""
    total = sum(math.prod(shape) for shape in shapes.values())
    if round((1 - sparsity) * total, 6) < len(shapes):
        raise ValueError(
            f"sparsity={sparsity} leaves less than one weight a leaf ({len(shapes)} prunable leaves, {total} weights); "
            f"the reachable maximum is {1 - len(shapes) / total:.6g}."
        )


def _solve(raw: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Scales raw densities to the budget; leaves that saturate become dense and are paid for by the others."""
    zeros = {name: rounded_down(sparsity * size) for name, size in sizes.items()}
    dense: set[str] = set()
    while True:
        rest = [name for name in sizes if name not in dense]
        if not rest:
            return dict.fromkeys(sizes, 1.0)
        budget = sum(sizes[n] - zeros[n] for n in rest) - sum(zeros[n] for n in dense)
        scale = budget / sum(raw[n] * sizes[n] for n in rest)
        largest = max(raw[n] for n in rest)
        if scale * largest <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in sizes}
        dense |= {name for name in rest if raw[name] == largest}


def distribution_of(
    distribution: DistributionName | Distribution | None, ranks: Rank, structure: Structure
) -> Distribution:
    """The one that was asked for, or the default of a method and a structure."""
    if callable(distribution):
        return distribution
    name = distribution or ("uniform" if ranks == "global" or isinstance(structure, NM) else "erk")
    if name not in DISTRIBUTIONS:
        raise ValueError(f"Unknown distribution {name!r}; use one of {sorted(DISTRIBUTIONS)} or a function.")
    return DISTRIBUTIONS[name]

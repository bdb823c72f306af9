"""What lives and dies together: single weights, n of every m, blocks, or channels."""

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np

Pool = Literal["mean", "l2", "max"]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Every weight lives or dies by itself.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import Unstructured, select
      >>> print(select(jnp.array([3.0, 1.0, 2.0]), count=2, structure=Unstructured()))
      [ True False  True]
    """


@dataclasses.dataclass(frozen=True)
class NM:
    """Exactly ``n`` of every ``m`` consecutive entries along an axis are live: 2:4 is ``NM(2, 4)``.

    The sparsity follows from it: ``1 - n / m``.

    Args:
      n: live entries per group, ``0 < n < m``.
      m: entries per group, up to 256.
      axis: the axis along which groups run; by default the input channels of kernels ``(..., inputs, outputs)``. Under
        explicit sharding, each device must hold whole groups of it.
      pad: allow an incomplete last group, which keeps ``min(n, entries)``; by default the length of
        the axis must be a multiple of ``m``.

    Raises:
      ValueError: for n or m that are out of range or not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import NM, select
      >>> print(select(jnp.array([3.0, 1.0, 2.0, 4.0, 9.0, 9.0, 9.0, 8.0]), structure=NM(2, 4, axis=-1)))
      [ True False False  True  True  True False False]
    """

    n: int
    m: int
    axis: int = -2
    pad: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.n, int | np.integer) and isinstance(self.m, int | np.integer)
        if not (whole and 0 < self.n < self.m <= 256):
            raise ValueError(f"NM keeps n of every m, integers with 0 < n < m <= 256; got n={self.n!r}, m={self.m!r}.")

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in a whole group."""
        return 1 - self.n / self.m

    def sparsity_along(self, length: int) -> float:
        """The fraction of zeros along an axis of this length, whose last group may be incomplete."""
        live = length // self.m * self.n + min(length % self.m, self.n)
        return 1 - live / length

    def block(self, shape: Shape) -> Shape:
        axis = self.axis % len(shape)
        return tuple(self.m if a == axis else 1 for a in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class Block:
    """Rectangles of weights live and die together, ranked by one pooled score each. Counts are counts of blocks.

    Args:
      shape: the shape of a block, in the last axes of a leaf: ``(4, 4)`` is 4 inputs by 4 outputs, ``(3, 3, 1, 1)``
        whole 3x3 kernels of a convolution.
      pool: the score of a block: the ``"mean"`` of its entries, their L2 norm (``"l2"``) or the ``"max"``.
      pad: allow incomplete blocks at the end of an axis, pooled over the entries they have; by default each
        length must be a multiple of the block's.

    Raises:
      ValueError: for an unknown pool, or a shape that is not made of positive integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import Block, select
      >>> scores = jnp.array([[1.0, 2.0, 5.0, 0.0], [1.0, 2.0, 0.0, 2.0]])
      >>> print(select(scores, count=1, structure=Block((2, 2))))
      [[False False  True  True]
       [False False  True  True]]
    """

    shape: Shape
    pool: Pool = "mean"
    pad: bool = False

    def __post_init__(self) -> None:
        _check_pool("Block", self.pool)
        if not (isinstance(self.shape, tuple) and self.shape and all(type(b) is int and b > 0 for b in self.shape)):
            raise ValueError(f"Block needs a shape of positive integers, such as (4, 4); got {self.shape!r}.")

    def block(self, shape: Shape) -> Shape:
        return (1,) * (len(shape) - len(self.shape)) + self.shape


@dataclasses.dataclass(frozen=True)
class Channel:
    """The weights of a channel live and die together, ranked by one pooled score. Counts are counts of channels.

    Each leaf is ranked by itself; a channel's bias and norm, and the layers that read it, are left as they are.

    Args:
      axis: the channel axis: the outputs by default, ``-2`` for the inputs of kernels ``(..., inputs, outputs)``.
      pool: the score of a channel: the ``"mean"`` of its entries, their L2 norm (``"l2"``) or the ``"max"``.

    Raises:
      ValueError: for an unknown pool, or an axis that is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import Channel, select
      >>> print(select(jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 0.0]]), sparsity=0.5, structure=Channel()))
      [[False  True  True]
       [False  True  True]]
    """

    axis: int = -1
    pool: Pool = "mean"

    def __post_init__(self) -> None:
        _check_pool("Channel", self.pool)
        if not isinstance(self.axis, int | np.integer):
            raise ValueError(f"Channel needs an integer axis, such as -1, and then a pool; got axis={self.axis!r}.")

    def block(self, shape: Shape) -> Shape:
        axis = self.axis % len(shape)
        return tuple(1 if a == axis else length for a, length in enumerate(shape))


Structure = Unstructured | NM | Block | Channel
UNSTRUCTURED = Unstructured()


def check_structure(structure: Any) -> None:
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be Unstructured(), NM(n, m), Block(shape) or Channel(); got {structure!r}.")


def check_fits(structure: Structure, shapes: dict[str, Shape]) -> None:
    """Raises a ``ValueError`` that lists every leaf which cannot be divided, and why."""
    misfits = {name: fault for name, shape in shapes.items() if (fault := _misfit(structure, shape))}
    if misfits:
        first = next(iter(misfits))
        lines = [f"{name} of shape {shapes[name]}: {fault}" for name, fault in misfits.items()]
        pad = "" if isinstance(structure, Channel) else "pad=True, "
        axes = "another shape" if isinstance(structure, Block) else "another axis"
        raise ValueError(
            f"{structure} does not divide these leaves:\n  " + "\n  ".join(lines) + f"\nGive {pad}{axes}, or keep the "
            f"leaf dense: sparsify(overrides={{{first!r}: 0.0}})."
        )


def same(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-9)


def _misfit(structure: Structure, shape: Shape) -> str | None:
    if isinstance(structure, Unstructured):
        return None
    if isinstance(structure, Block):
        if len(structure.shape) > len(shape):
            return f"a block has {len(structure.shape)} axes, the leaf {len(shape)}"
    elif not -len(shape) <= structure.axis < len(shape):
        return f"there is no axis {structure.axis}"
    if isinstance(structure, Channel) or structure.pad:
        return None
    uneven = [(a, d, b) for a, (d, b) in enumerate(zip(shape, structure.block(shape), strict=True)) if d % b]
    return ", ".join(f"axis {a} has {d} entries, not a multiple of {b}" for a, d, b in uneven) or None


def _check_pool(name: str, pool: str) -> None:
    if pool not in get_args(Pool):
        raise ValueError(f"{name} needs pool 'mean', 'l2' or 'max'; got {pool!r}.")

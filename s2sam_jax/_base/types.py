"""The vocabulary every other file shares: trees, the update clock, and what a sparse method is."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from s2sam_jax._base.structure import UNSTRUCTURED, Structure

Params = Any  # a pytree of floating arrays
Masks = Any  # bool arrays, exactly the treedef of the parameters; True where a weight lives
GradFn = Callable[[Params], Params]
ScalarOrSchedule = float | jax.Array | Callable[[jax.Array], Any]
Compat = Literal["paper", "authors"]
Invariant = Literal["per_layer", "total", "monotone", "bounded"]

NEVER = int(jnp.iinfo(jnp.int32).max)


@dataclasses.dataclass(frozen=True)
class Every:
    """A clock that fires at ``start, start + every, ...``, up to and including ``end``.

    Args:
      start: first call that fires, counted from 0.
      every: calls between two firings, at least 1.
      end: last call that may fire; ``None`` means no end. Methods that anneal over training (RigL) use it
        as their horizon and ask for it.

    Raises:
      ValueError: when a bound is negative or out of order.

    Example:
      >>> clock = Every(start=0, every=100, end=250)
      >>> [step for step in range(400) if clock.at_or_after(step) == step]
      [0, 100, 200]
    """

    start: int = 0
    every: int = 100
    end: int | None = None

    def __post_init__(self):
        try:
            object.__setattr__(self, "start", operator.index(self.start))  # NumPy's integers too
            object.__setattr__(self, "every", operator.index(self.every))
            object.__setattr__(self, "end", None if self.end is None else operator.index(self.end))
        except TypeError as error:
            raise TypeError(
                f"Every counts calls in integers; got {self.start!r}, {self.every!r}, {self.end!r}."
            ) from error
        if self.start < 0 or self.every < 1:
            raise ValueError(f"Every needs start >= 0 and every >= 1; got start={self.start}, every={self.every}.")
        if self.start >= NEVER or self.every >= NEVER:
            raise ValueError(f"Every counts in int32: start and every must be below 2**31 - 1; got {self}.")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"Every needs end >= start; got start={self.start}, end={self.end}.")
        if self.end is not None:
            object.__setattr__(self, "end", min(self.end, NEVER - 1))

    def at_or_after(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The first firing at or after ``step`` as int32[]; ``NEVER`` when there is none."""
        step = jnp.maximum(jnp.asarray(step, jnp.int32), self.start)
        due = step + (self.start - step) % self.every
        return due if self.end is None else jnp.where(due <= self.end, due, NEVER)

    def planned(self, before: jax.Array, due: bool | jax.Array, step: jax.Array) -> jax.Array:
        """The next firing after a call: the one planned before, or where that is done the first from ``step`` on."""
        if isinstance(due, bool):
            return self.at_or_after(step) if due else before
        return jnp.where(due, self.at_or_after(step), before)


class MaskInputs(NamedTuple):
    """What a mask-update function may look at. A superset: take what the method needs.

    Attributes:
      params: clean parameters (never the perturbed ones).
      masks: current masks; all true at initialisation.
      sparsities: planned fraction of zeros per leaf, Python floats; exactly 0.0 on leaves that stay dense.
      grads: dense gradient at the point the loop chose; ``None`` at initialisation.
      nnz: int32[] per leaf, the ones of the masks.
      step: int32[], calls so far.
      key: typed PRNG key, already folded with the step.
      when: the update clock, for schedules that need its horizon; ``None`` when masks never change.
      grad_fn: ``params -> dense gradient`` on the current batch, or ``None`` if the loop offers none.
      inner_state: state of the wrapped optimizer, for methods that rewind it.
      structure: what masks must keep to; ``NM`` or ``Unstructured``. Under ``Block`` and ``Channel``, ``params`` and
        ``grads`` hold pooled magnitudes, one entry per unit, and ``grad_fn`` and ``inner_state`` are ``None``.
    """

    params: Params
    masks: Masks
    sparsities: Any
    grads: Params | None = None
    nnz: Any = None
    step: Any = 0
    key: Any = None
    when: Every | None = None
    grad_fn: GradFn | None = None
    inner_state: Any = None
    structure: Structure = UNSTRUCTURED


class MaskUpdate(NamedTuple):
    """What a mask-update function returns.

    Attributes:
      masks: the new masks.
      state: the method's own state.
      values: weights to go on from, for methods that rewind them; ``None`` keeps the present ones.
      inner_state: state for the wrapped optimizer to go on from; ``None`` keeps the present one.
      restart: bool masks, true where weights start again from zero; ``None`` for nowhere.
      skip: leave the inner optimizer alone on this call: surviving weights keep their value, dropped ones
        become zero. A bool, possibly traced.
    """

    masks: Masks
    state: Any = ()
    values: Params | None = None
    inner_state: Any = None
    restart: Masks | None = None
    skip: bool | jax.Array = False


class SparseMethod(NamedTuple):
    """A sparse-training method: two pure functions and what they promise.

    Attributes:
      init: ``MaskInputs -> MaskUpdate``, the first masks and the method's state.
      update: ``(MaskInputs, state) -> MaskUpdate``, called when the clock fires; ``None`` for masks that
        never change.
      invariant: what every mask update preserves: ``"per_layer"`` (each leaf keeps its count), ``"total"`` (the sum
        of counts is kept), ``"monotone"`` (masks only shrink, which ``sparsify`` relies on) or ``"bounded"``. Under
        ``jax.experimental.checkify`` an update that breaks it is an error (counts not where a structure pads).
      ranks: whether it spends the sparsity ``"leaf"`` by leaf, or over all leaves together (``"global"``).
      when: the clock, if the method brings its own; ``sparsify(when=...)`` takes precedence.
      structured: whether it works under ``sparsify(structure=...)``: it ranks within leaves, by magnitudes, and
        keeps to ``MaskInputs.structure``.
    """

    init: Callable[[MaskInputs], MaskUpdate]
    update: Callable[[MaskInputs, Any], MaskUpdate] | None
    invariant: Invariant
    ranks: Literal["leaf", "global"] = "leaf"
    when: Every | None = None
    structured: bool = False


class Unmasked(NamedTuple):
    """Marks a tree in an optimizer state that is meant to be non-zero on pruned weights."""

    tree: Any

"""The vocabulary every other file shares: trees, and what a sparse method is."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from s2sam_jax._base.clock import Every
from s2sam_jax._base.structure import UNSTRUCTURED, Structure

Params = Any  # a pytree of floating arrays
Masks = Any  # bool arrays, exactly the treedef of the parameters; True where a weight lives
GradFn = Callable[[Params], Params]
BatchLoss = Callable[[Params, Any], jax.Array]
Progress = Callable[[int], None]  # called with how many more of something are done
ScalarOrSchedule = float | jax.Array | Callable[[jax.Array], Any]
Compat = Literal["paper", "authors"]
Invariant = Literal["per_layer", "total", "monotone", "bounded"]
Rank = Literal["leaf", "global"]


class MaskInputs(NamedTuple):
    """The inputs of a mask-update function. A method uses only those it needs.

    Attributes:
      params: clean parameters (never the perturbed ones).
      masks: current masks; all true at initialisation.
      sparsities: planned fraction of zeros per leaf, Python floats; exactly 0.0 on leaves that stay dense.
      grads: dense gradient at the point where the loop took it; ``None`` at initialisation.
      nnz: int32[] per leaf, the number of ones in its mask.
      step: int32[], calls so far.
      key: typed PRNG key, already folded with the step.
      when: the update clock, for schedules that need its horizon; ``None`` when masks never change.
      grad_fn: ``params -> dense gradient`` on the current batch, or ``None`` if the loop passes none.
      inner_state: state of the wrapped optimizer, for methods that rewind it.
      structure: what masks must follow, ``NM`` or ``Unstructured``. Under ``Block`` and ``Channel``, ``params`` and
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
      values: weights to continue from, for methods that rewind them; ``None`` keeps the current ones.
      inner_state: state of the wrapped optimizer to continue from; ``None`` keeps the current one.
      restart: bool masks, true where weights start again from zero; ``None`` for nowhere.
      skip: do not run the wrapped optimizer on this call: surviving weights keep their value, dropped ones
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
        of counts is kept), ``"monotone"`` (masks only shrink, which ``sparsify`` relies on) or ``"bounded"`` (counts
        rise and fall as the method plans, and nothing is checked). Under ``jax.experimental.checkify`` an update that
        breaks it is an error (counts are not checked under a structure with ``pad=True``).
      ranks: whether the sparsity is met in each leaf (``"leaf"``) or over all leaves together (``"global"``).
      when: the clock, if the method brings its own; ``sparsify(when=...)`` takes precedence.
      structured: whether it works under ``sparsify(structure=...)``: it then ranks within leaves, by magnitude, and
        follows ``MaskInputs.structure``.
    """

    init: Callable[[MaskInputs], MaskUpdate]
    update: Callable[[MaskInputs, Any], MaskUpdate] | None
    invariant: Invariant
    ranks: Rank = "leaf"
    when: Every | None = None
    structured: bool = False

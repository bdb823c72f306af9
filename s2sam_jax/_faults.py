"""What may be wrong with weights, masks and gradients, leaf by leaf, in arrays of NumPy on the host or of JAX."""

import math
from typing import Any, NamedTuple

from s2sam_jax._s2sam import S2SAMState, last_gradient
from s2sam_jax._tree import find_states, named_leaves
from s2sam_jax._types import Unmasked

NOT_APPLIED = "call apply_masks(params, opt_state) after init or a restore"


class Fault(NamedTuple):
    """Something that may be wrong with a leaf.

    Attributes:
      name: of the leaf.
      text: what it is and what to do, with ``{}`` for the value, and for what is wanted.
      value: a number.
      wanted: what it has to be.
    """

    name: str
    text: str
    value: Any
    wanted: Any

    @property
    def line(self) -> str:
        """With ``{}`` for the numbers still."""
        return f"{self.name.replace('{', '{{').replace('}', '}}')}: {self.text}"


def of_mask(name: str, mask: Any, nnz: Any) -> Fault:
    text = "the mask has {} ones, {} at the last mask update; only set_masks(opt_state, masks) may change it"
    return Fault(name, text, mask.sum(), nnz)


def of_pruned(name: str, weights: Any, mask: Any, advice: str = NOT_APPLIED) -> Fault:
    return Fault(name, f"{{}} pruned weights are not zero; {advice}", ((weights != 0) & ~mask).sum(), 0)


def not_finite(name: str, array: Any, what: str) -> Fault:
    return Fault(name, f"{{}} {what} are not finite", (~(abs(array) < math.inf)).sum(), 0)


def of_perturbation(inner_state: Any, masks: dict[Any, Any], fetch: Any = lambda x: x) -> list[Fault]:
    """Whether :func:`s2sam` would perturb weights that these masks prune."""
    remembered = [s for s in find_states(inner_state, S2SAMState) if not isinstance(s.last_grad, Unmasked)]
    text = "the last gradient of s2sam() is not zero at {} pruned weights; set_masks(opt_state, masks) zeroes it there"
    return [
        Fault("/".join(path), text, ((fetch(grad) != 0) & ~fetch(masks[path])).sum(), 0)
        for state in remembered
        for path, grad in named_leaves(last_gradient(state)).items()
        if path in masks
    ]

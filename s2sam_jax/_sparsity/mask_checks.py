"""What may be wrong with weights, masks and gradients, leaf by leaf; the host raises it, or warns of it."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2sam_jax._base.masks import SparseState, sparse_states
from s2sam_jax._base.state_rule import Unmasked
from s2sam_jax._base.tree import by_name, check_same_named, find_states, scalar
from s2sam_jax._base.types import Params
from s2sam_jax._sharpness.s2sam import S2SAMState, last_gradient
from s2sam_jax._sparsity.stacks import Stacked, check_stacked, layers_of

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


def check_masks(params: Params, opt_state: Any) -> None:
    """Raises an error if masks or pruned weights are not as they should be. Runs on the host; costs a few passes.

    Checked per leaf: structure and shape of the masks, their count against the one recorded at the last mask update,
    exact zeros off the mask in the parameters and in the gradient that :func:`s2sam` remembers, and finite weights.
    If pruned weights become non-zero at every step, something outside of :func:`sparsify` changes its updates. Momenta
    are not checked: they are zeroed before they are used, and some optimizers leave tiny numbers there.

    Args:
      params: clean parameters.
      opt_state: a state with a :class:`SparseState`.

    Raises:
      ValueError: listing every leaf that fails and how.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import check_masks, methods, sparsify
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = sparsify(optax.sgd(0.1), methods.static(), sparsity=0.5).init(params)
      >>> check_masks(params, state)
      Traceback (most recent call last):
      ValueError: check_masks found:
        kernel: 2 pruned weights are not zero; call apply_masks(params, opt_state) after init or a restore
    """
    params, opt_state = jax.device_get((params, opt_state))  # NumPy has nothing to compile
    faults = []
    named = by_name(params)
    for state in sparse_states(opt_state, "check_masks"):
        masks = by_name(state.masks)
        check_same_named(masks, {path: p for path, p in named.items() if path in masks}, "the masks", "params")
        if jnp.ndim(scalar(state.nnz)) > 1:
            raise ValueError(
                "check_masks looks at one network; this state is of several: take one from params and opt_state, "
                "jax.tree.map(lambda x: x[i], ...)."
            )
        faults += sparse_faults(named, state)
    if problems := [f.line.format(f.value, f.wanted) for f in faults if f.value != f.wanted]:
        raise ValueError("check_masks found:\n  " + "\n  ".join(problems))


def warn_if_collapsed(opt_state: Any, *, stacked: Stacked | None = None) -> None:
    """Warns of leaves that have lost all their weights. Runs on the host and waits for the device: call it rarely.

    No signal passes through such a layer. This can happen if all leaves are ranked together, as by SNIP, GraSP and
    global magnitude; :func:`check_masks` does not report it.

    Args:
      opt_state: a state with a :class:`SparseState`, of one network or of several, after the mask update in question:
        for SNIP and GraSP, after the first step.
      stacked: as given to :func:`sparsify`, to be warned of single layers of a stack too.

    Warns:
      UserWarning: naming the leaves, and what prevents it.

    Raises:
      ValueError: when there is no :class:`SparseState`, or for a ``stacked`` that does not fit.

    Example:
      >>> import warnings, jax.numpy as jnp, optax
      >>> from s2sam_jax import methods, sparsify, warn_if_collapsed
      >>> params = {"a": jnp.full((2, 2), 0.1), "b": jnp.ones((2, 2))}
      >>> state = sparsify(optax.sgd(0.1), methods.magnitude("global"), sparsity=0.5).init(params)
      >>> with warnings.catch_warnings(record=True, action="always") as caught:
      ...     warn_if_collapsed(state)
      >>> print(str(caught[0].message)[:26])
      No weight is left in ['a']
    """
    empty = []
    for state in sparse_states(opt_state, "warn_if_collapsed"):
        masks = by_name(state.masks)
        counts = np.asarray(jax.device_get(scalar(state.nnz)))  # leaves last, behind the axes of several networks
        gone = (counts == 0).any(axis=tuple(range(counts.ndim - 1)))
        empty += [name for (name, mask), none in zip(masks.items(), gone, strict=True) if none and mask.size]
        layers = layers_of(masks, check_stacked(stacked))
        empty += [name for name, mask in layers.items() if name not in masks and mask.size and not mask.any()]
    if empty:
        warnings.warn(
            f"No weight is left in {empty}. Lower the sparsity, or keep these leaves dense by "
            "sparsify(overrides={name: 0.0}); snip, grasp and masks_from_scores take keep_at_least=1.",
            stacklevel=2,
        )


def sparse_faults(weights: dict[str, Any], state: SparseState, advice: str = NOT_APPLIED) -> list[Fault]:
    """What may be wrong with masks, with what is behind them, and with the perturbation of the next gradient."""
    faults, masks = [], by_name(state.masks)
    changed = "the mask has {} ones, {} at the last mask update; only set_masks(opt_state, masks) may change it"
    alive = f"{{}} pruned weights are not zero; {advice}"
    for (path, mask), count in zip(masks.items(), scalar(state.nnz), strict=True):
        faults.append(Fault(path, changed, mask.sum(), count))
        faults.append(Fault(path, alive, ((weights[path] != 0) & ~mask).sum(), 0))
        faults.append(not_finite(path, weights[path], "weights"))
    return faults + _of_perturbation(state.inner_state, masks)


def not_finite(name: str, array: Any, what: str) -> Fault:
    return Fault(name, f"{{}} {what} are not finite", (~(abs(array) < math.inf)).sum(), 0)


def _of_perturbation(inner_state: Any, masks: dict[str, Any]) -> list[Fault]:
    """Whether :func:`s2sam` would perturb weights that these masks prune."""
    remembered = [s for s in find_states(inner_state, S2SAMState) if not isinstance(s.last_grad, Unmasked)]
    text = "the last gradient of s2sam() is not zero at {} pruned weights; set_masks(opt_state, masks) zeroes it there"
    return [
        Fault(path, text, ((grad != 0) & ~masks[path]).sum(), 0)
        for state in remembered
        for path, grad in by_name(last_gradient(state)).items()
        if path in masks
    ]

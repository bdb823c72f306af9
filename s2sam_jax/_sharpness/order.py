"""Where SAM and its variants have to stand in an optimizer, as far as its state tells."""

from typing import Any

import optax

from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.optax_wrappers import OBSERVING, chains, is_chain
from s2sam_jax._base.tree import find_states
from s2sam_jax._sharpness.msam import MSAMState
from s2sam_jax._sharpness.s2sam import S2SAMState
from s2sam_jax._sharpness.s2sam_wrapper import S2SAMWrapperState
from s2sam_jax._sharpness.second_gradient import NAMES, SECOND_GRADIENT, taking_second_gradients

SINGLE_GRADIENT = {S2SAMState: "s2sam", MSAMState: "msam", S2SAMWrapperState: "s2sam_wrapper"}


def check_order(opt_state: Any) -> None:
    """Raises a ``ValueError`` where SAM or a variant would not do what it is there for."""
    _check_alone(opt_state)
    _check_inside_sparsify(opt_state)
    check_comes_first(opt_state)


def check_comes_first(opt_state: Any) -> None:
    """What stands before them acts on the first gradient, not on the second one that replaces it."""
    for chain in chains(opt_state):
        parts = [part for part in chain if not isinstance(part, OBSERVING)]
        if is_chain(chain) and any(map(taking_second_gradients, parts[1:])):
            raise ValueError(
                f"{NAMES} stands behind something in an optax.chain, which acts on the first gradient alone: clipping "
                "and decay of the second one would be lost, and behind an optimizer weights would move uphill. Put it "
                "first: optax.chain(sam(), ...)."
            )


def _check_inside_sparsify(opt_state: Any) -> None:
    sparse = find_states(opt_state, SparseState)
    inside = [state for one in sparse for state in taking_second_gradients(one.inner_state)]
    if sparse and len(taking_second_gradients(opt_state)) > len(inside):
        raise ValueError(
            f"{NAMES} outside sparsify would perturb pruned weights, along their dense gradients; put it inside: "
            "sparsify(chain(sam(), ...))."
        )


def _check_alone(opt_state: Any) -> None:
    """On the same leaves: those of ``optax.multi_transform`` may differ by group."""
    outermost = find_states(opt_state, (*SINGLE_GRADIENT, *SECOND_GRADIENT, optax.transforms.PartitionState))
    kinds = {type(state) for state in outermost}
    single = [name for kind, name in SINGLE_GRADIENT.items() if kind in kinds]
    if single and kinds & set(SECOND_GRADIENT):
        raise ValueError(f"{' and '.join(single)} together with one of {NAMES} would perturb twice; take one of them.")

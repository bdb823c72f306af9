"""The states of SAM and its variants, which replace the gradient by a second one, and where they have to stand."""

from typing import Any

from s2sam_jax._base.optax_wrappers import OBSERVING, chains, is_chain
from s2sam_jax._base.tree import find_states
from s2sam_jax._sharpness.esam import ESAMState
from s2sam_jax._sharpness.looksam import LookSAMState
from s2sam_jax._sharpness.sam import SAMState
from s2sam_jax._sharpness.ssam import SSAMState

SECOND_GRADIENT = (SAMState, SSAMState, LookSAMState, ESAMState)
NAMES = "sam, ssam, looksam, gsam or esam"


def taking_second_gradients(opt_state: Any) -> list[Any]:
    """The states of SAM and its variants, which take a second gradient at the ascent point."""
    return find_states(opt_state, SECOND_GRADIENT)


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

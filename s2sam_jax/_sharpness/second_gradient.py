"""The states of SAM and its variants, which replace the gradient by a second one, and where they have to stand."""

from typing import Any

from s2sam_jax._base.optax_wrappers import chains
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
    """What stands before them acts on the first gradient, which is thrown away: its work would be lost in silence."""
    if any(taking_second_gradients(part) for chain in chains(opt_state) for part in chain[1:]):
        raise ValueError(
            f"{NAMES} stands behind something in an optax.chain, and replaces what that has made of the gradient: "
            "clipping and decay would be lost, and behind an optimizer weights would move uphill. Put it first: "
            "optax.chain(sam(), ...)."
        )

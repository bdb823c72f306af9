"""The states of SAM and its variants, which replace the gradient by a second one."""

from typing import Any

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

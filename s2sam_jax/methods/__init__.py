"""Sparse-training methods: one file each, one factory each. The folder is the registry."""

import pkgutil

from s2sam_jax._sparsity.pruning import masks_from_scores as masks_from_scores
from s2sam_jax.methods.chase import chase as chase
from s2sam_jax.methods.chex import chex as chex
from s2sam_jax.methods.dsr import dsr as dsr
from s2sam_jax.methods.gmp import gmp as gmp
from s2sam_jax.methods.grasp import grasp as grasp
from s2sam_jax.methods.grasp import grasp_scores as grasp_scores
from s2sam_jax.methods.itop import explored_fraction as explored_fraction
from s2sam_jax.methods.itop import itop as itop
from s2sam_jax.methods.lottery import Round as Round
from s2sam_jax.methods.lottery import lottery as lottery
from s2sam_jax.methods.lottery import lottery_rounds as lottery_rounds
from s2sam_jax.methods.lrr import lrr as lrr
from s2sam_jax.methods.magnitude import magnitude as magnitude
from s2sam_jax.methods.mest import mest as mest
from s2sam_jax.methods.rigl import rigl as rigl
from s2sam_jax.methods.set import set as set
from s2sam_jax.methods.snip import snip as snip
from s2sam_jax.methods.snip import snip_scores as snip_scores
from s2sam_jax.methods.static import static as static


def available() -> dict[str, str]:
    """The methods by name, each with one line on what it does.

    Returns:
      Factory names (attributes of this module) and the first line of their docstrings.

    Example:
      >>> from s2sam_jax import methods
      >>> methods.available()["static"]
      'A uniformly random mask with exactly the planned count per leaf, which never changes.'
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: globals()[name].__doc__.splitlines()[0] for name in names}

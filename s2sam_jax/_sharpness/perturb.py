"""The point at which a loop takes its gradient, where the optimizer state alone decides it."""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.optax_wrappers import HOLDING_BACK, chains
from s2sam_jax._base.state_rule import map_mirrored
from s2sam_jax._base.tree import by_name, find_states, map_named, scalar
from s2sam_jax._base.types import Params
from s2sam_jax._sharpness import msam, s2sam
from s2sam_jax._sharpness.ascent import add
from s2sam_jax._sharpness.msam import MSAMState
from s2sam_jax._sharpness.s2sam import S2SAMState


def perturb(params: Params, opt_state: Any) -> Params:
    r"""The point at which S2-SAM and Momentum-SAM take their gradient: ``params + epsilon``.

    .. math:: w + \rho\, \hat g_{t-1} / (\|\hat g_{t-1}\|_2 + \mathrm{eps}), \qquad
              w - \rho\, v_{t-1} / (\|v_{t-1}\|_2 + \mathrm{eps})

    Finds the state of :func:`s2sam` or :func:`msam` anywhere inside ``opt_state`` (chains, wrappers, train states).
    Several states on disjoint leaves, as under ``optax.multi_transform``, each use their own norm.

    Args:
      params: the clean parameters, any pytree.
      opt_state: the optimizer state that holds an :class:`S2SAMState` or an :class:`MSAMState`, or a train state
        around it.

    Returns:
      The perturbed parameters, in the parameters' structure and dtypes.

    Raises:
      ValueError: if there is no such state (training would silently be plain SGD), two states claim one leaf, a state
        belongs to another model, ``s2sam`` comes after an optimizer with momentum or moments in its chain or stands
        beside ``MultiSteps`` or ``apply_if_finite``, ``s2sam`` or ``msam`` stands outside ``sparsify``, ``msam`` finds
        no momentum, or ``params`` is a Flax NNX model with statistics or random counts, which would change in the
        returned copy only.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import perturb, s2sam
      >>> tx, params = s2sam(rho=0.5), jnp.array([3.0, 4.0])
      >>> _, state = tx.update(jnp.array([0.0, 2.0]), tx.init(params), params)
      >>> print(perturb(params, state))
      [3.  4.5]
    """
    if not perturbing(opt_state):
        raise ValueError(
            f"perturb found no S2SAMState or MSAMState in opt_state (a {type(opt_state).__name__}). Put s2sam() or "
            "msam() into the optimizer chain (sam and its variants perturb inside their update); if the state comes "
            "from a checkpoint, restore it into the structure of tx.init(params)."
        )
    _check_no_copy_of_states(params)
    moved: dict[str, jax.Array] = {}
    for _, _, epsilon in perturbations(by_name(params), opt_state):
        moved |= epsilon
    return map_named(lambda path, param: add(param, moved[path]) if path in moved else param, params)


def _check_no_copy_of_states(params: Params) -> None:
    """Whatever a Flax NNX model keeps besides parameters would change in the perturbed copy, and be lost with it.

    Flax is used only if the caller has imported it.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.Module) and (kept := by_name(nnx.state(params, nnx.Not(nnx.Param)))):
        raise ValueError(
            f"perturb was given a whole nnx.Module and would return a copy: {sorted(kept)} (statistics, random counts) "
            "would change in the copy only, never in your model. Split it by graph, params, rest = nnx.split(model, "
            "nnx.Param, ...), perturb params, and update the model by what is not a parameter."
        )


def perturbing(opt_state: Any) -> list[S2SAMState | MSAMState]:
    """The states that :func:`perturb` looks for."""
    return [*find_states(opt_state, S2SAMState), *find_states(opt_state, MSAMState)]


def perturbations(
    clean: dict[str, Any], opt_state: Any
) -> Iterator[tuple[S2SAMState | MSAMState, dict[str, jax.Array], dict[str, jax.Array]]]:
    """Each state that perturbs, with its directions and the perturbation along them, by leaf."""
    _check_order(opt_state)
    owners: dict[str, str] = {}
    for state, directions in _directions(opt_state, clean):
        name = type(state).__name__
        if jnp.ndim(scalar(state.rho)):
            raise ValueError(f"perturb moves one network; this {name} is of several: use jax.vmap(perturb).")
        for path, direction in directions.items():
            if path not in clean or jnp.shape(clean[path]) != jnp.shape(direction):
                raise ValueError(f"perturb: the {name} has a gradient {path}{jnp.shape(direction)} that params lack.")
            if path in owners:
                both = f"two {name}s" if owners[path] == name else f"{owners[path]} and {name}"
                raise ValueError(f"perturb: {both} claim the leaf {path}; use one s2sam() or msam() per leaf.")
            owners[path] = name
        if isinstance(state, S2SAMState):
            weights = jax.lax.stop_gradient([clean[path] for path in directions])  # epsilon is a constant
            epsilon = s2sam.epsilon(state, weights)
        else:
            epsilon = msam.epsilon(state, list(directions.values()))
        yield state, directions, dict(zip(directions, epsilon, strict=True))


def _directions(opt_state: Any, clean: dict[str, Any]) -> Iterator[tuple[S2SAMState | MSAMState, dict[str, Any]]]:
    """Each state with what it perturbs along, by leaf."""
    for state in find_states(opt_state, S2SAMState):
        yield state, by_name(s2sam.last_gradient(state))
    # Of a train state only the optimizer's state: a field mu elsewhere would be taken for a momentum.
    yield from msam.momenta(getattr(opt_state, "opt_state", opt_state), set(clean))


def _check_order(opt_state: Any) -> None:
    """Outside sparsify, s2sam would remember dense gradients; outside these wrappers, gradients they hold back."""
    _check_inside_sparsify(opt_state)
    _check_first(opt_state)
    for kind, name in HOLDING_BACK:
        outer = find_states(opt_state, (S2SAMState, kind, optax.transforms.PartitionState))
        if {type(state) for state in outer} >= {S2SAMState, kind}:
            raise ValueError(
                f"perturb: s2sam() stands beside {name}(...), and would perturb along gradients that it holds back; "
                f"put {name} around both: {name}(chain(s2sam(), ...), ...)."
            )


def _check_first(opt_state: Any) -> None:
    """After an optimizer, s2sam would remember updates, not gradients. Decay and clipping before it leave no trace."""
    for chain in chains(opt_state):
        states = [find_states(part, S2SAMState) for part in chain]
        place = next((i for i, found in enumerate(states) if found), 0)
        for state in states[place] if place else ():
            if _mirrors(s2sam.last_gradient(state), chain[:place]):
                raise ValueError(
                    "perturb: s2sam() stands behind an optimizer that keeps momentum or other moments, and would "
                    "remember its updates in place of gradients; put s2sam() first: optax.chain(s2sam(), ...)."
                )


def _mirrors(params: Params, state: Any) -> bool:
    """Whether a state has floating leaves of the parameters' paths and shapes."""
    found: list[jax.Array] = []

    def note(_, leaf):
        found.append(leaf)
        return leaf

    map_mirrored(note, params, state)
    return any(jnp.ndim(leaf) > 0 for leaf in found)


def _check_inside_sparsify(opt_state: Any) -> None:
    outer = find_states(opt_state, (S2SAMState, SparseState))
    pruned = {path for state in outer if isinstance(state, SparseState) for path in by_name(state.masks)}
    for state in outer:
        if isinstance(state, S2SAMState) and pruned & by_name(s2sam.last_gradient(state)).keys():
            raise ValueError(
                "perturb: s2sam() stands outside sparsify(); put it inside, sparsify(chain(s2sam(), ...), ...)."
            )

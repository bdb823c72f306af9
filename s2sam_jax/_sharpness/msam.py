"""Momentum-SAM: the perturbation of SAM from the optimizer's own momentum."""

from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_non_negative
from s2sam_jax._base.clock import increment
from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.tree import by_name, find_states, scalar
from s2sam_jax._base.types import ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent


class MSAMState(NamedTuple):
    """State of :func:`msam`: only scalars; the momentum is in the state of the optimizer.

    Attributes:
      step: int32[], gradients seen.
      rho: float[], radius of the next perturbation.
      eps: float[], added to the norm.
    """

    step: jax.Array
    rho: jax.Array
    eps: jax.Array


def msam(rho: ScalarOrSchedule = 0.3, *, eps: float = 1e-12) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: SAM along the momentum, with one gradient per step and no memory of its own.

    .. math:: \epsilon_t = -\rho\, v_{t-1} / (\|v_{t-1}\|_2 + \mathrm{eps}), \quad \epsilon_1 = 0, \quad
              \hat g_t = \nabla L_t(w_t + \epsilon_t)

    The gradient of a step is taken at ``perturb(params, opt_state)``, as with :func:`s2sam`, but *against* the momentum
    buffer, that is, where the next step would lead, as in Nesterov's method. The buffer is that of the optimizer after
    it: ``optax.trace`` (``optax.sgd`` with momentum), or the first moment ``mu`` of Adam, Lion, Muon and the like, as
    the optimizer stores it. It must cover every parameter exactly once. In a group of ``optax.multi_transform`` it is
    that group's buffer, with a norm of its own. Inside :func:`sparsify` pruned weights are not perturbed.

    Args:
      rho: radius of the perturbation (L2 over all leaves), or a schedule of the step. (If set by
        ``optax.inject_hyperparams``, it acts one step late, as does ``eps``.) The released code uses 0.3 by default and
        3 in its runs.
      eps: added to the norm; zero momentum gives a zero perturbation.

    Returns:
      A transformation whose update is the identity on gradients. State: three scalars.

    Raises:
      ValueError: for a negative ``rho`` or ``eps``; from :func:`perturb`, if no momentum is found or two buffers claim
        one leaf.

    Reference:
      Becker et al., "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024. The released
      code decays the perturbed weights under SGD; here decay acts on the clean ones, as everywhere in this library.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import msam, perturb
      >>> tx = optax.chain(msam(rho=0.5), optax.sgd(0.1, momentum=0.9))
      >>> params = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(params, tx.init(params), params)  # gradient of |w|^2 / 2; the momentum is [3, 4]
      >>> print(perturb(params, state))
      [2.7 3.6]
    """
    check_non_negative(eps, "eps")
    rho_at = schedule(rho, "rho")

    def state_at(step) -> MSAMState:
        return MSAMState(step, rho_at(step), jnp.array(eps, jnp.result_type(float)))

    def init_fn(params):
        del params
        return state_at(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return updates, state_at(increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def epsilon(state: MSAMState, momentum: list[jax.Array]) -> list[jax.Array]:
    """The perturbation of the next gradient: against the momentum."""
    return ascent(momentum, rho=-scalar(state.rho), eps=scalar(state.eps))


def momenta(opt_state: Any, leaves: Set[str] | None) -> Iterator[tuple[MSAMState, dict[str, jax.Array]]]:
    """Each :class:`MSAMState` with the momentum buffers around it, by leaf, zero where pruned.

    The search stays inside the ``sparsify`` or ``optax.masked`` that the state is in (groups of
    ``optax.multi_transform`` are the latter). ``leaves`` are the paths that must be covered, if they are known.
    """
    scopes = find_states(opt_state, (MSAMState, SparseState, optax.MaskedState))
    for own in (x for x in scopes if isinstance(x, MSAMState)):
        if find_states(opt_state, SparseState):
            raise ValueError(
                "perturb: msam() stands outside sparsify(); put it inside, sparsify(chain(msam(), ...), ...)."
            )
        yield own, _momentum(opt_state, leaves)
    for scope in scopes:
        if isinstance(scope, SparseState):
            masks = by_name(scope.masks)
            for state, buffers in momenta(scope.inner_state, masks.keys()):
                yield state, {path: jnp.where(masks[path], v, jnp.zeros((), v.dtype)) for path, v in buffers.items()}
        elif isinstance(scope, optax.MaskedState):
            yield from momenta(scope.inner_state, None)


def _momentum(opt_state: Any, leaves: Set[str] | None) -> dict[str, jax.Array]:
    """The momentum of every leaf."""
    found: dict[str, jax.Array] = {}
    buffers = _buffers(opt_state)
    for buffer in buffers:
        for path, value in by_name(buffer).items():
            if path in found:
                raise ValueError(
                    f"perturb: two momentum buffers claim the leaf {path}; msam() needs one per leaf, such "
                    "as that of one optax.sgd(..., momentum=0.9)."
                )
            found[path] = value
    expected = found.keys() if leaves is None else leaves
    if not buffers or expected - found.keys():
        missing = sorted(expected - found.keys())
        raise ValueError(
            f"perturb: msam() found no momentum{f' for {missing}' if found else ''}; combine it with an optimizer that "
            "keeps one (optax.trace, or a state with a field mu, as Adam's), and in optax.masked or "
            "optax.multi_transform put it beside that optimizer, into the same group."
        )
    if strange := sorted(found.keys() - expected):
        raise ValueError(f"perturb: msam() found a momentum for {strange}, which params lack.")
    return found


def _buffers(opt_state: Any) -> list[Any]:
    def is_owner(x):
        return isinstance(x, optax.TraceState) or "mu" in getattr(x, "_fields", ())

    owners = [x for x in jax.tree.leaves(opt_state, is_leaf=is_owner) if is_owner(x)]
    return [x.trace if isinstance(x, optax.TraceState) else x.mu for x in owners]

"""S2-SAM for loops that cannot be edited: the loop's parameters are the perturbed ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_floating, check_non_negative
from s2sam_jax._base.clock import increment
from s2sam_jax._base.masks import SparseState, get_masks
from s2sam_jax._base.optax_wrappers import HOLDING_BACK, check_none_inside
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.tree import by_name, check_same_named, find_states, map_named, masked
from s2sam_jax._base.types import Params, ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent_point
from s2sam_jax._sharpness.msam import MSAMState
from s2sam_jax._sharpness.s2sam import S2SAMState
from s2sam_jax._sharpness.second_gradient import NAMES, SECOND_GRADIENT


class S2SAMWrapperState(NamedTuple):
    """State of :func:`s2sam_wrapper`.

    Attributes:
      step: int32[], steps taken.
      rho: float[], the radius of the next gradient's perturbation.
      clean: the unperturbed parameters.
      inner_state: state of the wrapped optimizer, which only ever sees ``clean``.
    """

    step: jax.Array
    rho: jax.Array
    clean: Params
    inner_state: Any


def s2sam_wrapper(
    inner: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    *,
    clean_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""S2-SAM without :func:`perturb`: the loop holds ``w + epsilon``, the state keeps the clean ``w``.

    .. math:: w_{t+1} = w_t + \mathrm{inner}(\hat g_t, w_t), \qquad
              p_{t+1} = w_{t+1} + \rho\, \hat g_t / (\|\hat g_t\|_2 + \mathrm{eps})

    Prefer :func:`s2sam` in a loop that you can edit. Evaluate and save :func:`eval_params`, never the loop's own
    parameters. Wrap it around everything except ``optax.MultiSteps`` and ``optax.apply_if_finite``, as in
    ``s2sam_wrapper(sparsify(...))``: methods and weight decay then see clean weights, and only live weights are
    perturbed. It always perturbs along the latest gradient, while :func:`s2sam` inside ``sparsify`` keeps the
    previous one when a mask update skips the step.

    Args:
      inner: the optimizer, possibly sparsified.
      rho: radius of the perturbation (L2 over all leaves), or a schedule of the step. (If set by
        ``optax.inject_hyperparams``, it acts one step late.)
      clean_dtype: type of the clean copy, e.g. ``jnp.float32`` with bfloat16 parameters; that of the parameters
        if ``None``.
      eps: added to the norm.

    Returns:
      A transformation whose updates move the loop's parameters from one perturbed point to the next.

    Raises:
      ValueError: for a negative ``rho`` or ``eps``, a ``clean_dtype`` that is not floating-point, an ``inner`` that
        contains another sharpness-aware transformation, ``optax.MultiSteps`` or ``optax.apply_if_finite``, or an update
        without ``params``.

    Reference:
      Same as :func:`s2sam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import eval_params, s2sam_wrapper
      >>> tx, params = s2sam_wrapper(optax.sgd(0.5), rho=0.5), jnp.array([3.0, 4.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)  # gradient of |w|^2 / 2
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, eval_params(params, state))
      [1.8 2.4] [1.5 2. ]
    """
    check_floating(clean_dtype, "clean_dtype")
    check_non_negative(eps, "eps")
    rho_at = schedule(rho, "rho")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        clean = jax.tree.map(lambda p: jnp.array(p, dtype=clean_dtype, copy=True), params)
        inner_state = inner.init(clean)
        if find_states(inner_state, (S2SAMState, MSAMState, *SECOND_GRADIENT)):
            raise ValueError(f"s2sam_wrapper around s2sam, msam, {NAMES} would perturb twice; use one of them.")
        check_none_inside(inner_state, HOLDING_BACK, "s2sam_wrapper")
        step = jnp.zeros((), jnp.int32)
        return S2SAMWrapperState(step, rho_at(step), clean, inner_state)

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("s2sam_wrapper needs params: call tx.update(grads, state, params).")
        step = increment(state.step)
        rho = rho_at(step)
        moves, inner_state = inner.update(updates, state.inner_state, state.clean, **extra_args)
        clean = optax.apply_updates(state.clean, moves)
        target = ascent_point(clean, _on_masks(inner_state, updates), rho=rho, eps=eps)
        moves = jax.tree.map(lambda t, p: t.astype(p.dtype) - p, target, params)
        return moves, S2SAMWrapperState(step, rho, clean, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def eval_params(params: Params, opt_state: Any) -> Params:
    """The clean parameters to evaluate and save, whichever form of S2-SAM trains them.

    Returns ``params`` unchanged, unless the optimizer contains :func:`s2sam_wrapper`: then its clean copy, in the
    dtypes of ``params``.

    Args:
      params: the loop's parameters.
      opt_state: the optimizer state.

    Returns:
      Clean parameters, in the structure and dtypes of ``params``.

    Raises:
      ValueError: if two wrappers hold a copy, or a checkpoint was restored without the types of its states.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import eval_params
      >>> params = jnp.ones(2)
      >>> print(eval_params(params, optax.sgd(0.1).init(params)))
      [1. 1.]
    """
    states = find_states(opt_state, S2SAMWrapperState)
    if not states:
        if any(map(_is_untyped, jax.tree.leaves(opt_state, is_leaf=_is_untyped))):
            raise ValueError(
                "eval_params found the state of s2sam_wrapper as a plain dict, as a checkpoint restored without a "
                "structure has it; restore it into that of tx.init(params)."
            )
        return params
    if len(states) > 1 or find_states(states[0].inner_state, S2SAMWrapperState):
        raise ValueError("eval_params: s2sam_wrapper is in opt_state more than once; wrap the whole optimizer once.")
    clean = by_name(_on_masks(states[0].inner_state, states[0].clean))
    covered = {path: p for path, p in by_name(params).items() if path in clean}
    check_same_named(covered, clean, "params", "the s2sam_wrapper in opt_state")

    # optax.masked and the like may have hidden some leaves from the wrapper
    return map_named(lambda path, param: clean[path].astype(param.dtype) if path in clean else param, params)


def _is_untyped(state: Any) -> bool:
    return isinstance(state, dict) and set(S2SAMWrapperState._fields) <= state.keys()


def _on_masks(inner_state: Any, tree: Any) -> Any:
    """Zero off the masks of the wrapped optimizer, if it has any."""
    return masked(get_masks(inner_state, tree), tree) if find_states(inner_state, SparseState) else tree

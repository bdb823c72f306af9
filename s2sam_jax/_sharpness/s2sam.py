"""S2-SAM: sharpness-aware minimization at the price of one gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_compat, check_floating, check_non_negative
from s2sam_jax._base.clock import increment
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.state_rule import Unmasked
from s2sam_jax._base.tree import align, at_least_f32, masked, norm, scalar
from s2sam_jax._base.types import Compat, Masks, Params, ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent, divisor, times


class S2SAMState(NamedTuple):
    """Everything :func:`perturb` needs, as arrays, so that any checkpoint format can save it.

    Attributes:
      step: int32[], gradients seen.
      rho: float[], radius of the next perturbation.
      eps: float[], added to the norm.
      eta: float[] in the adaptive form, otherwise ``None``.
      norm: float[], norm in the divisor of the adaptive form of ``compat="authors"``, otherwise ``None``.
      last_grad: the last gradient, a tree like the parameters, zero at first.
    """

    step: jax.Array
    rho: jax.Array
    eps: jax.Array
    eta: jax.Array | None
    norm: jax.Array | None
    last_grad: Any


def s2sam(
    rho: ScalarOrSchedule = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    perturb_pruned: bool = False,
    grad_dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-12,
    compat: Compat = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""Single-step SAM: passes the gradient through and remembers it; :func:`perturb` does the rest.

    .. math:: \epsilon_t = \rho\, \hat g_{t-1} / (\|\hat g_{t-1}\|_2 + \mathrm{eps}), \quad \epsilon_1 = 0, \quad
              \hat g_t = \nabla L_t(w_t + \epsilon_t)

    The gradient of a step is taken at ``perturb(params, opt_state)``; nothing else in a loop changes and no
    second gradient is computed. Put it first in its chain, so that it sees the raw gradient, before clipping
    and weight decay, and inside :func:`sparsify`, which passes it masked gradients, so that only live weights
    are perturbed.

    Args:
      rho: radius of the perturbation (L2 over all leaves), or a schedule of the step. (If set by
        ``optax.inject_hyperparams``, it acts one step late, as do ``eta`` and ``eps``: an update stores the values that
        the next step uses.)
      adaptive: scale by ``T = |w| + eta``: :math:`\epsilon = \rho\, T^2 g / (\|T g\| + \mathrm{eps})` (ASAM).
      eta: the constant in ``T``; used only with ``adaptive``.
      perturb_pruned: remember the dense gradient under :func:`sparsify`, so that pruned weights are perturbed
        too, as in the released code. Combine with ``sparsify(mask_grads=False)`` for its dense momentum.
      grad_dtype: storage type of the remembered gradient, e.g. ``jnp.bfloat16``; that of the parameters if ``None``.
      eps: added to the norm.
      compat: ``"authors"`` reproduces the released adaptive branch, which perturbs by
        :math:`\rho\, \hat g^3 / (\||u| \hat g\| + \mathrm{eps})` with ``u`` the previously perturbed weights;
        the two settings agree when ``adaptive`` is false.

    Returns:
      A transformation whose update is the identity on gradients. State: one gradient-sized tree.

    Raises:
      ValueError: for a negative ``rho``, ``eta`` or ``eps``, an unknown ``compat``, or a ``grad_dtype`` that is not
        floating-point.

    Reference:
      Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate
      Sparse Training", NeurIPS 2024.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import perturb, s2sam
      >>> tx = optax.chain(s2sam(rho=0.1), optax.sgd(0.1))
      >>> params, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * jnp.sum(w**2)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     grads = jax.grad(loss)(perturb(params, state))
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(3))  # [2.7, 3.6], then w - 0.1 * (w + 0.1 * [0.6, 0.8])
      [2.424 3.232]
    """
    check_compat(compat)
    check_floating(grad_dtype, "grad_dtype")
    check_non_negative(eta, "eta")
    check_non_negative(eps, "eps")
    rho_at = schedule(rho, "rho")
    cubic = adaptive and compat == "authors"

    def state_at(step, length, last_grad) -> Any:
        """All numbers again, as ``inject_hyperparams`` may have changed any of them."""
        kept = Unmasked(last_grad) if perturb_pruned else last_grad
        added, offset = jnp.array(eps, jnp.result_type(float)), jnp.array(eta, jnp.result_type(float))
        return S2SAMState(step, rho_at(step), added, offset if adaptive else None, length, kept)

    def init_fn(params):
        length = jnp.zeros((), jnp.result_type(float)) if cubic else None
        return state_at(jnp.zeros((), jnp.int32), length, optax.tree.zeros_like(params, dtype=grad_dtype))

    def update_fn(updates, state, params=None, *, masks=None, dense_grads=None, **extra_args) -> Any:
        del extra_args
        grads = _remembered(updates, masks, dense_grads, perturb_pruned)
        length = _cubic_norm(grads, params, state) if cubic else None
        return updates, state_at(increment(state.step), length, optax.tree.cast_like(grads, last_gradient(state)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def last_gradient(state: S2SAMState) -> Any:
    return state.last_grad.tree if isinstance(state.last_grad, Unmasked) else state.last_grad


def _remembered(updates: Params, masks: Masks | None, dense_grads: Params | None, perturb_pruned: bool) -> Params:
    """The gradient to keep: dense where asked for, else live weights only."""
    if perturb_pruned:
        return updates if dense_grads is None else align(dense_grads, updates)
    return updates if masks is None else masked(align(masks, updates), updates)


def epsilon(state: S2SAMState, params: list[jax.Array]) -> list[jax.Array]:
    """The perturbation of the next gradient, for the leaves of the state in their order."""
    grads = jax.tree.leaves(last_gradient(state))
    rho, eps = scalar(state.rho), scalar(state.eps)
    if state.norm is not None:
        scale = rho / divisor(scalar(state.norm), eps)
        return [times(scale, at_least_f32(g) ** 3) for g in grads]
    return ascent(grads, params, rho=rho, eps=eps, eta=None if state.eta is None else scalar(state.eta))


def _cubic_norm(grads: Params, params: Params | None, state: S2SAMState) -> jax.Array:
    """``|| |u| * g ||`` with ``u`` the point at which ``g`` was taken."""
    if params is None:
        raise ValueError("s2sam(adaptive=True, compat='authors') needs params: call tx.update(grads, state, params).")
    leaves = jax.tree.leaves(params)
    points = [at_least_f32(p) + e for p, e in zip(leaves, epsilon(state, leaves), strict=True)]
    return norm([u * g for u, g in zip(points, jax.tree.leaves(grads), strict=True)]).astype(jnp.result_type(float))

"""LookSAM: SAM whose second gradient is taken every few steps, and remembered in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import NUMBERS, check_non_negative
from s2sam_jax._base.clock import Every, tick
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.tree import at_least_f32, cond, norm
from s2sam_jax._base.types import ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent_point, divisor, perpendicular, times
from s2sam_jax._sharpness.sam import second_gradient


class LookSAMState(NamedTuple):
    """State of :func:`looksam`.

    Attributes:
      step: int32[], steps taken.
      next_update: int32[], the step that takes a second gradient next.
      rho: float[], radius at the last step (initially, at the first one).
      g_v: the part of SAM's gradient orthogonal to the plain one, a tree like the parameters, zero at first.
    """

    step: jax.Array
    next_update: jax.Array
    rho: jax.Array
    g_v: Any


def looksam(
    rho: ScalarOrSchedule = 0.05, *, every: int = 5, alpha: ScalarOrSchedule = 0.7, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: takes SAM's second gradient every k steps and reuses its direction in between.

    .. math:: g_s = \nabla L(w + \rho\, g / (\|g\|_2 + \mathrm{eps})), \qquad
              g_v = g_s - \frac{g_s \cdot g}{\|g\|^2}\, g, \qquad
              \text{update} = g_s \;\text{ or, in between, }\; g + \alpha\, \|g\| \frac{g_v}{\|g_v\| + \mathrm{eps}}

    Steps ``0, every, 2 * every, ...`` are SAM steps. Put it first in its chain. Inside :func:`sparsify` the stored
    direction is zeroed where weights are pruned; its norm is taken when it is used.

    Args:
      rho: radius of the perturbation (L2 over all leaves), or a schedule of the step.
      every: the paper's k, 5 or 10 there; 1 gives SAM.
      alpha: weight of the stored direction, or a schedule of the step. 0.7 in the paper, 0.2 in the code released with
        Momentum-SAM.
      eps: added to the norms of ``g`` and ``g_v`` in the denominators; a zero gradient gives a zero perturbation.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``grad_fn`` (or ``second_grad_fn``, as in :func:`sam`),
      which it calls on SAM steps only. ``refresh_sam`` (a Python bool) says whether this step is one; if it is omitted
      or traced, a ``lax.cond`` decides in ``jit``. State: one gradient-sized tree.

    Raises:
      ValueError: for a negative ``rho``, ``alpha`` or ``eps``, an ``every`` below 1, or an update without ``params``.
      TypeError: for an update without ``grad_fn``.

    Reference:
      Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax import looksam
      >>> tx, params = looksam(rho=0.5, every=2, alpha=1.0), jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: 0.5 * w[0] ** 2 + w[1])
      >>> updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates.round(2))  # the gradient (3, 1), taken at w + 0.5 * (3, 1) / sqrt(10)
      [3.47 1.  ]
      >>> updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
      >>> print(updates.round(2))  # (3, 1), and its length along (1, -3) / sqrt(10)
      [ 4. -2.]
    """
    check_non_negative(eps, "eps")
    rho_at, alpha_at = schedule(rho, "rho"), schedule(alpha, "alpha")
    if isinstance(every, NUMBERS) and every < 1:
        raise ValueError(f"looksam needs every >= 1; got {every}.")
    clock = Every(start=0, every=every)

    def init_fn(params):
        zero = jnp.zeros((), jnp.int32)
        return LookSAMState(zero, clock.at_or_after(0), rho_at(zero), jax.tree.map(jnp.zeros_like, params))

    def update_fn(
        updates, state, params=None, *, grad_fn=None, second_grad_fn=None, refresh_sam=None, **extra_args
    ) -> Any:
        del extra_args
        gradient_at = second_gradient("looksam", params, updates, grad_fn, second_grad_fn)
        radius = rho_at(state.step)

        def look():
            found = gradient_at(lambda grads: ascent_point(params, grads, rho=radius, eps=eps))
            across = perpendicular(found, updates)
            # If the two gradients are parallel, as at rho = 0, this is rounding error, which reuse() would amplify.
            length = norm(found)
            is_rounding = norm(across) <= 10 * jnp.finfo(length.dtype).eps * length
            across = jax.tree.map(lambda v: jnp.where(is_rounding, jnp.zeros_like(v), v), across)
            return optax.tree.cast_like(found, updates), optax.tree.cast_like(across, state.g_v)

        def reuse():
            scale = alpha_at(state.step) * norm(updates) / divisor(norm(state.g_v), eps)
            moved = jax.tree.map(lambda g, v: at_least_f32(g) + times(scale, at_least_f32(v)), updates, state.g_v)
            return optax.tree.cast_like(moved, updates), state.g_v

        due, step, next_update = tick(clock, state, refresh_sam)
        grads, g_v = cond(due, look, reuse)
        return grads, LookSAMState(step, next_update, radius, g_v)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

"""GSAM: SAM that also narrows the surrogate gap."""

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_non_negative
from s2sam_jax._base.clock import increment
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.tree import at_least_f32
from s2sam_jax._base.types import ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent_point, perpendicular, times
from s2sam_jax._sharpness.sam import SAMState, second_gradient


def gsam(
    rho: ScalarOrSchedule = 0.05, *, alpha: ScalarOrSchedule = 0.2, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate gap guided SAM: minimizes the perturbed loss and its gap to the plain loss.

    .. math:: g_p = \nabla L(w + \rho\, g / (\|g\|_2 + \mathrm{eps})), \qquad
              g_\perp = g - \frac{g \cdot g_p}{\|g_p\|^2}\, g_p, \qquad \text{update} = g_p - \alpha\, g_\perp

    Two gradients per step, as with :func:`sam`; put it first in its chain. With ``second_grad_fn`` both gradients are
    means over the parts of a batch before they are decomposed (its authors decompose on each device).

    Args:
      rho: radius of the perturbation (L2 over all leaves), or a schedule of the step; the paper ties it to the learning
        rate (:func:`rho_from_learning_rate`).
      alpha: weight of the component of ``g`` orthogonal to the perturbed gradient, or a schedule of the step. 0 gives
        SAM; its authors use 0.4 (earlier 0.2) in their CIFAR-10 example and 0.6 for ViT-B/32.
      eps: added to the norm; a zero gradient gives a zero perturbation.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``grad_fn`` (or ``second_grad_fn``).

    Raises:
      ValueError: for a negative ``rho``, ``alpha`` or ``eps``, or an update without ``params``.
      TypeError: for an update without ``grad_fn``.

    Reference:
      Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax import gsam
      >>> tx, params = gsam(rho=5.0, alpha=0.5), jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: 0.5 * w[0] ** 2 + 4 * w[1])
      >>> updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates.round(2))  # (6, 4), minus half of what (3, 4) has across it
      [6.46 3.31]
    """
    check_non_negative(eps, "eps")
    rho_at, alpha_at = schedule(rho, "rho"), schedule(alpha, "alpha")

    def init_fn(params):
        del params
        zero = jnp.zeros((), jnp.int32)
        return SAMState(zero, rho_at(zero))

    def update_fn(updates, state, params=None, *, grad_fn=None, second_grad_fn=None, **extra_args):
        del extra_args
        gradient_at = second_gradient("gsam", params, updates, grad_fn, second_grad_fn)
        radius, weight = rho_at(state.step), alpha_at(state.step)
        found = gradient_at(lambda grads: ascent_point(params, grads, rho=radius, eps=eps))
        across = perpendicular(updates, found)
        grads = jax.tree.map(lambda g, x: (at_least_f32(g) - times(weight, x)).astype(g.dtype), found, across)
        return grads, SAMState(increment(state.step), radius)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rho_from_learning_rate(
    learning_rate: optax.Schedule, *, rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0
) -> optax.Schedule:
    r"""A schedule of the radius that follows the learning rate, as in GSAM.

    .. math:: \rho_t = \rho_\min + (\rho_\max - \rho_\min)\, (\eta_t - \eta_\min) / (\eta_\max - \eta_\min)

    Args:
      learning_rate: the schedule of the learning rate.
      rho_max: radius at and above ``lr_max``.
      rho_min: radius at and below ``lr_min``, as in a warm-up from zero.
      lr_max: the largest learning rate.
      lr_min: the smallest learning rate, at the end of the schedule.

    Returns:
      A schedule for the ``rho`` of :func:`gsam`, or of any other transformation here.

    Raises:
      ValueError: unless ``0 <= rho_min <= rho_max`` and ``0 <= lr_min < lr_max``.
      TypeError: for a learning rate that is not a schedule.

    Reference:
      Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022, §4.

    Example:
      >>> import optax
      >>> from s2sam_jax import rho_from_learning_rate
      >>> rate = optax.linear_schedule(0.1, 0.0, 10)
      >>> rho = rho_from_learning_rate(rate, rho_max=0.04, rho_min=0.02, lr_max=0.1)
      >>> [round(float(rho(step)), 3) for step in (0, 5, 10)]
      [0.04, 0.03, 0.02]
    """
    if not (0 <= rho_min <= rho_max and 0 <= lr_min < lr_max):
        raise ValueError(
            "rho_from_learning_rate needs 0 <= rho_min <= rho_max and 0 <= lr_min < lr_max; got "
            f"rho_min={rho_min}, rho_max={rho_max}, lr_min={lr_min}, lr_max={lr_max}."
        )
    if not callable(learning_rate):
        raise TypeError(
            "rho_from_learning_rate needs a schedule of the step, such as optax.cosine_decay_schedule(...); got "
            f"{learning_rate!r}. A constant rate goes with a constant radius."
        )

    def rho(count):
        share = (learning_rate(count) - lr_min) / (lr_max - lr_min)
        return rho_min + (rho_max - rho_min) * jnp.clip(share, 0.0, 1.0)

    return rho

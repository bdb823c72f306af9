"""SAM and ASAM as a transformation of gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_non_negative
from s2sam_jax._base.clock import increment
from s2sam_jax._base.optax_wrappers import check_nothing_hidden
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.types import GradFn, Params, ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent_point

# Takes (gradient of a part of the batch -> point) to the mean of the parts' gradients, each at its point.
SecondGradFn = Callable[[Callable[[Params], Params]], Params]


class SAMState(NamedTuple):
    """State of :func:`sam` and of :func:`gsam`.

    Attributes:
      step: int32[], steps taken.
      rho: float[], radius of the last perturbation (initially, of the first one).
    """

    step: jax.Array
    rho: jax.Array


def sam(
    rho: ScalarOrSchedule = 0.05, *, adaptive: bool = False, eta: float = 0.01, eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: replaces the gradient by the gradient at the ascent point.

    .. math:: \epsilon = \rho\, g / (\|g\|_2 + \mathrm{eps}), \qquad \text{update} = \nabla L(w + \epsilon)

    Two gradients per step: the loop's own, and one from ``grad_fn``, an extra argument of ``update``. Put it first in
    its chain: what stands before it acts on the first gradient alone. Inside :func:`sparsify`, the
    perturbation and both gradients are zero off the mask.

    For m-sharpness, pass ``second_grad_fn`` instead of ``grad_fn``. It receives a function that maps the gradient of
    one part of the batch to that part's perturbed point, and returns the mean of the parts' gradients at their points.
    ``make_train_step(..., sharpness_parts=m)`` does this.

    Args:
      rho: radius of the perturbation (L2 over all leaves), or a schedule of the step.
      adaptive: ASAM: :math:`\epsilon = \rho\, T^2 g / (\|T g\| + \mathrm{eps})` with ``T = |w| + eta`` on every
        leaf (its authors leave biases unscaled).
      eta: the constant in ``T``; used only with ``adaptive``.
      eps: added to the norm; a zero gradient gives a zero perturbation.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``grad_fn``, a function from parameters to the
      gradient on the current batch.

    Raises:
      ValueError: for a negative ``rho``, ``eta`` or ``eps``, or an update without ``params``.
      TypeError: for an update without ``grad_fn``.

    Reference:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, Algorithm 1.
      Kwon et al., "ASAM", ICML 2021, for the adaptive form.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax import sam
      >>> tx, params = sam(rho=0.5), jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)  # the gradient at [3, 4] + 0.5 * [0.6, 0.8]
      [3.3 4.4]
    """
    check_non_negative(eta, "eta")
    check_non_negative(eps, "eps")
    rho_at = schedule(rho, "rho")

    def init_fn(params):
        del params
        return SAMState(jnp.zeros((), jnp.int32), rho_at(jnp.zeros((), jnp.int32)))

    def update_fn(updates, state, params=None, *, grad_fn=None, second_grad_fn=None, **extra_args):
        del extra_args
        gradient_at = second_gradient("sam", params, updates, grad_fn, second_grad_fn)
        radius = rho_at(state.step)
        used_eta = eta if adaptive else None
        grads = gradient_at(lambda grads: ascent_point(params, grads, rho=radius, eps=eps, eta=used_eta))
        return grads, SAMState(increment(state.step), radius)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def second_gradient(
    name: str, params: Params | None, grads: Params, grad_fn: GradFn | None, second_grad_fn: SecondGradFn | None
) -> SecondGradFn:
    """A function of ``point``, which maps a gradient to a point, that returns the gradient there, or by part."""
    if params is None:
        raise ValueError(f"{name} needs params: call tx.update(grads, state, params, grad_fn=grad_fn).")
    check_nothing_hidden(params, name, "s2sam can perturb some of the leaves: optax.masked(s2sam(), ...).")
    if second_grad_fn is not None:
        return second_grad_fn
    if grad_fn is None:
        raise TypeError(
            f"{name} needs a second gradient: pass grad_fn, a function from parameters to the gradient of this batch, "
            "to tx.update(grads, state, params, grad_fn=grad_fn). make_train_step does; "
            "flax.training.TrainState.apply_gradients cannot pass it on."
        )
    return lambda point: grad_fn(point(grads))

"""Efficient SAM: perturbs some of the leaves, and takes its second gradient on the sharpest examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import NUMBERS, check_non_negative
from s2sam_jax._base.clock import increment
from s2sam_jax._base.counts import rounded_down
from s2sam_jax._base.schedules import schedule
from s2sam_jax._base.tree import own_key
from s2sam_jax._base.types import Params, ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent_point
from s2sam_jax._sharpness.sam import second_gradient


class ESAMState(NamedTuple):
    """State of :func:`esam`.

    Attributes:
      step: int32[], steps taken.
      rho: float[], radius of the last perturbation (initially, of the first one).
      key: typed PRNG key; a step uses ``fold_in(key, step)``.
    """

    step: jax.Array
    rho: jax.Array
    key: jax.Array


def esam(
    rho: ScalarOrSchedule = 0.05, *, beta: float = 0.6, seed: int | jax.Array = 0, eps: float = 1e-7
) -> optax.GradientTransformationExtraArgs:
    r"""Efficient SAM's stochastic weight perturbation: each leaf is perturbed with probability beta.

    .. math:: b_l \sim \mathrm{Bernoulli}(\beta), \qquad
              \epsilon_l = \frac{b_l}{\beta}\, \rho\, g_l / (\|(b_k\, g_k)_k\|_2 + \mathrm{eps}), \qquad
              \text{update} = \nabla L(w + \epsilon)

    Leaves are drawn at every step, including the first (where the released code perturbs all of them). The other half
    of the method, the second gradient on only the sharpest examples, is ``make_train_step(..., sharpest_fraction=0.5,
    example_loss_fn=...)``, or :func:`sharpest_examples` in a loop of your own; only that half saves time here.

    Args:
      rho: radius of the perturbation (L2 over the leaves drawn, before the division by beta), or a schedule.
      beta: probability in ``(0, 1]``; 1 gives SAM. The paper uses 0.6 for ResNet-18, otherwise 0.5.
      seed: integer or PRNG key, possibly traced.
      eps: added to the norm; if no leaf is drawn, nothing is perturbed.

    Returns:
      A transformation whose ``update`` needs ``params`` and ``grad_fn`` (or ``second_grad_fn``, as in :func:`sam`;
      all parts share one draw).

    Raises:
      ValueError: for a negative ``rho`` or ``eps``, a ``beta`` out of range, or an update without ``params``.
      TypeError: for an update without ``grad_fn``.

    Reference:
      Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
      Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from s2sam_jax import esam
      >>> tx, params = esam(rho=0.5, beta=1.0), jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)  # with all leaves drawn, SAM's
      [3.3 4.4]
    """
    check_non_negative(eps, "eps")
    if isinstance(beta, NUMBERS) and not 0 < beta <= 1:  # inject_hyperparams passes arrays
        raise ValueError(f"esam's beta is the probability of perturbing a leaf and must lie in (0, 1]; got {beta}.")
    rho_at = schedule(rho, "rho")

    def init_fn(params):
        del params
        zero = jnp.zeros((), jnp.int32)
        return ESAMState(zero, rho_at(zero), own_key(seed, "esam"))

    def update_fn(updates, state, params=None, *, grad_fn=None, second_grad_fn=None, **extra_args):
        del extra_args
        gradient_at = second_gradient("esam", params, updates, grad_fn, second_grad_fn)
        radius = rho_at(state.step)
        key = jax.random.fold_in(state.key, state.step)

        def point(grads):
            return ascent_point(params, _drawn(grads, key, beta), rho=radius / beta, eps=eps)

        return gradient_at(point), ESAMState(increment(state.step), radius, state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _drawn(grads: Params, key: jax.Array, beta: float) -> Params:
    """The gradient, zero on the leaves that are not drawn."""
    leaves, treedef = jax.tree.flatten(grads)
    chosen = jax.random.bernoulli(key, beta, (len(leaves),))
    return treedef.unflatten([jnp.where(b, g, jnp.zeros((), g.dtype)) for b, g in zip(chosen, leaves, strict=True)])


def sharpest_examples(before: jax.Array, after: jax.Array, fraction: float) -> jax.Array:
    r"""Sharpness-sensitive data selection: the examples whose loss the perturbation raises most.

    .. math:: \text{the } \max(1, \lfloor \gamma B \rfloor) \text{ largest of } \ell_i(w + \epsilon) - \ell_i(w)

    The released code leaves out the last of them, as it compares strictly.

    Args:
      before: the losses of the ``B`` examples of a batch at the clean weights.
      after: their losses at the ascent point, with the same augmentation.
      fraction: share :math:`\gamma` of the batch in ``(0, 1]``, a Python number.

    Returns:
      int32 indices of the examples, the largest rise first; of equal rises, the lower index first.

    Raises:
      ValueError: for a fraction out of range, or losses that are not one number per example.

    Reference:
      Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022, §3.2.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import sharpest_examples
      >>> print(sharpest_examples(jnp.array([0.2, 1.0, 0.5, 0.7]), jnp.array([0.5, 1.05, 0.9, 1.4]), 0.5))
      [3 2]
    """
    check_sharpest_fraction(fraction)
    if jnp.ndim(before) != 1 or jnp.shape(before) != jnp.shape(after) or not len(before):
        raise ValueError(
            "sharpest_examples needs one loss for each example of a batch, before and after; got shapes "
            f"{jnp.shape(before)} and {jnp.shape(after)}."
        )
    count = max(1, rounded_down(len(before) * fraction))
    return jax.lax.top_k(after - before, count)[1].astype(jnp.int32)


def check_sharpest_fraction(fraction: Any) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"The fraction of sharpest examples must lie in (0, 1]; got {fraction}.")

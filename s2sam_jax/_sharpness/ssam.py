"""Sparse SAM: perturbs only the coordinates that matter, by Fisher information or by drop-and-grow."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2sam_jax._base.arguments import check_compat, check_fractions, check_non_negative, check_sparsity
from s2sam_jax._base.clock import NEVER, Every, tick
from s2sam_jax._base.schedules import cosine, schedule
from s2sam_jax._base.select import random_scores
from s2sam_jax._base.structure import NM, UNSTRUCTURED, Unstructured, same
from s2sam_jax._base.tree import align, at_least_f32, cond, own_key
from s2sam_jax._base.types import Compat, Masks, Params, ScalarOrSchedule
from s2sam_jax._sharpness.ascent import ascent_point
from s2sam_jax._sharpness.sam import second_gradient
from s2sam_jax._sharpness.ssam_masks import move, move_as_released, move_in_groups, top, top_in_groups


class SSAMState(NamedTuple):
    """State of :func:`ssam`.

    Attributes:
      step: int32[], steps taken.
      next_update: int32[], the step that refreshes the perturbation mask next.
      rho: float[], radius of the last perturbation (initially, of the first one).
      perturb_masks: bool tree like the parameters, True where SAM perturbs.
      key: typed PRNG key; a refresh uses ``fold_in(key, step)``.
    """

    step: jax.Array
    next_update: jax.Array
    rho: jax.Array
    perturb_masks: Masks
    key: jax.Array


def ssam(
    rho: ScalarOrSchedule = 0.05,
    *,
    mask: Literal["fisher", "dynamic"] = "dynamic",
    sparsity: float = 0.5,
    update_every: int = 100,
    total_steps: int | None = None,
    drop_fraction: float = 0.5,
    seed: int | jax.Array = 0,
    structure: NM | Unstructured = UNSTRUCTURED,
    eps: float = 1e-12,
    compat: Compat = "paper",
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM: SAM that perturbs only a fraction of the coordinates.

    .. math:: \epsilon = m \odot \rho\, g / (\|g\|_2 + \mathrm{eps}), \qquad \text{update} = \nabla L(w + \epsilon)

    The norm is that of the full gradient, so :math:`\|\epsilon\| \le \rho`. The mask keeps exactly
    :math:`\lfloor d (1 - s) \rfloor` of the ``d`` coordinates, ranked over all leaves together; inside :func:`sparsify`
    ``d`` counts the live weights and pruned ones are never chosen. It is refreshed every ``update_every`` steps:

    * ``"fisher"`` (SSAM-F) keeps the coordinates of largest empirical Fisher information
      :math:`\sum_i (\partial \log p(y_i | x_i) / \partial w)^2`, from the extra argument ``fisher_fn``.
    * ``"dynamic"`` (SSAM-D) drops a fraction :math:`\tfrac{\alpha}{2}(1 + \cos(\pi t / T))` of the perturbed
      coordinates, those of smallest ``|g|``, and grows as many at random.

    Args:
      rho: radius before masking, or a schedule of the step.
      mask: how the mask is chosen.
      sparsity: fraction of coordinates that are *not* perturbed, in ``[0, 1)``.
      update_every: steps between refreshes (the paper: one or five epochs); the first is at step 0.
      total_steps: :math:`T` of the cosine; required by ``"dynamic"``.
      drop_fraction: :math:`\alpha` in ``[0, 1]``; used only by ``"dynamic"``.
      seed: integer or PRNG key, possibly traced.
      structure: ``NM(2, 4)`` perturbs 2 of every 4 entries of each leaf along its axis; ``sparsity`` must then be
        ``1 - n / m`` (for 2:4, the default). Leaves of one dimension, such as biases, and leaves without that axis are
        perturbed whole.
      eps: added to the norm (the released code: 1e-7).
      compat: ``"authors"`` follows the released code where it departs from the paper. Fisher: the first step has an
        empty mask, and refreshes come one step later, at the updated weights. Dynamic: a new mask acts from the next
        step on, grows only where the old mask was off, and truncates the two counts separately, so that it can lose
        one coordinate. Accidents of that code (a gradient left over in the first Fisher sample, BatchNorm statistics
        of those passes) are not reproduced.

    Returns:
      A transformation whose ``update`` needs ``params``, ``grad_fn`` and, for ``"fisher"``, ``fisher_fn``: a function
      from parameters to the squared per-example gradients, summed (:func:`empirical_fisher`). It is called on refresh
      steps only. ``refresh_perturbation`` (a Python bool) says if it is one; if omitted, a ``lax.cond`` in ``jit``.

    Raises:
      ValueError: for arguments out of range, a structure that does not divide a leaf or has a different sparsity, or
        an update without ``params``.
      TypeError: for an unsupported structure, or an update without ``grad_fn`` or, where needed, ``fisher_fn``.

    Reference:
      Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022,
      Algorithms 1 and 2.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from s2sam_jax import ssam
      >>> tx = ssam(rho=0.5, mask="fisher", sparsity=0.5)
      >>> params, grad_fn = jnp.array([3.0, 4.0]), jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, state = tx.update(
      ...     grad_fn(params), tx.init(params), params, grad_fn=grad_fn, fisher_fn=lambda w: grad_fn(w) ** 2)
      >>> print(updates)  # the gradient at [3, 4] + [0, 0.5 * 0.8]
      [3.  4.4]
    """
    _check(mask, sparsity, update_every, total_steps, drop_fraction, structure, eps, compat)
    rho_at, authors = schedule(rho, "rho"), compat == "authors"
    horizon = total_steps or 1
    clock = Every(start=int(authors and mask == "fisher"), every=update_every)

    def best(scores, live):
        if isinstance(structure, NM):
            return top_in_groups(scores, live, structure)
        return top(scores, live, sparsity)

    def moved(grads, masks, live, rate, key):
        if isinstance(structure, NM):
            return move_in_groups(grads, masks, live, rate, key, structure)
        return (move_as_released if authors else move)(grads, masks, live, rate, key, sparsity)

    def init_fn(params):
        zero = jnp.zeros((), jnp.int32)
        key = own_key(seed, "ssam")
        masks = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), params)
        if mask == "dynamic" or not authors:
            masks = best(random_scores(jax.random.fold_in(key, NEVER), params), None)
        return SSAMState(zero, clock.at_or_after(0), rho_at(zero), masks, key)

    def refreshed(grads, state, params, live, fisher_fn):
        if mask == "fisher":
            return best(_fisher(fisher_fn, params), live)
        rate = cosine(drop_fraction, state.step, horizon)
        return moved(grads, state.perturb_masks, live, rate, jax.random.fold_in(state.key, state.step))

    def update_fn(
        updates,
        state,
        params=None,
        *,
        grad_fn=None,
        second_grad_fn=None,
        fisher_fn=None,
        masks=None,
        refresh_perturbation=None,
        **extra_args,
    ):
        del extra_args
        gradient_at = second_gradient("ssam", params, updates, grad_fn, second_grad_fn)
        live = None if masks is None else align(masks, params)
        due, step, next_update = tick(clock, state, refresh_perturbation)
        old, radius = state.perturb_masks, rho_at(state.step)
        new = cond(due, lambda: refreshed(updates, state, params, live, fisher_fn), lambda: old)
        acting = old if authors and mask == "dynamic" else new

        def point(grads):
            moved = ascent_point(params, grads, rho=radius, eps=eps)
            return jax.tree.map(jnp.where, acting, moved, params)

        return gradient_at(point), SSAMState(step, next_update, radius, new, state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def empirical_fisher(
    loss_fn: Callable[[Params, Any], jax.Array], *, chunk_size: int = 16
) -> Callable[[Params, Any], Params]:
    r"""Builds a function for the Fisher information that :func:`ssam` ranks by, from the loss of one example.

    .. math:: F = \sum_{i=1}^{N} \left( \partial L(w; x_i) / \partial w \right)^2

    Args:
      loss_fn: ``(params, example) -> loss[]``, with ``example`` a slice of the batch without its leading axis.
      chunk_size: per-example gradients held in memory at once.

    Returns:
      ``(params, batch) -> tree like params``, for a batch of N examples along the leading axis of every leaf. Bind
      the batch to get the ``fisher_fn`` of ``ssam``: ``lambda params: fisher(params, batch)``.

    Raises:
      ValueError: for a ``chunk_size`` below 1.

    Reference:
      Mi et al., NeurIPS 2022, Eq. (5), which also divides by N; the ranking is the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from s2sam_jax import empirical_fisher
      >>> fisher = empirical_fisher(lambda w, x: jnp.dot(w, x))
      >>> print(fisher(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 0.0]])))
      [10.  4.]
    """
    if chunk_size < 1:
        raise ValueError(f"empirical_fisher needs chunk_size >= 1; got {chunk_size}.")
    per_example = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))

    def fisher(params, batch):
        size = jax.tree.leaves(batch)[0].shape[0]
        total = jax.tree.map(lambda p: jnp.zeros_like(at_least_f32(p)), params)  # squares are small numbers
        # A Python loop: XLA's CPU backend is slow at convolution gradients inside a scan.
        for start in range(0, size, chunk_size):
            grads = per_example(params, jax.tree.map(lambda x, s=start: x[s : s + chunk_size], batch))
            total = jax.tree.map(lambda t, g: t + jnp.sum(jnp.square(at_least_f32(g)), axis=0), total, grads)
        return total

    return fisher


def _fisher(fisher_fn: Callable[[Params], Params] | None, params: Params) -> Params:
    if fisher_fn is None:
        raise TypeError(
            "ssam(mask='fisher') needs fisher_fn, a function from parameters to summed squared per-example gradients "
            "(see empirical_fisher): tx.update(..., grad_fn=grad_fn, fisher_fn=fisher_fn). make_train_step passes it."
        )
    return fisher_fn(params)


def _check(mask, sparsity, update_every, total_steps, drop_fraction, structure, eps, compat) -> None:
    check_compat(compat)
    check_sparsity(sparsity, "ssam's sparsity")
    check_non_negative(eps, "eps")
    if not isinstance(structure, NM | Unstructured):
        raise TypeError(f"ssam's structure must be NM(n, m) or Unstructured(); got {structure!r}.")
    if isinstance(structure, NM) and not same(sparsity, structure.sparsity):
        raise ValueError(f"ssam(structure={structure}) has sparsity {structure.sparsity:g}; got sparsity={sparsity:g}.")
    if isinstance(structure, NM) and compat == "authors":
        raise ValueError("The released code has no structure: ssam(structure=NM(...)) needs compat='paper'.")
    if mask not in ("fisher", "dynamic"):
        raise ValueError(f"ssam's mask must be 'fisher' or 'dynamic'; got {mask!r}.")
    if update_every < 1:
        raise ValueError(f"ssam needs update_every >= 1; got {update_every}.")
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"ssam needs total_steps >= 1; got {total_steps}.")
    if mask == "dynamic" and total_steps is None:
        raise ValueError("ssam(mask='dynamic') anneals its drop fraction: give total_steps.")
    check_fractions("ssam", drop_fraction=drop_fraction)

"""One jitted training step for every optimizer and every sparse method."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2sam_jax._base.clock import increment
from s2sam_jax._base.masks import SparseState
from s2sam_jax._base.optax_wrappers import Optimizer, with_extra_args
from s2sam_jax._base.tree import find_states, norm, where
from s2sam_jax._base.types import Params
from s2sam_jax._sharpness.perturb import perturb, perturbing
from s2sam_jax._sharpness.s2sam_wrapper import S2SAMWrapperState
from s2sam_jax._sharpness.second_gradient import taking_second_gradients
from s2sam_jax._sharpness.ssam import empirical_fisher
from s2sam_jax._training.batches import Batch, first_examples
from s2sam_jax._training.calls import Flags, TrainStep, two_programs
from s2sam_jax._training.gradient import (
    ExampleLossFn,
    Gradient,
    LossFn,
    Metrics,
    ModelState,
    averaged_gradient,
    gradient_by_part,
    gradient_of_sharpest,
)
from s2sam_jax._training.option_checks import (
    check_loss_fn,
    check_metrics,
    check_options,
    check_second_gradient,
    check_state,
)
from s2sam_jax._training.train_state import TrainState


def make_train_step(
    loss_fn: LossFn,
    tx: Optimizer,
    *,
    accumulate: int = 1,
    sharpness_parts: int = 1,
    sharpest_fraction: float = 1.0,
    example_loss_fn: ExampleLossFn | None = None,
    fisher_examples: int = 16,
    fisher_loss_fn: LossFn | None = None,
    freeze: bool = True,
    vmap: bool = False,
    state_sharding: Any = None,
) -> TrainStep:
    r"""Builds the train step: the same one for SGD, S2-SAM, SAM and its variants, dense or sparse.

    .. math:: \hat g = \nabla L(\mathrm{perturb}(w)), \qquad w \leftarrow w + \mathrm{tx}(\hat g, w)

    Where gradients are taken, and how many, follows from the state of ``tx``. The model state is kept from the forward
    pass of the first gradient (the only one, except for SAM and its variants). Called inside ``jit`` or ``lax.scan``,
    the step is a pure function; called from Python, it is jitted and donates its state, and on CPU the clocks of mask
    and perturbation updates are kept on the host, so that these updates are programs of their own.

    Args:
      loss_fn: ``(params, model_state, batch, key) -> (loss[], (model_state, metrics))``, the mean over the batch;
        ``metrics`` is a dict of scalars.
      tx: the optimizer.
      accumulate: micro-batches per step. The batch is cut into as many equal parts; their gradients (and SAM's second
        ones) are averaged at one fixed perturbation. Micro-batch ``i`` has the examples ``i::accumulate``: if the batch
        is sharded, each device then holds a share of every micro-batch.
      sharpness_parts: number of equal parts of the batch, for m-sharpness. ``sam`` and its variants perturb for each
        part along its own gradient, and average the gradients at those points. With the batch sharded over devices and
        one part per device, that is the per-device perturbation of SAM's authors. Memory: one gradient per part. Typed
        keys in the model state are folded with the number of the part.
      sharpest_fraction: share of the batch on which ``sam`` and its variants take their second gradient, as in ESAM:
        the examples whose loss the perturbation raises most (:func:`sharpest_examples`).
      example_loss_fn: ``(params, model_state, batch, key) -> losses[B]``, to choose those examples; called twice,
        forward only. Both calls and the smaller batch get the ``key`` of the step. If an example is to have the same
        noise (dropout, augmentation) in all three, derive its key from the example itself, such as an index stored in
        the batch, not from its position.
      fisher_examples: how many examples of the batch ``ssam(mask="fisher")`` computes its Fisher information from;
        memory: up to 16 of their gradients at once.
      fisher_loss_fn: the loss for those single examples, if it should differ (as for BatchNorm in evaluation mode).
      freeze: from the first step whose loss or update is not finite, keep parameters, model state and optimizer state
        as they were before it. ``False`` takes that step and only sets ``first_bad_step``; this saves the memory of the
        previous state, with S2-SAM one to three copies of the parameters.
      vmap: trains several networks at once, such as seeds: every leaf of state and batch has an extra leading axis. All
        must be at the same step, since one clock on the host (on every backend) decides when masks are updated; with a
        ``lax.cond`` under ``vmap``, every step would pay for an update.
      state_sharding: the sharding of the state after every step, one per leaf. By default the compiler decides; it may
        shard what came in whole, and then the second step is compiled again.

    Returns:
      ``step(state, batch) -> (state, metrics)``. Metrics are device scalars: ``loss``, ``grad_norm``, ``update_norm``,
      ``first_bad_step``, those of ``loss_fn`` (averaged over micro-batches), and where they apply ``rho`` (of this
      step; of several groups the first) and ``sparsity`` (the fraction of zeros over all parameters). ``loss`` and
      those of ``loss_fn`` are of the point of the first gradient: with ``s2sam`` and ``msam`` the perturbed weights, so
      optimizers are to be compared by an evaluation. ``grad_norm`` is of that gradient too, before masks and clipping.
      After a freeze ``loss`` is NaN and ``update_norm`` 0.
      ``step.lower(state, batch)`` lowers it as one program that donates its state, to compile ahead of time or to
      inspect its memory and cost.

    Raises:
      ValueError: for ``accumulate``, ``sharpness_parts`` or ``fisher_examples`` below 1, a ``sharpest_fraction`` out of
        range or without ``example_loss_fn``, or more than one of the ways to cut the batch; from the step, for a batch
        that does not divide, an ``opt_state`` that is not of this ``tx``, ``sharpness_parts`` or ``sharpest_fraction``
        without an optimizer that takes a second gradient, or such an optimizer inside ``optax.MultiSteps`` (use
        ``accumulate``) or behind something else in its chain, or a state that an earlier step was given.
      TypeError: for a ``loss_fn`` of another signature; from the step, for one that returns something else, or a state
        that is not a ``TrainState``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from s2sam_jax import TrainState, make_train_step, s2sam
      >>> def loss_fn(params, model_state, batch, key):
      ...     return jnp.mean((batch @ params) ** 2), (model_state, {})
      >>> tx = optax.chain(s2sam(rho=0.05), optax.sgd(0.25))
      >>> step = make_train_step(loss_fn, tx)
      >>> state, metrics = step(TrainState.create(jnp.ones(1), tx), jnp.ones((4, 1)))
      >>> print(state.params, metrics["loss"], metrics["grad_norm"])
      [0.5] 1.0 2.0
    """
    check_options(accumulate, sharpness_parts, fisher_examples, sharpest_fraction, example_loss_fn)
    check_loss_fn(loss_fn)
    optimizer = with_extra_args(tx)
    fisher = _fisher_of(fisher_loss_fn or loss_fn)

    def gradient_fn(state: TrainState, batch: Batch) -> Callable[[Params], Gradient]:
        return averaged_gradient(loss_fn, state.model_state, batch, _key(state), accumulate)

    def by_part(state: TrainState, batch: Batch) -> Callable[..., Gradient]:
        return gradient_by_part(loss_fn, state.model_state, batch, _key(state), sharpness_parts)

    def second_grad_fn(state: TrainState, gradient: Gradient, batch: Batch) -> dict[str, Any]:
        """In place of grad_fn, which sparse methods use too, where SAM's second gradient is not the whole batch's."""
        if gradient.by_part is not None:
            return {"second_grad_fn": lambda point: by_part(state, batch)(point, gradient.by_part).grads}
        if example_loss_fn is None or sharpest_fraction == 1:
            return {}
        of_sharpest = gradient_of_sharpest(
            loss_fn, example_loss_fn, state.model_state, batch, _key(state), sharpest_fraction, state.params
        )
        return {"second_grad_fn": lambda point: of_sharpest(point(gradient.grads))}

    def differentiate(state: TrainState, batch: Batch) -> Gradient:
        check_state(tx, state)
        check_second_gradient(state, sharpness_parts, sharpest_fraction)
        if sharpness_parts > 1:
            return by_part(state, batch)(lambda _: state.params, jnp.arange(sharpness_parts))
        point = perturb(state.params, state.opt_state) if perturbing(state.opt_state) else state.params
        return gradient_fn(state, batch)(point)

    def update(state: TrainState, gradient: Gradient, batch: Batch, flags: Flags) -> tuple[TrainState, Metrics]:
        grads, loss, model_state, metrics, _ = gradient
        key = _key(state)
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad_fn=lambda params: gradient_fn(state, batch)(params).grads,
            fisher_fn=lambda params: fisher(params, state.model_state, first_examples(batch, fisher_examples), key),
            **dict(flags),
            **second_grad_fn(state, gradient, batch),
        )
        update_norm = norm(updates)
        proposal = (optax.apply_updates(state.params, updates), model_state, opt_state)
        new_state = _take_step(state, proposal, loss, update_norm, freeze)
        if freeze:  # what was thrown away must not look like training that goes on
            frozen = state.first_bad_step >= 0
            nan = np.full((), np.nan, loss.dtype)  # NumPy's, which jax_debug_nans does not look at
            loss, update_norm = jax.lax.select(frozen, nan, loss), jnp.where(frozen, 0, update_norm)
        own = {"loss": loss, "grad_norm": norm(grads), "update_norm": update_norm}
        own |= {"first_bad_step": new_state.first_bad_step}
        own |= _rho(state.opt_state, opt_state) | _sparsity(new_state)
        check_metrics(metrics, own)
        return new_state, metrics | own

    each, updates = (jax.vmap(differentiate), _vmapped(update)) if vmap else (differentiate, update)
    updates = updates if state_sharding is None else _placing(updates, state_sharding)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return updates(state, each(state, batch), batch, ())

    apart = vmap or jax.default_backend() == "cpu"
    return TrainStep(train_step, two_programs(each, updates) if apart else None)


def _key(state: TrainState) -> jax.Array:
    """The key of this step."""
    return jax.random.fold_in(state.key, state.step)


def _vmapped(update: Callable[..., Any]) -> Callable[..., Any]:
    def updates(state: TrainState, gradient: Gradient, batch: Batch, flags: Flags) -> tuple[TrainState, Metrics]:
        return jax.vmap(lambda *one: update(*one, flags))(state, gradient, batch)

    return updates


def _placing(update: Callable[..., Any], state_sharding: Any) -> Callable[..., Any]:
    def placing(state: TrainState, gradient: Gradient, batch: Batch, flags: Flags) -> tuple[TrainState, Metrics]:
        new_state, metrics = update(state, gradient, batch, flags)
        return jax.lax.with_sharding_constraint(new_state, state_sharding), metrics

    return placing


def _fisher_of(loss_fn: LossFn):
    def fisher(params, model_state, batch, key):
        def loss(params, example):
            return loss_fn(params, model_state, jax.tree.map(lambda x: x[None], example), key)[0]

        return empirical_fisher(loss)(params, batch)

    return fisher


def _take_step(
    state: TrainState,
    proposal: tuple[Params, ModelState, Any],
    loss: jax.Array,
    update_norm: jax.Array,
    freeze: bool,
) -> TrainState:
    """Takes the step; with ``freeze``, not if its loss or update, or that of an earlier step, was not finite.

    Gradients are not checked: what they hold behind a mask does not matter. If a wrapper of ``tx`` skips bad steps, a
    bad loss does not freeze the run either; only the model state of that step is discarded.
    """
    passed_over = _passes_over(state.opt_state)
    finite = jnp.isfinite(update_norm) & (passed_over | jnp.isfinite(loss))
    first_bad_step = jnp.where(finite | (state.first_bad_step >= 0), state.first_bad_step, state.step)
    if freeze:
        old = (state.params, state.model_state, state.opt_state)
        proposal = where(first_bad_step < 0, proposal, old)
    params, model_state, opt_state = proposal
    if passed_over:
        model_state = where(jnp.isfinite(loss), model_state, state.model_state)
    return state._replace(
        step=increment(state.step),
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        first_bad_step=first_bad_step,
    )


def _passes_over(opt_state: Any) -> bool:
    """Whether a wrapper skips the steps whose gradients are not finite."""
    skipping = any(outer.skip_state for outer in find_states(opt_state, optax.MultiStepsState))
    return skipping or bool(find_states(opt_state, optax.ApplyIfFiniteState))


def _rho(before: Any, after: Any) -> Metrics:
    """The radius of this step: s2sam and msam store the next step's, SAM and its variants the last one's."""
    used = [*perturbing(before), *find_states(before, S2SAMWrapperState), *taking_second_gradients(after)]
    return {"rho": used[0].rho} if used else {}


def _sparsity(state: TrainState) -> Metrics:
    sparse = find_states(state.opt_state, SparseState)
    if not sparse:
        return {}
    total = sum(p.size for p in jax.tree.leaves(state.params))
    covered = sum(m.size for s in sparse for m in jax.tree.leaves(s.masks))
    alive = sum((jnp.sum(s.nnz.astype(jnp.float32)) for s in sparse), jnp.zeros((), jnp.float32))  # int32 ends at 2**31
    return {"sparsity": (float(covered) - alive) / float(total)}

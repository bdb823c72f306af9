"""One training run: the same loop for every task, optimizer and method."""

import time
from typing import Any

import jax
import optax
from jax.experimental import checkify
from jax.sharding import Mesh

from experiments import sharding
from experiments.config import Config, choices
from experiments.models import Network
from experiments.tasks import images
from experiments.tasks.base import Epoch, Losses, Reporter, Step, Task, run_epoch
from experiments.training import optimizers
from experiments.training.checkpoint import Checkpoints
from experiments.training.grasp import ScoredMasks, scored_masks
from experiments.training.record import Record
from s2sam_jax import TrainState, checked, eval_params, make_train_step


def initial_state(
    config: Config,
    network: Network,
    tx: optax.GradientTransformation,
    start: TrainState | None = None,
    mesh: Mesh | None = None,
    scored_masks: ScoredMasks | None = None,
) -> TrainState:
    """A fresh state, or one with the weights and statistics of ``start``; each leaf is made where it is to lie.

    With ``scored_masks`` the masks are what it gives for these weights, in place of the method's first ones.
    """
    weights = network.params, network.model_state
    if start is not None:
        weights = eval_params(start.params, start.opt_state), start.model_state

    masks = None if scored_masks is None else scored_masks(*weights)

    def create(params: Any, model_state: Any, masks: Any) -> TrainState:
        return TrainState.create(params, tx, model_state=model_state, seed=config.key("train"), masks=masks)

    mesh, given = mesh or sharding.make_mesh(), (*weights, masks)
    shardings = sharding.of_state(mesh, jax.eval_shape(create, *given))
    return jax.jit(create, out_shardings=shardings)(*sharding.put(given, sharding.replicated(mesh)))


def first_state(
    config: Config, task: Task, tx: optax.GradientTransformation, start: TrainState | None = None
) -> TrainState:
    """The first state of a training, on the devices of its task."""
    return initial_state(config, task.network, tx, start, task.mesh, scored_masks(config, task))


def train_step(config: Config, losses: Losses, tx: optax.GradientTransformation, **options: Any) -> Any:
    """The library's step, as the config has it."""
    read = choices(config.to_json())
    fraction = read.get("sharpest_fraction", 1.0)
    step = make_train_step(
        losses.loss_fn,
        tx,
        accumulate=config.accumulate,
        sharpness_parts=read.get("sharpness_parts", 1),
        sharpest_fraction=fraction,
        example_loss_fn=losses.example_loss_fn,
        fisher_loss_fn=losses.plain_loss_fn,
        fisher_examples=config.fisher_examples,
        **options,
    )
    return step if fraction == 1 else lambda state, batch: step(state, images.numbered(batch))


def train(
    config: Config,
    task: Task,
    reporter: Reporter,
    start: TrainState | None = None,
    checkpoints: Checkpoints | None = None,
    debug: bool = False,
) -> TrainState:
    """Trains, from the last checkpoint on if there is one, and returns the final state.

    Raises:
      FloatingPointError: naming the step at which something was not finite.
      checkify.JaxRuntimeError: with ``debug``, for the first step that :func:`checked` finds fault with.
    """
    record = Record(config, task, reporter, checkpoints)
    tx = optimizers.make(config, task.steps_per_epoch, task.network.groups)
    state = record.begin(
        lambda: first_state(config, task, tx, start),
        max(checkpoints.epochs, default=None) if checkpoints else None,
    )
    placed = sharding.of_state(task.mesh, state)
    step = train_step(config, task.losses, checked(tx) if debug else tx, state_sharding=placed)
    run = _throwing(task, step, reporter) if debug else task.runner(step, reporter)
    while record.epoch < config.epochs:
        started = time.perf_counter()
        state, metrics = run(state, record.epoch)
        record.add(state, metrics, time.perf_counter() - started)
    return record.finish(state)


def _throwing(task: Task, step: Step, reporter: Reporter) -> Epoch:
    """Epochs of a step that checks itself, in which every step is waited for and raises what it has found."""
    checking = jax.jit(checkify.checkify(step))

    def throwing(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        error, result = checking(state, batch)
        error.throw()
        return result

    return lambda state, number: run_epoch(throwing, state, task.batches(number), reporter)

"""Every full-size model takes real steps under RigL with S2-SAM, one of them ordinary: that it fits together, as rows.

python -m experiments.reliability.one_step
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments import cli, models, tasks
from experiments.config import Config
from experiments.rows import jsonl, provenance
from experiments.training import loop, optimizers
from s2sam_jax import TrainState, check_masks, get_masks


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Takes train steps of full-size models on a batch of noise, under RigL with S2-SAM."""

    models: tuple[str, ...] = tuple(models.MODELS)  # Default: all.
    batch_size: int = 2
    out: Path = jsonl.RESULTS / "one_step.jsonl"  # File of a row for each model; those of these models are replaced.


def config_of(name: str, batch_size: int) -> Config:
    """The model at its own size on data of its own shape."""
    spec = models.MODELS[name]
    dataset = "wmt14" if spec.text else "imagenet2012" if spec.classes == 1000 else "cifar10"
    return dataclasses.replace(Config(), dataset=dataset, model=name, batch_size=batch_size, learning_rate=0.01)


def step_and_state(config: Config, steps_per_epoch: int = 100) -> tuple[Any, Any]:
    """The train step of a config, and a function that makes its first state."""
    network = tasks.build(config)
    tx = optimizers.make(config, steps_per_epoch, network.groups)
    step = loop.train_step(config, tasks.losses(config, network), tx)
    return step, lambda: TrainState.create(network.params, tx, model_state=network.model_state)


def two_steps(config: Config) -> dict[str, Any]:
    """Compiles, takes two steps, and checks that weights moved and masks hold.

    Losses are those that the steps report, S2-SAM's at its perturbed weights; the sparsity is over all parameters.

    Raises:
      FloatingPointError: when a loss or a weight is not finite, and when no weight moved.
      ValueError: naming the leaves whose masks do not hold.
    """
    step, first_state = step_and_state(config)
    batch, state, begin = tasks.noise(config), first_state(), time.perf_counter()
    # Where the first call changes the masks, it leaves the weights; the second is an ordinary one.
    state, first = step(state, batch)
    before = jax.device_get(jax.tree.leaves(state.params))
    state, _ = step(state, batch)
    after = jax.device_get(jax.tree.leaves(state.params))
    zeros = 0
    if config.method != "dense":
        check_masks(state.params, state.opt_state)
        zeros = sum(int((~mask).sum()) for mask in jax.tree.leaves(get_masks(state.opt_state)))
    # A step's loss is that of the weights before it, so the one after two steps takes a third.
    _, last = step(state, batch)
    losses = [float(metrics["loss"]) for metrics in (first, last)]
    row = {
        "parameters": sum(p.size for p in after),
        "loss_before": losses[0],
        "loss_after": losses[1],
        "moved": sum(int((new != old).sum()) for new, old in zip(after, before, strict=True)),
        "zeros": zeros,
        "sparsity": zeros / sum(p.size for p in after),
        "finite": all(bool(np.isfinite(values).all()) for values in (losses, *after)),
        "seconds_with_compilation": time.perf_counter() - begin,
    }
    if not (row["finite"] and row["moved"]):
        raise FloatingPointError(f"{config.name} must move its weights and stay finite; got {row}.")
    return row


@cli.command
def main(arguments: Arguments) -> None:
    """The command line; each row is written as soon as it is there."""
    console = Console()
    rows = {row["model"]: row for row in jsonl.read(arguments.out)}
    for name in arguments.models:
        config = config_of(name, arguments.batch_size)
        rows[name] = {"model": name} | two_steps(config) | provenance.of_run(config)
        console.print({k: rows[name][k] for k in ("model", "parameters", "loss_after", "seconds_with_compilation")})
        jsonl.write(arguments.out, rows.values())
        jax.clear_caches()


if __name__ == "__main__":
    main()

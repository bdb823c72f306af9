"""A run's folder: its config, one JSON row per evaluation, checkpoints, weights and curves.

While the run is in progress the name ends in ``.partial``; several processes share the folder, and one writes.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import models, sharding, tasks
from experiments.config import Config, check_same, choices
from experiments.figures import training
from experiments.rows import files, jsonl
from experiments.rows.jsonl import Row
from experiments.training import checkpoint, loop, optimizers
from s2sam_jax import TrainState, eval_params, get_masks

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ROBUSTNESS = "robustness.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT = "checkpoint"
BEST = "best"
WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
PARTIAL = ".partial"  # Ends the name of a folder until its run is finished.
Which = Literal["last", "best"]


def finished(config: Config) -> bool:
    """Whether the result of a run is there, and no later training of it has been interrupted."""
    return config.run_dir.is_dir() and not _partial(config).is_dir()


@contextlib.contextmanager
def claim(config: Config) -> Iterator[None]:
    """Keeps other processes from training the same run at the same time.

    Raises:
      ValueError: when another one does.
    """
    if not sharding.writes():
        yield
        return
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.run_dir.with_name(config.name + ".lock")
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by a process that is killed, too
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is training {config.name}; wait for it, or give another --out."
            ) from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def says_what_goes_on(configs: Sequence[Config]) -> Iterator[None]:
    """Notes on Ctrl-C, and on what is like it, which unfinished runs there are, of this command or one before it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if left := [str(folder) for folder in map(_partial, configs) if folder.is_dir()]:
            stop.add_note(f"the same command goes on from {', '.join(left)}")
        raise


def begin(config: Config, overwrite: bool = False, say: Callable[[str], Any] = print) -> Path:
    """The folder of an unfinished run: that which an interrupted one has left, or a new one.

    Says if it has been evaluated at other epochs than it will be: its rows do not show that.

    Raises:
      ValueError: for a folder that a run of another config has left.
    """
    folder = _partial(config)
    if not overwrite:
        before = _check_config(folder, config).get("eval_every", config.eval_every)
        if before != config.eval_every:
            say(
                f"{folder} goes on with --eval-every {config.eval_every}; its rows so far are of --eval-every {before}."
            )
    sharding.wait_for_all("check")
    if sharding.writes():
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / CONFIG, json.dumps(config.to_json(), indent=2) + "\n")
    sharding.wait_for_all("begin")
    return folder


def _partial(config: Config) -> Path:
    return config.run_dir.with_name(config.name + PARTIAL)


def append(folder: Path, row: Row) -> None:
    """Adds a row, in place of those from its epoch on, which an interrupted run may have left."""
    if sharding.writes():
        file = folder / METRICS
        lines = file.read_text().splitlines() if file.is_file() else []
        kept = [line for line in lines if _epoch(line) < row["epoch"]]
        files.write_text(file, "".join(line + "\n" for line in [*kept, json.dumps(row)]))


def finish(config: Config, folder: Path, state: TrainState, best: Path) -> None:
    """Writes what is left to write, then gives the folder its name, so that a named folder is a finished run."""
    checkpoint.save(folder / CHECKPOINT, state)
    masks = None if config.method == "dense" else get_masks(state.opt_state, state.params)
    arrays = sharding.gather((eval_params(state.params, state.opt_state), masks, state.model_state))
    if sharding.writes():
        checkpoint.export(folder / WEIGHTS, *arrays, metadata=metadata(config))
        training.draw({config.optimizer: rows(folder)}, config.name, folder / CURVES)
        shutil.rmtree(folder / BEST, ignore_errors=True)
        shutil.copytree(best, folder / BEST)
        shutil.rmtree(config.run_dir, ignore_errors=True)
        os.replace(folder, config.run_dir)
        tidy(config.run_dir)
    sharding.wait_for_all("finish")


def metadata(config: Config) -> dict[str, str]:
    """What exported weights are of, for where they are apart from their run's folder."""
    width = models.MODELS[config.model].width if config.width is None else config.width
    sparsity = 0.0 if config.method == "dense" else config.sparsity
    named = {"model": config.model, "dataset": config.dataset, "method": config.method}
    return named | {"width": str(width), "sparsity": str(sparsity)}


def tidy(folder: Path) -> None:
    """A finished run needs no checkpoints to go on from."""
    if sharding.writes():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def rows(folder: Path) -> list[Row]:
    """The rows of a run, one for each evaluation.

    Raises:
      FileNotFoundError: when there is no such run.
      ValueError: when it has no rows, or other things in their place.
    """
    file = folder / METRICS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {METRICS}.")
    found = jsonl.read(file)
    if not found:
        raise ValueError(f"{file} has no rows. Train anew with --overwrite.")
    return found


def robustness(folder: Path) -> Row:
    """The summary that :mod:`experiments.robustness` has left, or nothing."""
    found = jsonl.read(folder / ROBUSTNESS)
    return found[-1]["summary"] if found else {}


def read_config(folder: Path, data: Path | None = None) -> Config:
    """The config of a finished run, with its data set where ``data`` says, if it has moved.

    Raises:
      FileNotFoundError: when the folder holds none.
      ValueError: when it is not the config of a run, or the run is not finished.
    """
    file = folder / CONFIG
    if folder.name.endswith(PARTIAL):
        raise ValueError(f"{folder} is of a run that has not finished; the command that began it goes on from there.")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a finished run: it has no {CONFIG}.")
    try:
        config = Config.from_json(json.loads(file.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the config of a run ({error}).") from error
    return dataclasses.replace(config, data=data or config.data)


def restore(folder: Path, which: Which = "last") -> TrainState:
    """The final state of a finished run, or that of the best test accuracy among its checkpoints."""
    config = read_config(folder)
    # Only the structure is needed here, which does not depend on the number of steps, if only they are enough.
    network = tasks.build(config)
    tx = optimizers.make(config, 10_000, network.groups)
    like = jax.eval_shape(lambda: loop.initial_state(config, network, tx))
    return checkpoint.restore(folder / {"last": CHECKPOINT, "best": BEST}[which], like)


def _check_config(folder: Path, config: Config) -> dict[str, Any]:
    """What an unfinished run has stored; raises a ValueError that names the fields in which it is another config."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text())
        choices(stored)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the config of a run ({error}). Train anew with --overwrite.") from error
    advice = "Put back what it was to go on, or train anew with --overwrite."
    check_same(stored, config, f"The unfinished run {folder} has", advice)
    return stored


def _epoch(line: str) -> float:
    """The epoch of a row; infinite for half of one."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError):
        return float("inf")

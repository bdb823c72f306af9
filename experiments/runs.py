"""A run's folder: its config, one JSON row per evaluation, the checkpoint, weights and curves."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import s2sam_jax
from experiments import checkpoint, loop, optimizers, plots, tasks
from experiments.config import Config
from experiments.loop import Row
from s2sam_jax import TrainState, get_masks

CONFIG, METRICS, ROBUSTNESS, CHECKPOINT, WEIGHTS, CURVES = (
    "config.json",
    "metrics.jsonl",
    "robustness.jsonl",
    "checkpoint",
    "weights.safetensors",
    "curves.png",
)


def begin(config: Config) -> Path:
    """An empty folder for an unfinished run; one that an interrupted run has left is emptied."""
    folder = config.run_dir.with_name(config.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")
    return folder


def append(folder: Path, row: Row) -> None:
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def finish(config: Config, folder: Path, state: TrainState) -> None:
    """Writes what is left to write, then gives the folder its name, so that a named folder is a finished run."""
    checkpoint.save(folder / CHECKPOINT, state)
    checkpoint.export(
        folder / WEIGHTS, state, None if config.method == "dense" else get_masks(state.opt_state, state.params)
    )
    plots.draw({config.optimizer: rows(folder)}, config.name, folder / CURVES)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    os.replace(folder, config.run_dir)


def rows(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def robustness(folder: Path) -> Row:
    """The summary that :mod:`experiments.robustness` has left, or nothing."""
    file = folder / ROBUSTNESS
    return json.loads(file.read_text().splitlines()[-1])["summary"] if file.is_file() else {}


def read_config(folder: Path) -> Config:
    """The config of a finished run.

    Raises:
      FileNotFoundError: when the folder holds none.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a finished run: it has no {CONFIG}.")
    return Config.from_json(json.loads(file.read_text()))


def restore(folder: Path) -> TrainState:
    """The final state of a finished run."""
    config = read_config(folder)
    # Only the structure is needed here, which does not depend on the number of steps, if only they are enough.
    network, tx = tasks.build(config), optimizers.make(config, steps_per_epoch=10_000)
    like = jax.eval_shape(lambda: loop.initial_state(config, network, tx))
    return checkpoint.restore(folder / CHECKPOINT, like)


def provenance(config: Config) -> dict[str, Any]:
    """What every row says about where it comes from."""
    return {
        "config": config.to_json(),
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {name: version(name) for name in ("jax", "optax", "flax")} | {"s2sam_jax": s2sam_jax.__version__},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the source tree, if it is a git checkout; with a ``+`` where files differ from it."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

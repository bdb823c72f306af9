"""Where a row comes from: its config, and the device, XLA flags, versions and commit it was made with."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax

import s2sam_jax
from experiments.config import Config
from experiments.rows.jsonl import Row


def of_run(config: Config) -> Row:
    """What every row of a run says; the config without paths, which are of one machine alone."""
    return {
        "config": {field: value for field, value in config.to_json().items() if field not in ("data", "out")},
        "seed": config.seed,
        **environment(),
    }


def environment() -> Row:
    """What no config decides."""
    return {
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {name: version(name) for name in ("jax", "optax", "flax")} | {"s2sam_jax": s2sam_jax.__version__},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the source tree, with a ``+`` where files differ from it; without a git checkout, what GIT_COMMIT says."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")

"""Kills runs at random moments, lets them go on, and compares them bit by bit with runs that nothing happened to.

    python -m experiments.reliability.resume_matrix

One row for each method and optimizer.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import cli
from experiments.config import Config, OptimizerName
from experiments.rows import jsonl, provenance
from experiments.training import runs

TIMES = ("seconds", "images_per_second", "config")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kills runs on digits at random moments, lets them continue, and compares them with undisturbed ones."""

    methods: tuple[str, ...] = ("rigl", "mest-ems", "lottery", "chex")
    optimizers: tuple[OptimizerName, ...] = ("s2sam", "sam")
    kills: int = 3  # How often each run is killed.
    epochs: int = 8
    seed: int = 0  # Of the moments at which runs are killed.
    out: Path = jsonl.RESULTS / "resume.jsonl"  # File of the rows, which replace those that it has.


@cli.command
def main(arguments: Arguments) -> None:
    moments, console, rows = random.Random(arguments.seed), Console(), []
    with tempfile.TemporaryDirectory() as scratch:
        for method in arguments.methods:
            for optimizer in arguments.optimizers:
                config = Config(
                    width=4, subset=512, epochs=arguments.epochs, method=method, optimizer=optimizer,
                    sparsity=0.5 if method == "chex" else 0.9, prune_fraction=0.7 if method == "lottery" else None,
                )  # fmt: skip
                row = one(config, arguments.kills, moments, Path(scratch))
                rows.append(row)
                console.print(method, optimizer, {name: row[name] for name in ("kills", "equal", "rows_equal")})
    jsonl.write(arguments.out, rows)  # all together: an interrupted command leaves the old ones


def one(config: Config, kills: int, moments: random.Random, scratch: Path) -> dict[str, Any]:
    """A run that nothing happens to, one that is killed again and again, and whether they are the same."""
    whole, killed = (dataclasses.replace(config, out=scratch / out) for out in ("whole", "killed"))
    _start(whole, scratch).wait()
    log = [_kill(killed, moments, scratch) for _ in range(kills)]
    _start(killed, scratch).wait()
    states = [[np.asarray(_raw(x)) for x in jax.tree.leaves(runs.restore(c.run_dir))] for c in (whole, killed)]
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in runs.rows(c.run_dir)] for c in (whole, killed)]
    return provenance.of_run(config) | {
        "kills": log,
        "leaves": len(states[0]),
        "equal": all(a.tobytes() == b.tobytes() for a, b in zip(*states, strict=True)),
        "rows_equal": rows[0] == rows[1],
    }


def _kill(config: Config, moments: random.Random, scratch: Path) -> dict[str, Any]:
    """Kills a process some time after it has begun to write a checkpoint that was not there yet."""
    folder = config.run_dir.with_name(config.name + runs.PARTIAL) / runs.CHECKPOINTS
    epoch = min(_newest(folder) + moments.randint(1, 2), config.epochs)
    process = _start(config, scratch)
    while process.poll() is None and not any(folder.glob(f"{epoch}*")):
        time.sleep(0.001)
    time.sleep(moments.choice((0.0, moments.uniform(0, 0.2), moments.uniform(0, 2))))
    process.send_signal(signal.SIGKILL)
    process.wait()
    writing = sorted(path.name for path in folder.glob("*tmp*")) if folder.is_dir() else []
    return {"epoch": _newest(folder), "writing": writing, "finished": config.run_dir.is_dir()}


def _start(config: Config, scratch: Path) -> "subprocess.Popen[bytes]":
    changed = {k: v for k, v in config.to_json().items() if v is not None and v != Config().to_json()[k]}
    options = [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "experiments.train", *options]
    return subprocess.Popen(command, env=os.environ | cache, stdout=subprocess.DEVNULL)


def _newest(folder: Path) -> int:
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


def _raw(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


if __name__ == "__main__":
    main()

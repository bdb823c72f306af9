"""Makes the small network of a finished run whose channels are masked, and checks that it computes the same."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from experiments import cli, tasks
from experiments.config import Config
from experiments.models import Network
from experiments.training import checkpoint, flops, runs
from s2sam_jax import eval_params, get_masks, materialize

SMALL, CHECKPOINT, WIDTHS = "small", "checkpoint", "widths.json"
TOLERANCE = 1e-5  # Of the largest output; sums of fewer terms round otherwise.


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Cuts masked channels out of a run's network, checks its outputs, and writes it into the run's folder."""

    run_dir: tyro.conf.Positional[Path]  # The folder of a finished run.
    data: Path | None = None  # Where its data set lies, if no longer where it was.


class Comparison(NamedTuple):
    """The masked and the small network, on what the run was evaluated on: the test set, or held-out images.

    Attributes:
      difference: the largest difference between two outputs.
      largest: the largest output of the masked network.
      masked_accuracy: accuracy with channels masked.
      small_accuracy: accuracy with channels removed.
      masked_parameters: how many parameters there are, zeros included.
      small_parameters: how many are left.
      masked_flops: FLOPs of a forward pass on a sample, zeros included.
      small_flops: how many are left.
    """

    difference: float
    largest: float
    masked_accuracy: float
    small_accuracy: float
    masked_parameters: int
    small_parameters: int
    masked_flops: int
    small_flops: int


@cli.command
def main(arguments: Arguments) -> Comparison:
    return shrink(arguments, Console())


def shrink(arguments: Arguments, console: Console) -> Comparison:
    """Writes the small network and prints how it compares.

    Raises:
      ValueError: when no channel can be removed, or the outputs differ by more than rounding.
    """
    folder = arguments.run_dir
    config = runs.read_config(folder, arguments.data)
    masked, small, widths = _networks(folder, config)
    found = compare(config, masked, small)
    console.print(
        f"parameters {found.masked_parameters:,} -> {found.small_parameters:,}, FLOPs {found.masked_flops:.3g} -> "
        f"{found.small_flops:.3g}, test accuracy "
        f"{found.masked_accuracy:.2%} -> {found.small_accuracy:.2%}, largest difference of outputs "
        f"{found.difference:.3g} (largest output {found.largest:.3g})",
        soft_wrap=True,
    )
    if not found.difference <= TOLERANCE * found.largest:
        raise ValueError(
            f"The small network of {folder} does not compute what the masked one does; nothing is written."
        )
    _save(folder / SMALL, config, small, widths)
    console.print(f"Files: {folder / SMALL}", soft_wrap=True)
    return found


def load_small(folder: Path) -> Network:
    """The small network of a run, with its weights and statistics.

    Raises:
      FileNotFoundError: when there is none.
    """
    file = folder / SMALL / WIDTHS
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}; write it by python -m experiments.shrink {folder}")
    network = tasks.build(runs.read_config(folder), json.loads(file.read_text()))
    arrays = {"params": network.params, "model_state": network.model_state}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    return network._replace(**ocp.load(str((file.parent / CHECKPOINT).resolve()), like))


def compare(config: Config, masked: Network, small: Network) -> Comparison:
    """Runs both networks over what the run was evaluated on."""

    @jax.jit
    def figures(weights, example):
        inputs, labels, counted = example
        outputs = [n.apply(*w, inputs, False)[0] for n, w in zip((masked, small), weights, strict=True)]
        difference, largest = (
            jnp.max(jnp.where(counted[..., None], jnp.abs(x), 0)) for x in (outputs[0] - outputs[1], outputs[0])
        )
        right = [jnp.sum((jnp.argmax(x, axis=-1) == labels) & counted) for x in outputs]
        return {"largest": (difference, largest), "sums": (*right, jnp.sum(counted))}

    weights, examples = (masked[:2], small[:2]), tasks.make(config, tasks.load(config)).examples()
    found = jax.device_get([figures(weights, example) for example in examples])
    difference, largest = (max(float(x) for x in column) for column in zip(*(f["largest"] for f in found), strict=True))
    *right, rows = (sum(int(x) for x in column) for column in zip(*(f["sums"] for f in found), strict=True))
    sizes = [sum(x.size for x in jax.tree.leaves(network.params)) for network in (masked, small)]
    costs = [flops.forward_flops(config, network) for network in (masked, small)]
    return Comparison(difference, largest, right[0] / rows, right[1] / rows, *sizes, *costs)


def _networks(folder: Path, config: Config) -> tuple[Network, Network, dict[str, int]]:
    """The masked network of a run, the small one, and its widths; both compute in float32."""
    if config.method == "dense":
        raise ValueError(f"{folder} is a dense run: it has no masks, so no channel can be removed.")
    config = dataclasses.replace(config, compute="float32")
    state, network = runs.restore(folder), tasks.build(config)
    params = eval_params(state.params, state.opt_state)
    left = materialize(params, state.model_state, network.groups, get_masks(state.opt_state, params))
    small = tasks.build(config, left.widths)._replace(params=left.params, model_state=left.model_state)
    masked = network._replace(params=params, model_state=state.model_state)
    if jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"{folder} has no channel that can be removed. That takes masks of all scales and biases of a channel, as "
            f"methods that prune channels make them; this run is of method={config.method}."
        )
    return masked, small, left.widths


def _save(folder: Path, config: Config, network: Network, widths: Mapping[str, int]) -> None:
    """Between two renamings there is only the old folder, as ``small.old``."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    arrays = {"params": network.params, "model_state": network.model_state}
    ocp.save(str((partial / CHECKPOINT).resolve()), arrays)
    (partial / WIDTHS).write_text(json.dumps(widths, indent=2) + "\n")
    metadata = runs.metadata(config) | {"widths": json.dumps(widths)}
    checkpoint.export(partial / runs.WEIGHTS, network.params, None, network.model_state, metadata)
    if folder.exists():
        old = folder.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)


if __name__ == "__main__":
    main()

"""The final state of a run on disk: an Orbax checkpoint, and plain weights and masks as safetensors."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from s2sam_jax import TrainState, eval_params


def save(folder: Path, state: TrainState) -> None:
    """Writes a checkpoint; Orbax makes it appear at once, when it is complete."""
    ocp.save(str(folder.resolve()), state)


def restore(folder: Path, like: TrainState) -> TrainState:
    """Reads a checkpoint into the structure of ``like``, whose leaves may be shapes, as from ``jax.eval_shape``.

    Raises:
      FileNotFoundError: when there is none.
      ValueError: listing every field that is missing, unexpected, or of another shape or type.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {folder}; it appears when a run has finished.")
    _check_fields(folder, like)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    return ocp.load(str(folder.resolve()), target)


def export(file: Path, state: TrainState, masks: Any = None) -> None:
    """Writes clean weights by path, and masks as uint8 under ``mask/``; the file is replaced at once or not at all."""
    arrays = _named(eval_params(state.params, state.opt_state))
    if masks is not None:
        arrays |= {f"mask/{name}": mask.astype(np.uint8) for name, mask in _named(masks).items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in jax.device_get(arrays).items()}
    partial = file.with_suffix(".partial")
    save_file(arrays, partial)
    os.replace(partial, file)


def _check_fields(folder: Path, like: TrainState) -> None:
    """Orbax casts types silently and does not name the field whose shape differs."""
    stored = {
        name: x for name, x in _named(ocp.metadata(str(folder.resolve())).metadata).items() if hasattr(x, "dtype")
    }
    wanted = {name: _as_stored(x) for name, x in _named(like).items()}
    problems = [f"{name}: missing in the checkpoint" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: in the checkpoint only" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        want, have = wanted[name], stored[name]
        if (tuple(want.shape), want.dtype) != (tuple(have.shape), have.dtype):
            problems.append(f"{name}: {have.dtype}{have.shape} in the checkpoint, {want.dtype}{want.shape} expected")
    if problems:
        raise ValueError(f"The checkpoint {folder} does not fit:\n  " + "\n  ".join(sorted(problems)))


def _as_stored(x: Any) -> Any:
    """Typed keys are stored as their data."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, x) if is_key else x


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

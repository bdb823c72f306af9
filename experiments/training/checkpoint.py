"""The state of a run on disk: Orbax checkpoints, and plain weights and masks as safetensors."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save as to_safetensors

from experiments import sharding, stopping
from experiments.rows import files
from experiments.trees import by_name
from s2sam_jax import TrainState

_POLICIES = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of a run in progress, by epoch: the last two, and that of the best test accuracy.

    They are written while training goes on; each appears at once, when it is complete, and only then an older one is
    removed. A context manager: leaving it waits for what is being written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        _check_metrics(folder)
        best = _POLICIES.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
        kept: Any = _POLICIES.AnyPreservationPolicy([_POLICIES.LatestN(2), best])
        with stopping.held():
            self._checkpointer = ocp.training.Checkpointer(
                str(folder.resolve()),
                preservation_policy=kept,
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        if kind is None:
            self.wait()
        second = () if kind is None else (Exception,)  # the first one tells more
        with contextlib.suppress(*second), _writing(self.folder):
            self._checkpointer.close()

    @property
    def epochs(self) -> list[int]:
        """The epochs that have a checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def best(self) -> Path:
        """The folder of the checkpoint with the best test accuracy; among equals the last."""
        measured = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        return self.folder / str(max(measured, key=lambda c: (_accuracy(c.metrics), c.step)).step)

    def save(self, epoch: int, state: TrainState, progress: dict[str, Any], accuracy: float | None) -> None:
        """Begins to write; ``progress`` is anything that JSON can hold.

        Raises:
          OSError: when this or the one before it cannot be written.
        """
        metrics: dict[str, Any] | None = None if accuracy is None else {"test_accuracy": accuracy}
        with _writing(self.folder):
            self._checkpointer.save_async(epoch, state, force=True, metrics=metrics, custom_metadata=progress)

    def wait(self) -> None:
        """Waits until all is written; raises as :meth:`save`."""
        with _writing(self.folder):
            self._checkpointer.wait()

    def restore(self, epoch: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state as :func:`restore` has it, with the progress; later checkpoints are removed."""
        folder = self.folder / str(epoch)
        state = restore(folder, like)
        with _reading(folder):
            progress: Any = ocp.metadata(str(folder.resolve())).custom_metadata
            if not isinstance(progress, dict) or progress.get("epoch") != epoch:
                raise ValueError(f"its metadata are {progress}")
        with stopping.held():
            for later in [other for other in self.epochs if other > epoch]:
                self._checkpointer.delete(later)
        return state, progress


def save(folder: Path, state: TrainState) -> None:
    """Writes a checkpoint; Orbax makes it appear at once, when it is complete.

    Raises:
      OSError: when it cannot be written.
    """
    with _writing(folder):
        ocp.save(str(folder.resolve()), state, overwrite=True)


def restore(folder: Path, like: TrainState) -> TrainState:
    """Reads a checkpoint into the structure of ``like``, whose leaves may be shapes, as from ``jax.eval_shape``.

    Each leaf comes to lie as in ``like``, or on the first device, or in every process, where that does not say.

    Raises:
      FileNotFoundError: when there is none.
      ValueError: listing every field that is missing, unexpected, or of another shape or type; or for a checkpoint
        that is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {folder}; it appears when a run has finished.")
    with _reading(folder):
        stored = ocp.metadata(str(folder.resolve())).metadata
        if stored is None:
            raise ValueError("it does not say what is in it")
    _check_fields(folder, stored, like)
    alone = jax.process_count() == 1
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if alone else sharding.replicated(sharding.make_mesh())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), like)
    with _reading(folder):
        return ocp.load(str(folder.resolve()), target)


def export(file: Path, params: Any, masks: Any, model_state: Any, metadata: dict[str, str]) -> None:
    """Writes weights by path, ``mask/`` as uint8 unless None, and ``model_state/``; at once or not at all."""
    arrays = by_name(params) | {f"model_state/{name}": array for name, array in by_name(model_state).items()}
    if masks is not None:
        arrays |= {f"mask/{name}": mask.astype(np.uint8) for name, mask in by_name(masks).items()}
    content = to_safetensors({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
    files.write_whole(file, lambda path: path.write_bytes(content))  # save_file's own are for their owner alone


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Orbax reports what went wrong in the background, as one of many types, when it is called next."""
    try:
        with stopping.held():
            yield
    except Exception as error:
        raise OSError(
            f"A checkpoint could not be written to {folder} ({_short(error)}). Those that are complete stay; when "
            "there is space and permission to write, the same command goes on from the last."
        ) from error


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """A damaged checkpoint shows as almost any type of exception."""
    try:
        with stopping.held():
            yield
    except Exception as error:
        unfinished = folder.name.isdecimal()
        advice = "Remove that folder to go on from the one before it, or train" if unfinished else "If it is, train"
        raise ValueError(
            f"The checkpoint {folder} is damaged, or cannot be read here ({_short(error)}). {advice} anew with "
            "--overwrite."
        ) from error


def _short(error: Exception) -> str:
    """Orbax and TensorStore add pages of their settings."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def _accuracy(metrics: Any) -> float:
    return metrics["test_accuracy"]


def _check_metrics(folder: Path) -> None:
    """Orbax reads those of all checkpoints at once, and does not say which are damaged."""
    for file in folder.glob("*/metrics/metrics"):
        if (checkpoint := file.parents[1]).name.isdecimal():
            with _reading(checkpoint):
                _accuracy(json.loads(file.read_text()))


def _check_fields(folder: Path, tree: Any, like: TrainState) -> None:
    """Orbax casts types silently and does not name the field whose shape differs."""
    stored = {name: x for name, x in by_name(tree).items() if hasattr(x, "dtype")}
    wanted = {name: _as_stored(x) for name, x in by_name(like).items()}
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

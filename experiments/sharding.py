"""Several devices: a mesh, and the sharding of states and batches over it."""

import os
import sys
import textwrap
import traceback
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# A batch is sharded along both axes, the state along the second.
AXES = ("data", "fsdp")
# A leaf of fewer elements costs less to hold than to send around.
SMALL = 2**12


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several, before anything else of JAX; what is not given, the cluster has to tell.

    Raises:
      ValueError: when neither does.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as error:
        raise ValueError(
            f"The processes cannot find each other ({error}) Outside of TPU pods, Slurm, Open MPI and Kubernetes, give "
            "each --coordinator HOST:PORT of the first, --num-processes and its own --process-id, from 0 on."
        ) from error


def leave(error: Exception) -> NoReturn:
    """Ends this process of several after an error in what they do together, without a wait for those that have died."""
    advice = "If another process has died, start all again with the same commands: they go on from the last checkpoint."
    sys.stdout.flush()
    traceback.print_exception(error)
    print(f"error: {textwrap.shorten(str(error), 1000)}\n{advice}", file=sys.stderr, flush=True)
    os._exit(1)


def make_mesh(text: str | None = None) -> Mesh:
    """A mesh from ``data=4,fsdp=2``; without a text one device, or all of them where there are several processes.

    Raises:
      ValueError: for an axis that is unknown or without a positive size, and for other devices than there are.
    """
    devices, processes = jax.devices(), jax.process_count()
    sizes = {"data": len(devices) if processes > 1 else 1} if text is None else _sizes(text)
    data, fsdp = (sizes.get(axis, 1) for axis in AXES)
    if data * fsdp > len(devices):
        raise ValueError(f"The mesh {text} needs {data * fsdp} devices; there are {len(devices)}.")
    if processes > 1 and data * fsdp < len(devices):
        raise ValueError(
            f"The mesh {text} has {data * fsdp} of the {len(devices)} devices of {processes} processes; it needs all."
        )
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * len(AXES), devices=devices[: data * fsdp])


def check_batch(mesh: Mesh, size: int) -> None:
    if size % mesh.size:
        raise ValueError(f"batch_size={size} does not divide among the {mesh.size} devices of the mesh.")


def fill(mesh: Mesh, size: int) -> int:
    """The least multiple of the number of devices that is no smaller than ``size``."""
    return mesh.size * -(-size // mesh.size)


def of_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of arrays that have the examples of a batch along an axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_state(mesh: Mesh, state: Any) -> Any:
    """The sharding of each leaf: a large one is cut along its largest dimension that the devices divide.

    By its shape alone, so that masks, momentum and the last gradient lie as their parameter does.
    """

    def rule(leaf: Any) -> NamedSharding:
        size = mesh.shape["fsdp"]
        divisible = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or leaf.size < SMALL or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, state)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Places arrays of which every process holds the whole."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    host = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), host)


def assemble(mesh: Mesh, share: Any) -> Any:
    """The batch of which every process holds its share."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(of_batch(mesh), x), share)


def gather(tree: Any) -> Any:
    """The whole of each array in every process, as NumPy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def writes() -> bool:
    """Whether this process is the one that writes files; Orbax's need all."""
    return jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Until every process has come to a place."""
    multihost_utils.sync_global_devices(place)


def _sizes(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"A mesh looks like data=4,fsdp=2, with one or both of the axes {AXES}; got {text!r}.")
        sizes[axis] = int(size)
    return sizes

"""Accelerators that programs can be compiled for without having one: JAX's packages for them bring their compilers."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

from jax.experimental import topologies

Target = Literal["h100", "v5e"]
EXTRAS = {"h100": "cuda12", "v5e": "tpu"}  # Of jax.
COMPILERS = {"h100": "jax-cuda12-plugin", "v5e": "libtpu"}  # The packages that these bring.

# What XLA asks of a device before it compiles for it: an H100 SXM of 80 GB under CUDA 12.9.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(target: Target) -> list[Any]:
    """Eight of them, as a host has; nothing can be run there.

    Raises:
      ValueError: when JAX's package for them is not installed.
    """
    if target not in get_args(Target):
        raise ValueError(f"the target must be one of {', '.join(get_args(Target))}; got {target!r}.")
    try:
        version(COMPILERS[target])
    except PackageNotFoundError as error:
        extra = f"jax[{EXTRAS[target]}]"
        raise ValueError(
            f"{COMPILERS[target]} is not installed, with which XLA compiles for {target}: add --with '{extra}' to "
            f"uv run, or pip install '{extra}'."
        ) from error
    if target == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8").devices
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no host that knows of a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one that several processes could fight for
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices

"""Eight virtual devices for sharding, and quick compilation, which is most of what the suite spends.

Without optimization, and where possible without fusion emitters and with each program in one piece, XLA compiles
several times as fast; programs run slower, but briefly. Python looks for garbage less often: what JAX traces is many
small objects that nearly all stay, and to go through them took an eighth of the time.
"""

import gc
import os
from importlib.metadata import version

# Versions after 0.10 may end at a flag that they do not know.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if version("jaxlib").startswith("0.10.")
        else ""
    )
)

import jax
import pytest

gc.set_threshold(100_000, 50, 1000)
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def float64():
    """64-bit types, so that rounding hides nothing from NumPy's float64."""
    with jax.enable_x64(True):
        yield

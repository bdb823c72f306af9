"""Eight virtual devices for the sharding tests, and quick compilation: it is most of what the suite spends.

Without optimization, and where it can do without its fusion emitters, XLA compiles in a quarter of the time; programs
run slower, but briefly.
"""

import os
from importlib.metadata import version

# Versions after 0.10 end at this flag, as they no longer know it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
)

import jax

jax.config.update("jax_num_cpu_devices", 8)

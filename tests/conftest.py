"""Eight virtual devices for the sharding tests, and quick compilation: it is most of what the suite spends.

Without its fusion emitters and optimization XLA compiles in a quarter of the time; they run slower, but briefly.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)

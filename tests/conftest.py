"""Eight virtual devices for the sharding tests, and quick compilation: it is most of what the suite spends."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax

jax.config.update("jax_num_cpu_devices", 8)

"""Eight virtual CPU devices, so that sharding is tested on any machine. Must run before jax starts a backend."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

"""Sparse-training methods: one file each, one factory each. The folder is the registry."""

from s2sam_jax.methods.rigl import rigl as rigl
from s2sam_jax.methods.static import static as static

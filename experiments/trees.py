"""Trees of arrays: as flat dicts, and several in one."""

from typing import Any

import jax
import jax.numpy as jnp


def by_name(tree: Any) -> dict[str, Any]:
    """Its leaves by their paths, as ``blocks/2/conv2/kernel``."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def stack(*trees: Any) -> Any:
    """Trees of one structure as one, whose leaves have another axis in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

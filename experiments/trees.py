"""Trees of arrays as flat dicts."""

from typing import Any

import jax


def by_name(tree: Any) -> dict[str, Any]:
    """Its leaves by their paths, as ``blocks/2/conv2/kernel``."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

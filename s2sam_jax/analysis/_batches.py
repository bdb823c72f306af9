"""The batches whose mean loss is analysed."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


def listed(batches: Iterable[Any], caller: str) -> list[Any]:
    """The batches, after a check that they are of one shape, since they are weighted equally in the mean.

    Raises:
      ValueError: for batches of several shapes.
    """
    batches = list(batches)
    shapes = [jax.tree.map(jnp.shape, batch) for batch in batches]
    if any(shape != shapes[0] for shape in shapes):
        found = " and ".join(dict.fromkeys(map(str, shapes)))
        raise ValueError(
            f"{caller} weights all batches alike, so they must have one shape; got {found}. Leave out the last, "
            "smaller one; for a single batch give [batch]."
        )
    return batches

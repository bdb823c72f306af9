"""The loss that is looked at: of a batch, at any parameters."""

from collections.abc import Callable
from typing import Any

import jax

from s2sam_jax._base.types import Params

BatchLoss = Callable[[Params, Any], jax.Array]
Progress = Callable[[int], None]

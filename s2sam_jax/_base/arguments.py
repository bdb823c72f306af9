"""Checks of numeric arguments. Schedules, and arrays such as ``inject_hyperparams`` passes, are not checked."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

NUMBERS = (int, float, np.integer, np.floating)


def check_non_negative(value: Any, name: str) -> None:
    if isinstance(value, optax.GradientTransformation):  # as optax.contrib.sam takes it
        raise TypeError(
            f"{name} must be a number or a schedule; got an optimizer: chain the two, optax.chain(..., optimizer)."
        )
    if isinstance(value, str):  # which jnp.array would read
        raise TypeError(f"{name} must be a number or a schedule; got {value!r}.")
    if isinstance(value, NUMBERS) and not value >= 0:
        raise ValueError(f"{name} must be a number >= 0 or a schedule; got {value!r}.")


def check_fractions(caller: str, **fractions: Any) -> None:
    """Each must lie in [0, 1]."""
    for name, value in fractions.items():
        if isinstance(value, NUMBERS) and not 0 <= value <= 1:
            raise ValueError(f"{caller} needs 0 <= {name} <= 1; got {value}.")


def check_sparsity(value: Any, name: str) -> None:
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be a number, as it decides about shapes and counts; got a traced {value.aval}. If "
            "optax.inject_hyperparams has made it one, name it in static_args."
        )
    if not 0 <= value < 1:
        raise ValueError(f"{name} is the fraction of zeros and must lie in [0, 1); got {value}.")


def check_floating(dtype: Any, name: str) -> None:
    """``None`` passes: the argument is optional."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating type, such as jnp.bfloat16; got {jnp.dtype(dtype)}.")


def check_compat(compat: str) -> None:
    if compat not in ("paper", "authors"):
        raise ValueError(f"compat must be 'paper' or 'authors'; got {compat!r}.")

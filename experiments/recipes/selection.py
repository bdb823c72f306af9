"""Which rows of a table a command is for."""

import dataclasses
from typing import Any

import tyro

from experiments import recipes
from experiments.config import OptimizerName
from experiments.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Selection:
    """A table, and what its rows must have."""

    # The first part of recipes' names: table1, table1-cifar100, ssam-table1 and so on; an unknown one lists them all.
    table: tyro.conf.Positional[str]
    methods: tuple[str, ...] = ()  # Only rows of these, such as rigl-erk; default: all.
    sparsities: tuple[float, ...] = ()  # Only rows of these, and those that have none; default: all.
    optimizers: tuple[OptimizerName, ...] = ()  # Only rows of these; default: all.


def chosen(selection: Selection) -> list[Recipe]:
    """Rows of the table that the filters leave.

    Raises:
      ValueError: for an unknown table, a filter that the table does not have, and when nothing is left.
    """
    rows = recipes.of_table(selection.table)
    _check("methods", selection.methods, [recipe.key for recipe in rows], selection.table)
    _check("sparsities", selection.sparsities, [recipe.sparsity for recipe in rows], selection.table)
    _check("optimizers", selection.optimizers, [recipe.config.optimizer for recipe in rows], selection.table)
    left = [
        recipe
        for recipe in rows
        if recipe.key in (selection.methods or (recipe.key,))
        and recipe.sparsity in (None, *(selection.sparsities or (recipe.sparsity,)))
        and recipe.config.optimizer in (selection.optimizers or (recipe.config.optimizer,))
    ]
    if not left:
        raise ValueError(f"No row of {selection.table} has these methods, sparsities and optimizers together.")
    return left


def _check(field: str, asked: tuple[Any, ...], known: list[Any], table: str) -> None:
    if foreign := [value for value in asked if value not in known]:
        known = [value for value in dict.fromkeys(known) if value is not None]
        raise ValueError(f"{table} has no {field} {foreign}; it has {known}.")

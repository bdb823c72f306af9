"""Named configurations of the rows of the S2-SAM and Sparse SAM papers, with what their sources say and leave open.

The numbers are those printed in talk slides, rebuttal and paper texts; where a table is not printed there, its rows
expect nothing.
"""

import difflib

from experiments.recipes import (
    budget,
    causes,
    channels,
    cifar,
    dense,
    imagenet,
    label_noise,
    length,
    methods,
    overfit,
    rebuttal,
    sparsities,
    ssam,
    translation,
)
from experiments.recipes.base import Recipe

_SOURCES = (
    cifar,
    imagenet,
    channels,
    dense,
    rebuttal,
    translation,
    ssam,
    budget,
    sparsities,
    causes,
    overfit,
    length,
    label_noise,
    methods,
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for source in _SOURCES for recipe in source.recipes()}
TABLES: tuple[str, ...] = tuple(dict.fromkeys(recipe.table for recipe in RECIPES.values()))


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      ValueError: for another name, with those that are like it.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}; {_near(name)}.")
    return RECIPES[name]


def of_table(table: str) -> list[Recipe]:
    """The rows of one table.

    Raises:
      ValueError: for another table, with those that there are.
    """
    if table not in TABLES:
        raise ValueError(f"Unknown table {table!r}; there are {', '.join(TABLES)}.")
    return [recipe for recipe in RECIPES.values() if recipe.table == table]


def describe(recipe: Recipe) -> str:
    """A header for a run: where the row is from, what to expect, and how sure that is."""
    printed, zeros = recipe.printed, recipe.sparsity
    value = "unknown" if printed.value is None else f"{printed.value:g}"
    spread = "" if printed.spread is None else f" ± {printed.spread:g}"
    sparse = "" if zeros is None else f", {100 * zeros:g} % zeros"
    fields = {
        "paper": recipe.paper,
        "row": f"{recipe.table}, {recipe.row}, {recipe.config.dataset}{sparse}",
        "expected": f"{recipe.metric.name}: {value}{spread}",
        "known": recipe.known,
        "unknown": recipe.unknown,
        "command": recipe.command,
    }
    return "\n".join([recipe.name, *(f"  {field:8}  {text}" for field, text in fields.items())])


def _near(name: str) -> str:
    """The recipes whose names are most alike and, if none is much alike, also the tables."""
    if near := difflib.get_close_matches(name, RECIPES, n=5):
        return f"did you mean {', '.join(near)}"
    near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0)
    return f"the nearest are {', '.join(near)}; names begin with one of {', '.join(TABLES)}"

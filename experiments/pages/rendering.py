"""Lines of a paper's table and ours as text: for a terminal, in Markdown, and as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.pages.markdown import table as markdown_table
from experiments.rows.comparison import Line
from experiments.rows.spread import MISSING, figure

HEADER = (
    "row", "zeros (%)", "gradients a step", "paper", "ours", "seeds", "paper: gain", "ours: gain", "95 % interval",
    "pairs",
)  # fmt: skip
BEST = ("ours: best", "best: gain")  # further columns, where each epoch was evaluated
LEAST_NEEDED = ("pairs", "gradients a step", *BEST, "paper: gain", "seeds", "paper")  # the first of them least of all


def terminal(lines: Sequence[Line], title: str, width: int) -> Table:
    """The lines, without empty columns and those that the width has no room for; no cell is truncated."""
    header, *body = _cells(lines)
    columns = {name: cells for name, *cells in zip(header, *body, strict=True) if set(cells) - {MISSING, "0"}}
    for name in LEAST_NEEDED:
        if _width(columns) > width:
            columns.pop(name, None)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, width=_width(columns))
    for name in columns:
        table.add_column(_heading(name), justify="left" if name == HEADER[0] else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _heading(name: str) -> str:
    """The name of a column, on two lines where it has two words."""
    return "\n".join(name.rsplit(" ", 1))


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """How wide a table is: a blank on either side of a cell, and another between two cells and at the ends."""
    return 1 + sum(3 + max(map(len, [*_heading(name).split("\n"), *cells])) for name, cells in columns.items())


def markdown(lines: Sequence[Line]) -> str:
    header, *body = _cells(lines)
    return markdown_table(header, body, rule=" --- ")


def comma_separated(lines: Iterable[Line]) -> str:
    """CSV of the bare figures."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Line._fields, *lines])
    return text.getvalue()


def _cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The header, and the cells of each line."""
    with_best = any(line.best is not None for line in lines)
    return [HEADER + BEST * with_best, *(_line_cells(line) + _best_cells(line) * with_best for line in lines)]


def _line_cells(line: Line) -> tuple[str, ...]:
    return (
        line.row,
        MISSING if line.sparsity is None else f"{100 * line.sparsity:g}",
        MISSING if line.gradients is None else f"{line.gradients:.2f}",
        figure(line.paper, line.paper_spread),
        figure(line.ours, line.spread),
        str(line.seeds),
        figure(line.paper_difference, sign="+"),
        figure(line.difference, line.difference_spread, sign="+"),
        MISSING if line.interval is None else f"±{line.interval:.2f}",
        str(line.pairs),
    )


def _best_cells(line: Line) -> tuple[str, ...]:
    return figure(line.best), figure(line.best_difference, sign="+")

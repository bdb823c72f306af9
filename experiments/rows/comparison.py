"""A paper's table with ours beside it, from rows: means, paired differences and their intervals."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.rows import pages
from experiments.rows.jsonl import Row
from experiments.rows.spread import MISSING, figure, gains, interval, mean


class Line(NamedTuple):
    """A row of a paper's table beside ours; None where there is nothing. Spreads of ours are sample deviations.

    Attributes:
      name: of the recipe.
      row: the paper's label.
      sparsity: fraction of zeros.
      optimizer: ours.
      metric: what the figures are of.
      paper: as printed.
      paper_spread: as printed.
      paper_difference: to the baseline, of the printed figures.
      baseline: the recipe that differences are to.
      ours: mean over seeds.
      spread: over seeds.
      seeds: how many.
      difference: to the baseline, mean of the differences seed by seed.
      difference_spread: of these.
      pairs: how many.
      gradients: evaluations a step, or the like of them.
      best: mean over seeds of the figure of each seed's best epoch.
      best_difference: to the baseline's.
    """

    name: str
    row: str
    sparsity: float | None
    optimizer: str
    metric: str
    paper: float | None
    paper_spread: float | None
    paper_difference: float | None
    baseline: str | None
    ours: float | None
    spread: float | None
    seeds: int
    difference: float | None
    difference_spread: float | None
    pairs: int
    gradients: float | None = None
    best: float | None = None
    best_difference: float | None = None

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval of the difference, by Student's distribution."""
        return interval(self.difference_spread, self.pairs)


HEADER = (
    "row", "zeros (%)", "gradients a step", "paper", "ours", "seeds", "paper: gain", "ours: gain", "95 % interval",
    "pairs",
)  # fmt: skip
BEST = ("ours: best", "best: gain")  # further columns, where each epoch was evaluated
LEAST_NEEDED = ("pairs", "gradients a step", *BEST, "paper: gain", "seeds", "paper")  # the first of them least of all


def compare(rows: Sequence[Row]) -> list[Line]:
    """The lines of a table, from rows that hold ``recipe``, ``seed`` and ``value``, in their order."""
    values, best = _by_seed(rows, "value"), _by_seed(rows, "best")
    # Means are of the same seeds, or none.
    best = {name: found if found.keys() == values[name].keys() else {} for name, found in best.items()}
    lines = []
    for recipe in {row["recipe"]["name"]: row["recipe"] for row in rows}.values():
        name, baseline = recipe["name"], recipe["baseline"]
        mine, paired = values[name], gains(values[name], values.get(baseline, {}))
        (ours, deviation), (difference, difference_spread) = mean(mine.values()), mean(paired)
        lines.append(
            Line(
                **recipe,
                ours=ours,
                spread=deviation,
                seeds=len(mine),
                difference=difference,
                difference_spread=difference_spread,
                pairs=len(paired),
                best=mean(best[name].values())[0],
                best_difference=mean(gains(best[name], best.get(baseline, {})))[0],
            )
        )
    return lines


def _by_seed(rows: Sequence[Row], field: str) -> dict[str, dict[int, float]]:
    """Of each recipe that has rows; without the seeds that lack the field."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        mine = found.setdefault(row["recipe"]["name"], {})
        if row.get(field) is not None:
            mine[row["seed"]] = row[field]
    return found


def pooled(lines: Sequence[Line]) -> dict[str, list[float]]:
    """The gains of each optimizer over its baseline, a number a cell: the mean over its pairs."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line.difference is not None:
            found.setdefault(line.optimizer, []).append(line.difference)
    return found


def terminal(lines: Sequence[Line], title: str, width: int) -> Table:
    """For a terminal of that width: without empty columns and those that there is no room for; nothing is truncated."""
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
    """On two lines where it has two words."""
    return "\n".join(name.rsplit(" ", 1))


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Of a table of these, with a blank on either side of a cell, and another between two cells and at the ends."""
    return 1 + sum(3 + max(map(len, [*_heading(name).split("\n"), *cells])) for name, cells in columns.items())


def markdown(lines: Sequence[Line]) -> str:
    header, *body = _cells(lines)
    return pages.table(header, body, rule=" --- ")


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

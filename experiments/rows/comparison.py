"""A paper's table with ours beside it, from rows: means, paired differences and their intervals."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.rows.jsonl import Row
from experiments.rows.spread import gains, interval, mean


class Line(NamedTuple):
    """A row of a paper's table beside ours; None where there is nothing. Spreads of ours are sample deviations.

    Attributes:
      name: of the recipe.
      row: the paper's label.
      sparsity: fraction of zeros.
      optimizer: of our run.
      metric: what is compared, such as ``accuracy (%)``.
      paper: the printed figure.
      paper_spread: what is printed behind its ±.
      paper_difference: the printed figure less that of the baseline.
      baseline: the name of the recipe that differences are to.
      ours: our figure, the mean over seeds.
      spread: its deviation over seeds.
      seeds: how many there are.
      difference: ours less the baseline's, the mean over the seeds that both have.
      difference_spread: its deviation over these seeds.
      pairs: how many these are.
      gradients: gradient evaluations a step; other passes count in proportion.
      best: the mean over seeds of the figure after each seed's best epoch.
      best_difference: the same less the baseline's.
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
    """The values of a field by recipe and seed, without the seeds that lack it."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        mine = found.setdefault(row["recipe"]["name"], {})
        if row.get(field) is not None:
            mine[row["seed"]] = row[field]
    return found


def pooled(lines: Sequence[Line]) -> dict[str, list[float]]:
    """The gains of each optimizer over its baseline, one number for each line: the mean over its pairs."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line.difference is not None:
            found.setdefault(line.optimizer, []).append(line.difference)
    return found

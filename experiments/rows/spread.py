"""Means over seeds, how much they scatter, and gains that are paired by seed, as numbers and as the cells of tables."""

import math
import statistics
from collections.abc import Collection, Mapping

from scipy.special import stdtrit  # stats would take a second to import

MISSING = "–"


def mean(values: Collection[float]) -> tuple[float | None, float | None]:
    """The mean and the sample deviation, which takes two values; None where there is none."""
    average = statistics.mean(values) if values else None
    return average, statistics.stdev(values) if len(values) > 1 else None


def paired(mine: Mapping[int, float], base: Mapping[int, float]) -> list[tuple[float, float]]:
    """The values of the seeds that both have, in their order."""
    return [(mine[seed], base[seed]) for seed in sorted(mine.keys() & base.keys())]


def gains(mine: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Differences of the seeds that both have, in their order."""
    return [a - b for a, b in paired(mine, base)]


def interval(spread: float | None, count: int) -> float | None:
    """Half the width of a mean's 95 % confidence interval, by Student's distribution; None without a spread."""
    if spread is None:
        return None
    return float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count)


def figure(
    value: float | None, spread: float | None = None, *, sign: str = "", form: str = ".2f", spread_form: str = ".2f"
) -> str:
    """``1.23 ± 0.45``, as far as there is something."""
    if value is None:
        return MISSING
    return f"{value:{sign}z{form}}" + ("" if spread is None else f" ± {spread:{spread_form}}")


def with_interval(differences: Collection[float]) -> str:
    """Their mean with its 95 % interval, as far as there are enough of them."""
    average, spread = mean(differences)
    half = interval(spread, len(differences))
    return figure(average, sign="+") + ("" if half is None else f" (±{half:.2f})")

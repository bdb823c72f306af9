"""Paired timing: cases take turns, so that a machine's drift meets all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Case = Callable[[], Any]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      what: what is measured.
      value: a ratio, or a figure in ``unit``.
      low: lower quartile over the pairs of runs; the value itself where nothing is timed.
      high: upper quartile.
      unit: ``"x"`` for ratios.
      target: what it should be, such as ``"<= 1.02"``; empty where it is only reported.
      detail: the figures behind it.
    """

    what: str
    value: float
    low: float
    high: float
    unit: str = "x"
    target: str = ""
    detail: str = ""

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, bound = self.target.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def paired(cases: Mapping[str, Case], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each case and round, float64[rounds], after one run that does not count; the order alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        jax.block_until_ready(case())
    for number in range(rounds):
        names = list(cases) if number % 2 else list(cases)[::-1]
        for name in names:
            begin = time.perf_counter()
            jax.block_until_ready(cases[name]())
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio_row(what: str, over: np.ndarray, under: np.ndarray, target: str = "", detail: str = "") -> Row:
    """The ratio of two paired series."""
    low, middle, high = np.quantile(over / under, [0.25, 0.5, 0.75])
    times = f"{milliseconds(over)} / {milliseconds(under)}"
    return Row(what, float(middle), float(low), float(high), "x", target, f"{times}{'; ' if detail else ''}{detail}")


def figure(what: str, value: float, unit: str, target: str = "", detail: str = "") -> Row:
    """Something counted, not timed."""
    return Row(what, float(value), float(value), float(value), unit, target, detail)


def milliseconds(seconds: np.ndarray) -> str:
    return f"{1e3 * float(np.median(seconds)):.3g} ms"


class Memory(NamedTuple):
    """XLA's own figures for a program, in bytes."""

    peak: int
    temporary: int


def memory(compiled: Any) -> Memory:
    """What a program holds at the most, a donated buffer counted once."""
    used = compiled.memory_analysis()
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return Memory(held + used.temp_size_in_bytes, used.temp_size_in_bytes)


def cost(compiled: Any) -> dict[str, float]:
    """XLA's own count of a program's floating-point operations and bytes touched."""
    analysis = compiled.cost_analysis()
    return {"flops": analysis.get("flops", 0.0), "bytes": analysis.get("bytes accessed", 0.0)}

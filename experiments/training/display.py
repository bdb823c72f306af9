"""What is shown of a run in the terminal: a progress bar, and the final tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.rows import spread
from experiments.rows.jsonl import Row


class ProgressBar:
    """Counts steps, and shows the newest row; where nothing can be drawn over, as in a file, every row on a line.

    A context manager.
    """

    def __init__(self, console: Console, title: str, epochs: int, steps_per_epoch: int):
        self._console, self._title, self._total = console, title, epochs * steps_per_epoch
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=5),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_interactive)
        self._task = self._progress.add_task(title, total=self._total, news="compiling")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def steps(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def row(self, row: Row) -> None:
        news = (
            f"epoch {row['epoch']} loss {row['train_loss']:.3f} test {row['test_accuracy']:.1%} "
            f"zeros of all {row['sparsity']:.0%} {_speed(row)} img/s"
        )
        self._progress.update(self._task, news=news)
        if not self._console.is_interactive:
            self._console.print(f"{self._title} {row['step']}/{self._total} {news}", soft_wrap=True)


def result_table(finals: Mapping[str, Row]) -> Table:
    """A line for each run: accuracy, also with BatchNorm's running statistics, speed, and the zeros of all kernels."""
    columns = ("test\naccuracy", "running\nstats", "training\nloss", "seconds", "images/s", "zeros of\nkernels")
    table = _table(*columns)
    for name, row in finals.items():
        counts = [sum(column) for column in zip(*row["layers"].values(), strict=True)]
        table.add_row(
            name,
            f"{row['test_accuracy_recalibrated']:.2%}",
            f"{row['test_accuracy']:.2%}",
            f"{row['train_loss']:.4f}",
            f"{row['seconds']:.1f}",
            _speed(row),
            _fraction(counts) if counts else "dense",
        )
    return _whole(table)


def layer_table(finals: Mapping[str, Row]) -> Table:
    """The zeros of every kernel, once where all runs have the same."""
    layers = {name: row["layers"] for name, row in finals.items() if row["layers"]}
    first, *others = layers.values() or [{}]
    if all(counts == first for counts in others):
        layers = {"zeros": first}
    table = _table(*layers)
    for kernel in dict.fromkeys(kernel for counts in layers.values() for kernel in counts):
        table.add_row(kernel, *(_fraction(counts.get(kernel)) for counts in layers.values()))
    return _whole(table)


def seeds_table(finals: Sequence[Row]) -> Table:
    """Means over seeds of each optimizer, and what it gains over the first on the same seeds."""
    accuracies: dict[str, dict[int, float]] = {}
    for row in finals:
        mine = accuracies.setdefault(row["config"]["optimizer"], {})
        mine[row["seed"]] = 100 * row["test_accuracy_recalibrated"]
    first, *others = accuracies
    table = _table("test accuracy (%)", "seeds", *([f"gain over {first}, 95 % interval"] if others else []))
    for optimizer, mine in accuracies.items():
        gain = spread.MISSING if optimizer == first else spread.with_interval(spread.gains(mine, accuracies[first]))
        table.add_row(
            optimizer, spread.figure(*spread.mean(mine.values())), str(len(mine)), *([gain] if others else [])
        )
    return _whole(table)


def _table(*columns: str) -> Table:
    """A table with names on the left, and columns of figures."""
    table = Table()
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _whole(table: Table) -> Table:
    """Keeps cells from being cut: the table becomes wider than the terminal, if need be."""
    for column in table.columns:
        texts = [str(column.header), *map(str, column.cells)]
        column.min_width = max(len(line) for text in texts for line in text.split("\n"))
    return table


def _speed(row: Row) -> str:
    """Images a second; not known after a first epoch alone, in whose time the step is compiled."""
    return f"{row['images_per_second']:,.0f}" if "images_per_second" in row else "-"


def _fraction(zeros_and_size: list[int] | None) -> str:
    return "-" if not zeros_and_size else f"{zeros_and_size[0] / zeros_and_size[1]:.2%}"

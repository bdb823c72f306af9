"""What is shown of a run in the terminal: a progress bar, and the final table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.training.record import Row


class ProgressBar:
    """Counts steps, and shows the newest row. A context manager."""

    def __init__(self, console: Console, title: str, epochs: int, steps_per_epoch: int):
        self._epochs = epochs
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(title, total=epochs * steps_per_epoch, news="compiling")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def steps(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def row(self, row: Row) -> None:
        news = (
            f"{row['epoch']}/{self._epochs} loss {row['train_loss']:.3f} test {row['test_accuracy']:.1%} "
            f"zeros {row['sparsity']:.0%} {_speed(row)} img/s"
        )
        self._progress.update(self._task, news=news)


def result_table(finals: Mapping[str, Row]) -> Table:
    """One column per run: accuracy, speed, and the sparsity of every kernel."""
    table = Table()
    table.add_column("")
    for name in finals:
        table.add_column(name, justify="right")

    def line(label: str, cells: list[str], **style: Any) -> None:
        table.add_row(label, *cells, **style)

    rows = list(finals.values())
    line("test accuracy", [f"{row['test_accuracy_recalibrated']:.2%}" for row in rows], style="bold")
    line("  with running BatchNorm statistics", [f"{row['test_accuracy']:.2%}" for row in rows])
    line("training loss", [f"{row['train_loss']:.4f}" for row in rows])
    line("seconds", [f"{row['seconds']:.1f}" for row in rows])
    line("images/s", [_speed(row) for row in rows], end_section=True)
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    if not names:
        line("sparsity", ["dense" for _ in rows])
        return table
    totals = [_fraction([sum(column) for column in zip(*row["layers"].values(), strict=True)]) for row in rows]
    line("sparsity of all kernels", totals, style="bold")
    for name in names:
        line(f"  {name}", [_fraction(row["layers"].get(name)) for row in rows])
    return table


def _speed(row: Row) -> str:
    """There is none for a first epoch alone."""
    return f"{row['images_per_second']:,.0f}" if "images_per_second" in row else "-"


def _fraction(zeros_and_size: list[int] | None) -> str:
    return "-" if not zeros_and_size else f"{zeros_and_size[0] / zeros_and_size[1]:.2%}"

"""Rows: one JSON object on each line of a file, added as soon as it is known. Pages and figures are made from them."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.rows import files

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


def read(file: Path, fields: Sequence[str] = ()) -> list[Row]:
    """All rows; none if there is no such file.

    Raises:
      ValueError: naming the first line that is no row, or none that has these fields.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, is not a row: one JSON object was expected ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}, is not a row: one JSON object was expected; got {row!r}.")
        if lacking := [field for field in fields if field not in row]:
            raise ValueError(f"{file}, line {number}, is a row of another kind: it lacks {', '.join(lacking)}.")
        rows.append(row)
    return rows


def write(file: Path, rows: Iterable[Row]) -> None:
    """All rows, in place of those that the file had."""
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def append(file: Path, *rows: Row) -> None:
    """Adds rows, and the folder if it is missing."""
    with files.locked(file), file.open("a+b") as stream:  # of others, none in the middle of it
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            unfinished = stream.read() != b"\n"  # by an editor, or a disk that was full
            stream.write(b"\n" * unfinished)
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())

"""Rows: a JSON object a line, added as soon as it is known. Pages and figures of results are made from them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(file: Path) -> list[dict[str, Any]]:
    """All rows; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def append(file: Path, *rows: dict[str, Any]) -> None:
    """Adds rows, and the folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))

"""Files that are written as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda path: path.write_text(text))


def write_whole(file: Path, save: Callable[[Path], Any]) -> None:
    """Saves under another name first, so that the file is replaced at once or not at all; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save(partial)
    os.replace(partial, file)

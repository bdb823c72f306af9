"""Files that are written as a whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_whole(file: Path, save: Callable[[Path], Any]) -> None:
    """Saves under another name first, so that the file is replaced at once or not at all; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # other processes may be writing theirs
    try:
        save(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Other processes wait here, while one changes a file of the folder by what it has read there."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

"""What pages of results have in common: tables in Markdown, and where their figures are from."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.rows.jsonl import Row


def table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """A line for the header and each row; an empty cell takes no more room than it needs."""
    body = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in rows)
    return "\n".join([f"| {' | '.join(header)} |", "|" + f"{rule}|" * len(header), *body])


def picture(file: Path) -> str:
    """A figure that lies beside the page."""
    return f"![{file.stem.replace('_', ' ')}]({file.name})"


def wrapped(text: str) -> str:
    """Paragraphs in lines that fit on a screen."""
    fill = textwrap.TextWrapper(width=120, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(map(fill, text.split("\n\n")))


def values(rows: Iterable[Row], field: str) -> str:
    """All that rows have as a field, once each and in order; ``none`` for an empty text."""
    return ", ".join(sorted({str(row[field]) or "none" for row in rows}))


def source(rows: Iterable[Row], command: str, name: str) -> str:
    """The devices, and the command that makes the page from the file of that name; the sentence may go on."""
    return f"Device: {values(rows, 'device')}. Made by `python -m experiments.{command}` from `{name}`"

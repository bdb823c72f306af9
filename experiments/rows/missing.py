"""What a file of rows still lacks, and whether what it has was made as is asked for now."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from experiments.config import check_same
from experiments.rows.jsonl import Row

Key = TypeVar("Key", bound=Hashable)


def of(
    file: Path,
    have: Mapping[Key, Row],
    wanted: Mapping[Key, dict[str, Any]],
    advice: str = "Give another file as --rows.",
) -> list[Key]:
    """The keys without a row, in their order.

    Args:
      file: where the rows are from, for the message.
      have: rows by what they are of.
      wanted: by the same keys, fields that a row must have with their values, ``config`` among them as a ``Config``.
      advice: how to go on where one has others.

    Raises:
      ValueError: naming in what a row was made otherwise. It is neither replaced nor passed off as what is asked for.
    """
    for key in (key for key in wanted if key in have):
        fields, row = dict(wanted[key]), have[key]
        what = f"{file} has a row of {', '.join(map(str, key)) if isinstance(key, tuple) else key}, but of"
        if (config := fields.pop("config", None)) is not None:
            check_same(row["config"], config, what, advice)
        if differing := [f"{f}={row.get(f)}, not {value}" for f, value in fields.items() if row.get(f) != value]:
            raise ValueError(f"{what} {'; '.join(differing)}. {advice}")
    return [key for key in wanted if key not in have]

"""Whether rows can stand on one page: what they may differ in, and nothing else."""

from collections.abc import Collection, Sequence

from experiments.config import choices, differing
from experiments.rows.jsonl import Row


def check(rows: Sequence[Row], measured: Collection[str], free: Collection[str]) -> None:
    """Checks that rows differ only in their seeds and in the fields of the config that are ``free``.

    Args:
      rows: with their ``config`` as JSON.
      measured: the fields of a row, beside its config, that say how it was measured.
      free: fields of the config.

    Raises:
      ValueError: naming what else differs.
    """
    chosen = [choices(row["config"]) | {field: row.get(field) for field in measured} for row in rows]
    if different := [field for field in differing(chosen) if field not in free]:
        raise ValueError(
            f"Runs of one table must differ in {', '.join(free)} and seed alone; these also differ in "
            f"{', '.join(different)}. Leave some out, or give other --rows."
        )

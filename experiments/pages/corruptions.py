"""Accuracy under common corruptions, of optimizers side by side: the page of experiments.robustness."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.config import LABELS
from experiments.datasets.corruptions import CORRUPTIONS
from experiments.figures import robustness
from experiments.pages import markdown
from experiments.rows import alike, files, jsonl, spread
from experiments.rows.jsonl import Row

KINDS = {"noise": CORRUPTIONS[:3], "blur": CORRUPTIONS[3:7], "weather": CORRUPTIONS[7:11], "digital": CORRUPTIONS[11:]}


def check(rows: Sequence[Row]) -> None:
    """What stands in one table differs in optimizer and seed alone, and is of the same images and corruptions.

    Raises:
      ValueError: naming what else differs.
    """
    measured = [row | {"corruptions": list(row["by_corruption"])} for row in rows]
    alike.check(measured, ("examples", "corruptions"), ("optimizer",))


def table(rows: list[Row]) -> str:
    """Means over seeds in per cent; gains over SGD are paired by seed, with their 95 % interval."""
    names = list(accuracies(rows[0]))
    header = ["optimizer", "seeds", *names, "gain, clean", "gain, corrupted", "pairs"]
    lines = []
    by_optimizer: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        by_optimizer.setdefault(row["optimizer"], {})[row["seed"]] = accuracies(row)
    base = by_optimizer.get("sgd", {})
    for optimizer, mine in by_optimizer.items():
        other = {} if optimizer == "sgd" else base
        gains = [spread.gains(*({seed: of[seed][name] for seed in of} for of in (mine, other))) for name in names[:2]]
        means = [f"{np.mean([figures[name] for figures in mine.values()]):.1f}" for name in names]
        shown = [spread.with_interval(differences) for differences in gains]
        lines.append([LABELS[optimizer], str(len(mine)), *means, *shown, str(len(gains[0]))])
    return markdown.table(header, lines, rule=" --- ")


def accuracies(row: Row) -> dict[str, float]:
    """Accuracies of a run in per cent: clean, mean over all corruptions, and over those of each kind that it has."""
    each = row["by_corruption"]
    kinds = {kind: [each[name] for name in names if name in each] for kind, names in KINDS.items()}
    found = {"clean": row["clean_accuracy"], "corrupted": row["mean_corruption_accuracy"]}
    found |= {kind: float(np.mean(values)) for kind, values in kinds.items() if values}
    return {name: 100 * value for name, value in found.items()}


def write(file: Path) -> None:
    """The page, from the rows alone."""
    rows = jsonl.read(file)
    check(rows)
    first = rows[0]
    config, command = first["config"], f"robustness RUN RUN ... --examples {first['examples']} --rows {file.name}"
    title = f"{config['dataset']}, {config['method']} at {100 * config['sparsity']:g} %"
    robustness.draw_corruptions(rows, f"{title}; ± deviation over seeds", file.with_suffix(".png"))
    page = (
        f"# Robustness of sparse networks to corruptions, {config['dataset']}\n\n"
        f"{config['model']} of width {config['width']}, {config['method']} at {100 * config['sparsity']:g} %, "
        f"{config['epochs']} epochs on {config['subset'] or 'all'} images; rho {config['rho']:g}. Accuracy (%) on the "
        f"first {first['examples']} test images, clean and under {len(first['by_corruption'])} corruptions at 5 "
        f"severities, computed here; missing: {', '.join(first['missing'])}. Means over seeds; gains over SGD "
        f"are paired by seed, with their 95 % interval.\n\n{table(rows)}\n\n"
        f"{markdown.source(rows, command, file.name)}, which holds config, versions and commit of each row.\n\n"
        f"![Accuracy under each corruption]({file.with_suffix('.png').name})\n"
    )
    files.write_text(file.with_suffix(".md"), page)

"""A table of a paper with ours beside it, and what was run: the page of experiments.table."""

from pathlib import Path
from typing import Any

from experiments import recipes
from experiments.config import LABELS
from experiments.figures import tables
from experiments.pages import markdown, rendering
from experiments.rows import comparison, files, jsonl, spread
from experiments.rows.jsonl import Row

# Tables whose gains are drawn once more: against the share of zeros, or side by side.
GAINS = {
    "sparsities": tables.draw_gains,
    "rebuttal-sweep": tables.draw_gains,
    "label-noise": tables.draw_prices,
    "label-noise-adamw": tables.draw_prices,
    "label-noise-cifar10": tables.draw_prices,
}
POOLED = ("methods", "sparsities")  # Tables whose cells ask the same question, so that their mean answers it.
LEVEL = 0.005  # Points that are printed as none.
BEST = (
    "Best is of the epoch that is best on the test set: chosen on test images, so too high, and without recalibration, "
    "which S2-SAM of a large radius needs (its running statistics are of perturbed weights)."
)


def write(file: Path) -> None:
    """Page, figures and plots beside the rows' file, from the rows alone."""
    rows = jsonl.read(file)
    lines, title = comparison.compare(rows), file.stem.replace("_", ", ")
    head = _head(rows, file) + (_pooled(lines) if file.stem.split("_")[0] in POOLED else "")
    drawn = {file.with_suffix(".png"): tables.draw_comparison}
    if drawing := GAINS.get(file.stem.rsplit("_", 1)[0]):
        drawn[file.with_name(f"{file.stem}_gains.png")] = drawing
    for figure, draw in drawn.items():
        draw(lines, title, figure)
    parts = [
        f"# {title}",
        markdown.wrapped(head),
        rendering.markdown(lines),
        *(markdown.picture(figure) for figure in drawn if figure.exists()),
    ]
    files.write_text(file.with_suffix(".md"), "\n\n".join(parts) + "\n")
    files.write_text(file.with_suffix(".csv"), rendering.comma_separated(lines))


def _head(rows: list[Row], file: Path) -> str:
    table, scale = file.stem.rsplit("_", 1)
    best = f" {BEST}" if any(row.get("best") is not None for row in rows) else ""
    small = "" if scale == "full" else " Smaller than the paper's, so its figures cannot be compared with these."
    device, flags = markdown.values(rows, "device"), markdown.values(rows, "xla_flags")
    command = f"experiments.table {table} --scale {scale}{_data(rows)}{_tuned(rows)}"
    return (
        f"Ours: {_size([row['config'] for row in rows])}.{small} After the last epoch, BatchNorm recalibrated; mean ± "
        f"standard deviation over seeds. Gains are over {_baselines(rows)}; ours are paired by seed.{best}\n\n"
        f"Device: {device}; XLA flags: `{flags}`; {_versions(rows)}. {_effort(rows)}\n\n"
        f"Made by `python -m {command}` from `{file.name}`, which holds config, versions and commit of each run."
    )


def _size(configs: list[dict[str, Any]]) -> str:
    """What says how large the runs were; a field that none has set is left out."""
    fields = ("dataset", "model", "width", "subset", "epochs", "batch_size", "label_noise")
    said = [field for field in fields if any(config.get(field) for config in configs)]
    return ", ".join(f"{field.replace('_', ' ')} {markdown.values(configs, field)}" for field in said)


def _versions(rows: list[Row]) -> str:
    each = (", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows)
    return "; or ".join(sorted(set(each)))


def _pooled(lines: list[comparison.Line]) -> str:
    """A sentence on each optimizer. The interval is over cells, whatever the number of pairs in them."""
    sentences = []
    for optimizer, gains in comparison.pooled(lines).items():
        ahead, behind = sum(gain > LEVEL for gain in gains), sum(gain < -LEVEL for gain in gains)
        sentences.append(
            f"{LABELS[optimizer]} minus its baseline, mean over {len(gains)} cells with its 95 % interval: "
            f"{spread.with_interval(gains)}; ahead in {ahead}, behind in {behind}"
            + (f", level in {level}." if (level := len(gains) - ahead - behind) else ".")
        )
    return "\n\n" + " ".join(sentences)


def _data(rows: list[Row]) -> str:
    """Digits come with scikit-learn."""
    return "" if {row["config"]["dataset"] for row in rows} == {"digits"} else " --data PATH"


def _tuned(rows: list[Row]) -> str:
    """Whether a radius is another than its recipe's."""
    known = [(recipes.RECIPES.get(row["recipe"]["name"]), row["config"]["rho"]) for row in rows]
    return " --tuned ROWS" if any(recipe and recipe.config.rho != rho for recipe, rho in known) else ""


def _baselines(rows: list[Row]) -> str:
    optimizers = {row["recipe"]["name"]: row["recipe"]["optimizer"] for row in rows}
    found = {optimizers.get(row["recipe"]["baseline"], "sgd") for row in rows}
    plain = ", ".join(sorted({LABELS[row["config"].get("base", "sgd")] for row in rows}))
    return f"the row of {plain}" + ("" if found == {"sgd"} else ", of SSAM over that of SAM")


def _effort(rows: list[Row]) -> str:
    """Commits and time, as far as the rows have them."""
    if not all({"commit", "seconds"} <= row.keys() for row in rows):
        return ""
    commits = dict.fromkeys(f"{str(row['commit'])[:7]}{'+' * str(row['commit']).endswith('+')}" for row in rows)
    hours = sum(row["seconds"] for row in rows) / 3600
    changed = " (+: with changes that were not committed)" if any(commit.endswith("+") for commit in commits) else ""
    return f"{len(rows)} runs, {hours:.1f} hours in all; commits {', '.join(commits)}{changed}."

"""Ra, eigenvalues and accuracy of many solutions, and SGD's beside the others': the page of experiments.flatness."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.config import LABELS
from experiments.config.variants import ROUNDS
from experiments.figures import against_sparsity
from experiments.pages import markdown
from experiments.rows import alike, files, jsonl, spread
from experiments.rows.jsonl import Row


def check(rows: Sequence[Row]) -> None:
    """What stands on one page differs in method, sparsity, optimizer and seed alone, and was measured alike.

    Raises:
      ValueError: naming what else differs.
    """
    free = ("method", "sparsity", "optimizer")
    if any(row["config"].get("method") in ROUNDS for row in rows):
        free += ("epochs",)  # a lottery trains several times
    alike.check(rows, ("examples", "span", "n", "steps", "sharpness_rho"), free)


def table(rows: list[Row]) -> str:
    """Means and standard deviations over seeds."""
    columns = {
        "accuracy (%)": ("test_accuracy_recalibrated", 100.0),
        "Ra, live weights": ("roughness", 1.0),
        "Ra, pruned ones too": ("roughness_pruned_move", 1.0),
        "λ1": ("largest_eigenvalue", 1.0),
        "λ1/λ5": ("eigenvalue_ratio", 1.0),
        "trace": ("trace", 1.0),
        "SAM's sharpness": ("sam_sharpness", 1.0),
    }
    lines = []
    for (method, sparsity, optimizer), mine in _by_cell(rows).items():
        cells = [
            spread.figure(
                *spread.mean([scale * row[field] for row in mine if row[field] is not None]),
                form=".4g",
                spread_form=".2g",
            )
            for field, scale in columns.values()
        ]
        lines.append([method, f"{100 * sparsity:g}", LABELS.get(optimizer, optimizer), *cells, str(len(mine))])
    return markdown.table(["method", "zeros (%)", "optimizer", *columns, "seeds"], lines)


def claims(rows: list[Row]) -> str:
    """The paper's two claims beside our means; an optimizer is compared with SGD over the seeds that both have."""
    cells = _by_cell(rows)
    of_sgd = {(method, zeros): mine for (method, zeros, optimizer), mine in cells.items() if optimizer == "sgd"}
    others = dict.fromkeys(optimizer for _, _, optimizer in cells if optimizer != "sgd")
    parts = ["The paper has Ra grow with the sparsity, and lower with S2-SAM than without."]
    if of_sgd:
        parts += ["Ra with SGD, means over seeds, against the share of zeros:", _roughness(of_sgd)]
    if of_sgd and others:
        said = "In how many cells it is below SGD's, and how many times SGD's it is over cells (geometric mean, 95 % "
        compared = [[LABELS.get(optimizer, optimizer), *_compared(cells, of_sgd, optimizer)] for optimizer in others]
        columns = [f"{label}{what}" for label in MEASURES.values() for what in (": below", " / SGD's")]
        parts += [f"{said}interval):", markdown.table(["optimizer", *columns], compared)]
    return "\n\n".join(parts)


MEASURES = {"roughness": "Ra", "largest_eigenvalue": "λ1", "trace": "trace"}


def _roughness(of_sgd: dict[tuple[str, float], list[Row]]) -> str:
    sparsities = sorted({zeros for _, zeros in of_sgd})
    lines = [
        [method]
        + [
            f"{statistics.mean(row['roughness'] for row in of_sgd[method, zeros]):.3g}" if (method, zeros) in of_sgd
            else spread.MISSING
            for zeros in sparsities
        ]
        for method in dict.fromkeys(method for method, _ in of_sgd)
    ]  # fmt: skip
    return markdown.table(["method", *(f"{100 * zeros:g} %" for zeros in sparsities)], lines)


def _compared(
    cells: dict[tuple[str, float, str], list[Row]], of_sgd: dict[tuple[str, float], list[Row]], optimizer: str
) -> list[str]:
    """For each measure, in how many cells it is below SGD's, and how many times SGD's it is."""
    pairs = [(mine, of_sgd.get((m, zeros), [])) for (m, zeros, o), mine in cells.items() if o == optimizer]
    found = []
    for field in MEASURES:
        both = _paired(pairs, field)
        below = sum(statistics.mean(mine - base for mine, base in cell) < 0 for cell in both)
        found += [f"{below} of {len(both)}", _ratio(both)]
    return found


def _ratio(both: list[list[tuple[float, float]]]) -> str:
    """The geometric mean over cells of how many times SGD's the measure is, with its 95 % interval."""
    means = [map(statistics.mean, zip(*cell, strict=True)) for cell in both]
    logs = [math.log(mine / base) for mine, base in means if mine > 0 and base > 0]
    average, deviation = spread.mean(logs)
    half = spread.interval(deviation, len(logs))
    if average is None or half is None:
        return spread.MISSING
    return f"{math.exp(average):.2f} ({math.exp(average - half):.2f} to {math.exp(average + half):.2f})"


def _paired(pairs: list[tuple[list[Row], list[Row]]], field: str) -> list[list[tuple[float, float]]]:
    """The values of each cell that has seeds in common with SGD's, seed by seed."""
    of_seeds = [[{row["seed"]: row[field] for row in rows} for rows in pair] for pair in pairs]
    return [both for mine, base in of_seeds if (both := spread.paired(mine, base))]


def _by_cell(rows: list[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """The rows of all seeds, by method, sparsity and optimizer."""
    cells: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["sparsity_asked"], row["optimizer"]), []).append(row)
    return cells


def write(file: Path) -> None:
    """Page and figures, from the rows alone."""
    rows = jsonl.read(file)
    check(rows)
    first, config = rows[0], rows[0]["config"]
    options = f"--rows {file.name} --examples {first['examples']} --n {first['n']} --steps {first['steps']}"
    command = "flatness" if config["dataset"] == "digits" else f"flatness --runs RUN RUN ... {options}"
    head = (
        f"{config['model']} of width {config['width']}, {config['epochs']} epochs; rho {config['rho']:g}, SSAM "
        f"perturbs half. Loss of {first['examples']} training images without augmentation, BatchNorm in evaluation "
        f"mode. Ra: {first['n']} x {first['n']} points, from -{first['span']:g} to {first['span']:g} filter norms "
        "along two random directions, those of one seed for all. Eigenvalues of the Hessian of the live weights: "
        f"{first['steps']} Lanczos steps.\n\n"
        f"{markdown.source(rows, command, file.name)}, which holds config, versions and commit of each run."
    )
    figures = [file.with_name(f"{file.stem}_{quantity.field}.png") for quantity in against_sparsity.FLATNESS]
    for figure, quantity in zip(figures, against_sparsity.FLATNESS, strict=True):
        against_sparsity.draw(rows, quantity, quantity.title, figure)
    parts = [
        f"# Flatness of sparse solutions on {config['dataset']}",
        markdown.wrapped(head),
        claims(rows),
        *map(markdown.picture, figures),
        "Mean ± standard deviation over seeds:",
        table(rows),
    ]
    files.write_text(file.with_suffix(".md"), "\n\n".join(parts) + "\n")

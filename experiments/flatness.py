"""Are solutions flatter with S2-SAM, and rougher with more zeros? Ra, eigenvalues and accuracy.

    python -m experiments.flatness
    python -m experiments.flatness --runs runs/SOME_RUN runs/OTHER_RUN --rows OTHER_ROWS

Trains on digits what is missing in the rows file, or looks at finished runs, and rewrites table and figures beside it
from the rows alone.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

from rich.progress import track

from experiments import cli, solution, spectrum, surface, tasks
from experiments.config import LABELS, Config, OptimizerName
from experiments.figures import against_sparsity
from experiments.recipes import methods
from experiments.rows import files, jsonl, missing, pages, provenance, spread
from experiments.rows.jsonl import Row
from experiments.training import loop, runs
from experiments.training.record import Last

Cell = tuple[str, OptimizerName, float, int]
CELL = ("method", "optimizer", "sparsity_asked", "seed")
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "sam", "ssam-f", "ssam-d", "s2sam")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, how they are measured, and where the rows go."""

    methods: tuple[str, ...] = ("static", "rigl", "mest-em")
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)  # Which ones, not how many.
    runs: tuple[Path, ...] = ()  # Folders of finished runs, to be looked at in place of all that.
    data: Path | None = None  # Where their data set lies, if no longer where it was.
    examples: int = 512  # Training images that the loss is the mean of.
    span: float = 1.0
    n: int = 15
    steps: int = 30  # Of Lanczos.
    samples: int = 10  # For the trace.
    rows: Path = jsonl.RESULTS / "flatness_digits.jsonl"
    cache: Path = cli.COMPILED  # Compiled programs: the seeds of a cell share them.


def config_of(method: str, optimizer: OptimizerName, sparsity: float, seed: int) -> Config:
    """The small scale of the table methods; MEST with the profile that was released for 98 %, from there on."""
    own = "mest-em-98" if method == "mest-em" and sparsity >= 0.98 else method
    return methods.config_of(own, optimizer, sparsity, seed)


def measured(config: Config, loaded: Any, arguments: Arguments) -> dict[str, Any]:
    """Trains, and looks at what came out."""
    task, reporter = tasks.make(config, loaded), Last()
    state = loop.train(config, task, reporter)
    return reporter.last | looked_at(solution.of_state(config, task, state, arguments.examples), config, arguments)


def looked_at(found: solution.Solution, config: Config, arguments: Arguments) -> dict[str, Any]:
    """Along live weights alone, and with pruned ones moving too."""
    grid: Any = {"span": arguments.span, "n": arguments.n, "seed": 0}
    live, whole = surface.measure(found, pruned=False, **grid), surface.measure(found, pruned=True, **grid)
    options: Any = {"steps": arguments.steps, "samples": arguments.samples}
    curvature = spectrum.measure(found, rho=config.rho, seed=0, pruned=False, **options)
    values = curvature["eigenvalues"]
    return {
        **live,
        **curvature,
        "examples": len(found.batches) * config.batch_size,
        "roughness_pruned_move": whole["roughness"],
        "largest_eigenvalue": values[0],
        "eigenvalue_ratio": values[0] / values[4] if len(values) > 4 else None,
    }


def run(arguments: Arguments) -> None:
    """Each row is written as soon as it is there.

    Raises:
      ValueError: for a row of the same method, optimizer, sparsity and seed that is otherwise another one, or was
        measured otherwise: the figures could not tell them apart.
    """
    have = {_cell_of(row): row for row in jsonl.read(arguments.rows, (*CELL, "examples", "config"))}
    if arguments.runs:
        _run_on_folders(arguments, have)
    else:
        _run_on_digits(arguments, have)


def _cell_of(row: Row) -> Cell:
    method, optimizer, sparsity, seed = (row[field] for field in CELL)
    return method, optimizer, sparsity, seed


def _wanted(config: Config, arguments: Arguments) -> Row:
    """What a row must say of itself."""
    measured = {field: getattr(arguments, field) for field in ("span", "n", "steps")}
    measured["sharpness_rho"] = config.rho  # read by the measure, if not by SGD
    examples = min(arguments.examples, config.subset or arguments.examples)
    return {"config": config, "examples": examples // config.batch_size * config.batch_size} | measured


def _run_on_folders(arguments: Arguments, have: dict[Cell, Row]) -> None:
    for folder in track(arguments.runs, description="runs"):
        config = runs.read_config(folder)
        cell = config.method, config.optimizer, config.sparsity, config.seed
        if missing.of(arguments.rows, have, {cell: _wanted(config, arguments)}):
            config, found = solution.of_run(folder, arguments.data, arguments.examples)
            figures = runs.rows(folder)[-1] | looked_at(found, config, arguments)
            have[cell] = _store(cell, config, figures, arguments.rows)


def _run_on_digits(arguments: Arguments, have: dict[Cell, Row]) -> None:
    cells: list[Cell] = [
        (method, optimizer, sparsity, seed)
        for method in arguments.methods
        for sparsity in arguments.sparsities
        for optimizer in arguments.optimizers
        for seed in arguments.seeds
    ]
    loaded = tasks.load(Config())
    wanted = {cell: _wanted(config_of(*cell), arguments) for cell in cells}
    for cell in track(missing.of(arguments.rows, have, wanted), description="runs"):
        config = config_of(*cell)
        _store(cell, config, measured(config, loaded, arguments), arguments.rows)


def _store(cell: Cell, config: Config, figures: dict[str, Any], file: Path) -> Row:
    method, optimizer, sparsity, _ = cell
    row = {"method": method, "optimizer": optimizer, "sparsity_asked": sparsity} | figures | provenance.of_run(config)
    jsonl.append(file, row)
    return row


def table(rows: list[dict[str, Any]]) -> str:
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
    return pages.table(["method", "zeros (%)", "optimizer", *columns, "seeds"], lines)


def claims(rows: list[dict[str, Any]]) -> str:
    """The paper's two claims beside what the means are, of an optimizer and of SGD over the seeds that both have."""
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
        parts += [f"{said}interval):", pages.table(["optimizer", *columns], compared)]
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
    return pages.table(["method", *(f"{100 * zeros:g} %" for zeros in sparsities)], lines)


def _compared(
    cells: dict[tuple[str, float, str], list[Row]], of_sgd: dict[tuple[str, float], list[Row]], optimizer: str
) -> list[str]:
    """Two entries for each measure."""
    pairs = [(mine, of_sgd.get((m, zeros), [])) for (m, zeros, o), mine in cells.items() if o == optimizer]
    found = []
    for field in MEASURES:
        both = _paired(pairs, field)
        below = sum(statistics.mean(mine - base for mine, base in cell) < 0 for cell in both)
        found += [f"{below} of {len(both)}", _ratio(both)]
    return found


def _ratio(both: list[list[tuple[float, float]]]) -> str:
    """Of the means of each cell, over several cells."""
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


def _by_cell(rows: list[dict[str, Any]]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """The rows of all seeds, by method, sparsity and optimizer."""
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["sparsity_asked"], row["optimizer"]), []).append(row)
    return cells


def write(file: Path) -> None:
    """Page and figures, from the rows alone."""
    rows = jsonl.read(file)
    first, config = rows[0], rows[0]["config"]
    head = (
        f"{config['model']} of width {config['width']}, {config['epochs']} epochs; rho {config['rho']:g}, SSAM "
        f"perturbs half. Loss of {first['examples']} training images without augmentation, BatchNorm in evaluation "
        f"mode. Ra: {first['n']} x {first['n']} points, from -{first['span']:g} to {first['span']:g} filter norms "
        "along two random directions, those of one seed for all. Eigenvalues of the Hessian of the live weights: "
        f"{first['steps']} Lanczos steps.\n\n"
        f"{pages.source(rows, 'flatness', file.name)}, which holds config, versions and commit of each run."
    )
    figures = [file.with_name(f"{file.stem}_{quantity.field}.png") for quantity in against_sparsity.FLATNESS]
    for figure, quantity in zip(figures, against_sparsity.FLATNESS, strict=True):
        against_sparsity.draw(rows, quantity, quantity.title, figure)
    parts = [
        f"# Flatness of sparse solutions on {config['dataset']}",
        pages.wrapped(head),
        claims(rows),
        *map(pages.picture, figures),
        "Mean ± standard deviation over seeds:",
        table(rows),
    ]
    files.write_text(file.with_suffix(".md"), "\n\n".join(parts) + "\n")


@cli.command
def main(arguments: Arguments) -> None:
    cli.keep_compiled(arguments.cache)
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main()

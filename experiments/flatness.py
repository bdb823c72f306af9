"""Are solutions flatter with S2-SAM, and rougher with more zeros? Ra, eigenvalues and accuracy.

    python -m experiments.flatness
    python -m experiments.flatness --runs runs/SOME_RUN runs/OTHER_RUN --rows OTHER_ROWS

Trains on digits what is missing in the rows file, or looks at finished runs, and rewrites table and figures beside it
from the rows alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import track

from experiments import cli, solution, spectrum, surface, tasks
from experiments.config import Config, OptimizerName
from experiments.pages import flatness as page
from experiments.recipes import methods
from experiments.rows import jsonl, missing, provenance
from experiments.rows.jsonl import Row
from experiments.training import loop, runs
from experiments.training.record import Last

Cell = tuple[str, OptimizerName, float, int]
CELL = ("method", "optimizer", "sparsity_asked", "seed")
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "sam", "ssam-f", "ssam-d", "s2sam")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures how flat the solutions of runs on digits, or of finished runs, are."""

    methods: tuple[str, ...] = ("static", "rigl", "mest-em")  # A network is trained for each combination of these four.
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)  # Which ones, not how many.
    runs: tuple[Path, ...] = ()  # Folders of finished runs, to be looked at in place of all that.
    data: Path | None = None  # Where their data set lies, if no longer where it was.
    examples: int = 512  # Training images over which the loss is averaged.
    span: float = 1.0  # The grid of losses runs from -span to span filter norms.
    n: int = 15  # Points along each of the two directions.
    steps: int = 30  # Of the Lanczos iteration that gives eigenvalues.
    samples: int = 10  # Random vectors that the trace is estimated from.
    rows: Path = jsonl.RESULTS / "flatness_digits.jsonl"  # File that rows are added to; the page is written beside it.
    cache: Path = cli.COMPILED  # Folder of compiled programs, which the seeds of a cell share.


def config_of(method: str, optimizer: OptimizerName, sparsity: float, seed: int) -> Config:
    """The small scale of the table methods; MEST with the profile that was released for 98 %, from there on."""
    own = "mest-em-98" if method == "mest-em" and sparsity >= 0.98 else method
    return methods.config_of(own, optimizer, sparsity, seed)


def measured(config: Config, loaded: Any, arguments: Arguments) -> dict[str, Any]:
    """Trains a network and measures its solution."""
    task, reporter = tasks.make(config, loaded), Last()
    state = loop.train(config, task, reporter)
    return reporter.last | looked_at(solution.of_state(config, task, state, arguments.examples), config, arguments)


def looked_at(found: solution.Solution, config: Config, arguments: Arguments) -> dict[str, Any]:
    """Roughness along live weights, and with pruned ones moving too; curvature of live weights."""
    grid: Any = {"span": arguments.span, "n": arguments.n, "seed": 0}
    live, whole = surface.measure(found, pruned=False, **grid), surface.measure(found, pruned=True, **grid)
    options: Any = {"steps": arguments.steps, "samples": arguments.samples}
    curvature = spectrum.measure(found, rho=config.rho, seed=0, pruned=False, **options)
    return {
        **live,
        **curvature,
        "examples": len(found.batches) * config.batch_size,
        "roughness_pruned_move": whole["roughness"],
        "largest_eigenvalue": curvature["eigenvalues"][0],
    }


def run(arguments: Arguments) -> None:
    """Measures what has no row yet; each row is written as soon as it is there.

    Raises:
      ValueError: for a row of the same method, optimizer, sparsity and seed that is otherwise another one, or was
        measured otherwise: the figures could not tell them apart; and for runs that cannot stand on one page.
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
    """The fields that tell how a row was measured, with the values asked for."""
    measured = {field: getattr(arguments, field) for field in ("span", "n", "steps")}
    measured["sharpness_rho"] = config.rho  # read by the measure, if not by SGD
    examples = min(arguments.examples, config.subset or arguments.examples)
    return {"config": config, "examples": examples // config.batch_size * config.batch_size} | measured


def _check(wanted: Iterable[tuple[Cell, Row]], have: Mapping[Cell, Row], file: Path) -> None:
    """Before anything is measured: no row is of another run or measured otherwise, and all can stand on one page."""
    rows = list(have.values())
    for cell, fields in wanted:
        missing.of(file, have, {cell: fields})
        rows.append(fields | {"config": fields["config"].to_json()})
    page.check(rows)


def _run_on_folders(arguments: Arguments, have: dict[Cell, Row]) -> None:
    configs = [runs.read_config(folder) for folder in arguments.runs]
    wanted: list[tuple[Cell, Row]] = [
        ((c.method, c.optimizer, c.sparsity, c.seed), _wanted(c, arguments)) for c in configs
    ]
    _check(wanted, have, arguments.rows)
    for folder, (cell, _) in track(list(zip(arguments.runs, wanted, strict=True)), description="runs"):
        if cell not in have:
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
    _check(wanted.items(), have, arguments.rows)
    for cell in track([cell for cell in cells if cell not in have], description="runs"):
        config = config_of(*cell)
        _store(cell, config, measured(config, loaded, arguments), arguments.rows)


def _store(cell: Cell, config: Config, figures: dict[str, Any], file: Path) -> Row:
    method, optimizer, sparsity, _ = cell
    row = {"method": method, "optimizer": optimizer, "sparsity_asked": sparsity} | figures | provenance.of_run(config)
    jsonl.append(file, row)
    return row


@cli.command
def main(arguments: Arguments) -> None:
    cli.keep_compiled(arguments.cache)
    run(arguments)
    page.write(arguments.rows)


if __name__ == "__main__":
    main()

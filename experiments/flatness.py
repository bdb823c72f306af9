"""Are solutions flatter with S2-SAM, and rougher with more zeros? Ra, eigenvalues and accuracy on digits.

    python -m experiments.flatness

Runs what is missing in the rows file, and rewrites table and figures beside it from the rows alone.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.progress import track

from experiments import landscapes, loop, runs, solution, spectrum, surface, sweep, tasks
from experiments.config import Config, OptimizerName

OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "sam", "ssam-f", "ssam-d", "s2sam")
FIGURES = (
    ("roughness", "Ra (nats)", "Roughness of the loss surface", 1.0, True),
    ("largest_eigenvalue", "λ1", "Largest eigenvalue of the Hessian", 1.0, True),
    ("test_accuracy_recalibrated", "accuracy (%)", "Test accuracy", 100.0, False),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, how they are measured, and where the rows go."""

    methods: tuple[str, ...] = ("static", "rigl", "mest-em")
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 512  # Training images that the loss is the mean of.
    span: float = 1.0
    n: int = 15
    steps: int = 30  # Of Lanczos.
    rows: Path = sweep.RESULTS / "flatness_digits.jsonl"
    cache: Path = Path("runs/compiled")  # Compiled programs: the seeds of a cell share them.


def config_of(method: str, optimizer: OptimizerName, sparsity: float, seed: int) -> Config:
    """The small scale of the sweep over methods; MEST with the profile that was released for 98 %, from there on."""
    own = "mest-em-98" if method == "mest-em" and sparsity >= 0.98 else method
    return sweep.config_of(own, optimizer, sparsity, seed)


def measured(config: Config, loaded: Any, arguments: Arguments) -> dict[str, Any]:
    """Trains, and looks at what came out: along live weights alone, and with pruned ones moving too."""
    task, reporter = tasks.make(config, loaded), sweep.Last()
    state = loop.train(config, task, reporter)
    found = solution.of_state(config, task, state, arguments.examples)
    grid: Any = {"span": arguments.span, "n": arguments.n, "seed": 0}
    live, whole = surface.measure(found, pruned=False, **grid), surface.measure(found, pruned=True, **grid)
    curvature = spectrum.measure(found, steps=arguments.steps, samples=10, rho=config.rho, seed=0, pruned=False)
    values = curvature["eigenvalues"]
    return {
        **reporter.last,
        **live,
        **curvature,
        "examples": arguments.examples,
        "roughness_pruned_move": whole["roughness"],
        "largest_eigenvalue": values[0],
        "eigenvalue_ratio": values[0] / values[4] if len(values) > 4 else None,
    }


def run(arguments: Arguments) -> None:
    """Each row is written as soon as it is there."""
    done = {sweep.cell_of(row) for row in sweep.read(arguments.rows)}
    cells: list[sweep.Cell] = [
        (method, optimizer, sparsity, seed)
        for method in arguments.methods
        for sparsity in arguments.sparsities
        for optimizer in arguments.optimizers
        for seed in arguments.seeds
    ]
    loaded = tasks.load(Config())
    for cell in track([cell for cell in cells if cell not in done], description="runs"):
        config = config_of(*cell)
        method, optimizer, sparsity, _ = cell
        row = {"method": method, "optimizer": optimizer, "sparsity_asked": sparsity}
        row |= runs.provenance(config) | measured(config, loaded, arguments)
        arguments.rows.parent.mkdir(parents=True, exist_ok=True)
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


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
    lines = [f"| method | zeros (%) | optimizer | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 4) + "|"]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["sparsity_asked"], row["optimizer"]), []).append(row)
    for (method, sparsity, optimizer), mine in groups.items():
        cells = [
            _spread([scale * row[field] for row in mine if row[field] is not None]) for field, scale in columns.values()
        ]
        lines.append(f"| {method} | {100 * sparsity:g} | {optimizer} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} ± {deviation:.2g}" if values else "–"


def write(file: Path) -> None:
    """Page and figures, from the rows alone."""
    rows = sweep.read(file)
    first = rows[0]
    head = (
        "# Flatness of sparse solutions on digits\n\n"
        "ResNet-8 of width 8, 20 epochs, as in the sweep over methods; rho 0.05, SSAM perturbs half. Loss of "
        f"{first['examples']} training images without augmentation, BatchNorm in evaluation mode. Ra: {first['n']} x "
        f"{first['n']} points, from -{first['span']:g} to {first['span']:g} filter norms along two random directions, "
        f"those of one seed for all. Eigenvalues of the Hessian of the live weights: {first['steps']} Lanczos steps. "
        "Mean ± standard deviation over seeds.\n\n"
        f"Device: {', '.join(sorted({row['device'] for row in rows}))}. Made by `python -m experiments.flatness` from "
        f"`{file.name}`, which holds config, versions and commit of each run.\n\n"
    )
    file.with_suffix(".md").write_text(head + table(rows) + "\n")
    for field, label, title, scale, logarithmic in FIGURES:
        figure = file.with_name(f"{file.stem}_{field}.png")
        landscapes.draw_against_sparsity(rows, field, label, title, figure, scale=scale, logarithmic=logarithmic)


def main(arguments: Arguments) -> None:
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main(tyro.cli(Arguments))

"""Figures of several runs, from their rows alone, as runs/KIND.png or --out.

python -m experiments.draw curves runs/digits-*                          # over the epochs, mean over seeds
python -m experiments.draw masks runs/SOME_RUN                           # which connections die and grow
python -m experiments.draw sparsity experiments/results/methods_full.jsonl
python -m experiments.draw surfaces runs/ONE_RUN runs/ANOTHER            # also spectra, ratios: side by side what
                                                                         # surface, spectrum and ratio have found
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure
from rich.console import Console

from experiments import cli, ratio, spectrum, surface
from experiments.figures import against_sparsity, curves, masks
from experiments.figures.against_sparsity import Quantity
from experiments.rows import jsonl
from experiments.rows.jsonl import Row
from experiments.training import runs

RUNS = Path("runs")  # Where figures go that nobody has named.
ANALYSES = {"surfaces": surface.ANALYSIS, "spectra": spectrum.ANALYSIS, "ratios": ratio.ANALYSIS}
SHOWN = {  # What a row must have for a kind of figure, beside its config and seed.
    "curves": ("epoch", "train_loss", "test_accuracy"),
    "surfaces": ("surface", "span", "n", "roughness"),
    "spectra": ("nodes", "weights"),
    "ratios": ("r_edges", "r_counts", "r_below_zero"),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draws a figure of the rows of finished runs, or of files of rows."""

    # curves: loss and accuracy over epochs. masks: which connections die and grow. sparsity: --field against sparsity.
    # surfaces, spectra, ratios: side by side what the commands surface, spectrum and ratio have found.
    kind: tyro.conf.Positional[Literal["curves", "masks", "sparsity", "surfaces", "spectra", "ratios"]]
    rows: tyro.conf.Positional[tuple[Path, ...]]  # Folders of runs, or files of rows.
    out: Path | None = None  # The figure's file, written anew if it is there; default: runs/KIND.png.
    field: str = "test_accuracy_recalibrated"  # For sparsity: a field of the rows with numbers, such as roughness.
    methods: tuple[str, ...] = ()  # For sparsity: only these; default: all.


def run(arguments: Arguments) -> Path:
    """Draws, and says where.

    Raises:
      ValueError: where the rows do not hold what the figure shows.
    """
    file, analysis = _file(arguments), ANALYSES.get(arguments.kind)
    name = runs.METRICS if analysis is None else analysis.rows
    fields = ("config", "seed", *SHOWN.get(arguments.kind, ()))
    rows = [row for path in arguments.rows for row in _read(path / name if path.is_dir() else path, fields)]
    if not rows:
        raise ValueError(f"There are no rows in {', '.join(map(str, arguments.rows)) or 'nothing'}.")
    groups = curves.grouped(rows)
    if arguments.kind == "curves" and len(groups) > curves.MOST:
        raise ValueError(f"{len(groups)} curves look alike; draw at most {curves.MOST} at a time.")
    if arguments.kind == "curves":
        curves.draw_curves(groups, _common(rows) + _zeros(rows), _in_folder(file))
    elif arguments.kind == "masks":
        if len({(label, row["seed"]) for label, mine in groups.items() for row in mine}) > 1:
            raise ValueError("Masks are drawn of one run; these rows are of several.")
        masks.draw_masks(rows, f"{_common(rows)}{_zeros(rows)}, {rows[0]['config']['optimizer']}", _in_folder(file))
    elif arguments.kind == "sparsity":
        _against_sparsity(rows, arguments, file)
    elif analysis is not None:
        found = {f"{label}, seed {row['seed']}": row for label, mine in groups.items() for row in mine}
        analysis.draw(found, _in_folder(file))
    return file


def _file(arguments: Arguments) -> Path:
    """Where the figure goes; a PNG where nothing says otherwise."""
    file = arguments.out or RUNS / arguments.kind
    file = file if file.suffix else file.with_suffix(".png")
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:] not in known:
        raise ValueError(f"--out must end in one of {', '.join(sorted(known))}; got {file}.")
    return file


def _in_folder(file: Path) -> Path:
    """The same file, once its folder is made: not before there is a figure to put there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _against_sparsity(rows: list[Row], arguments: Arguments, file: Path) -> None:
    """Draws the last row of each run; method, optimizer and sparsity are those of its config if it does not say."""
    finals = []
    for row in rows:
        config = row["config"]
        sparsity = 0.0 if config["method"] == "dense" else config["sparsity"]
        named = {"method": config["method"], "optimizer": config["optimizer"], "sparsity_asked": sparsity}
        if row.get("final", True) and isinstance(row.get(arguments.field), int | float):
            finals.append(named | row)
    finals = [row for row in finals if row["method"] in (arguments.methods or (row["method"],))]
    if not finals:
        of = f" and is of {', '.join(arguments.methods)}" if arguments.methods else ""
        raise ValueError(f"No row of a finished run has a number as {arguments.field}{of}.")
    cells = [(row["method"], row["optimizer"], row["sparsity_asked"], row["seed"]) for row in finals]
    if twice := {cell for cell in cells if cells.count(cell) > 1}:
        method, optimizer, sparsity, seed = min(twice)
        raise ValueError(
            f"Several rows are of {method}, {optimizer}, sparsity {sparsity:g} and seed {seed}: they differ in what "
            "this figure does not tell apart. Draw their files one by one."
        )
    plain = Quantity(arguments.field, label=arguments.field, title=arguments.field)
    quantity = next((known for known in against_sparsity.FLATNESS if known.field == arguments.field), plain)
    against_sparsity.draw(finals, quantity, f"{quantity.title}, {_common(rows)}", _in_folder(file))


def _common(rows: list[Row]) -> str:
    """Data sets and models of the runs."""
    found: dict[str, None] = dict.fromkeys(f"{row['config']['dataset']}, {row['config']['model']}" for row in rows)
    return "; ".join(found)


def _zeros(rows: list[Row]) -> str:
    """Method and sparsity, if the runs have them in common."""
    configs = [row["config"] for row in rows]
    found = {"dense" if c["method"] == "dense" else f"{c['method']}, {c['sparsity']:.0%} zeros" for c in configs}
    return f", {found.pop()}" if len(found) == 1 else ""


def _read(file: Path, fields: Sequence[str]) -> list[Row]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    return jsonl.read(file, fields)


@cli.command
def main(arguments: Arguments) -> Path:
    file = run(arguments)
    Console().print(f"File: {file}", soft_wrap=True)
    return file


if __name__ == "__main__":
    main()

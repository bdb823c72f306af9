"""Train steps as compiled for accelerators that are not there: the page of experiments.aot."""

from collections.abc import Callable
from pathlib import Path

from experiments.pages import markdown
from experiments.rows import files, jsonl
from experiments.rows.jsonl import Row

TITLES = {
    "networks": "ResNet-32 of 1.86 M parameters, 128 images of CIFAR-10",
    "weights": "An MLP of 113 M parameters, 8 examples",
    "methods": "The same MLP: every sparse method with S2-SAM, every sharpness-aware transformation dense",
    "sharded": "The same MLP on eight devices, its matrices cut up among them; of one device, gathered layers included",
}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "MB": lambda row: f"{row['peak_bytes'] / 1e6:,.1f}",
    "copies": lambda row: f"{row['peak_bytes'] / row['parameter_bytes']:.2f}",
    # A TPU's programs spell their copies out, and have products of matrices as convolutions.
    "kernels": lambda row: f"{row['kernels']:,}" if row["target"] == "h100" else "",
    "convolutions": lambda row: str(row["convolutions"] or "") if row["target"] == "h100" else "",
}


def table(rows: list[Row]) -> str:
    """A line for each program; of each target, the columns in which it has anything."""
    found = {(row["what"], row["target"]): row for row in rows}
    said = [(target, name) for target in _each(rows, "target") for name in COLUMNS]
    whole = [row for row in rows if "error" not in row]
    shown = [(t, n) for t, n in said if n == "MB" or any(_cell(row, n) for row in whole if row["target"] == t)]
    lines = [[what, *(_cell(found.get((what, t)), name) for t, name in shown)] for what in _each(rows, "what")]
    return markdown.table(["step", *(f"{target}: {name}" for target, name in shown)], lines)


def _cell(row: Row | None, name: str) -> str:
    if row is None:
        return "–"
    return "not compiled" if "error" in row else COLUMNS[name](row)


def _each(rows: list[Row], field: str) -> list[str]:
    """The values of a field, once each, in their order."""
    return list(dict.fromkeys(row[field] for row in rows))


def page(rows: list[Row], name: str) -> str:
    """A table for each section; of a program that was tried again, the last row counts."""
    rows = list({(row["target"], row["section"], row["what"]): row for row in rows}.values())
    kinds = "; ".join(f"{row['target']}: {row['device_kind']}" for row in {row["target"]: row for row in rows}.values())
    good = sum("error" not in row for row in rows)
    talking = sum(row.get("to_host", 0) > 0 for row in rows)
    head = f"""# Compiled for accelerators, not run

Peak memory of the train step as one program, in MB and in copies of the parameters, as the compilers of XLA for these
devices plan it: arguments, results and temporaries, those that are donated counted once. Kernels are what a GPU has to
start for a step without a mask update (a loop counts once); convolutions are those among them, for outputs and for the
gradients of inputs and of weights. **Nothing was run on these devices, and nothing is said of time or accuracy.**
Convolutions may take more on a GPU than planned, as their algorithms are chosen by trying them out. What a TPU keeps on
its chip is not counted.
Of {len(rows)} programs {good} compiled; {talking} send anything to the host.

{kinds}. Compiled on: {markdown.values(rows, "device")}; versions: {markdown.values(rows, "versions")}; commits:
{markdown.values(rows, "commit")}. Made by `python -m experiments.aot --target TARGET` from `{name}`."""
    sections = [(title, [row for row in rows if row["section"] == section]) for section, title in TITLES.items()]
    tables = [f"## {title}\n\n{table(mine)}" for title, mine in sections if mine]
    return "\n\n".join([head, *tables])


def write(file: Path) -> None:
    """The page, from the rows alone."""
    files.write_text(file.with_suffix(".md"), page(jsonl.read(file), file.name) + "\n")

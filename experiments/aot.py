"""Compiles train steps for accelerators that are not there, and says what memory they would take; nothing is run.

    uv run --extra experiments --with 'jax[cuda12]' python -m experiments.aot --target h100
    uv run --extra experiments --with 'jax[tpu]' python -m experiments.aot --target v5e

A row a program, stored as soon as it is compiled; what has a row is skipped.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import jax
from rich.console import Console

from experiments import cli
from experiments.benchmarks import programs, targets, timing
from experiments.benchmarks.programs import Program
from experiments.benchmarks.targets import Target
from experiments.rows import files, jsonl, pages
from experiments.rows.jsonl import Row
from experiments.training import runs

Section = Literal["weights", "methods", "sharded", "networks"]
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")  # Names for what is there already.
TITLES = {
    "networks": "ResNet-32 of 1.86 M parameters, 128 images of CIFAR-10",
    "weights": "An MLP of 9.7 M parameters, 8 examples",
    "methods": "The same MLP: every sparse method with S2-SAM, every sharpness-aware transformation dense",
    "sharded": "The same MLP on eight devices, all state cut up among them (each device's share)",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """For which accelerator, and what."""

    target: Target = "h100"
    sections: tuple[Section, ...] = get_args(Section)
    skip: tuple[str, ...] = ()  # Programs that take too long to compile, by their names.
    width: int = 32  # Of the ResNet-32.
    batch_size: int = 128
    rows: Path = jsonl.RESULTS / "compiled.jsonl"


def compiled(program: Program) -> Row:
    """What the compiler says of it; in place of figures its error, where it refuses."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.params))
    try:
        executable = program.step.lower(program.state, program.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:1000]}
    used, counted, text = timing.memory(executable), executable.cost_analysis() or {}, executable.as_text()
    return {
        "parameter_bytes": size,
        "peak_bytes": used.peak,
        "temporary_bytes": used.temporary,
        "flops": counted.get("flops"),
        "bytes_accessed": counted.get("bytes accessed"),
        "kernels": kernels(text),
        "convolutions": len(re.findall(r'"__cudnn\$conv|\bconvolution\(', text)),
        "to_host": len(re.findall(r"callback|outfeed|infeed|send-to-host", text)),
    }


def kernels(text: str) -> int:
    """Instructions of a program's outermost computation that a device has to start, without those of branches."""
    started = re.findall(r"^ .* = .*?\b([a-z][a-z-]*)\(", text[text.index("\nENTRY") :], flags=re.MULTILINE)
    return sum(name not in FREE for name in started)


def run(arguments: Arguments) -> None:
    """Compiles what has no row."""
    jax.config.update("jax_platforms", "cpu")  # before JAX looks for devices: what is not there cannot be initialised
    console, devices = Console(), targets.devices(arguments.target)
    made: dict[str, Callable[[], Iterator[Program]]] = {
        "networks": lambda: programs.networks(arguments.width, arguments.batch_size),
        "weights": programs.weights,
        "methods": programs.every_method,
        "sharded": lambda: programs.sharded(devices),
    }
    done = {(row["target"], row["section"], row["what"]) for row in jsonl.read(arguments.rows)}
    common = {"target": arguments.target, "device_kind": devices[0].device_kind} | runs.environment()
    common["versions"] |= {targets.COMPILERS[arguments.target]: version(targets.COMPILERS[arguments.target])}
    for section in arguments.sections:
        for program in made[section]():
            if program.what in arguments.skip or (arguments.target, section, program.what) in done:
                continue
            placed = program if section == "sharded" else programs.on_one(devices[0], program)
            row = common | {"section": section, "what": program.what} | compiled(placed)
            jsonl.append(arguments.rows, row)
            said = row.get("error") or ", ".join(f"{name} {show(row)}" for name, show in COLUMNS.items())
            console.print(f"{section}: {program.what}: {said}", soft_wrap=True)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "MB": lambda row: f"{row['peak_bytes'] / 1e6:,.1f}",
    "copies": lambda row: f"{row['peak_bytes'] / row['parameter_bytes']:.2f}",
    # A TPU's programs spell their copies out, and have products of matrices as convolutions.
    "kernels": lambda row: f"{row['kernels']:,}" if row["target"] == "h100" else "",
    "convolutions": lambda row: str(row["convolutions"] or "") if row["target"] == "h100" else "",
}


def table(rows: list[Row]) -> str:
    """A line a program, with the columns of each target that has any."""
    found = {(row["what"], row["target"]): row for row in rows}
    said = [(target, name) for target in _each(rows, "target") for name in COLUMNS]
    shown = [(t, n) for t, n in said if any(_cell(row, n) for row in rows if row["target"] == t)]
    lines = [[what, *(_cell(found.get((what, t)), name) for t, name in shown)] for what in _each(rows, "what")]
    return pages.table(["step", *(f"{target}: {name}" for target, name in shown)], lines)


def _cell(row: Row | None, name: str) -> str:
    if row is None:
        return "–"
    return "not compiled" if "error" in row else COLUMNS[name](row)


def _each(rows: list[Row], field: str) -> list[str]:
    """Its values, once each."""
    return list(dict.fromkeys(row[field] for row in rows))


def page(rows: list[Row], name: str) -> str:
    """A table a section, with a column a target."""
    kinds = "; ".join(f"{row['target']}: {row['device_kind']}" for row in {row["target"]: row for row in rows}.values())
    good = sum("error" not in row for row in rows)
    talking = sum(row.get("to_host", 0) > 0 for row in rows)
    head = f"""# Compiled for accelerators, not run

Peak memory of the train step as one program, in MB and in copies of the parameters, as the compilers of XLA for these
devices plan it: arguments, results and temporaries, those that are donated counted once. Kernels are what a GPU has to
start for a step without a mask update; convolutions are those among them, for outputs and for the gradients of inputs
and of weights. None of these devices was at hand: **nothing was run there, and nothing is said of time or accuracy.**
Convolutions may take more on a GPU than planned, as their algorithms are chosen by trying them out.
Of {len(rows)} programs {good} compiled; {talking} send anything to the host.

{kinds}. Compiled on: {pages.values(rows, "device")}; versions: {pages.values(rows, "versions")}; commits:
{pages.values(rows, "commit")}. Made by `python -m experiments.aot --target TARGET` from `{name}`."""
    sections = [(title, [row for row in rows if row["section"] == name]) for name, title in TITLES.items()]
    tables = [f"## {title}\n\n{table(mine)}" for title, mine in sections if mine]
    return "\n\n".join([head, *tables])


def write(file: Path) -> None:
    """The page, from the rows alone."""
    files.write_text(file.with_suffix(".md"), page(jsonl.read(file), file.name) + "\n")


@cli.command
def main(arguments: Arguments) -> None:
    run(arguments)
    write(arguments.rows)


if __name__ == "__main__":
    main()

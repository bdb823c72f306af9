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
from experiments.rows import files, jsonl, pages, provenance
from experiments.rows.jsonl import Row

Section = Literal["weights", "methods", "sharded", "networks"]
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all")  # Nothing starts.
TO_HOST = r'= \S+ (?:infeed|outfeed)\(|is_host_transfer=true|custom_call_target="[^"]*callback'
TITLES = {
    "networks": "ResNet-32 of 1.86 M parameters, 128 images of CIFAR-10",
    "weights": "An MLP of 113 M parameters, 8 examples",
    "methods": "The same MLP: every sparse method with S2-SAM, every sharpness-aware transformation dense",
    "sharded": "The same MLP on eight devices, its matrices cut up among them; of one device, gathered layers included",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles train steps for an accelerator that need not be there, and says what memory they would take."""

    target: Target = "h100"  # The accelerator.
    sections: tuple[Section, ...] = get_args(Section)  # Which programs; default: all.
    give_up: tuple[str, ...] = ()  # Names of programs that take too long to compile: the page says so.
    rows: Path = jsonl.RESULTS / "compiled.jsonl"  # File that rows are added to; the page is written beside it.


def compiled(program: Program) -> Row:
    """What the compiler says of it; in place of figures its error, where it refuses."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.params))
    try:
        executable = program.step.lower(program.state, program.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:1000]}
    used, text = timing.memory(executable), executable.as_text()
    started = kernels(text)
    return {
        "parameter_bytes": size,
        "peak_bytes": used.peak,
        "temporary_bytes": used.temporary,
        "kernels": len(started),
        "convolutions": sum("__cudnn$conv" in line for line in started),
        "to_host": len(re.findall(TO_HOST, text)),
    }


def kernels(text: str) -> list[str]:
    """What the outermost computation of a program has to start: a branch or a loop, whatever is in it, is one."""
    lines = text[text.index("\nENTRY") :].splitlines()
    found = [(re.search(r" = .*?\b([a-z][a-z-]*)\(", line), line) for line in lines]
    return [line for match, line in found if match and match[1] not in FREE and not match[1].endswith("-done")]


def run(arguments: Arguments) -> None:
    """Compiles what has no row."""
    jax.config.update("jax_platforms", "cpu")  # before JAX looks for devices: what is not there cannot be initialised
    console, devices = Console(), targets.devices(arguments.target)
    made: dict[str, Callable[[], Iterator[Program]]] = {
        "networks": programs.networks,
        "weights": programs.weights,
        "methods": programs.every_method,
        "sharded": lambda: programs.sharded(devices),
    }
    done = {(row["target"], row["section"], row["what"]) for row in jsonl.read(arguments.rows) if "error" not in row}
    common = {"target": arguments.target, "device_kind": devices[0].device_kind} | provenance.environment()
    common["versions"] |= {targets.COMPILERS[arguments.target]: version(targets.COMPILERS[arguments.target])}
    for section in arguments.sections:
        for program in made[section]():
            if (arguments.target, section, program.what) in done:
                continue
            placed = program if section == "sharded" else programs.on_one(devices[0], program)
            found = {"error": "given up"} if program.what in arguments.give_up else compiled(placed)
            row = common | {"section": section, "what": program.what} | found
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
    whole = [row for row in rows if "error" not in row]
    shown = [(t, n) for t, n in said if n == "MB" or any(_cell(row, n) for row in whole if row["target"] == t)]
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
    """A table a section, with columns for each target; of a program that was tried again, the last row."""
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

{kinds}. Compiled on: {pages.values(rows, "device")}; versions: {pages.values(rows, "versions")}; commits:
{pages.values(rows, "commit")}. Made by `python -m experiments.aot --target TARGET` from `{name}`."""
    sections = [(title, [row for row in rows if row["section"] == section]) for section, title in TITLES.items()]
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

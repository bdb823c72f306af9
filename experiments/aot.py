"""Compiles train steps for accelerators that are not there, and says what memory they would take; nothing is run.

    uv run --extra experiments --with 'jax[cuda12]' python -m experiments.aot --target h100
    uv run --extra experiments --with 'jax[tpu]' python -m experiments.aot --target v5e

Each program gives a row, stored as soon as it is compiled; a program that has a row is skipped.
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
from experiments.pages import compiled as page
from experiments.rows import jsonl, provenance
from experiments.rows.jsonl import Row

Section = Literal["weights", "methods", "sharded", "networks"]
# Instructions for which a GPU starts nothing.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all")
TO_HOST = r'= \S+ (?:infeed|outfeed)\(|is_host_transfer=true|custom_call_target="[^"]*callback'


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles train steps for an accelerator that need not be there, and says what memory they would take."""

    target: Target = "h100"  # The accelerator.
    sections: tuple[Section, ...] = get_args(Section)  # Which programs; default: all.
    give_up: tuple[str, ...] = ()  # Names of programs that take too long to compile: the page says so.
    rows: Path = jsonl.RESULTS / "compiled.jsonl"  # File that rows are added to; the page is written beside it.


def compiled(program: Program) -> Row:
    """The compiler's figures for a program, or its error where it refuses."""
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
    """The instructions of a program's outermost computation that start something; a branch or a loop counts as one."""
    lines = text[text.index("\nENTRY") :].splitlines()
    found = [(re.search(r" = .*?\b([a-z][a-z-]*)\(", line), line) for line in lines]
    return [line for match, line in found if match and match[1] not in FREE and not match[1].endswith("-done")]


def run(arguments: Arguments) -> None:
    """Compiles each program that has no row yet."""
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
            said = row.get("error") or ", ".join(f"{name} {show(row)}" for name, show in page.COLUMNS.items())
            console.print(f"{section}: {program.what}: {said}", soft_wrap=True)


@cli.command
def main(arguments: Arguments) -> None:
    run(arguments)
    page.write(arguments.rows)


if __name__ == "__main__":
    main()

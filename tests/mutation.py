"""A mutation run on the library: one operator or number is changed at a time, and a test has to fail.

    uv run --all-extras --with cosmic-ray==8.7.0 --with pytest-cov==7.1.0 python -m tests.mutation

The tests run once under coverage, which says by which of them each line is covered. Then every mutant, in a clone of
the last commit, meets those of its line, the shortest first, up to a limit of seconds: one that outlives them survives.
One row for each mutant; the same command goes on after the last row.
"""

import ast
import collections
import dataclasses
import difflib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import coverage
import tyro
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from rich.console import Console

ROOT = Path(__file__).parents[1]
# Those of cosmic-ray that a hand could have slipped to; it has more, such as `<<` in place of `*`, that fail anywhere.
SWAPS = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd BitXor_BitOr "
    "LShift_RShift RShift_LShift"
)
COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_Gt Gt_Lt LtE_GtE GtE_LtE Is_IsNot IsNot_Is"
UNARY = "Delete_Not Delete_USub Delete_Invert"
OTHERS = (
    "AddNot NumberReplacer ReplaceAndWithOr ReplaceOrWithAnd ReplaceTrueWithFalse ReplaceFalseWithTrue "
    "ReplaceBreakWithContinue ReplaceContinueWithBreak ZeroIterationForLoop RemoveDecorator"
)
OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{name}" for name in SWAPS.split()),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARISONS.split()),
    *(f"core/ReplaceUnaryOperator_{name}" for name in UNARY.split()),
    *(f"core/{name}" for name in OTHERS.split()),
]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How many mutants, and what they have to outlive."""

    count: int = 200
    seed: int = 0
    tests: tuple[str, ...] = ("tests", "s2sam_jax")  # Which tests are run under coverage.
    seconds: float = 120.0  # Of tests, as they took under coverage, that a mutant has to outlive.
    work: Path = ROOT / "build" / "mutation"  # Coverage and the clone.
    rows: Path = ROOT / "experiments" / "results" / "mutation.jsonl"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change."""

    module: str
    line: int
    operator: str
    occurrence: int


def sites() -> list[list[Mutant]]:
    """All changes, by the place in the code they are at."""
    places = collections.defaultdict(list)
    for path in sorted((ROOT / "s2sam_jax").rglob("*.py")):
        module, tree = str(path.relative_to(ROOT)), get_ast(path.read_text())
        for name in OPERATORS:
            operator = plugins.get_operator(name)()
            found = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
            for occurrence, (start, end) in enumerate(found):
                places[module, start, end].append(Mutant(module, start[0], name, occurrence))
    return list(places.values())


def sample(count: int, seed: int) -> list[tuple[Mutant, str]]:
    """Some mutants with their code, one a place at most; none that declares a function otherwise, or asserts less."""
    rng, chosen = random.Random(seed), []
    places = sites()
    rng.shuffle(places)
    for place in places:
        mutant = rng.choice(place)
        before = (ROOT / mutant.module).read_text()
        after = mutate_code(before, plugins.get_operator(mutant.operator)(), mutant.occurrence)
        if after is not None and _meaning(after) not in (None, _meaning(before)):
            chosen.append((mutant, after))
        if len(chosen) == count:
            break
    return chosen


def _meaning(code: str) -> str | None:
    """What is run; ``None`` where the code is none."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
        if isinstance(node, ast.arguments):  # a lone asterisk
            node.args, node.posonlyargs, node.kwonlyargs = node.posonlyargs + node.args + node.kwonlyargs, [], []
            node.defaults, node.kw_defaults = node.defaults + [x for x in node.kw_defaults if x], []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
    return ast.dump(tree)


class Tests:
    """Which tests cover a line, and how long they take."""

    def __init__(self, arguments: Arguments):
        arguments.work.mkdir(parents=True, exist_ok=True)
        data, junit = arguments.work / "coverage.sqlite", arguments.work / "tests.xml"
        if not junit.exists():
            options = ["--cov=s2sam_jax", "--cov-branch", "--cov-context=test", "--cov-report=", f"--junitxml={junit}"]
            subprocess.run([*PYTEST, *options, *arguments.tests], cwd=ROOT, env=_environment(ROOT, data), check=True)
        self.data = coverage.CoverageData(str(data))
        self.data.read()
        self.seconds = {(case.get("classname"), case.get("name")): float(case.get("time", 0)) for case in _cases(junit)}
        self.files = {path[path.index("s2sam_jax/") :]: path for path in self.data.measured_files()}

    def of(self, mutant: Mutant, limit: float) -> list[str]:
        """The tests of its line, shortest first; of a line that is run at import, all tests of its module."""
        lines = self.data.contexts_by_lineno(self.files[mutant.module])
        names = {context.split("|")[0] for context in lines.get(mutant.line, ()) if context}
        names = names or {context.split("|")[0] for contexts in lines.values() for context in contexts if context}
        chosen, total = [], 0.0
        for name in sorted(names, key=lambda name: (self._duration(name), name)):
            total += self._duration(name)
            if total > limit:
                break
            chosen.append(name)
        return chosen

    def _duration(self, name: str) -> float:
        file, _, test = name.partition("::")
        return self.seconds.get((file.removesuffix(".py").replace("/", "."), test), 0.0)


def _cases(junit: Path) -> list[ET.Element]:
    return list(ET.parse(junit).getroot().iter("testcase"))


def _environment(folder: Path, data: Path | None = None) -> dict[str, str]:
    changed = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | changed | ({} if data is None else {"COVERAGE_FILE": str(data)})


def outcome(clone: Path, module: str, code: str, tests: list[str], limit: float) -> tuple[str, str]:
    """``"killed"``, ``"survived"``, ``"timeout"`` or ``"not covered"``, and by which test."""
    if not tests:
        return "not covered", ""
    file = clone / module
    original = file.read_text()
    file.write_text(code)
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
            listed.write("\n".join(tests))
            listed.flush()
            command = [*PYTEST, "-x", "-rfE", f"@{listed.name}"]
            done = subprocess.run(
                command, cwd=clone, env=_environment(clone), capture_output=True, text=True, timeout=limit
            )
    except subprocess.TimeoutExpired:
        return "timeout", ""
    finally:
        file.write_text(original)
    by = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    if done.returncode and not by:
        raise RuntimeError(f"pytest ended with {done.returncode}, and no test has failed:\n{done.stdout[-2000:]}")
    return ("killed", by[0]) if by else ("survived", "")


def main(arguments: Arguments) -> None:
    commit = _commit()
    arguments = dataclasses.replace(arguments, work=arguments.work / commit)
    console, tests = Console(), Tests(arguments)
    done = [] if not arguments.rows.exists() else [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    known = {(r["module"], r["line"], r["operator"], r["occurrence"]) for r in done if r["commit"] == commit}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for mutant, code in sample(arguments.count, arguments.seed):
            if dataclasses.astuple(mutant) in known:
                continue
            started, chosen = time.perf_counter(), tests.of(mutant, arguments.seconds)
            found, by = outcome(clone, mutant.module, code, chosen, 60 + 10 * arguments.seconds)
            row = dataclasses.asdict(mutant) | _change((ROOT / mutant.module).read_text(), code)
            row |= {"outcome": found, "by": by, "tests": len(chosen), "seconds": time.perf_counter() - started}
            with arguments.rows.open("a") as file:
                file.write(json.dumps(row | {"commit": commit}) + "\n")
            console.print(found, f"{mutant.module}:{mutant.line}", row["after"], f"{row['seconds']:.0f} s", by)


def _commit() -> str:
    if subprocess.check_output(["git", "status", "--porcelain", "s2sam_jax", "tests"], cwd=ROOT, text=True):
        sys.exit("error: s2sam_jax or tests have changes that are not committed; mutants are of a commit.")
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()


def _change(before: str, after: str) -> dict[str, Any]:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
    old, new = ([line[1:].strip() for line in lines if line.startswith(sign)] for sign in "-+")
    return {"before": "\n".join(old), "after": "\n".join(new)}


if __name__ == "__main__":
    main(tyro.cli(Arguments))

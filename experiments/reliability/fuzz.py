"""Random configurations of the library, each run for a few updates and checked after every one.

    python -m experiments.reliability.fuzz --count 10000

A case follows from its number alone. It passes, or is refused by a ValueError or TypeError before anything was trained;
all else is a finding. One row for each chunk of cases; the same command goes on after the last row.
"""

import collections
import contextlib
import dataclasses
import random
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from experiments import cli
from experiments.reliability import fuzz_cases
from experiments.reliability.fuzz_cases import Case
from experiments.rows import jsonl, provenance
from experiments.rows.jsonl import Row
from s2sam_jax import SparseState, apply_masks, get_masks, perturb
from s2sam_jax._base import select

UPDATES = 6


class WrongError(Exception):
    """What a case found."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Runs random configurations of the library for a few updates, and checks masks and states after each."""

    count: int = 10_000  # How many cases.
    first: int = 0  # The number of the first; processes that share the cases need --rows of their own.
    chunk: int = 250  # Cases in a row of the results.
    jit_every: int = 50  # One case in so many is compiled as a whole; the others run operation by operation.
    rows: Path = jsonl.RESULTS / "fuzz.jsonl"  # File that rows are added to.


def run(case: Case) -> str:
    """ "passed", or the reason why the configuration was refused.

    Raises:
      WrongError: for a broken promise.
    """
    rng = np.random.default_rng(case.number)
    with contextlib.nullcontext() if case.jitted else _operation_by_operation():
        params = fuzz_cases.tree(case, rng)
        try:
            tx = optax.with_extra_args_support(fuzz_cases.optimizer(case))
            state = tx.init(params)
        except (ValueError, TypeError) as error:
            return _refusal(error)
        params = apply_masks(params, state)
        _check(case, params, state, params, state)
        step = _step(case, tx)
        for number in range(UPDATES):
            noise = fuzz_cases.noise(case, rng, params, get_masks(state, params))
            try:
                new_params, new_state = step(params, state, noise)
            except (ValueError, TypeError) as error:
                if number:
                    raise WrongError(f"refused at update {number}: {error}") from error
                return _refusal(error)
            _same_kind(params, new_params, "params")
            _same_kind(state, new_state, "opt_state")
            _check(case, new_params, new_state, params, state)
            params, state = new_params, new_state
    return "passed"


@contextlib.contextmanager
def _operation_by_operation() -> Iterator[None]:
    """Compiles nothing but the search for thresholds, which would take most of the time."""
    largest = select.largest

    def compiled(*arguments: Any) -> Any:
        with jax.disable_jit(False):
            return largest(*arguments)

    with mock.patch.object(select, "largest", compiled), jax.disable_jit():
        yield


def _refusal(error: Exception) -> str:
    """The message of an error, behind the name of another package if that raised it."""
    if len(str(error)) < 20:
        raise WrongError(f"a message that says too little: {error!r}") from error
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    other = next((name for name in ("optax", "jax") if name in raised_in), None)
    return (f"{other}: " if other else "") + " ".join(str(error).split())[:60]


def _step(case: Case, tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    def step(params: Any, state: Any, noise: Any) -> Any:
        def gradient(point: Any) -> Any:
            return jax.tree.map(lambda n, p: (n + 0.1 * p).astype(p.dtype), noise, point)

        point = perturb(params, state) if case.sharpness in fuzz_cases.PERTURBING else params
        updates, state = tx.update(
            gradient(point),
            state,
            params,
            value=jnp.float32(1.0),
            grad_fn=gradient,
            fisher_fn=lambda point: jax.tree.map(jnp.square, gradient(point)),
        )
        return optax.apply_updates(params, updates), state

    return jax.jit(step) if case.jitted else step


def _same_kind(before: Any, after: Any, name: str) -> None:
    """Structure, shapes and dtypes must not change, as scan and checkpoints need."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise WrongError(f"{name} has another structure")
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (jnp.shape(old), jnp.result_type(old)) != (jnp.shape(new), jnp.result_type(new)):
            raise WrongError(f"{name}{jax.tree_util.keystr(path)}: {jax.typeof(old)} became {jax.typeof(new)}")


def _check(case: Case, params: Any, state: Any, old_params: Any, old_state: Any) -> None:
    """Checks every promise, in NumPy."""
    sparse, old = (_sparse_state(tree) for tree in (state, old_state))
    leaves, masks = jax.tree.leaves_with_path(params), [np.asarray(mask) for mask in jax.tree.leaves(sparse.masks)]
    counts, before = sparse.nnz.tolist(), jax.tree.leaves(old_params)
    for (path, leaf), old_leaf, mask, count in zip(leaves, before, masks, counts, strict=True):
        name, values = jax.tree_util.keystr(path), np.asarray(leaf).astype(np.float64)
        if mask.dtype != bool or mask.shape != values.shape or int(mask.sum()) != count:
            raise WrongError(f"{name}: a mask of {mask.dtype}{mask.shape} with {mask.sum()} ones, recorded {count}")
        # An update is added, and nothing that is added to infinity makes zero; MultiSteps makes NaN of 0 * infinity.
        alive = ~mask & (values != 0) & np.isfinite(np.asarray(old_leaf).astype(np.float64))
        if case.outer == "MultiSteps" and not fuzz_cases.stays_finite(case):
            alive &= np.isfinite(values)
        if alive.any():
            raise WrongError(f"{name}: {alive.sum()} pruned weights are not zero")
        if fuzz_cases.stays_finite(case) and not np.isfinite(values).all():
            raise WrongError(f"{name}: not finite")
    _check_invariant(case, masks, [np.asarray(mask) for mask in jax.tree.leaves(old.masks)])
    # Until the first update it is as the optimizer has made it.
    if int(sparse.step) and case.mask_grads and case.optimizer not in fuzz_cases.EPSILON_OFF_MASKS:
        by_path = {path: mask for (path, _), mask in zip(leaves, masks, strict=True)}
        _check_inner(sparse.inner_state, by_path, fuzz_cases.stays_finite(case))


def _sparse_state(tree: Any) -> SparseState:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SparseState))
    return next(leaf for leaf in leaves if isinstance(leaf, SparseState))


def _check_invariant(case: Case, masks: list[np.ndarray], old: list[np.ndarray]) -> None:
    now, was = ([int(mask.sum()) for mask in tree] for tree in (masks, old))
    broken = {
        "per_layer": now != was,
        "total": sum(now) != sum(was),
        "monotone": any((mask & ~before).any() for mask, before in zip(masks, old, strict=True)),
        "bounded": False,
    }
    invariant = fuzz_cases.METHODS[case.method](0.3).invariant
    fewer_at_the_edge = "padded" in case.structure and invariant in ("per_layer", "total")
    if broken[invariant] and not fewer_at_the_edge:
        raise WrongError(f"the invariant {invariant} does not hold: ones {was} became {now}")


def _check_inner(inner_state: Any, masks: dict[Any, np.ndarray], finite: bool) -> None:
    """No state that mirrors a parameter lives where its weight does not; an overflow elsewhere may make it NaN."""
    for path, leaf in jax.tree.leaves_with_path(inner_state):
        if jax.tree_util.GetAttrKey("tree") in path or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue  # the former is in a tree that is meant to be dense
        for of_param, mask in masks.items():
            mirrors = path[len(path) - len(of_param) :] == of_param and leaf.shape == mask.shape
            values = np.asarray(leaf).astype(np.float64)[~mask] if mirrors else np.zeros(())
            if ((values != 0) & (finite | np.isfinite(values))).any():
                raise WrongError(f"inner_state{jax.tree_util.keystr(path)}: not zero off the mask")


@cli.command
def main(arguments: Arguments) -> None:
    jax.config.update("jax_enable_x64", True)
    console = Console()
    done, end = sum(row["cases"] for row in jsonl.read(arguments.rows)), arguments.first + arguments.count
    for first in range(arguments.first + done, end, arguments.chunk):
        numbers = range(first, min(first + arguments.chunk, end))
        row = chunk(numbers, arguments.jit_every)
        jsonl.append(arguments.rows, row)
        console.print(f"{row['cases']} cases from {first}: {row['passed']} passed, {len(row['findings'])} findings")
        for finding in row["findings"]:
            console.print_json(data=finding)


def chunk(numbers: range, jit_every: int) -> Row:
    """Runs some cases; the row says how many passed, why others were refused, and what was found."""
    started, refused, findings = time.perf_counter(), collections.Counter(), []
    for number in track(numbers, description="cases", transient=True):
        case = fuzz_cases.draw(random.Random(number), number, number % jit_every == 0)
        try:
            refused[run(case)] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = {
                "error": f"{type(error).__name__}: {error}"[:500],
                "at": f"{Path(where.filename).name}:{where.lineno}",
            }
            findings.append(dataclasses.asdict(case) | found)
    seconds = time.perf_counter() - started
    counts = {"cases": len(numbers), "passed": refused.pop("passed", 0), "refused": dict(refused)}
    return {"first": numbers.start} | counts | {"findings": findings, "seconds": seconds} | provenance.environment()


if __name__ == "__main__":
    main()

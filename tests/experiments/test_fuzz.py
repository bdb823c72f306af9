"""The fuzzing finds what is broken, and tells it from what is refused."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import pytest

from experiments.reliability import fuzz, fuzz_cases

CASE = dataclasses.replace(
    fuzz_cases.draw(random.Random(0), 0, False), tree="one", dtype="float32", optimizer="momentum", sharpness="none",
    method="static", structure="unstructured", distribution="uniform", sparsity=0.5, mask_grads=True, outer="none",
    gradients="normal", jitted=True,
)  # fmt: skip


def test_a_case_follows_from_its_number():
    first, again, other = (fuzz_cases.draw(random.Random(number), number, False) for number in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_sound_configuration_passes():
    assert fuzz.run(CASE) == "passed"


def test_a_refusal_is_no_finding():
    assert fuzz.run(dataclasses.replace(CASE, structure="2:4", sparsity=0.9)).startswith("NM(n=2, m=4")


def test_a_refusal_of_another_package_says_whose_it_is(monkeypatch):
    tree = {"a": jnp.ones((4, 8), jnp.bfloat16), "b": jnp.ones((4, 8), jnp.float16)}
    monkeypatch.setattr(fuzz_cases, "tree", lambda case, rng: tree)
    assert fuzz.run(dataclasses.replace(CASE, optimizer="schedule_free")).startswith("optax: Cannot compare dtype")


def test_a_broken_promise_is_found(monkeypatch):
    monkeypatch.setattr(fuzz, "apply_masks", lambda params, state: params)
    with pytest.raises(fuzz.WrongError, match="16 pruned weights are not zero"):
        fuzz.run(CASE)


def test_rows_count_and_go_on(monkeypatch, tmp_path):
    def run(case):
        if case.number == 3:
            raise fuzz.WrongError("found")
        return "passed" if case.number % 2 else "refused"

    monkeypatch.setattr(fuzz, "run", run)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for count in (4, 6):
        fuzz.main(["--count", str(count), "--chunk", "3", "--rows", str(tmp_path / "rows")])
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["first"], row["cases"], row["passed"]) for row in rows] == [(0, 3, 1), (3, 1, 0), (4, 2, 1)]
    assert rows[0]["refused"] == {"refused": 2}
    assert [(f["number"], f["error"]) for f in rows[1]["findings"]] == [(3, "WrongError: found")]
    assert rows[0]["device"] == jax.devices()[0].device_kind
    assert not {"config", "seed"} & rows[0].keys()  # a case is of no run

"""Compiling for accelerators that are not there, with this machine's virtual devices in their place."""

import json
import re
import types
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from experiments import aot, report
from experiments.benchmarks import programs, targets
from experiments.pages import compiled as compiled_page


@pytest.fixture
def here(monkeypatch):
    """A target whose compiler is that of this machine, and a small network."""
    monkeypatch.setattr(targets, "devices", lambda target: jax.devices())
    monkeypatch.setattr(targets, "COMPILERS", {"h100": "jaxlib", "v5e": "jaxlib"})
    monkeypatch.setattr(programs, "WIDTH", 64)


def test_a_row_a_program_and_a_page_of_them(here, tmp_path, capsys):
    file = tmp_path / "compiled.jsonl"
    words = ["--sections", "sharded", "--rows", str(file)]
    aot.main(words)
    rows = {row["what"]: row for row in map(json.loads, file.read_text().splitlines())}
    copy = 3 * (64 * 64 + 64) * 4
    assert {row["parameter_bytes"] for row in rows.values()} == {copy}
    assert all(row["temporary_bytes"] < row["peak_bytes"] < 20 * copy for row in rows.values())
    # The last gradient: an eighth of each kernel on each device, the biases whole.
    held = {name: row["peak_bytes"] - row["temporary_bytes"] for name, row in rows.items()}
    assert 0 <= held["S2-SAM"] - held["SGD"] - 3 * (64 * 64 / 8 + 64) * 4 < 100  # and its norm, and rho
    assert {row["to_host"] for row in rows.values()} == {0}
    text = file.with_suffix(".md").read_text()
    assert f"Of {len(rows)} programs {len(rows)} compiled; 0 send anything" in text
    assert "| S2-SAM, rigl | 0.1 | " in text

    capsys.readouterr()
    aot.main(words)
    assert len(file.read_text().splitlines()) == len(rows)
    assert "sharded" not in capsys.readouterr().out
    assert report.writer(file) is compiled_page.write


def test_every_method_and_transformation_has_a_program(here):
    found = {program.what: program for program in programs.every_method()}
    assert {"s2sam, dense", "s2sam, rigl", "s2sam, chex", "s2sam, chase", "ssam-f", "esam"} <= set(found)
    placed = programs.on_one(jax.devices()[0], found["s2sam, chase"])
    assert aot.compiled(placed)["peak_bytes"] > 0


def test_a_program_that_is_refused_has_the_compilers_words():
    class Refused:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("out of memory in space hbm")

    state = next(programs.weights()).state
    row = {"section": "weights", "what": "x", "target": "v5e", "device_kind": "TPU v5 lite", "device": "cpu"}
    row |= {"versions": {}, "commit": "0"} | aot.compiled(programs.Program("x", Refused(), state, None))
    assert row["error"] == "out of memory in space hbm"
    assert "Of 1 programs 0 compiled" in compiled_page.page([row], "x")
    assert "\n| step | v5e: MB |\n|---|---|\n| x | not compiled |" in compiled_page.page([row], "x")
    compiled = row | {"peak_bytes": 3e6, "parameter_bytes": 2e6, "kernels": 9, "convolutions": 4}
    del compiled["error"]
    assert "\n| step | v5e: MB | v5e: copies |\n|---|---|---|\n| x | 3.0 | 1.50 |" in compiled_page.page(
        [row, compiled], "x"
    )


def test_what_takes_too_long_is_given_up_and_said(here, tmp_path):
    file = tmp_path / "compiled.jsonl"
    words = ["--sections", "sharded", "--rows", str(file), "--give-up"]
    names = [program.what for program in programs.sharded(jax.devices())]
    aot.main([*words, *names])
    assert "Of 7 programs 0 compiled" in file.with_suffix(".md").read_text()
    aot.main([*words, *names[1:]])  # what was given up is tried again
    assert "Of 7 programs 1 compiled" in file.with_suffix(".md").read_text()


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(targets, "COMPILERS", {"h100": "no-such-package"})
    with pytest.raises(ValueError, match=r"no-such-package is not installed.*--with 'jax\[cuda12\]'"):
        targets.devices("h100")
    with pytest.raises(ValueError, match="one of h100, v5e; got 'mi300'"):
        targets.devices("mi300")


def test_kernels_are_counted_outside_of_branches():
    text = """HloModule m
%branch (a: f32[]) -> f32[] {
  ROOT %n = f32[] negate(%a)
}

ENTRY %main (x: f32[2]) -> (f32[2], f32[]) {
  %x = f32[2]{0} parameter(0), sharding={replicated}
  %both = (f32[2]{0}, f32[]) fusion(%x), kind=kInput, calls=%branch, metadata={op_name="jit(f)/add(x)"}
  %one = f32[2]{0} get-tuple-element(%both), index=0
  %conv = (f32[2]{0}, u8[9]{0}) custom-call(%one), custom_call_target="__cudnn$convForward"
  %wait-start = (f32[2]{0}, f32[2]{0}) copy-start(%one)
  %wait-done = f32[2]{0} copy-done(%wait-start), metadata={op_name="jit(callback)/copy"}
  %kept = f32[2]{0} opt-barrier(%one)
  ROOT %t = (f32[2]{0}, f32[]) tuple(%one, %one)
}
"""
    assert [line.split(" =")[0].strip() for line in aot.kernels(text)] == ["%both", "%conv", "%wait-start"]
    assert len(re.findall(aot.TO_HOST, text)) == 0
    for line in (
        "  %s = (f32[2]{0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true",
        '  %c = (f32[2]{0}) custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback"',
        "  %o = token[] outfeed(%x, %token)",
    ):
        assert len(re.findall(aot.TO_HOST, text + line)) == 1


def test_the_guides_example_runs(monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "guide" / "devices.md").read_text()
    code = page.partition("## Will it fit?")[2].partition("```python\n")[2].partition("```")[0]
    topology = types.SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **options: topology)
    exec(code, {})
    assert "temp_size_in_bytes" in capsys.readouterr().out

"""Interrupted runs: what is left, what goes on from it, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted import CASES, SHORT, assert_same_run, snapshot, start, stop_in

from experiments.config import Config
from experiments.rows import provenance
from experiments.tasks import arrays
from experiments.training import record, runs
from experiments.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_again_and_again_is_the_uninterrupted_one(case, toy, tmp_path, monkeypatch):
    """In an epoch, before a row, in a checkpoint, in the last evaluation, and before the folder gets its name."""
    stops = [(arrays.Task, "order", 4), (runs, "append", 1)]
    if case == "rigl-s2sam":
        stops += [(Checkpoints, "save", 1), (record, "recalibrate_batch_stats", 1), (shutil, "copytree", 1)]
    for owner, name, calls in stops:
        stop_in(monkeypatch, owner, name, calls, tmp_path / "stopped", *CASES[case])
        (partial,) = (tmp_path / "stopped").iterdir()
        assert partial.name.endswith(".partial")
    assert_same_run(start(tmp_path / "stopped", *CASES[case]), start(tmp_path / "reference", *CASES[case]))


CHILD = """
import os, sys
sys.path.insert(0, "tests/experiments")
import toy
from experiments import tasks, train
from experiments.figures import training
from experiments.training.checkpoint import Checkpoints
tasks.build, training.draw = toy.build, lambda runs, title, file: file.touch()
save = Checkpoints.save
def saving(self, epoch, *rest):
    save(self, epoch, *rest)
    print("saving", epoch, flush=True)
    if epoch == int(os.environ["EXIT_AT"]):
        os._exit(1)
Checkpoints.save = saving
train.main(sys.argv[1:])
"""


def child(out, compiled, *options, exit_at=0, stderr=None):
    """A process of the same run, which may leave while a checkpoint is being written."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8", "EXIT_AT": str(exit_at)}
    command = [sys.executable, "-c", CHILD, *SHORT, "--out", str(out), *options]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_a_process_that_is_asked_to_end_says_how_it_goes_on(toy, tmp_path):
    reference, out = start(tmp_path / "reference"), tmp_path / "asked"
    with child(out, toy, stderr=subprocess.PIPE) as process:
        while "saving 2" not in process.stdout.readline():
            assert process.poll() is None
        process.terminate()
        said = process.stderr.read()
    (partial,) = out.glob("*.partial")
    assert (process.returncode, said) == (143, f"stopped; the same command goes on from {partial}\n")
    assert_same_run(start(out), reference)


def test_a_killed_process(toy, tmp_path):
    """Once by the operating system at any moment, once in a write that goes on in the background."""
    reference, out = start(tmp_path / "reference"), tmp_path / "killed"
    with child(out, toy) as first:
        while "saving 2" not in first.stdout.readline():
            assert first.poll() is None
        os.kill(first.pid, signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL
    with child(out, toy, exit_at=4) as second:
        assert "saving 4" in second.stdout.read()
    assert second.returncode == 1
    (partial,) = out.glob("*.partial")
    (partial / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    with (partial / runs.METRICS).open("a") as file:
        file.write('{"epoch": 4, "half')
    assert_same_run(start(out), reference)


def test_a_row_replaces_what_an_interrupted_run_has_left(tmp_path):
    lines = [json.dumps({"epoch": epoch}) for epoch in (1, 2, 3, 4)]
    file = tmp_path / runs.METRICS
    file.write_text("\n".join(lines) + '\n{"epoch": 5, "st')
    runs.append(tmp_path, {"epoch": 3, "new": True})
    assert file.read_text().splitlines() == [*lines[:2], '{"epoch": 3, "new": true}']


def test_another_config_is_refused_and_named(interrupted):
    file = interrupted / runs.CONFIG
    original = file.read_text()
    for change, message in [
        ({"rho": 0.5, "seed": 3}, "rho: 0.5 there, 0.05 asked for\n  seed: 3 there, 0 asked for"),
        ({"colour": "red"}, 'colour: "red" there, null asked for'),
    ]:
        file.write_text(json.dumps(json.loads(original) | change))
        before = snapshot(interrupted)
        with pytest.raises(SystemExit, match=message):
            start(interrupted.parent)
        assert snapshot(interrupted) == before
    file.write_text(original[: len(original) // 2])
    with pytest.raises(SystemExit, match=r"config\.json is not the config of a run"):
        start(interrupted.parent)
    start(interrupted.parent, "--overwrite")
    assert not interrupted.exists()


def test_going_on_with_other_evaluations_is_said(interrupted, capsys):
    folder = start(interrupted.parent, "--eval-every", "4")
    line = f"{interrupted} goes on with --eval-every 4; its rows so far are of --eval-every 1.\n"
    assert line in capsys.readouterr().out
    assert [row["epoch"] for row in runs.rows(folder)] == [1, 2, 4, 5]
    start(interrupted.parent, "--overwrite")
    assert "goes on" not in capsys.readouterr().out


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    config = Config(out=tmp_path)
    with runs.claim(config), pytest.raises(ValueError, match="Another process is training digits-"), runs.claim(config):
        pass
    with runs.claim(config):
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_no_other_process_begins_before_the_folder_has_its_name(toy, tmp_path, monkeypatch):
    def another_tries(config, *rest):
        with pytest.raises(ValueError, match="Another process is training"), runs.claim(config):
            pass
        finish(config, *rest)

    finish = runs.finish
    monkeypatch.setattr(runs, "finish", another_tries)
    assert start(tmp_path, "--epochs", "1").is_dir()


def test_a_run_that_another_process_has_finished_meanwhile_is_not_trained_again(tmp_path, monkeypatch):
    folder = start(tmp_path, "--epochs", "1")
    before = (folder / runs.METRICS).read_bytes()
    answers = iter([False, True, True])  # when the command begins, when it has the run for itself, and in the end
    monkeypatch.setattr(runs, "finished", lambda config: next(answers))
    assert start(tmp_path, "--epochs", "1") == folder
    assert (folder / runs.METRICS).read_bytes() == before


def test_an_interrupted_run_is_not_finished_even_over_an_older_result(tmp_path):
    config = Config(out=tmp_path)
    config.run_dir.mkdir()
    assert runs.finished(config)
    runs.begin(config, overwrite=True)
    assert not runs.finished(config)


def test_without_a_checkout_the_commit_is_what_the_environment_says(monkeypatch):
    def missing(*_, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert provenance.environment()["commit"] == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    assert provenance.environment()["commit"] is None

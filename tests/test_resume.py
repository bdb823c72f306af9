"""Interrupted runs: what is left, what goes on from it, and what is refused."""

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import CASES, SHORT, assert_same_run, raw, small_state, start, stop_in

from experiments import evaluate
from experiments.config import Config
from experiments.rows import provenance
from experiments.tasks import arrays
from experiments.training import record, runs
from experiments.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]


# Orbax leaves coroutines behind where reading fails.
UNAWAITED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


# Going on


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
sys.path.insert(0, "tests")
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


# What is kept


def test_the_last_two_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as kept:
        for epoch, accuracy in enumerate((0.3, 0.9, 0.9, None, 0.5, None), start=1):
            kept.save(epoch, small_state(epoch), {"epoch": epoch, "history": [0.1 + epoch]}, accuracy)
    with Checkpoints(tmp_path / "checkpoints") as kept:
        assert kept.epochs == [3, 5, 6]
        assert kept.best == tmp_path / "checkpoints" / "3"
        state, progress = kept.restore(5, jax.eval_shape(lambda: small_state(0)))
        assert progress == {"epoch": 5, "history": [5.1]}
        assert float(state.params["kernel"].sum()) == 5 * 64 * 64
        assert kept.epochs == [3, 5]


def test_the_state_is_copied_before_it_can_be_donated(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, s), donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints") as kept:
        state = small_state(1)
        for epoch in (1, 2, 3):
            kept.save(epoch, state, {"epoch": epoch}, None)
            state = advance(state)
        kept.wait()
        for epoch in (3, 2):
            assert float(kept.restore(epoch, state)[0].params["kernel"][0, 0]) == epoch


# What is refused


@pytest.fixture
def interrupted(toy, tmp_path, monkeypatch):
    """The folder of a run that was stopped in its third epoch."""
    stop_in(monkeypatch, arrays.Task, "order", 3, tmp_path)
    (partial,) = tmp_path.iterdir()
    return partial


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def test_an_interrupted_run_is_not_finished_even_over_an_older_result(tmp_path):
    config = Config(out=tmp_path)
    config.run_dir.mkdir()
    assert runs.finished(config)
    runs.begin(config, overwrite=True)
    assert not runs.finished(config)


@UNAWAITED
def test_a_damaged_checkpoint_is_refused_and_named(interrupted):
    newest = interrupted / "checkpoints" / "2"
    (newest / "state" / "manifest.ocdbt").unlink()
    before = snapshot(interrupted)
    with pytest.raises(SystemExit, match=r"checkpoints/2 is damaged.*Remove that folder to go on from the one before"):
        start(interrupted.parent)
    gc.collect()
    assert snapshot(interrupted) == before
    shutil.rmtree(newest)
    folder = start(interrupted.parent, "--checkpoint-every", "3")  # what a result does not depend on may change
    assert [row["epoch"] for row in runs.rows(folder)] == [1, 2, 3, 4, 5]
    best = max((runs.rows(folder)[epoch - 1] for epoch in (1, 3, 5)), key=lambda row: row["test_accuracy"])
    assert evaluate.main([str(folder), "--which", "best"])[0] == best["test_accuracy"]
    assert int(runs.restore(folder, "best").step) == best["step"]


@UNAWAITED
def test_every_file_of_a_checkpoint_counts_or_is_not_needed(tmp_path):
    """Without a file, or with half of it: the state is whole, or an error names the folder."""
    wanted, like = small_state(2), jax.eval_shape(lambda: small_state(0))
    with Checkpoints(tmp_path / "whole") as kept:
        for epoch in (1, 2):
            kept.save(epoch, small_state(epoch), {"epoch": epoch}, 0.5)
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file()]
    refused = set()
    for index, (file, half) in enumerate(itertools.product(files, (False, True))):
        folder = tmp_path / f"damaged-{index}"
        shutil.copytree(tmp_path / "whole", folder)
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2]) if half else (folder / file).unlink()
        state, message = restored(folder, like)
        if state is None:
            assert f"The checkpoint {folder}/2 is damaged" in message
            refused.add((file.parts[1], half))
        else:
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), state, wanted)
    gc.collect()
    assert refused >= {("state", False), ("state", True), ("_CHECKPOINT_METADATA", True), ("metrics", True)}


def restored(folder, like):
    try:
        with Checkpoints(folder) as kept:
            return kept.restore(2, like)[0], ""
    except ValueError as error:
        return None, str(error)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands for it."""
    script = """
import resource, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from experiments.training.checkpoint import Checkpoints
from interrupted import small_state
kept = Checkpoints(Path(sys.argv[1]))
kept.save(1, small_state(1), {"epoch": 1}, 0.5)
kept.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    kept.save(2, small_state(2), {"epoch": 2}, 0.6)
    kept.wait()
except OSError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoints")]
    output = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert f"A checkpoint could not be written to {tmp_path}/checkpoints" in output
    with Checkpoints(tmp_path / "checkpoints") as kept:
        assert kept.epochs == [1]
        assert float(kept.restore(1, jax.eval_shape(lambda: small_state(0)))[0].params["kernel"][0, 0]) == 1
        kept.save(2, small_state(2), {"epoch": 2}, 0.6)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_place_that_cannot_be_written_to_is_an_error_in_a_line(toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file"):
        start(tmp_path / "file" / "runs")


def test_without_a_checkout_the_commit_is_what_the_environment_says(monkeypatch):
    def missing(*_, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert provenance.environment()["commit"] == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    assert provenance.environment()["commit"] is None

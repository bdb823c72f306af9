"""Checkpoints: which are kept, and damaged or unwritable ones."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import raw, small_state, snapshot, start

from experiments import evaluate
from experiments.training import checkpoint, runs
from experiments.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]


# Orbax leaves coroutines behind where reading fails.
UNAWAITED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


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
sys.path.insert(0, "tests/experiments")
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


def test_what_is_on_its_way_out_is_not_lost_to_a_failed_write(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED")

    def train(stop):
        with Checkpoints(tmp_path / "checkpoints") as kept:
            monkeypatch.setattr(kept._checkpointer, "close", full)
            if stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stop=True)
    with pytest.raises(OSError, match=r"could not be written to .*RESOURCE"):
        train(stop=False)
    monkeypatch.setattr(checkpoint.ocp, "save", full)
    with pytest.raises(OSError, match=r"could not be written to .*last \(ValueError: RESOURCE_EXHAUSTED"):
        checkpoint.save(tmp_path / "last", small_state(1))


def test_a_place_that_cannot_be_written_to_is_an_error_in_a_line(toy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file"):
        start(tmp_path / "file" / "runs")

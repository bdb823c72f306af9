"""Runs on several devices and in several processes: the results of one."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import stop_in
from jax.sharding import PartitionSpec as P

from experiments import sharding, tasks, train
from experiments.config import Config
from experiments.datasets.stream import Evaluation, Stream
from experiments.tasks import arrays
from experiments.training import record, runs
from s2sam_jax import get_masks

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--subset", "256", "--epochs", "2"]


def start(out, *options):
    return next(iter(train.main([*SHORT, "--out", str(out), *options]).values()))


def assert_close_runs(folder, reference):
    """Weights and rows up to the order of sums, masks exactly."""
    a, b = (runs.restore(x) for x in (folder, reference))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a.params, b.params)
    jax.tree.map(np.testing.assert_array_equal, get_masks(a.opt_state), get_masks(b.opt_state))
    for row, other in zip(runs.rows(folder), runs.rows(reference), strict=True):
        np.testing.assert_allclose(row["train_loss"], other["train_loss"], rtol=1e-4)
        assert row["layers"] == other["layers"] if row["final"] else "layers" not in row


def test_a_mesh_is_read_from_a_text():
    assert dict(sharding.make_mesh("data=4,fsdp=2").shape) == {"data": 4, "fsdp": 2}
    assert dict(sharding.make_mesh("fsdp=8").shape) == {"data": 1, "fsdp": 8}
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=-2", "data=2,data=2", "model=2", "data=2;fsdp=2"])
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"A mesh looks like data=4,fsdp=2, .* got "):
        sharding.make_mesh(text)


def test_a_mesh_must_fit_the_devices_and_the_batch(toy, tmp_path):
    with pytest.raises(ValueError, match="The mesh data=3,fsdp=3 needs 9 devices; there are 8"):
        sharding.make_mesh("data=3,fsdp=3")
    with pytest.raises(SystemExit, match="batch_size=64 does not divide among the 3 devices of the mesh"):
        start(tmp_path, "--mesh", "data=3")
    assert not list(tmp_path.iterdir())


def test_large_leaves_are_cut_along_their_largest_dimension_that_divides():
    mesh = sharding.make_mesh("data=2,fsdp=4")
    shapes = {
        "conv": (3, 3, 32, 64), "head": (4096, 10), "odd": (63, 4095), "small": (64, 10), "scalar": (),
        "first": (64, 64),
    }  # fmt: skip
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: lies.spec for name, lies in sharding.of_state(mesh, tree).items()}
    assert specs == {
        "conv": P(None, None, None, "fsdp"), "head": P("fsdp"), "odd": P(), "small": P(), "scalar": P(),
        "first": P("fsdp"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return tmp_path_factory.mktemp("one")


@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2"])
@pytest.mark.parametrize(
    "options", [(), ("--method", "mest-ems", "--optimizer", "sam")], ids=["rigl-s2sam", "mest-ems-sam"]
)
def test_many_devices_give_the_result_of_one(options, mesh, toy, one_device, tmp_path):
    """Batches cut up, and beside it large leaves with all that mirrors them."""
    reference = start(one_device, *options)
    folder = start(tmp_path, "--mesh", mesh, *options)
    assert folder.name == reference.name
    assert_close_runs(folder, reference)
    assert runs.rows(folder)[-1]["mesh"] == mesh


def test_the_state_lies_where_it_should_throughout(toy, monkeypatch, tmp_path):
    """Masks, momentum and the last gradient as their parameter, and every leaf as at the start."""
    seen = []
    monkeypatch.setattr(record, "stop_if_bad", lambda state: seen.append(jax.tree.map(lambda x: x.sharding, state)))
    config = Config(subset=256, epochs=3, out=tmp_path)
    task = tasks.make(config, tasks.load(config), sharding.make_mesh("data=2,fsdp=4"))
    state = train.loop.train(config, task, Silent())
    assert len(seen) == 3
    for (path, leaf), *found in zip(jax.tree.leaves_with_path(state), *map(jax.tree.leaves, seen), strict=True):
        wanted = sharding.of_state(task.mesh, leaf)
        assert all(lies.is_equivalent_to(wanted, leaf.ndim) for lies in found), (path, wanted, found)
    kernels = [x for x in jax.tree.leaves(state) if x.shape == (64, 96)]
    assert len(kernels) == 4  # the parameter, its mask, momentum, last gradient
    assert {kernel.sharding.spec for kernel in kernels} == {P(None, "fsdp")}
    assert {shard.data.shape for kernel in kernels for shard in kernel.addressable_shards} == {(64, 24)}


class Silent:
    def steps(self, count):
        pass

    def row(self, row):
        pass


def test_a_run_goes_on_on_another_mesh(toy, one_device, tmp_path, monkeypatch):
    reference = start(one_device)
    monkeypatch.setattr("test_resume.SHORT", SHORT)
    stop_in(monkeypatch, arrays.Task, "order", 2, tmp_path, "--mesh", "data=2,fsdp=4")
    stop_in(monkeypatch, arrays.Task, "order", 1, tmp_path, "--mesh", "data=8")
    assert_close_runs(start(tmp_path), reference)


def test_an_epoch_in_one_program(toy, monkeypatch):
    """The form for accelerators, on several devices."""
    config, results = Config(subset=256, epochs=2), []
    for text, backend in ((None, "cpu"), ("data=2,fsdp=2", "gpu")):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            task = tasks.make(config, tasks.load(config), sharding.make_mesh(text))
            results.append(train.loop.train(config, task, Silent()))
    a, b = (state.params for state in results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), a, b)
    jax.tree.map(np.testing.assert_array_equal, *(get_masks(state.opt_state) for state in results))


PROCESS = """
import functools, glob, os, signal, sys, time
sys.path.insert(0, "tests/experiments")
import jax, toy
from experiments import tasks, train
from experiments.figures import training
from experiments.tasks import arrays
tasks.build, training.draw = toy.build, lambda runs, title, file: file.touch()

order, saved = arrays.Task.order, os.environ.get("DIE_AFTER")

def dying(task, number):
    while saved and number == 1 and not glob.glob(saved):
        time.sleep(0.1)
    if saved and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return order(task, number)

arrays.Task.order = dying
# How long it takes the others to notice; 100 by default.
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
train.main(sys.argv[1:])
"""


def two_processes(out, compiled, **environments):
    """Two devices each, over gloo: exit codes and what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    common = [*SHORT, "--out", str(out), "--mesh", "data=2,fsdp=2", "--distributed", "--coordinator", address]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *common, "--num-processes", "2", "--process-id", str(index)],
            cwd=ROOT, env=env | environments.get(f"of_{index}", {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], outputs


def test_two_processes_one_of_which_is_killed_give_the_result_of_one(toy, one_device, tmp_path):
    """The other ends with an error that says what to do; both go on from the checkpoint, and the first writes."""
    checkpoint = tmp_path / "*.partial" / runs.CHECKPOINTS / "1"
    codes, outputs = two_processes(tmp_path, toy, of_1={"DIE_AFTER": str(checkpoint)})
    assert codes == [1, -signal.SIGKILL], outputs
    assert "start all again with the same commands" in outputs[0][1]
    assert len(list(tmp_path.glob(str(checkpoint.relative_to(tmp_path))))) == 1
    codes, outputs = two_processes(tmp_path, toy)
    assert codes == [0, 0], outputs
    assert "accuracy" in outputs[0][0]  # of the table, whose headings are on several lines
    assert "accuracy" not in outputs[1][0]
    (folder,) = tmp_path.iterdir()
    assert_close_runs(folder, start(one_device))
    assert [json.loads(line)["epoch"] for line in (folder / runs.METRICS).read_text().splitlines()] == [1, 2]


def test_processes_that_cannot_find_each_other_are_told_how(monkeypatch):
    def initialize(*arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match=r"should be defined.\) Outside of .* give each --coordinator HOST:PORT"):
        train.main(["--distributed"])


def test_shares_of_processes_put_together_are_the_batches_of_one():
    """In order, so that what depends on the place in a batch, such as dropout, is the same."""
    kinds = (
        lambda index, count: Stream(range(24), lambda row, rng: (row, rng.random()), 8, index, count).batches(0),
        lambda index, count: Evaluation(range(21), lambda row: (row, row), (-1, -1), 8, index, count),
    )
    for make in kinds:
        whole, *shares = (list(itertools.islice(make(i, n), 3)) for i, n in ((0, 1), (0, 2), (1, 2)))
        for batch, *parts in zip(whole, *shares, strict=True):
            for together, *cut in zip(batch, *parts, strict=True):
                np.testing.assert_array_equal(together, np.concatenate(cut))


def test_from_the_command_line_on_several_devices(toy, tmp_path):
    arguments = ["--subset", "256", "--epochs", "2", "--optimizer", "sam", "--sharpness-parts", "4"]
    one = train.main([*arguments, "--out", str(tmp_path / "one")])["sam"]
    four = train.main([*arguments, "--out", str(tmp_path / "four"), "--mesh", "data=4"])["sam"]
    a, b = (runs.restore(folder) for folder in (one, four))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a.params, b.params)
    assert one.name == four.name
    assert Config(optimizer="sam", sharpness_parts=4).digest != Config(optimizer="sam").digest
    with pytest.raises(ValueError, match="sharpness_parts must be a divisor of batch_size; got 3"):
        Config(sharpness_parts=3)

"""``--tensorboard``: event files that say what the rows say."""

import sys

import numpy as np
import pytest

from experiments import train
from experiments.rows import provenance
from experiments.training import runs

TINY = ["--width", "2", "--subset", "128", "--epochs", "2", "--method", "dense", "--optimizer", "sgd"]


def scalars(folder):
    """``{(name, step): value}`` of all event files: records of a length, its checksum, an event, and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.glob("events.out.tfevents.*"):
        content, start = file.read_bytes(), 0
        while start < len(content):
            begin = start + 12
            end = begin + int.from_bytes(content[start : start + 8], "little")
            event = Event.FromString(content[begin:end])
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            start = end + 4
    return found


def test_events_equal_the_rows(tmp_path):
    folder = train.main([*TINY, "--tensorboard", "--out", str(tmp_path)])["sgd"]
    rows, origin = runs.rows(folder), provenance.of_run(runs.read_config(folder))
    expected = {
        (name, row["step"]): float(np.float32(value))
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name not in origin
    }
    assert scalars(folder) == expected
    assert [row["step"] for row in rows] == [2, 4]
    for step in (2, 4):
        assert {"train_loss", "test_accuracy", "sparsity", "epoch"} <= {name for name, at in expected if at == step}
    assert ("test_accuracy_recalibrated", 4) in expected


def test_without_the_package_the_option_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"needs tensorboardX: install the extra s2sam-jax\[tensorboard\]"):
        train.main([*TINY, "--tensorboard", "--out", str(tmp_path)])

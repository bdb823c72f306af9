"""Benchmarks on networks so small that their figures mean nothing."""

import numpy as np

from experiments import bench
from experiments.benchmarks import throughput
from experiments.config import Config
from experiments.rows import jsonl


def test_rows_of_another_network_stay(tmp_path):
    file = tmp_path / "bench_cpu.jsonl"
    old = [{"section": "throughput", "what": what, "value": 1.0} for what in ("a", "b")]
    jsonl.write(file, old)
    new = [{"section": "throughput", "what": "b", "value": 2.0}]
    assert bench._merged(file, new) == [old[0], *new]


def test_throughput_is_images_by_the_second(monkeypatch):
    seconds = {"sgd": np.array([2.0, 4.0, 4.0]), "s2sam": np.array([4.0] * 3), "sam": np.array([8.0] * 3)}
    monkeypatch.setattr(throughput, "paired", lambda cases, rounds: seconds)
    monkeypatch.setattr(throughput, "_runner", lambda *_: (lambda: None, 0))
    monkeypatch.setattr(throughput, "perturbation", lambda *_: {"epsilon_cosine": 1.0})
    config = Config(dataset="cifar10", model="resnet8", width=2, batch_size=4)
    sgd, _, s2sam, _, sam, *_ = throughput.rows(config, ["float32"], rounds=3, steps=10)
    assert (sgd.value, sgd.low, sgd.high) == (10.0, 10.0, 15.0)
    assert (s2sam.value, sam.value) == (10.0, 5.0)


def test_throughput_has_speed_and_memory_of_each_optimizer_and_what_is_left_of_the_perturbation():
    config = Config(dataset="cifar10", model="resnet8", width=2, batch_size=4)
    *figures, kept = throughput.rows(config, ["bfloat16"], rounds=1, steps=2)
    speeds, memory = figures[::2], figures[1::2]
    assert [row.what for row in speeds] == [
        f"throughput, resnet8, RigL-ERK 90 %, batch 4, bfloat16, {name}" for name in ("sgd", "s2sam", "sam")
    ]
    assert all(row.low <= row.value <= row.high for row in speeds)
    sgd, s2sam, _ = (row.value for row in memory)
    assert s2sam > sgd > 0
    assert 0 < kept.value < 1

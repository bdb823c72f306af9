"""Benchmarks on networks so small that their figures mean nothing."""

from experiments.benchmarks import throughput
from experiments.config import Config


def test_throughput_has_speed_and_memory_of_each_optimizer_and_what_is_left_of_the_perturbation():
    config = Config(dataset="cifar10", model="resnet8", width=2, batch_size=4)
    *figures, kept = throughput.rows(config, ["bfloat16"], rounds=1, steps=2)
    speeds, memory = figures[::2], figures[1::2]
    assert [row.what for row in speeds] == [
        f"throughput, resnet8, batch 4, bfloat16, {name}" for name in ("sgd", "s2sam", "sam")
    ]
    assert all(row.low <= row.value <= row.high for row in speeds)
    sgd, s2sam, _ = (row.value for row in memory)
    assert s2sam > sgd > 0
    assert 0 < kept.value < 1

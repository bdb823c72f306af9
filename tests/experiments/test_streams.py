"""Streams: every row once, another permutation each epoch, shared by processes."""

import itertools
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from experiments.datasets import sources
from experiments.datasets.stream import Evaluation, Stream


def take(batches, count):
    return list(itertools.islice(batches, count))


def with_draw(record, rng):
    return np.int32(record), rng.random()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("start", [1, 4, 5, 12])
def test_batches_from_a_step_on_are_those_of_the_whole_run(start):
    stream = Stream(range(23), with_draw, batch_size=4)
    assert stream.steps_per_epoch == 5
    whole = take(stream.batches(seed=3), 15)
    assert whole[0][0].shape == whole[0][1].shape == (4,)
    same(take(stream.batches(3, start), 15 - start), whole[start:])
    other = take(stream.batches(4), 15)
    assert any((a[0] != b[0]).any() for a, b in zip(whole, other, strict=True))


def test_every_epoch_is_another_permutation():
    stream = Stream(range(23), with_draw, batch_size=4)
    for seed in range(3):
        rows, draws = (np.stack(x).reshape(3, 20) for x in zip(*take(stream.batches(seed), 15), strict=True))
        assert all(len(set(epoch)) == 20 for epoch in rows)
        assert (rows[0] != rows[1]).any()
        assert (rows[1] != rows[2]).any()
        assert len(np.unique(draws)) == 60
    # One seed's second epoch is not the next one's first.
    first, second = (np.concatenate([b[0] for b in take(stream.batches(seed), 10)]).reshape(2, 20) for seed in (0, 1))
    assert (first[1] != second[0]).any()


def test_processes_share_the_batches_of_one():
    make = partial(Stream, range(24), with_draw, 4)
    whole = take(make(process_index=0, process_count=1).batches(0), 12)
    shares = [take(make(process_index=i, process_count=2).batches(0), 12) for i in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(rows) for rows, _ in parts] == [2, 2]
        assert set(batch[0]) == set(parts[0][0]) | set(parts[1][0])
        assert set(batch[1]) == set(parts[0][1]) | set(parts[1][1])
    for epoch in (slice(0, 6), slice(6, 12)):
        assert sorted(np.concatenate([rows for share in shares for rows, _ in share[epoch]])) == list(range(24))


@pytest.mark.parametrize(("rows", "processes"), [(23, 1), (24, 1), (23, 2), (3, 2), (9, 4)])
def test_evaluation_counts_every_row_once(rows, processes):
    parts = [
        Evaluation(range(rows), lambda x: {"row": np.int32(x)}, {"row": np.int32(-1)}, 8, i, processes)
        for i in range(processes)
    ]
    for _ in range(2):
        batches = [[batch["row"] for batch in part] for part in parts]
        assert {len(b) for b in batches} == {len(parts[0])} == {-(-rows // 8)}
        assert {len(batch) for part in batches for batch in part} == {8 // processes}
        seen = np.concatenate([batch for part in batches for batch in part])
        assert sorted(seen[seen >= 0]) == list(range(rows))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stream(iter([1]), with_draw, 1), TypeError, "source must have a length .* got list_iterator"),
        (lambda: Stream(range(3), with_draw, 4), ValueError, "batch_size=4 is more than the 3 rows"),
        (lambda: Stream(range(9), with_draw, 4, 0, 3), ValueError, "multiple of the 3 processes; got 4"),
        (lambda: Stream(range(9), with_draw, 4, 2, 2), ValueError, r"process_index must be in \[0, 2\); got 2"),
        (lambda: Evaluation(range(9), str, "", 0), ValueError, "positive multiple of the 1 processes; got 0"),
        (lambda: Stream(range(9), with_draw, 4).batches(0, -1), ValueError, "start_step must be at least 0; got -1"),
    ],
)
def test_streams_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_importing_needs_no_optional_library():
    optional = ["grain", "tokenizers", "sacrebleu", "tensorflow_datasets", "matplotlib"]
    check = (
        "import sys; import experiments.tasks, experiments.datasets.corruptions; "
        f"print([name for name in {optional} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_newest_prepared_version_is_read(tfds_folder):
    assert sources.records("words", "train", tfds_folder)[0]["text"] == b"newest"

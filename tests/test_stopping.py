"""Ctrl-C and SIGTERM: none is lost, and none meets code that could not bear it."""

import asyncio
import contextlib
import signal

import pytest

from experiments import stopping
from experiments.training.checkpoint import Checkpoints


def test_a_signal_in_a_held_block_waits_for_its_end():
    done = []

    def work():
        with stopping.stops_raise(), stopping.held():
            with stopping.held():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")

    with pytest.raises(stopping.Terminated):
        work()
    assert done == ["inner", "outer"]


def test_a_second_one_does_not_wait():
    done = []

    def work():
        with stopping.stops_raise(), stopping.held():
            for number in (1, 2):
                signal.raise_signal(signal.SIGTERM)
                done.append(number)

    with pytest.raises(stopping.Terminated):
        work()
    assert done == [1]


def test_one_that_was_put_off_is_not_left_for_later():
    with pytest.raises(stopping.Terminated), stopping.stops_raise(), stopping.held():
        signal.raise_signal(signal.SIGTERM)
    with stopping.stops_raise(), stopping.held():
        pass


def test_jobs_in_the_background_stay_deaf_to_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.stops_raise():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_signal_is_lost_in_what_orbax_catches(tmp_path, monkeypatch):
    """It catches everything in its event loops, and goes on."""

    def swallowing(self):
        async def careless():
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)

        asyncio.run(careless())

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(type(checkpoints._checkpointer), "wait", swallowing)
        with pytest.raises(stopping.Terminated), stopping.stops_raise():
            checkpoints.wait()
        monkeypatch.undo()

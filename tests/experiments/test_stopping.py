"""Ctrl-C and SIGTERM: none is lost, and none meets code that could not bear it."""

import asyncio
import contextlib
import gc
import signal
import time
from functools import partial

import pytest

from experiments import cli, stopping, tasks, train
from experiments.config import Config
from experiments.training import runs
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


def test_stopping_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop, cli.one_line():
        raise KeyboardInterrupt
    assert (stop.value.code, capsys.readouterr().err) == (130, "stopped\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_a_run_goes_on_is_said_by_either_way_to_stop_it(number, code, tmp_path, capsys, request):
    # A shell starts what it puts into the background deaf to Ctrl-C.
    request.addfinalizer(
        partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    )
    config, before = Config(out=tmp_path), signal.getsignal(signal.SIGTERM)
    folder = runs.begin(config)
    with (
        pytest.raises(SystemExit) as stop,
        cli.one_line(),
        runs.says_what_goes_on([config, Config(out=tmp_path / "no")]),
    ):
        signal.raise_signal(number)
    assert (stop.value.code, capsys.readouterr().err) == (
        code,
        f"stopped; the same command goes on from {folder}\n",
    )
    assert signal.getsignal(signal.SIGTERM) is before


def test_so_is_it_while_the_data_are_loaded(tmp_path, monkeypatch, capsys):
    folder = runs.begin(Config(out=tmp_path))
    monkeypatch.setattr(tasks, "load", lambda config: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert (stop.value.code, said) == (143, f"stopped; the same command goes on from {folder}\n")


def test_a_signal_is_not_lost_where_python_ignores_exceptions(capsys):
    """JAX calls back from the garbage collector, where a long run spends much of its time."""

    def collecting(*_):
        gc.callbacks.remove(collecting)
        signal.raise_signal(signal.SIGTERM)

    @cli.one_line()
    def main():
        gc.callbacks.append(collecting)
        gc.collect()
        time.sleep(10)

    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err) == (143, "stopped\n")

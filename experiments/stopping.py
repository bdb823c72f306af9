"""Ctrl-C and SIGTERM as exceptions, where the code that they meet can bear one."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster sends it before it takes the machine away: what holds for Ctrl-C holds for it."""


_KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_held = 0  # How many blocks put signals off.
_pending: type[KeyboardInterrupt] | None = None  # What has been put off.


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off to the end of the block; a second one does not wait.

    Orbax catches all that is raised inside its event loops, so that a signal there would be lost, or end the loop with
    work in it.
    """
    global _held, _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if not _held and _pending is not None:
            stop, _pending = _pending(), None
            if (error := sys.exc_info()[1]) is not None:
                stop.add_note(f"{type(error).__name__}: {error}")
            raise stop


@contextlib.contextmanager
def stops_raise() -> Iterator[None]:
    """Makes both signals raise, SIGTERM a :class:`Terminated`; but not in the midst of what is :func:`held`."""
    global _pending
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    # What a shell puts into the background is deaf to Ctrl-C, and stays so.
    heard = [number for number in _KINDS if signal.getsignal(number) is not signal.SIG_IGN]
    _pending, before = None, {number: signal.signal(number, _stop) for number in heard}
    try:
        with _none_is_lost():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _stop(number: int, frame: Any) -> None:
    global _pending
    del frame
    if not _held or _pending is not None:
        raise _KINDS[signal.Signals(number)]
    _pending = _KINDS[signal.Signals(number)]


@contextlib.contextmanager
def _none_is_lost() -> Iterator[None]:
    """Sends a signal to stop again where Python has ignored what it raised, as in JAX's callback of the collector."""
    before = sys.unraisablehook

    def again(ignored: Any) -> None:
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(ignored.exc_value, Terminated) else signal.SIGINT
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        else:
            before(ignored)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before

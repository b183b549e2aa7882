"""Signals that stop a command: SIGINT, SIGTERM (job schedulers) and SIGHUP (a closed terminal), all treated alike.

They stop at once, as Ctrl-C does, but wait where something is half done: training finishes its step first.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal arrived. Not an ``Exception``, as with Ctrl-C: nobody catches it by mistake."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Waiting:
    """Whether signals wait, and the first that does; a second one does not."""

    is_on = False
    number = 0


def _receive(number: int, frame: Any) -> None:
    if _Waiting.is_on and not _Waiting.number:
        _Waiting.number = number
        return
    raise Stopped(number)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """A context in which the signals raise ``Stopped``; those that are ignored, as under nohup, still are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in mine:
        signal.signal(number, _receive)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextlib.contextmanager
def waiting() -> Iterator[Callable[[], int]]:
    """A context in which the first signal waits; the function that it gives returns its number, 0: none arrived.

    What waits at the end is raised there.
    """
    _Waiting.is_on, _Waiting.number = True, 0
    try:
        yield lambda: _Waiting.number
    finally:
        _Waiting.is_on = False
    if _Waiting.number:
        raise Stopped(_Waiting.number)


@contextlib.contextmanager
def fatal() -> Iterator[None]:
    """A context in which the signals end the process, where nothing is half done and a wait in C++ may be long.

    A handler in Python would not run before the wait ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = [number for number, handler in before.items() if handler is _receive]
    for number in mine:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])

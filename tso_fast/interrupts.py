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
def _handled_by(handler: Any, is_mine: Callable[[Any], bool]) -> Iterator[None]:
    """A context in which a handler takes the place of those that ``is_mine`` tells; only the main thread has any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = {number: before for number in SIGNALS if is_mine(before := signal.getsignal(number))}
    for number in mine:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in mine.items():
            signal.signal(number, before)


def handled() -> contextlib.AbstractContextManager[None]:
    """A context in which the signals raise ``Stopped``; those that are ignored, as under nohup, still are."""
    return _handled_by(_receive, lambda before: before not in (signal.SIG_IGN, None))


def fatal() -> contextlib.AbstractContextManager[None]:
    """A context in which the signals end the process, where nothing is half done and a wait in C++ may be long.

    A handler in Python would not run before the wait ends.
    """
    return _handled_by(signal.SIG_DFL, lambda before: before is _receive)


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

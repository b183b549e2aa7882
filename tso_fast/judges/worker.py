"""Functions called in a process of their own, which ends when one of them hangs: a regular expression that backtracks
for years holds Python's lock, and no thread of the same process could stop it.

    call() -- function, arguments --> child: imports it, calls it
           <-- what it gave ---------
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tso_fast.errors import InputError, import_named

LOAD_S = 300.0
"""Longest import of a module, which may load a model."""
GRACE_S = 5.0
"""Time after which the child ends by itself, should nobody be left to end it."""

Made = tuple[str, tuple[Any, ...]]
"""A function to call: what makes it, as ``package.module:function``, and that one's arguments."""


class Failed(Exception):  # noqa: N818
    """A call gave nothing: ``raised ValueError: …``, ``took longer than 3 s``, ``ended its process with status 1``."""


class Worker:
    """One child, started by the first call and again after it was ended; for one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._loaded: set[Made] = set()

    def load(self, made: Made) -> None:
        """Makes a function ready in the child.

        Raises:
            InputError: as what makes it raised.
            Failed: the child ended, or was not ready in time.
        """
        if self._process is None or self._owner != os.getpid():  # a fork shares its parent's connection
            self._start()
        if made not in self._loaded:
            self._ask(("load", made, (sys.path, os.getcwd())), LOAD_S)
            self._loaded.add(made)

    def call(self, made: Made, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """What the function gives.

        Raises:
            InputError: the function raised it, or cannot be made.
            Failed: it raised something else, took longer than ``timeout_s``, or ended its process.
        """
        self.load(made)
        return self._ask(("call", made, arguments), timeout_s)

    def close(self) -> None:
        """Ends the child and all that it started."""
        if self._process is not None and self._owner == os.getpid():
            self._connection.close()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self._loaded.clear()

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C is for the program, and what a verifier starts ends with it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tso_fast.judges.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        self._connection, self._owner = Connection(ours.detach()), os.getpid()

    def _ask(self, message: tuple[str, Made, Any], timeout_s: float) -> Any:
        assert self._process is not None
        try:
            self._connection.send((*message, timeout_s + GRACE_S))
            if not self._connection.poll(timeout_s):
                self.close()
                raise Failed(f"took longer than {timeout_s:g} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            process = self._process
            self.close()
            raise Failed(f"ended its process with status {process.returncode}") from error
        except BaseException:  # Ctrl-C: an answer still to come would be taken for that of the next call
            self.close()
            raise
        if kind == "input error":
            raise InputError(value)
        if kind == "failed":
            raise Failed(value)
        return value


worker = Worker()
"""The one of this process."""
atexit.register(worker.close)


# ---------------------------------------------------------------------------------------------------------- child


def _serve(connection: Connection) -> None:
    functions: dict[Made, Callable[..., Any]] = {}
    while True:
        kind, made, given, limit_s = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            if kind == "load":
                sys.path[:], folder = given
                os.chdir(folder)
                name, arguments = made
                functions[made] = import_named(name, name, "function")(*arguments)
                answer: tuple[str, Any] = ("value", None)
            else:
                answer = ("value", functions[made](*given))
        except InputError as error:
            answer = ("input error", str(error))
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            answer = ("failed", f"raised {type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def main() -> None:
    number = int(sys.argv[1])
    os.set_inheritable(number, False)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        _serve(Connection(number))
    sys.stdout.flush()
    os._exit(0)  # threads of a verifier hold nothing up


if __name__ == "__main__":
    main()

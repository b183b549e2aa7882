"""An engine in its own, watched process: if it dies or falls silent, the result is an ``EngineError``, not a hang.

    EngineProcess -- spec, shards --> child: VLLMEngine or HFEngine
                  <-- answers, signs of life --

The child leads a process group that contains every process the engine starts. If this process ends, by any signal, the
child sees the connection close and kills its group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import pickle
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tso_fast.errors import EngineError, InputError
from tso_fast.generators.engine import Completion, EngineSpec, Refusal, Request

CLOSE_S, STOP_S = 10.0, 0.5
"""Time that an engine has to end by itself, and that it has once it is ``stopped``."""
BATCH_S = 0.05
"""Time that answers wait for others, since a message costs about 0.1 ms on either side."""
GRACE_S = 1.0
"""Time that an engine has to report the death of one of its processes."""
POLL_S = 0.2
"""Interval at which a wait checks the clock and the process."""
LAST_WORDS = 15
LAST_BYTES = 64 * 1024

Message = tuple[str, Any]


class EngineProcess:
    """``Engine`` in a supervised child process.

    Args:
        environment: more variables for the child.
        log: file to which its output is appended; default: a temporary one, which is kept if the engine dies.
        stopped: once it is set, nobody waits for the engine any more: not for its start, nor for an answer or its end.

    Raises:
        InputError: the engine cannot run here.
        EngineError: it did not start within ``spec.start_timeout_s``, or died; contains its last output.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        environment: Mapping[str, str] | None = None,
        log: str | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        self.spec = spec
        self._stopped = stopped or threading.Event()
        self._is_own_log = log is None
        self._log = Path(log) if log is not None else _temporary_log()
        self._outstanding = 0
        self._error: Exception | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._process = self._start(dict(environment or {}))
        self._finalizer = weakref.finalize(self, _end, self._process, self._outbox)
        self._send("spec", spec)
        try:
            self._wait_until_ready()
        except BaseException:  # Ctrl-C too
            self._finalizer()
            raise

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open(self._log, "ab") as log:
            self._log_start = log.tell()
            # Without PYTHONSAFEPATH, folders in the working directory would shadow packages.
            process = subprocess.Popen(
                [sys.executable, "-m", "tso_fast.generators.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **environment},
            )
        connection = Connection(ours.detach())
        # Threads, since a message to or from a stopped process would block forever. They hold no reference to self, so
        # that an unreferenced engine is finalized.
        for target, box in ((_write, self._outbox), (_read, self._inbox)):
            threading.Thread(target=target, args=(connection, box), daemon=True).start()
        return process

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.spec.start_timeout_s
        while (message := self._receive(deadline)) is not None:
            if message[0] == "ready":
                return
            self._raise_if_failed(message)
        raise self._failed(f"it was not ready after {self.spec.start_timeout_s:g} s")

    # ------------------------------------------------------------------------------------------------ protocol

    def submit(self, requests: Sequence[Request]) -> None:
        self._raise_if_over()
        self._outstanding += len(requests)
        self._send("requests", list(requests))

    def collect(self) -> list[Completion | Refusal]:
        """See ``Engine``."""
        self._raise_if_over()
        allowed_s = self.spec.timeout_s
        while self._outstanding:
            message = self._receive(time.monotonic() + allowed_s)
            if message is None:
                raise self._failed(f"it was silent for {allowed_s:g} s, with {self._outstanding} requests to answer")
            self._raise_if_failed(message)
            kind, payload = message
            if kind == "answers":
                self._outstanding -= len(payload)
                return payload
            allowed_s = self.spec.timeout_s if kind == "alive" else max(self.spec.timeout_s, self.spec.start_timeout_s)
        return []

    def close(self) -> None:
        if not self._finalizer.alive:
            return
        if not self._outstanding or self.spec.kind == "vllm":  # hf only looks between batches
            self._send("close")
            deadline = time.monotonic() + (STOP_S if self._stopped.is_set() else CLOSE_S)
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self._finalizer()
        self._drop_own_log()

    def _drop_own_log(self) -> None:
        if self._is_own_log:
            self._log.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------- messages

    def _send(self, kind: str, payload: Any = None) -> None:
        self._outbox.put(pickle.dumps((kind, payload)))

    def _receive(self, deadline: float) -> Message | None:
        """The next message; None: the deadline passed. The end of the process is a message, too."""
        while (left := deadline - time.monotonic()) > 0:
            if self._stopped.is_set():
                raise EngineError(f"the {self.spec.kind} engine of {self.spec.names} was stopped")
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=min(left, POLL_S))
            # Its children may hold the connection open.
            if self._process.poll() is not None and self._inbox.empty():
                return "gone", None
        return None

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._finalizer.alive:
            raise EngineError("the engine is closed")

    def _raise_if_failed(self, message: Message) -> None:
        kind, payload = message
        if kind == "gone":
            raise self._died()
        if kind == "input error":
            self._error = InputError(payload)
            self._finalizer()
            self._drop_own_log()
            raise self._error
        if kind == "error":
            raise self._failed(payload)

    def _died(self) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the connection ends before the process does
            self._process.wait(1.0)
        return self._failed(f"it died, {_status(self._process.poll())}")

    def _failed(self, what: str) -> EngineError:
        """The error to raise, after killing all that is left of the engine."""
        self._finalizer()
        words = last_words(self._log, self._log_start)
        said = "".join(f"\n    {line}" for line in words) or " none"
        self._error = EngineError(
            f"the {self.spec.kind} engine of {self.spec.names} failed: {what}\n"
            f"  its last words:{said}\n  its whole output: {self._log}"
        )
        return self._error


def _status(returncode: int | None) -> str:
    if returncode is None:
        return "its process still running"
    if returncode >= 0:
        return f"its process with status {returncode}"
    name = signal.Signals(-returncode).name if -returncode in {*signal.Signals} else "unknown"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process by signal {-returncode} ({name}){hint}"


def _temporary_log() -> Path:
    number, name = tempfile.mkstemp(prefix="tso-fast-engine-", suffix=".log")
    os.close(number)
    return Path(name)


# Colours; a progress bar's earlier states; vLLM's prefix of process and time; lines that do not explain why an engine
# died.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PREFIX = re.compile(r"^(\([^()]+ pid=\d+\) )+")
WARNING = re.compile(r"^\S+:\d+: \w*Warning: ")
NOISE = re.compile(rf"^(INFO|DEBUG|WARNING|\[W\d+) |{WARNING.pattern}|\d+%\||% Completed \|")


def last_words(log: Path, start: int = 0) -> list[str]:
    """The last lines of an engine's output that may say why it died."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return [f"(its output cannot be read: {error})"]
    lines = [PREFIX.sub("", COLOUR.sub("", line.split("\r")[-1])).rstrip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    told = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if not NOISE.search(line) and not (line.startswith("  ") and WARNING.search(before))  # a warning's source line
    ]
    return (told or lines)[-LAST_WORDS:]


def _write(connection: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError):  # the reader reports it
        while (message := outbox.get()) is not None:
            connection.send_bytes(message)


def _read(connection: Connection, inbox: queue.SimpleQueue[Message]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(("gone", None))


def _end(process: subprocess.Popen[bytes], outbox: queue.SimpleQueue[bytes | None]) -> None:
    """Kills the whole group and waits until it is gone, so that its memory is free."""
    outbox.put(None)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(CLOSE_S)
    deadline = time.monotonic() + CLOSE_S
    while _is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    # Zombies of the group still exist until their status is read, which in a container may never happen.
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, found = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False


# ---------------------------------------------------------------------------------------------------------- child


class _Closed(Exception):  # noqa: N818
    pass


class _Child:
    """The engine's side of the connection: receives shards and sends answers while the engine works."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.answers: list[Completion | Refusal] = []
        self.outstanding = 0
        self.sent = time.monotonic()
        self.is_closing = False

    def listen(self) -> None:
        try:
            while True:
                self.inbox.put(self.connection.recv())
        except (EOFError, OSError):  # the parent is gone; the engine may be deep in a computation
            os.killpg(0, signal.SIGKILL)

    def watch(self, processes: list[multiprocessing.process.BaseProcess]) -> None:
        """Ends this process if one of ``processes`` dies: vLLM waits forever if its EngineCore process was killed."""
        ended = wait([process.sentinel for process in processes]) if processes else []
        time.sleep(GRACE_S)  # lets the engine report more
        for process in processes:
            if process.sentinel in ended and not self.is_closing:
                print(f"{process.name} ended with {process.exitcode}", file=sys.stderr, flush=True)
                os._exit(1)

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        spec: EngineSpec = self.inbox.get()[1]
        # One sign of life per second, or more often if the parent's timeout is short.
        self.alive_s = min(1.0, spec.timeout_s / 4)
        engine = _open(spec)
        self.streams = spec.kind == "vllm"
        self.engine = engine
        engine.on_progress = self.on_progress
        threading.Thread(target=self.watch, args=(multiprocessing.active_children(),), daemon=True).start()
        self.send("ready")
        try:
            while True:
                self.take(wait=not self.outstanding)
                found = engine.collect()  # on_progress may send self.answers meanwhile
                self.answers += found
                self.outstanding -= len(found)
                self.send_answers(is_due=not self.outstanding or not self.streams)
        except _Closed:
            self.is_closing = True
            engine.close()

    def take(self, wait: bool) -> None:
        """Hands new shards to the engine."""
        while wait or not self.inbox.empty():
            with contextlib.suppress(queue.Empty):
                kind, requests = self.inbox.get(timeout=POLL_S)
                wait = False
                if kind == "close":
                    raise _Closed
                self.outstanding += len(requests)
                self.engine.submit(requests)

    def on_progress(self, is_loading: bool = False) -> None:
        """Hook that the engine calls between two steps."""
        if self.streams:
            self.take(wait=False)
        self.send_answers()
        if is_loading:
            self.send("loading")
        elif time.monotonic() - self.sent > self.alive_s:
            self.send("alive")

    def send_answers(self, is_due: bool = False) -> None:
        if self.answers and (is_due or time.monotonic() - self.sent > BATCH_S):
            answers, self.answers = self.answers, []
            self.send("answers", answers)

    def send(self, kind: str, payload: Any = None) -> None:
        self.connection.send((kind, payload))
        self.sent = time.monotonic()


def _open(spec: EngineSpec) -> Any:
    if spec.kind == "vllm":
        from tso_fast.generators.vllm_engine import VLLMEngine

        return VLLMEngine(spec)
    from tso_fast.generators.hf import HFEngine

    return HFEngine(spec)


def _track_apart() -> subprocess.Popen[bytes]:
    """Starts the tracker of shared memory, which outlives this process's group.

    multiprocessing starts its own inside the group. When the group is killed, that one dies before it has removed what
    the others leave in /dev/shm, such as the 400 MiB of vLLM's message queues.
    """
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", f"from multiprocessing.resource_tracker import main; main({reader})"],
        stdin=subprocess.DEVNULL,
        pass_fds=[reader],
        start_new_session=True,
    )
    os.close(reader)
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    tracker._fd, tracker._pid = writer, process.pid
    return process


def main() -> None:
    number = int(sys.argv[1])
    os.set_inheritable(number, False)
    tracker = _track_apart()  # noqa: F841 an unreferenced process is waited for
    child = _Child(Connection(number))
    status = 1
    try:
        child.run()
        status = 0
    except BaseException as error:
        child.send_answers(is_due=True)  # answers from before the error
        if isinstance(error, InputError):
            child.send("input error", str(error))
        elif isinstance(error, EngineError):
            child.send("error", str(error))
        else:
            traceback.print_exc()
            child.send("error", f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    os._exit(status)  # some libraries crash when torn down in the wrong order


if __name__ == "__main__":
    main()

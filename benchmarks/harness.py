"""Code that the benchmarks share: facts about the machine, rounds and their spread, child processes, files, tables."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.metadata
import json
import os
import platform
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def machine() -> dict[str, Any]:
    facts = _cpuinfo()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "processor": facts.get("model name", platform.machine()),
        "isa": [name for name in ISA if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpuinfo() -> dict[str, str]:
    """Fields of /proc/cpuinfo for the first core."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short commit hash, marked if tracked files differ from it; ``unknown`` outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        is_dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def interleave(calls: Mapping[str, Callable[[], float]], rounds: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of every call in every round. Each round starts with another call, to vary which call follows which.

    A call with fewer ``rounds`` skips the later ones, so its n-th time belongs to the n-th round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(max(rounds.values(), default=0)):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if number < rounds[name]:
                times[name].append(calls[name]())
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of values; for a single value, all are that value."""
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q1": q1, "q3": q3}


def resident_mib(field: str) -> float:
    """Of this process, such as ``VmRSS`` now and ``VmHWM`` at its peak; on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


# --------------------------------------------------------------------------------------------------- child processes

Say = Callable[[dict[str, Any]], None]


def in_child(work: Callable[[Say], None], hear: Say, *, limit_s: float, quiet_s: float | None = None) -> str | None:
    """Runs ``work(say)`` in a fork of this process. Each record passed to ``say`` reaches ``hear`` at once.

    A fork has every import of this process and starts in milliseconds; in exchange this process must not have used CUDA
    or started threads that it waits for. The child and all it started are killed after ``limit_s`` seconds, or
    ``quiet_s`` seconds after its last record.

    Returns:
        None if ``work`` returned, else a short description of how it ended: an exception, a signal, an exit status, or
        the limit with the line it was at.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _live(work, writer, log.fileno(), limit_s, quiet_s)
        os.close(writer)
        last_words: list[str | None] = []

        def listen(record: dict[str, Any]) -> None:
            last_words.append(record[ENDED]) if ENDED in record else hear(record)

        try:
            is_late = not _listen(pid, reader, listen, limit_s, quiet_s)
        finally:
            os.close(reader)
            code = _end(pid)
        if last_words:
            return last_words[0]
        log.seek(0)
        return _how_it_ended(code, is_late, log.read().decode(errors="replace"))


ENDED = "ended in child"
"""Key of a child's last record: None if it returned, else the exception. A child that exits otherwise sends none."""


def _live(work: Callable[[Say], None], writer: int, log: int, limit_s: float, quiet_s: float | None) -> NoReturn:
    """Runs the child; its stack is written shortly before it is killed."""
    end = time.monotonic() + limit_s
    with contextlib.suppress(BaseException):
        os.setsid()  # a group of its own, which is killed with what else it starts, such as compilers
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays on the GPU behind this script
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(file=2)

        def watch() -> None:
            left_s = max(0.2, min(end - time.monotonic(), quiet_s or limit_s))
            faulthandler.dump_traceback_later(left_s - min(2.0, 0.2 * left_s), file=2)

        def say(record: dict[str, Any]) -> None:
            data = json.dumps(record).encode() + b"\n"
            while data:
                data = data[os.write(writer, data) :]
            watch()

        watch()
        try:
            work(say)
            say({ENDED: None})
        except BaseException as error:
            traceback.print_exc()
            say({ENDED: brief(error)})
    os._exit(0)


def brief(error: BaseException) -> str:
    """Type and message of an exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _listen(pid: int, reader: int, hear: Say, limit_s: float, quiet_s: float | None) -> bool:
    """Passes on records until the child ends; returns whether it ended by itself. It has ended if the pipe is closed
    or, since processes it started may hold the pipe, if it is dead and the pipe is empty."""
    start = last = time.monotonic()
    is_dead, rest = False, b""
    while time.monotonic() < min(start + limit_s, last + (quiet_s or limit_s)):
        if select.select([reader], [], [], 0 if is_dead else 0.1)[0]:
            data = os.read(reader, 65536)
            if not data:
                return True
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                hear(json.loads(line))
                last = time.monotonic()
        elif is_dead:
            return True
        else:
            is_dead = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _end(pid: int) -> int | None:
    """The exit status of a child, negative for a signal, after killing the rest of its group. None: the child does not
    die, e.g. because a driver hangs."""
    for is_killed in (False, *[True] * 100):
        if is_killed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.1 if is_killed else 0.02)  # at first a moment for an exit of its own, whose status tells more
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # before the child is reaped, while its number is its own
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None


def _how_it_ended(code: int | None, is_late: bool, log: str) -> str:
    if is_late:
        how = "no answer in time, stopped" + (" and still there" if code is None else "")
    elif code is not None and code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    else:
        how = f"left with exit status {code}"
    return f"{how}{_last_frames(log)}"


def _last_frames(log: str) -> str:
    """The position of a child in faulthandler's output: that of the thread that failed, else of the main thread, which
    comes last."""
    blocks = re.split(r"\n(?=Current thread |Thread )", "\n" + log)[1:]
    failed = [block for block in blocks if block.startswith("Current thread ")]
    frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', (failed or blocks or [""])[-1])
    return "".join(
        f"{', in' if n == 0 else ' <-'} {Path(file).name}:{line} {name}"
        for n, (file, line, name) in enumerate(frames[:3])
    )


# ---------------------------------------------------------------------------------------------------- files and tables


def write_json(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

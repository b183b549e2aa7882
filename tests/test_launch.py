"""Several processes from one command: who speaks, and with what status it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tso_fast.errors import InputError
from tso_fast.launch import launch

WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, what, folder = os.environ["RANK"], sys.argv[1], Path(sys.argv[2])
def stop(number, frame):
    (folder / f"stopped-{rank}").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / f"began-{rank}").touch()
print(f"out {rank} of {os.environ['WORLD_SIZE']}")
print(f"error {rank}", file=sys.stderr, flush=True)
if what == "dies" and rank == "1":
    print("the disk is full", file=sys.stderr)
    sys.exit(3)
if what != "ends":
    time.sleep(60)
"""
"""A process of a command: it ends, waits, or dies if it is the second."""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A program that launches two workers, as ``tso-fast train --num_processes 2`` does."""
    (tmp_path / "tso_fast_worker.py").write_text(WORKER)
    program = (
        "import sys, tso_fast.launch as l; sys.path.insert(0, sys.argv[3]); l.MODULE = 'tso_fast_worker';"
        "sys.exit(l.launch(2, sys.argv[1:3]))"
    )
    return [sys.executable, "-c", program]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_the_first_process_alone_speaks(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [*command, "ends", str(tmp_path), ""], capture_output=True, text=True, env=environment(tmp_path), timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "out 0 of 2\n"
    assert run.stderr == "error 0\n"


def test_a_process_that_dies_ends_all_with_its_last_words(command: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        [*command, "dies", str(tmp_path), ""], capture_output=True, text=True, env=environment(tmp_path), timeout=120
    )
    assert run.returncode == 3
    assert "process 1 ended first, with status 3:\n  error 1\n  the disk is full\n" in run.stderr
    assert "Traceback" not in run.stderr
    assert (tmp_path / "stopped-0").exists()


def test_a_signal_reaches_every_process(command: list[str], tmp_path: Path) -> None:
    run = subprocess.Popen(
        [*command, "waits", str(tmp_path), ""], stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
    )
    while len(list(tmp_path.glob("began-*"))) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert told == "error 0\n"
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["15", "15"]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="num_processes: got 4, but this machine has 2 GPUs"):
        launch(4, ["train"])

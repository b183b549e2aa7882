"""Starts a command once for each process of a machine, by torch's elastic launcher."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tso_fast.errors import InputError
from tso_fast.progress import console

MODULE = "tso_fast"
"""What each process runs."""
PATIENCE = 600
"""Seconds that processes have, once they are told to stop, to finish their step and write a checkpoint."""


def is_launched() -> bool:
    """Whether this is one of several processes that a launcher started."""
    return "RANK" in os.environ


def launch(num_processes: int, arguments: Sequence[str], use_cpu: bool = False) -> int:
    """Runs ``tso-fast`` with these arguments in so many processes and returns the exit status.

    The first one has the terminal. What another says last is shown when it is the first to die; all others are stopped
    then.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if 0 < (gpus := torch.cuda.device_count()) < num_processes and not use_cpu:
        raise InputError(
            f"num_processes: got {num_processes}, but this machine has {gpus} GPUs; expected at most as many"
        )
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    with tempfile.TemporaryDirectory(prefix="tso-fast-") as logs:
        options: dict[str, Any] = {
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": num_processes,
            "run_id": "tso-fast",
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "max_restarts": 0,
            "logs_specs": DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, num_processes), Std.ALL)),
            "shutdown_timeout": PATIENCE,
        }
        known = {field.name for field in dataclasses.fields(LaunchConfig)}  # shutdown_timeout came with torch 2.12
        config = LaunchConfig(**{key: value for key, value in options.items() if key in known})
        try:
            elastic_launch(config, entrypoint=sys.executable)("-m", MODULE, *arguments)
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            if rank:
                console.print(
                    f"process {rank} ended first, with status {failure.exitcode}:{_last_words(Path(logs), rank)}"
                )
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _last_words(logs: Path, rank: int, lines: int = 12) -> str:
    """The end of what a process wrote to stderr."""
    files = sorted(logs.glob(f"**/{rank}/stderr.log"))
    text = files[-1].read_text(errors="replace").rstrip() if files else ""
    return "".join(f"\n  {line}" for line in text.splitlines()[-lines:]) or " without a word"

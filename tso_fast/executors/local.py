"""Engines in processes on this machine, each with GPUs of its own."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from tso_fast.errors import InputError
from tso_fast.generators import Engine, EngineSpec, open_engine


@dataclass(eq=False)
class Place:
    gpus: tuple[str, ...]
    number: int
    """Number of the engine, used in its log's name; 0 for a client."""


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as named in CUDA_VISIBLE_DEVICES."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(i) for i in range(count)]


class LocalExecutor:
    """``Executor`` on this machine.

    Args:
        gpus: GPUs that engines may use; empty: engines run on the CPU.
        num_engines: maximum number of engines at once; 0: as many as the GPUs allow, or one if there are none.
        logs: folder for the engines' output.
    """

    def __init__(self, gpus: list[str], num_engines: int, logs: Path) -> None:
        self.free = list(gpus)
        self.num_gpus = len(gpus)
        self.limit = num_engines or (len(gpus) if gpus else 1)
        self.logs = logs
        self.running = 0
        self.started = 0
        self.stopped = threading.Event()

    def acquire(self, spec: EngineSpec) -> Place | None:
        if spec.num_gpus > self.num_gpus:
            raise InputError(f"num_gpus: {spec.names} needs {spec.num_gpus} GPUs, this machine offers {self.num_gpus}")
        if not spec.is_client and (self.running >= self.limit or len(self.free) < spec.num_gpus):
            return None
        self.running += not spec.is_client
        self.started += 1
        gpus, self.free = tuple(self.free[: spec.num_gpus]), self.free[spec.num_gpus :]
        return Place(gpus, 0 if spec.is_client else self.started)

    def release(self, place: Place) -> None:
        self.running -= place.number > 0
        self.free += place.gpus

    def open(self, spec: EngineSpec, place: Place) -> Engine:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)} if place.gpus else {}
        return open_engine(
            spec,
            own_process=self.limit > 1,
            environment=environment,
            log=str(self.logs / f"engine-{place.number}.log"),
            stopped=self.stopped,
        )

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        pass

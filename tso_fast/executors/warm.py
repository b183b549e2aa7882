"""Engines that stay open from one ``run`` to the next, as a search asks for a few responses many times."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tso_fast.executors import Answer, Executor
from tso_fast.generators import Engine, EngineSpec, Request


class _Lent:
    """An engine that is closed only if it may not be used again: it has requests that nobody waits for, as where it
    failed, or all is ``stopped``."""

    def __init__(self, engine: Engine, stopped: threading.Event) -> None:
        self.engine = engine
        self.stopped = stopped
        self.outstanding = 0
        self.is_fit = True

    def submit(self, requests: Sequence[Request]) -> None:
        self.outstanding += len(requests)
        self.engine.submit(requests)

    def collect(self) -> list[Answer]:
        answers = self.engine.collect()
        self.outstanding -= len(answers)
        return answers

    def close(self) -> None:
        if self.outstanding or self.stopped.is_set():
            self.end()

    def end(self) -> None:
        self.is_fit = False
        self.engine.close()


@dataclass(eq=False)
class _Place:
    spec: EngineSpec
    place: Any
    engine: _Lent | None = None

    def serves(self, spec: EngineSpec) -> bool:
        """Whether its engine is one that ``spec`` describes, perhaps of more cells."""
        own = dataclasses.replace(self.spec, cells=spec.cells, servers=spec.servers)
        return own == spec and set(spec.cells) <= set(self.spec.cells)


class WarmExecutor:
    """``Executor`` over another one. Engines that have done their work wait for more of the same kind, until another
    kind needs their room, or ``close``.

    Used by one ``run`` at a time.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.stopped = threading.Event()
        self.idle: list[_Place] = []

    def acquire(self, spec: EngineSpec) -> _Place | None:
        for place in self.idle:
            if place.serves(spec):
                self.idle.remove(place)
                return place
        while (found := self.executor.acquire(spec)) is None and self.idle:
            self._end(self.idle.pop(0))
        return None if found is None else _Place(spec, found)

    def release(self, place: _Place) -> None:
        if place.engine is not None and place.engine.is_fit:
            self.idle.append(place)
        else:
            self.executor.release(place.place)

    def open(self, spec: EngineSpec, place: _Place) -> Engine:
        if place.engine is None:
            place.engine = _Lent(self.executor.open(spec, place.place), self.stopped)
        return place.engine

    def stop(self) -> None:
        self.stopped.set()
        self.executor.stop()

    def cool(self) -> None:
        """Closes the engines that wait, for something else that needs their memory."""
        while self.idle:
            self._end(self.idle.pop())

    def _end(self, place: _Place) -> None:
        assert place.engine is not None
        place.engine.end()
        self.executor.release(place.place)

    def close(self) -> None:
        self.cool()
        self.executor.close()

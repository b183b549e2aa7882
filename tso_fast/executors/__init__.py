"""Executors run engines: shards of requests in, answers out, even if engines die on the way.

    Job[] -> run(executor, jobs, done) -> done(answers) ...

A job is the work of one kind of engine. Jobs are ordered by size, the largest first; each gets one engine while there
is room, then each a second one, and so on. Every engine has a thread that feeds it shards and collects its answers; the
calling thread hands them to ``done``. If an engine dies, its unanswered requests go to another engine.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tso_fast.errors import EngineError
from tso_fast.generators import Completion, Engine, EngineSpec, Refusal, Request

JOIN_S = 1.0
"""Seconds that a stop waits for an engine's thread, which may be loading a model in this process."""
LOOK_S = 10.0
"""Seconds between checks for room for more engines, since clusters grow."""

logger = logging.getLogger(__name__)

Answer = Completion | Refusal


class Executor(Protocol):
    """Places where engines can run."""

    def acquire(self, spec: EngineSpec) -> Any | None:
        """A place for one more engine of this kind; None: there is no room now."""
        ...

    def release(self, place: Any) -> None: ...

    def open(self, spec: EngineSpec, place: Any) -> Engine:
        """Raises what ``generators.open_engine`` raises."""
        ...

    def stop(self) -> None:
        """Ends all engines at once, also those that are being opened; called from another thread than theirs."""
        ...

    def close(self) -> None: ...


@dataclass
class Shard:
    """Requests that are handed out together; answered ones are removed."""

    requests: dict[bytes, Request]
    failures: int = 0


@dataclass
class Job:
    """The work of one kind of engine; may be used from several threads."""

    spec: EngineSpec
    size_b: float
    """Size of the largest model, billions of parameters; the largest jobs start first."""
    shards: Iterator[list[Request]]
    returned: list[Shard] = field(default_factory=list)
    engines: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: Shard | None = None

    @property
    def title(self) -> str:
        return f"{self.spec.kind}: {self.spec.names}"

    def take(self) -> Shard | None:
        """The next shard, returned ones first; None: nothing is left to hand out."""
        with self._lock:
            if self.returned:
                return self.returned.pop(0)
            self._look()
            shard, self._next = self._next, None
            return shard

    def has_more(self) -> bool:
        with self._lock:
            self._look()
            return bool(self.returned) or self._next is not None

    def _look(self) -> None:
        while self._next is None and (requests := next(self.shards, None)) is not None:
            if requests:
                self._next = Shard({request.key: request for request in requests})

    def give_back(self, shard: Shard) -> None:
        with self._lock:
            self.returned.append(shard)


@dataclass(frozen=True)
class _Done:
    answers: list[Answer]


@dataclass(frozen=True)
class _Progress:
    """Change in the number of answers; negative if some were lost with their engine."""

    count: int


@dataclass(frozen=True)
class _Ended:
    """An engine's thread has ended; ``error`` says why, None: no work was left."""

    job: Job
    place: Any
    error: BaseException | None
    unfinished: list[Shard]


_Event = _Done | _Progress | _Ended


class _Worker(threading.Thread):
    """One engine and the thread that feeds it."""

    def __init__(self, executor: Executor, job: Job, place: Any, events: queue.Queue[_Event]) -> None:
        super().__init__(name=job.title, daemon=True)
        self.executor, self.job, self.place, self.events = executor, job, place, events
        self.is_stopped = threading.Event()
        self.engine: Engine | None = None
        # hf makes batches within a shard and stores the shard whole, so that a repeated shard gives the same bits.
        # Other engines get several shards at once: the tail of a shard overlaps the head of the next.
        self.is_whole = job.spec.kind == "hf"
        self.depth = 1 if self.is_whole else 3
        self.buffer: list[Answer] = []

    def run(self) -> None:
        error: BaseException | None = None
        held: list[Shard] = []
        try:
            try:
                self._serve(held)
            finally:
                if self.engine is not None:
                    self.engine.close()
        except BaseException as caught:
            error = caught
        self.events.put(_Progress(-len(self.buffer)))
        self.events.put(_Ended(self.job, self.place, error, [shard for shard in held if shard.requests]))

    def _serve(self, held: list[Shard]) -> None:
        if (first := self.job.take()) is None:
            return
        held.append(first)
        self.engine = self.executor.open(self.job.spec, self.place)
        self.engine.submit(list(first.requests.values()))
        while not self.is_stopped.is_set():
            while len(held) < self.depth and (shard := self.job.take()) is not None:
                held.append(shard)
                self.engine.submit(list(shard.requests.values()))
            if not held:
                return
            answers = self.engine.collect()
            self.events.put(_Progress(len(answers)))
            self.buffer += answers
            if self.is_whole and len(self.buffer) < len(held[0].requests):
                continue
            for answer in self.buffer:
                for shard in held:
                    shard.requests.pop(answer.key, None)
            held[:] = [shard for shard in held if shard.requests]
            self.events.put(_Done(self.buffer))
            self.buffer = []


def run(
    executor: Executor,
    jobs: Sequence[Job],
    done: Callable[[list[Answer]], None],
    *,
    max_retries: int,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Runs all jobs; calls ``done`` with new answers and ``progress`` with their number, both in this thread.

    Args:
        max_retries: how often a shard may go to another engine after its engine died.

    Raises:
        EngineError: the engines of one shard died ``max_retries + 1`` times; contains the last engine's output.
        InputError, or what ``done`` raises: engines are stopped first. Answers already given to ``done`` are kept.
    """
    jobs = sorted(jobs, key=lambda job: -job.size_b)
    events: queue.Queue[_Event] = queue.Queue()
    workers: dict[int, _Worker] = {}
    try:
        while True:
            _start(executor, jobs, events, workers)
            if not workers:
                if waiting := next((job for job in jobs if job.has_more()), None):
                    raise EngineError(
                        f"{waiting.title}: there is no room for its engine, which needs {waiting.spec.num_gpus} GPUs"
                    )
                return
            looked = time.monotonic()
            ended: list[_Ended] = []
            while not ended and time.monotonic() < looked + LOOK_S:
                now = _waiting(events, LOOK_S)
                if answers := [answer for event in now if isinstance(event, _Done) for answer in event.answers]:
                    done(answers)
                progress(sum(event.count for event in now if isinstance(event, _Progress)))
                ended = [event for event in now if isinstance(event, _Ended)]
            for event in ended:
                workers.pop(id(event.place)).join()
                event.job.engines -= 1
                executor.release(event.place)
            for event in ended:
                _give_back(event, max_retries)
    except BaseException:  # Ctrl-C too
        for worker in workers.values():
            worker.is_stopped.set()
        executor.stop()
        for worker in workers.values():
            if worker.engine is not None:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    worker.engine.close()
        for worker in workers.values():
            worker.join(timeout=JOIN_S)
        raise


def _waiting(events: queue.Queue[_Event], timeout_s: float) -> list[_Event]:
    """All events that have arrived, so that answers that come one by one are written together."""
    out = []
    with contextlib.suppress(queue.Empty):
        out.append(events.get(timeout=timeout_s))
        while True:
            out.append(events.get_nowait())
    return out


def _start(executor: Executor, jobs: Sequence[Job], events: queue.Queue, workers: dict[int, _Worker]) -> None:
    """Starts engines for jobs that have work: one per job in order, then a second one each, while there is room."""
    is_new = True
    while is_new:
        is_new = False
        fewest = min((job.engines for job in jobs if job.has_more()), default=0)
        for job in jobs:
            is_enough = job.engines > fewest or (job.engines and job.spec.is_client)  # one client is async
            if is_enough or not job.has_more() or (place := executor.acquire(job.spec)) is None:
                continue
            job.engines += 1
            workers[id(place)] = _Worker(executor, job, place, events)
            workers[id(place)].start()
            is_new = True


def _give_back(event: _Ended, max_retries: int) -> None:
    if event.error is None:
        return
    if not isinstance(event.error, EngineError):
        raise event.error
    for shard in event.unfinished:
        shard.failures += 1
        if shard.failures > max_retries:
            raise EngineError(
                f"{event.job.title}: {shard.failures} engines died over one shard; stopped. What was "
                f"answered is kept. The last: {event.error}"
            ) from event.error
    tries = max(shard.failures for shard in event.unfinished)
    logger.warning(
        "%s: an engine died, its work is given to another (retry %d of %d): %s",
        event.job.title,
        tries,
        max_retries,
        event.error,
    )
    for shard in event.unfinished:
        event.job.give_back(shard)

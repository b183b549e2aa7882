"""Shards, retries and places, with engines whose deaths are planned; real ones are in test_answering and test_ray."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tso_fast.errors import EngineError, InputError
from tso_fast.executors import Answer, Job, run
from tso_fast.executors.local import LocalExecutor
from tso_fast.executors.warm import WarmExecutor
from tso_fast.generators import Completion, EngineSpec, Kind, Refusal, Request, Sampling
from tso_fast.types import Cell


def cell(name: str, size_b: float = 1.0) -> Cell:
    return Cell(
        name=name,
        path=Path(name),
        base=Path(name),
        size_b=size_b,
        version_rank=0,
        weight_hash=name,
        architecture="a",
        context=64,
    )


def spec(name: str, kind: Kind = "vllm", num_gpus: int = 0, size_b: float = 1.0) -> EngineSpec:
    return EngineSpec(kind=kind, cells=(cell(name, size_b),), tokenizer="-", dtype="float32", num_gpus=num_gpus)


def job(name: str, shards: int, size: int = 4, size_b: float = 1.0, **options: Any) -> Job:
    def requests() -> Iterator[list[Request]]:
        for shard in range(shards):
            yield [] if shard == 1 else [request(name, shard * size + i) for i in range(size)]

    return Job(spec=spec(name, size_b=size_b, **options), size_b=size_b, shards=requests())


def request(name: str, number: int) -> Request:
    return Request(key=f"{name}/{number}".encode(), cell=name, token_ids=(1,), seed=number, sampling=Sampling())


def wanted(name: str, shards: int, size: int = 4) -> list[bytes]:
    return sorted(request(name, n).key for s in range(shards) if s != 1 for n in range(s * size, (s + 1) * size))


class Scripted:
    """Answers a few requests at a time, in random order, until its plan says that it dies."""

    def __init__(self, executor: Planned, spec: EngineSpec, lives: float) -> None:
        self.executor, self.spec, self.lives = executor, spec, lives
        self.pending: list[Request] = []
        self.is_closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        self.pending += requests
        self.executor.submitted += [r.key for r in requests]

    def collect(self) -> list[Answer]:
        assert self.pending, "nothing to wait for"
        time.sleep(self.executor.delay_s)
        if self.lives <= 0:
            raise EngineError("its last words")
        answers: list[Answer] = []
        for _ in range(min(3, len(self.pending))):
            self.lives -= 1
            r = self.pending.pop(self.executor.rng.randrange(len(self.pending)))
            if r.key in self.executor.refused:
                answers.append(Refusal(key=r.key, reason="no"))
            else:
                answers.append(Completion(key=r.key, token_ids=(1,), text="", finish_reason="stop", logprob=0.0))
        return answers

    def close(self) -> None:
        self.is_closed = True


class Planned(LocalExecutor):
    """Opens engines that answer as many requests as planned."""

    def __init__(self, lives: Callable[[int], float], gpus: int = 0, num_engines: int = 0) -> None:
        super().__init__([f"g{i}" for i in range(gpus)], num_engines, Path("-"))
        self.lives = lives
        self.rng = random.Random(0)
        self.engines: list[Scripted] = []
        self.opened: list[tuple[str, tuple[str, ...]]] = []
        self.submitted: list[bytes] = []
        self.refused: set[bytes] = set()
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def open(self, spec: EngineSpec, place: Any) -> Any:
        with self.lock:
            self.engines.append(Scripted(self, spec, self.lives(len(self.engines))))
            self.opened.append((spec.cells[0].name, place.gpus))
            return self.engines[-1]


def work(executor: Planned, jobs: list[Job], max_retries: int = 3) -> list[Answer]:
    answers: list[Answer] = []
    progress: list[int] = []
    run(executor, jobs, answers.extend, max_retries=max_retries, progress=progress.append)
    assert sum(progress) == len(answers)
    assert all(engine.is_closed for engine in executor.engines)
    assert len(executor.free) == executor.num_gpus
    assert executor.running == 0
    return answers


def test_every_request_once_by_one_engine_a_job() -> None:
    executor = Planned(lambda n: float("inf"))
    answers = work(executor, [job("a", 5), job("b", 3)])
    assert sorted(a.key for a in answers) == wanted("a", 5) + wanted("b", 3)
    assert [name for name, _ in executor.opened] == ["a", "b"]
    assert work(Planned(lambda n: 1.0), [job("none", 0), job("empty", 1, size=0)]) == []


@pytest.mark.parametrize("kind", ["vllm", "hf"])
@pytest.mark.parametrize("seed", range(5))
def test_engines_that_die_lose_nothing_and_repeat_nothing(kind: Kind, seed: int) -> None:
    rng = random.Random(seed)
    lives = [rng.choice([0, 1, 2, 5, 9, 40]) for _ in range(12)]
    executor = Planned(lambda n: lives[n] if n < len(lives) else float("inf"), gpus=4)
    jobs = [job("a", 7, kind=kind, num_gpus=1), job("b", 5, kind=kind, num_gpus=2)]
    answers = work(executor, jobs, max_retries=50)
    assert sorted(a.key for a in answers) == wanted("a", 7) + wanted("b", 5)
    assert len(executor.engines) > 3
    if kind == "vllm":  # what was answered is not asked again
        assert len(executor.submitted) - len(answers) <= 12 * (12 + 4 * len(executor.engines))


def test_an_answered_request_is_not_asked_again() -> None:
    executor = Planned(lambda n: 3 if n == 0 else float("inf"))
    answers = work(executor, [job("a", 1, size=8)])
    assert len(answers) == 8
    assert len(executor.submitted) == 8 + 5


def test_a_shard_of_hf_is_whole_or_not_there() -> None:
    """Its batches depend on it: half a shard done again would have other last bits."""
    executor = Planned(lambda n: 6 if n == 0 else float("inf"))
    batches: list[int] = []
    run(executor, [job("a", 1, size=8, kind="hf")], lambda answers: batches.append(len(answers)), max_retries=1)
    assert batches == [8]
    assert len(executor.submitted) == 16


def test_after_too_many_deaths_the_engines_own_words() -> None:
    executor = Planned(lambda n: 0)
    with pytest.raises(EngineError, match=r"vllm: a: 3 engines died over one shard; stopped.*The last: its last words"):
        work(executor, [job("a", 2)], max_retries=2)
    assert len(executor.engines) == 3
    assert all(engine.is_closed for engine in executor.engines)


def test_the_count_of_deaths_is_a_shards_own() -> None:
    """Ten engines die, each over another shard: the run goes on."""
    executor = Planned(lambda n: 4 if n < 10 else float("inf"))
    answers = work(executor, [job("a", 14, kind="hf")], max_retries=1)
    assert len(answers) == 13 * 4


def test_bad_input_stops_at_once_and_every_engine_is_closed() -> None:
    class Refusing(Planned):
        def open(self, spec: EngineSpec, place: Any) -> Any:
            if spec.cells[0].name == "b":
                raise InputError("b: no model there")
            return super().open(spec, place)

    executor = Refusing(lambda n: float("inf"), num_engines=2)
    executor.delay_s = 0.01
    with pytest.raises(InputError, match="no model there"):
        run(executor, [job("a", 400), job("b", 2)], lambda answers: None, max_retries=9)
    assert [engine.is_closed for engine in executor.engines] == [True] * len(executor.engines)
    assert len(executor.submitted) < 1600


def test_an_error_of_the_receiver_stops_the_engines() -> None:
    executor = Planned(lambda n: float("inf"), num_engines=3)
    executor.delay_s = 0.01

    def full(answers: list[Answer]) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(executor, [job("a", 400)], full, max_retries=0)
    assert all(engine.is_closed for engine in executor.engines)


def test_ctrl_c_stops_engines_also_those_that_are_being_opened() -> None:
    """The main thread is interrupted while one engine works and the other takes an hour to start."""

    class Slow(Planned):
        def open(self, spec: EngineSpec, place: Any) -> Any:
            if spec.cells[0].name == "b":
                assert self.stopped.wait(3600)
                raise EngineError("was stopped")
            return super().open(spec, place)

    def interrupted(answers: list[Answer]) -> None:
        raise KeyboardInterrupt

    executor = Slow(lambda n: float("inf"), num_engines=2)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(executor, [job("a", 400), job("b", 2)], interrupted, max_retries=0)
    assert time.monotonic() - begun < 30
    assert all(engine.is_closed for engine in executor.engines)


def test_an_engine_that_cannot_be_closed_is_an_error_and_no_wait() -> None:
    class Stuck(Planned):
        def open(self, spec: EngineSpec, place: Any) -> Any:
            engine = super().open(spec, place)

            def close() -> None:
                engine.is_closed = True
                raise RuntimeError("it will not go")

            engine.close = close
            return engine

    with pytest.raises(RuntimeError, match="it will not go"):
        run(Stuck(lambda n: float("inf")), [job("a", 2)], lambda answers: None, max_retries=0)


def test_refusals_are_answers() -> None:
    executor = Planned(lambda n: float("inf"))
    executor.refused = {b"a/2", b"a/9"}
    answers = work(executor, [job("a", 3)])
    assert {a.key for a in answers if isinstance(a, Refusal)} == executor.refused
    assert len(answers) == 8


def test_largest_first_then_what_room_is_left() -> None:
    executor = Planned(lambda n: float("inf"), gpus=8)
    executor.delay_s = 0.02
    jobs = [
        job("small", 40, size_b=1),
        job("large", 40, size_b=70, num_gpus=4),
        job("middle", 40, size_b=8, num_gpus=2),
    ]
    jobs[0].spec = spec("small", num_gpus=1)
    answers = work(executor, jobs)
    assert len(answers) == 3 * 39 * 4
    first = executor.opened[:4]
    assert {name: len(gpus) for name, gpus in first} == {"large": 4, "middle": 2, "small": 1}
    assert sorted(name for name, _ in first) == ["large", "middle", "small", "small"]
    taken = [gpu for _, gpus in first for gpu in gpus]
    assert sorted(taken) == [f"g{i}" for i in range(8)]


def test_one_client_for_servers_beside_engines() -> None:
    executor = Planned(lambda n: float("inf"), num_engines=1)
    answers = work(executor, [job("server", 9, kind="openai"), job("a", 4)])
    assert len(answers) == (8 + 3) * 4
    assert sorted(name for name, _ in executor.opened) == ["a", "server"]


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(InputError, match=r"num_gpus: large needs 4 GPUs, this machine offers 2"):
        LocalExecutor(["0", "1"], 0, Path("-")).acquire(spec("large", num_gpus=4))


def test_places_of_this_machine() -> None:
    executor = LocalExecutor(["4", "5", "7"], 0, Path("-"))
    two = executor.acquire(spec("a", num_gpus=2))
    one = executor.acquire(spec("a", num_gpus=1))
    assert two is not None
    assert one is not None
    assert (two.gpus, one.gpus) == (("4", "5"), ("7",))
    assert executor.acquire(spec("a", num_gpus=1)) is None
    executor.release(two)
    again = executor.acquire(spec("a", num_gpus=1))
    assert again is not None
    assert again.gpus == ("4",)
    cpu = LocalExecutor([], 0, Path("-"))
    assert cpu.acquire(spec("a")) is not None
    assert cpu.acquire(spec("a")) is None
    assert LocalExecutor([], 3, Path("-")).limit == 3


def test_warm_engines_wait_for_more_work_of_their_kind() -> None:
    executor = Planned(lambda n: 12 if n == 0 else float("inf"))  # the first one dies in its third run
    warm, answers = WarmExecutor(executor), list[Answer]()

    def work_on(*jobs: Job) -> None:
        run(warm, jobs, answers.extend, max_retries=1)

    with contextlib.closing(warm):
        work_on(job("a", 1))
        work_on(job("a", 1))
        assert [name for name, _ in executor.opened] == ["a"]
        work_on(job("a", 3))
        assert [name for name, _ in executor.opened] == ["a", "a"]
        assert [engine.is_closed for engine in executor.engines] == [True, False]
        work_on(job("b", 1), job("a", 1))  # there is room for one
        assert [name for name, _ in executor.opened] == ["a", "a", "b", "a"]
        warm.cool()
        assert all(engine.is_closed for engine in executor.engines)
        work_on(job("b", 1))
    assert len(answers) == 4 + 4 + 8 + 4 + 4 + 4
    assert all(engine.is_closed for engine in executor.engines)
    assert executor.running == 0


def test_a_stop_closes_warm_engines_at_work() -> None:
    executor = Planned(lambda n: float("inf"))
    with contextlib.closing(WarmExecutor(executor)) as warm:
        run(warm, [job("a", 1)], lambda answers: None, max_retries=0)

        def failing(answers: list[Answer]) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(warm, [job("a", 1)], failing, max_retries=0)
        assert [engine.is_closed for engine in executor.engines] == [True]


def test_a_warm_engine_of_more_cells_serves_one_of_them() -> None:
    executor = Planned(lambda n: float("inf"))
    warm = WarmExecutor(executor)
    both = dataclasses.replace(spec("a"), cells=(cell("a"), cell("b")))
    place = warm.acquire(both)
    assert place is not None
    engine = warm.open(both, place)
    warm.release(place)
    assert warm.acquire(dataclasses.replace(spec("b"), dtype="bfloat16")) is not place
    assert engine.engine.is_closed  # type: ignore[attr-defined]

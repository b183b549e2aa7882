"""EngineProcess: answers come through, and no death, hang or exit leaves anything waiting or running.

Faults are those of a scripted engine, which the child imports as if it were HFEngine and which starts in an instant.
No bound on a time is near what it takes: a machine under load may need seconds for what needs milliseconds.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fork, status_of
from transformers import LlamaConfig, LlamaForCausalLM

from tso_fast.errors import EngineError, InputError
from tso_fast.generators import EngineSpec, Refusal, Request, Sampling, generate, open_engine, process
from tso_fast.generators.process import EngineProcess, last_words
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.types import Cell

SCRIPTED = """
import multiprocessing, os, pathlib, signal, subprocess, sys, time, types

here = pathlib.Path(__file__).parent

class HFEngine:
    def __init__(self, spec):
        self.todo = []
        self.closing = spec.dtype
        if spec.dtype == "wrong":
            raise InputError("cells/wrong: no model")
        if spec.dtype == "broken":
            import no_such_library
        if spec.dtype == "slow":
            time.sleep(60)
        if spec.dtype == "worker":
            context = multiprocessing.get_context("spawn")
            self.worker = context.Process(target=time.sleep, args=(600,), name="Worker-7")
            self.worker.start()

    def on_progress(self, is_loading=False):
        pass

    def submit(self, requests):
        self.todo += requests

    def collect(self):
        request = self.todo.pop(0)
        (here / f"at {os.getpid()}").touch()
        getattr(self, request.cell)(request.seed / 1000)
        return [Refusal(key=request.key, reason=request.cell)]

    def answer(self, seconds):
        pass

    def work(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (here / "enough").exists():
            self.on_progress()
            time.sleep(0.001)

    def load(self, seconds):
        self.on_progress(is_loading=True)

    def hang(self, seconds):
        time.sleep(seconds)

    def spin(self, seconds):
        while True:
            pass

    def refuse(self, seconds):
        raise InputError("cells/tiny: its weights are damaged")

    def give_up(self, seconds):
        raise EngineError("the model answers nonsense")

    def fail(self, seconds):
        raise RuntimeError("device lost")

    def leave(self, seconds):
        print("INFO 11-21 busy\\nout of device memory", file=sys.stderr, flush=True)
        os._exit(3)

    def crash(self, seconds):
        os.kill(os.getpid(), signal.SIGSEGV)

    def orphan(self, seconds):  # which holds all that this process has open
        subprocess.Popen(["sleep", "600"], close_fds=False)
        os.set_inheritable(int(sys.argv[1]), True)
        subprocess.Popen(["sleep", "600"], close_fds=False)
        self.crash(seconds)

    def share(self, seconds):
        from multiprocessing import shared_memory
        shared = shared_memory.SharedMemory(create=True, size=4096)
        (here / f"share of {os.getpid()}").write_text(shared.name)
        time.sleep(seconds)

    def lose_worker(self, seconds):
        self.worker.kill()
        time.sleep(600)

    def close(self):
        if self.closing == "never":
            time.sleep(600)

module = types.ModuleType("tso_fast.generators.hf")
module.HFEngine = HFEngine
sys.modules[module.__name__] = module
from tso_fast.errors import EngineError, InputError
from tso_fast.generators import Refusal
"""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which the child finds the scripted engine."""
    folder = tmp_path_factory.mktemp("scripted")
    (folder / "sitecustomize.py").write_text(SCRIPTED)
    return {"PYTHONPATH": str(folder)}


CELL = Cell(
    name="tiny",
    path=Path("tiny"),
    base=Path("tiny"),
    size_b=0.0001,
    version_rank=1,
    weight_hash="tiny",
    architecture="tiny",
    context=64,
)
SPEC = EngineSpec(
    kind="hf", cells=(CELL,), tokenizer="tiny", dtype="float32", use_cpu=True, start_timeout_s=60.0, timeout_s=30.0
)


AT_ONCE_S = 5.0
"""Far less than ``CLOSE_S``: what takes a tenth of a second is not to fail under load."""
SOON_S = 25.0
"""Less than the engine's patience, and far less than the 600 s for which a fault lasts."""


@pytest.fixture
def start(scripted: dict[str, str]) -> Iterator[Callable[..., EngineProcess]]:
    started = []

    def start(log: Path | None = None, stopped: threading.Event | None = None, **options: Any) -> EngineProcess:
        spec, given = dataclasses.replace(SPEC, **options), None if log is None else str(log)
        started.append(EngineProcess(spec, environment=scripted, log=given, stopped=stopped))
        return started[-1]

    yield start
    for engine in started:
        engine.close()
        if engine._is_own_log:
            engine._log.unlink(missing_ok=True)


def ask(what: str, seconds: float = 0.0, n: int = 1) -> list[Request]:
    return [
        Request(
            key=f"{what}{i}".encode(),
            cell=what,
            token_ids=(1, 5),
            seed=int(1000 * seconds),
            sampling=Sampling(max_tokens=6),
        )
        for i in range(n)
    ]


def group_of(engine: EngineProcess) -> int:
    return engine._process.pid


def wait_until_at_work(engine: int, scripted: dict[str, str]) -> None:
    """Until an engine, named by its process, has begun with a request."""
    assert until((Path(scripted["PYTHONPATH"]) / f"at {engine}").exists)


def alive(group: int) -> list[str]:
    """Processes of a group that are not yet dead."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [pid for found, state, pid in rows if int(found) == group and not state.startswith("Z")]


def until(condition: Callable[[], Any], timeout_s: float = SOON_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def broken_package(folder: Path) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('not the torch that was meant')")
    return folder


@pytest.mark.slow
def test_a_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same answers as without the process, nothing left of it, and no packages from the folder it was started in."""
    path, log = tmp_path / "tiny", tmp_path / "logs" / "engine.log"
    tokenizer: Any = make_tokenizer([("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4, Recipe(seed=0))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    cell = dataclasses.replace(CELL, path=path, base=path)
    spec = dataclasses.replace(SPEC, cells=(cell,), tokenizer=str(path))
    asked = [dataclasses.replace(r, cell="tiny", seed=i) for i, r in enumerate(ask("r", n=60))]
    own = open_engine(spec)
    want = generate(own, asked)
    own.close()

    monkeypatch.chdir(broken_package(tmp_path / "here"))
    before = rss_mb()
    engine = open_engine(spec, own_process=True, environment={"PYTHONPROFILEIMPORTTIME": "1"}, log=str(log))
    assert isinstance(engine, EngineProcess)
    assert generate(engine, asked) == want
    engine.close()
    assert not alive(group_of(engine))
    assert rss_mb() - before < 16
    assert "import time:" in log.read_text()


def test_shards(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    assert engine.collect() == []
    shards = [
        [dataclasses.replace(r, key=b"%d %d" % (i, j)) for j, r in enumerate(ask("work", 0.002, n=40))]
        for i in range(5)
    ]
    for shard in shards:
        engine.submit(shard)
    got = []
    while found := engine.collect():
        got += found
    assert got == [Refusal(key=r.key, reason="work") for shard in shards for r in shard]


def test_close(start: Callable[..., EngineProcess], tmp_path: Path) -> None:
    engine = start()
    group, log = group_of(engine), engine._log
    assert alive(group)
    assert log.exists()
    engine.close()
    assert not alive(group)
    assert not log.exists()
    engine.close()
    for call in (engine.collect, lambda: engine.submit(ask("answer"))):
        with pytest.raises(EngineError, match="is closed"):
            call()

    given = tmp_path / "engine.log"
    given.write_text("before\n")
    start(log=given).close()
    assert given.read_text() == "before\n"


@pytest.mark.parametrize(("dtype", "work"), [("never", "answer"), ("float32", "spin"), ("float32", "hang")])
def test_close_waits_for_nobody(
    start: Callable[..., EngineProcess], monkeypatch: pytest.MonkeyPatch, dtype: str, work: str
) -> None:
    monkeypatch.setattr("tso_fast.generators.process.CLOSE_S", 1.0)
    engine = start(dtype=dtype)
    engine.submit(ask(work, 600))
    if work == "answer":
        engine.collect()
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < SOON_S
    assert not alive(group_of(engine))


def test_an_engine_that_is_stopped_ends_at_once(start: Callable[..., EngineProcess]) -> None:
    """Also one that would never close, and one at work, whose thread waits for an answer."""
    stopped = threading.Event()
    idle, busy = start(dtype="never", stopped=stopped), start(stopped=stopped)
    idle.submit(ask("answer"))
    idle.collect()
    busy.submit(ask("hang", 600))
    waits = ThreadPoolExecutor(1).submit(busy.collect)
    begun = time.monotonic()
    stopped.set()
    with pytest.raises(EngineError, match="the hf engine of tiny was stopped"):
        waits.result(AT_ONCE_S)
    for engine in (idle, busy):
        engine.close()
        assert not alive(group_of(engine))
    assert time.monotonic() - begun < AT_ONCE_S


def test_nobody_waits_for_the_start_of_an_engine_that_is_stopped(scripted: dict[str, str], tmp_path: Path) -> None:
    stopped, spec = threading.Event(), dataclasses.replace(SPEC, dtype="slow")
    threading.Timer(0.2, stopped.set).start()
    begun = time.monotonic()
    with pytest.raises(EngineError, match="was stopped"):
        EngineProcess(spec, environment=scripted, log=str(tmp_path / "log"), stopped=stopped)
    assert time.monotonic() - begun < AT_ONCE_S


def test_an_engine_that_is_let_go_ends(scripted: dict[str, str]) -> None:
    engine = EngineProcess(SPEC, environment=scripted)
    engine.submit(ask("spin"))
    group, reference = group_of(engine), weakref.ref(engine)
    engine._log.unlink()
    del engine
    assert until(lambda: reference() is None and not alive(group))


@pytest.mark.parametrize("work", ["spin", "hang", "work"])
def test_a_killed_engine_is_an_error_at_once(
    start: Callable[..., EngineProcess], scripted: dict[str, str], tmp_path: Path, work: str
) -> None:
    engine = start(log=tmp_path / "engine.log")
    engine.submit(ask(work, 600))
    wait_until_at_work(group_of(engine), scripted)
    os.kill(group_of(engine), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"hf engine of tiny failed: it died, .* by signal 9 \(SIGKILL\)") as caught:
        engine.collect()
    assert time.monotonic() - begun < SOON_S
    assert str(tmp_path / "engine.log") in str(caught.value)
    for call in (engine.collect, lambda: engine.submit(ask("answer"))):  # over for good
        with pytest.raises(EngineError, match="SIGKILL"):
            call()


def test_an_idle_engine_that_was_killed(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    os.kill(group_of(engine), signal.SIGKILL)
    engine.submit(ask("answer"))
    with pytest.raises(EngineError, match="SIGKILL"):
        engine.collect()


def test_a_death_is_seen_though_a_child_holds_the_connection(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    engine.submit(ask("orphan"))
    begun = time.monotonic()
    with pytest.raises(EngineError, match="SIGSEGV"):
        engine.collect()
    assert time.monotonic() - begun < SOON_S
    assert not alive(group_of(engine))


@pytest.mark.slow
def test_a_death_within_the_engine_is_seen_though_it_waits(start: Callable[..., EngineProcess]) -> None:
    engine = start(dtype="worker")
    time.sleep(1.5)
    generate_refusals(engine, ask("answer"))
    engine.submit(ask("lose_worker"))
    begun = time.monotonic()
    with pytest.raises(EngineError, match="with status 1\n  its last words:\n    Worker-7 ended with -9\n"):
        engine.collect()
    assert time.monotonic() - begun < SOON_S
    assert not alive(group_of(engine))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (
            "fail",
            r": RuntimeError: device lost\n  its last words:\n    Traceback(.*\n)+    RuntimeError: device lost\n",
        ),
        ("give_up", "failed: the model answers nonsense\n"),
        ("leave", "it died, its process with status 3\n  its last words:\n    out of device memory\n  its whole"),
        ("crash", r"by signal 11 \(SIGSEGV\)\n  its last words: none"),
    ],
)
def test_how_an_engine_ends_is_said(start: Callable[..., EngineProcess], work: str, words: str) -> None:
    engine = start()
    engine.submit([*ask("answer"), *ask(work)])
    assert engine.collect() == [Refusal(key=b"answer0", reason="answer")]
    with pytest.raises(EngineError, match=words):
        engine.collect()
    assert engine._log.exists()
    assert not alive(group_of(engine))


def test_wrong_input_is_no_fault_of_the_engine(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    engine.submit(ask("refuse"))
    with pytest.raises(InputError, match=r"^cells/tiny: its weights are damaged$"):
        engine.collect()
    assert not alive(group_of(engine))
    assert not engine._log.exists()


def test_a_hung_engine_is_an_error_after_its_timeout(start: Callable[..., EngineProcess]) -> None:
    engine = start()
    generate_refusals(engine, ask("answer"))
    os.kill(group_of(engine), signal.SIGSTOP)
    engine.spec = dataclasses.replace(engine.spec, timeout_s=0.5)
    engine.submit(ask("answer", n=20_000))  # more than a socket holds, and yet it returns
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"silent for 0.5 s, with 20000 requests to answer"):
        engine.collect()
    assert 0.5 <= time.monotonic() - begun < SOON_S
    assert not alive(group_of(engine))


def generate_refusals(engine: EngineProcess, asked: list[Request]) -> None:
    engine.submit(asked)
    assert engine.collect() == [Refusal(key=r.key, reason=r.cell) for r in asked]


def test_work_and_loads_give_signs_of_life(start: Callable[..., EngineProcess], scripted: dict[str, str]) -> None:
    enough = Path(scripted["PYTHONPATH"]) / "enough"
    engine = start()
    engine.submit(ask("work", 600))
    try:
        assert engine._inbox.get(timeout=SOON_S) == ("alive", None)
        enough.touch()
        assert engine.collect() == [Refusal(key=b"work0", reason="work")]
    finally:
        enough.unlink(missing_ok=True)
    engine.submit(ask("load"))
    assert engine._inbox.get(timeout=SOON_S) == ("loading", None)
    assert engine.collect() == [Refusal(key=b"load0", reason="load")]


class Clock:
    """Time that passes only while somebody waits for the next message, which comes when planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self.plan: list[tuple[float, str]] = []

    def monotonic(self) -> float:
        return self.now

    def empty(self) -> bool:
        return not self.plan

    def get(self, timeout: float) -> tuple[str, Any]:
        if not self.plan or self.plan[0][0] > self.now + timeout:
            self.now += timeout
            raise queue.Empty
        self.now, kind = max(self.now, self.plan[0][0]), self.plan.pop(0)[1]
        return kind, ["an answer"] if kind == "answers" else None


def test_what_is_silence(start: Callable[..., EngineProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not work, not a load within the time of a start, and not the time in which nobody listens."""
    engine, clock = start(timeout_s=30.0, start_timeout_s=100.0), Clock()
    engine._inbox = clock  # type: ignore[assignment]
    engine.submit(ask("hang", 600, n=4))
    with monkeypatch.context() as patch:
        patch.setattr(process, "time", clock)
        clock.plan = [(25.0, "alive"), (50.0, "alive"), (75.0, "answers")]
        assert engine.collect() == ["an answer"]
        clock.plan = [(80.0, "loading"), (175.0, "answers")]
        assert engine.collect() == ["an answer"]
        clock.plan, clock.now = [(180.0, "answers")], 1000.0
        assert engine.collect() == ["an answer"]
        clock.plan = [(1001.0, "loading"), (1002.0, "alive"), (1033.0, "answers")]
        patch.setattr(engine, "_failed", lambda what: EngineError(what))
        with pytest.raises(EngineError, match="silent for 30 s, with 1 requests to answer"):
            engine.collect()
        clock.plan, clock.now = [(2000.0, "loading")], 2000.0
        with pytest.raises(EngineError, match="silent for 100 s"):
            engine.collect()
        assert clock.now == pytest.approx(2100.0)


def test_starts_that_fail(scripted: dict[str, str], tmp_path: Path) -> None:
    log = str(tmp_path / "engine.log")
    with pytest.raises(InputError, match=r"^cells/wrong: no model$"):
        EngineProcess(dataclasses.replace(SPEC, dtype="wrong"), environment=scripted, log=log)
    with pytest.raises(EngineError, match="No module named 'no_such_library'\n  its last words:\n    Traceback"):
        EngineProcess(dataclasses.replace(SPEC, dtype="broken"), environment=scripted, log=log)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"not ready after 1 s"):
        EngineProcess(dataclasses.replace(SPEC, dtype="slow", start_timeout_s=1.0), environment=scripted, log=log)
    assert time.monotonic() - begun < SOON_S


PARENT = """
import sys, pickle, time
from tso_fast.generators.process import EngineProcess
spec, environment, work = pickle.load(open(sys.argv[1], "rb"))
engine = EngineProcess(spec, environment=environment, log=sys.argv[1] + ".log")
engine.submit(work)
print(engine._process.pid, flush=True)
if sys.argv[2] == "stay":
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["stay", "leave"])
@pytest.mark.parametrize("work", ["spin", "hang"])
def test_when_the_parent_goes_so_does_the_engine(scripted: dict[str, str], tmp_path: Path, how: str, work: str) -> None:
    """Killed, or at the end of its program; the engine is computing."""
    (tmp_path / "work").write_bytes(pickle.dumps((SPEC, scripted, ask(work, 600))))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "work"), how], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    if how == "stay":
        wait_until_at_work(group, scripted)
        assert alive(group)
        parent.kill()
    assert parent.wait(60) == (-signal.SIGKILL if how == "stay" else 0)
    assert until(lambda: not alive(group))


def test_last_words_are_those_that_tell(tmp_path: Path) -> None:
    log = tmp_path / "log"
    earlier = "of another engine\n"
    log.write_text(
        earlier
        + "\n".join(f"early {i}" for i in range(30))
        + "\n\x1b[31m(EngineCore pid=12) ERROR 11-21 out of memory\x1b[0m\n"
        "(MainProcess pid=1) (Worker-2 pid=2) WARNING 11-21 a warning\nINFO 11-21 news\n\n"
        "/lib/x.py:138: FutureWarning: soon\n  its_source(line)\n"
        "Loading:   0%|  | 0/2\rLoading: 100%|##| 2/2\n[W1121 13:26:20 utils.cpp:68] Warning: NUMA\n"
        "Traceback:\n  deep\nRuntimeError: the end\n"
    )
    words = last_words(log, len(earlier))
    assert words[-4:] == ["ERROR 11-21 out of memory", "Traceback:", "  deep", "RuntimeError: the end"]
    assert words[:-4] == [f"early {i}" for i in range(19, 30)]
    log.write_text(earlier + "INFO 11-21 news\n")
    assert last_words(log, len(earlier)) == ["INFO 11-21 news"]
    assert last_words(log, log.stat().st_size) == []
    assert "cannot be read" in last_words(tmp_path / "none")[0]


# ------------------------------------------------------------------------------------------------------ shared memory


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
@pytest.mark.parametrize("end", ["close", "killed", "its owner killed"])
def test_no_shared_memory_stays(start: Callable[..., EngineProcess], scripted: dict[str, str], end: str) -> None:
    """Whoever is killed: vLLM's message queues are 400 MiB, and its own tracker would die with it."""

    def share(engine: EngineProcess) -> None:
        engine.submit(ask("share", seconds=600))
        assert until(lambda: (noted := name_of(engine)).exists() and noted.read_text())

    def name_of(engine: EngineProcess) -> Path:
        return Path(scripted["PYTHONPATH"]) / f"share of {group_of(engine)}"

    if end == "its owner killed":
        told = Path(scripted["PYTHONPATH"]) / "owned"

        def own() -> None:
            share(engine := EngineProcess(SPEC, environment=scripted))
            told.write_text(str(group_of(engine)))
            time.sleep(600)

        owner = fork(own)
        assert until(lambda: told.exists() and told.read_text())
        shared = Path("/dev/shm") / (told.parent / f"share of {told.read_text()}").read_text()
        assert shared.exists()
        os.kill(owner, signal.SIGKILL)
        assert status_of(owner) == -signal.SIGKILL
    else:
        share(engine := start())
        shared = Path("/dev/shm") / name_of(engine).read_text()
        assert shared.exists()
        if end == "killed":
            os.killpg(group_of(engine), signal.SIGKILL)
        engine.close()
    assert until(lambda: not shared.exists())

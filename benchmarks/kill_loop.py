"""Kills runs at random moments and at single writes, starts them again, and compares them with one that nobody killed.

    python benchmarks/kill_loop.py [SCENARIO ...] [--kills 300] [--seed 0] [--out FILE]

Every run has checkpoints, and each of its parts is killed: generation, judging, annotation, training, saving. A
scenario is started again until it ends, and then again from the beginning, until it was killed as often as it should
be. It holds if every run ends with the bytes of the run that nobody killed, and nothing stays after any kill: no
process, no shared memory; after the end no temporary file. The exit status is 1 if one does not. Ten minutes on two
cores.

Starts are forks of a process that has trained once, which takes milliseconds instead of seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's other threads, and would wait for them
import torch
from accelerate.state import AcceleratorState

from tso_fast import interrupts, trainer
from tso_fast.config.settings import CellConfig, JudgeConfig, TrainConfig
from tso_fast.errors import Paused
from tso_fast.files.labels import LabelFile, make_label
from tso_fast.files.responses import ResponseStore, Row
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.files.run import iterations
from tso_fast.progress import console
from tso_fast.quickstart.build import Recipe, Size, build
from tso_fast.trainer import train

SMALL = Recipe(
    seed=0,
    sizes={"s": Size(hidden=32, layers=1, ffn=64, steps=30), "m": Size(hidden=32, layers=2, ffn=64, steps=30)},
    versions=(0.5, 1.0),
    demonstrations=200,
    prompts=16,
    human_share=0.25,
    held_out=6,
    development=12,
)
MARK = "TSO_FAST_KILL_LOOP"
"""Environment variable by which the processes of this loop are found, whoever their parent is."""
FILES = {
    "kill_loop_verifier.py": (
        "def letters(prompt, response, answer):\n    return sum(c.isalpha() for c in response) / (1 + len(response))\n"
    ),
    "short.txt": "{prompt}\n{first}\n{second}\n",
}
"""A verifier that tells answers of models apart which know nothing, and a judge's template; in the current folder."""
WRITES = 180
"""Places of a run at which it can be killed, about."""
TOLD_S = 5.0
"""Time that processes have to stop when another one has died."""
PATIENCE_S = 15.0
"""Time that whatever was started has to end after a kill."""


@dataclass(frozen=True)
class Scenario:
    """Settings over those of all, and how many processes train."""

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    world: int = 1


JUDGES = [
    JudgeConfig(kind="implicit", cell="policy", reference="m.v1"),
    JudgeConfig(kind="llm", cell="m.v2", template="short.txt", max_completion_length=2, pairs="baseline"),
]
LORA = {"peft": "lora", "lora_r": 4, "cells": ["s.v2", "m.v1"]}
SCENARIOS = {
    "judged": Scenario("judges, people, a mean as the reference", {"judges": JUDGES, "annotate": True}
                       | {"reference": "ema"}),
    "lora": Scenario("an adapter", LORA),
    "sharded": Scenario("sharded over 2 processes", {"shard": "full"}, world=2),
    "lora-2": Scenario("an adapter, 2 processes", LORA, world=2),
    "engines": Scenario("2 engines in processes of their own", {"num_engines": 2, "shard_size": 4}),
}  # fmt: skip


def config_of(scenario: Scenario, folder: Path) -> TrainConfig:
    matrix = build(SMALL)
    cells = scenario.settings.get("cells", ["s.v2", "m.v1", "m.v2"])
    config = TrainConfig(
        output_dir=str(folder),
        prompts=str(matrix / "prompts.jsonl"),
        eval_prompts=str(matrix / "held_out.jsonl"),
        cells=[CellConfig(path=str(matrix / name), version_rank=int(name[-1])) for name in cells],
        verifier="kill_loop_verifier:letters",
        num_iterations=2,
        max_completion_length=8,
        generation_batch_size=16,
        learning_rate=1e-3,
        per_device_train_batch_size=4 // scenario.world,
        num_train_epochs=2,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        seed=1,
    )
    return dataclasses.replace(config, **{k: v for k, v in scenario.settings.items() if k != "cells"})


# ---------------------------------------------------------------------------------------------------------- one start


def work(scenario: Scenario, folder: Path) -> None:
    """What a user does: the command, people's labels where it waits for them, and the command again."""
    config = config_of(scenario, folder)
    if config.annotate:  # whoever was labelling when everything was killed goes on
        label(folder)
    with interrupts.handled():
        while True:
            try:
                train(config)
                return
            except Paused:
                label(folder)


def label(folder: Path) -> None:
    """Labels one pair of each prompt whose iteration waits for it, one by one, as the page does."""
    for iteration in iterations(folder):
        if not iteration.verdicts.exists() or iteration.pairs.exists():
            continue
        candidates = read_candidates(iteration.responses, BadRows())
        file = LabelFile(iteration.labels, candidates)
        done = {found.pair[0] for found in file.history()}
        for item in candidates[:6]:
            if item.prompt.id not in done and len(item.responses) > 1:
                file.append(make_label(item, (0, 1), "ada", 1.0, datetime(2026, 1, 2, tzinfo=UTC)))


class Deadly:
    """In a child: the process kills itself at writes that no earlier one was killed at, or passed by."""

    def __init__(self, folder: Path, share: float, seed: float) -> None:
        self.folder, self.share = folder, share
        self.file = folder.with_name(f"{folder.name}.seen")
        self.seen = set(self.file.read_text().splitlines()) if self.file.exists() else set()
        self.random = random.Random(seed)

    def install(self) -> None:
        add, fsync = ResponseStore.add, os.fsync

        def deadly_add(store: ResponseStore, rows: Iterable[Row]) -> None:
            rows = list(rows)
            self.at("add", f"{self.folder} {min(row[0] for row in rows).hex()}")
            add(store, rows)

        def deadly_fsync(handle: int) -> None:
            self.at("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        ResponseStore.add, os.fsync = deadly_add, deadly_fsync  # type: ignore[method-assign]
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                self.at(event, path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"):
            self.at(event, " ".join(str(a) for a in arguments if isinstance(a, str | Path)))

    def at(self, event: str, paths: str) -> None:
        """Before something is written."""
        if f"{self.folder}" not in paths or str(self.file) in paths:
            return
        key = f"{event} {paths.replace(str(self.folder), '')}"
        if event == "os.rename" and paths.endswith("run.json"):  # often, each time with other content
            key += hashlib.sha256((self.folder / ".tmp-run.json").read_bytes()).hexdigest()[:12]
        if key in self.seen:
            return
        self.seen.add(key)
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, key.encode() + b"\n")
        os.close(handle)
        if self.random.random() < self.share:
            os.kill(os.getpid(), signal.SIGKILL)


def fork(do: Callable[[], object]) -> int:
    """The id of a child that does it and ends, with 128 + its number after a signal as the program does."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            do()
            status = 0
        except interrupts.Stopped as stop:
            status = 128 + stop.number
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def start(scenario: Scenario, folder: Path, deadly: Deadly | None = None) -> list[int]:
    """The processes of one start of the command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        console.quiet = True
        if scenario.world > 1:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(scenario.world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                LOCAL_WORLD_SIZE=str(scenario.world), MASTER_PORT=str(port),
            )  # fmt: skip
            torch.set_num_threads(1)
            # The others look once a second whether a stage is complete.
            trainer.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.01))  # type: ignore[assignment]
        AcceleratorState._reset_state(reset_partial_state=True)
        if deadly is not None and rank == 0:
            deadly.install()
        work(scenario, folder)

    return [fork(functools.partial(child, rank)) for rank in range(scenario.world)]


def ended(children: list[int], after_s: float = 600.0) -> list[int]:
    """Statuses of all, once all have ended. When one fails, the others are told to stop, and then killed: as a launcher
    does, only sooner, since one that waits for another in a library hears nothing.

    Raises:
        Fault: none failed, and not all have ended.
    """
    statuses: dict[int, int] = {}
    until = time.monotonic() + after_s
    told = False
    while len(statuses) < len(children):
        for pid in set(children) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) and not told:
            told, until = True, time.monotonic() + TOLD_S
            for pid in set(children) - statuses.keys():
                os.kill(pid, signal.SIGTERM)
        if time.monotonic() > until:
            for pid in set(children) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if not told:
                raise Fault("it hung")
        time.sleep(0.002)
    return [statuses[pid] for pid in children]


# ------------------------------------------------------------------------------------------------------ what must hold


class Fault(AssertionError):  # noqa: N818
    """What must hold does not."""


def content_of(run: Path) -> dict[str, str]:
    """sha256 of every file whose content a run promises; of run.json the stages and the manifest.

    What is only kept to save work depends on how it was interrupted, and so does how much was asked anew.
    """
    out = {}
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run).as_posix()
        if file.is_file() and not re.search(r"^run\.json|responses\.sqlite3|\.lock$|reference-logprobs", name):
            out[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    state = json.loads((run / "run.json").read_text())
    out |= {key: json.dumps(state[key]) for key in ("stages", "manifest", "mini_batches")}
    return {key: re.sub(r'"new_requests": \d+', "", value) for key, value in out.items()}


def left_behind(folder: Path) -> list[str]:
    """Files that nobody needs after the end."""
    return [p.name for p in folder.rglob("*") if ".tmp-" in p.name or p.name in ("parts", "checkpoint")]


def ours() -> set[int]:
    """Processes that this loop started, directly or not."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if f"{MARK}={os.environ[MARK]}".encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found |= {int(entry.name)} if state != "Z" else set()
    return found - {os.getpid()}


def shared_memory() -> set[str]:
    """Names in shared memory, those of other programs among them."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.is_file()}


def check_nothing_stays(before: set[str] | None) -> None:
    """Raises Fault for a process or shared memory that is there some seconds after a kill.

    Args:
        before: what was in shared memory at first; None: it is not looked at.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        left = ours(), set() if before is None else shared_memory() - before
        if left == (set(), set()):
            return
        if time.monotonic() > until:
            raise Fault(f"after a kill processes {left[0]} and shared memory {left[1]} stay")
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------- loop


def killed(scenario: Scenario, folder: Path, share: float, longest_s: float, draw: random.Random) -> Iterator[str]:
    """Starts until the run has ended, and yields once for each kill: at a write, at a random moment, or by SIGTERM.

    Args:
        share: of the writes, at which starts kill themselves.
        longest_s: until the others get a signal.
    """
    while True:
        kind = draw.choices(("at a write", "SIGKILL", "SIGTERM"), (5, 4, 1))[0]
        children = start(scenario, folder, Deadly(folder, share, draw.random()) if kind == "at a write" else None)
        number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL
        if kind != "at a write":
            time.sleep(draw.uniform(0, longest_s))
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(children), number)
        statuses = ended(children)
        if not any(statuses):
            return
        if -number not in statuses and 128 + number not in statuses:  # the former: before it could do anything about it
            raise Fault(f"{kind}: it ended with {statuses}")
        yield kind


def run_scenario(name: str, kills: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kills of a scenario by their kind.

    Raises:
        Fault: what must hold does not.
    """
    scenario, counts = SCENARIOS[name], Counter[str]()
    for file, text in FILES.items():
        (folder / file).write_text(text)
    os.chdir(folder)
    before = shared_memory() if "num_engines" in scenario.settings else None
    began = time.monotonic()
    if any(ended(start(scenario, folder / "whole"))):
        raise Fault("the run that nobody killed failed")
    took_s = time.monotonic() - began
    expected, number = content_of(folder / "whole"), 0
    check_nothing_stays(before)
    while counts.total() < kills:
        number += 1
        run = folder / f"run-{number}"
        # So many that a run is killed about as often as it should be.
        kinds = killed(
            scenario, run, min(1.0, kills / WRITES), took_s / 10 + 2 * took_s / kills, random.Random(seed + number)
        )
        for kind in kinds:
            counts[kind] += 1
            check_nothing_stays(before)
            if counts.total() >= kills:
                break
        if any(ended(start(scenario, run))):
            raise Fault(f"{run}: it does not go on after {dict(counts)}")
        found = content_of(run)
        if wrong := sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key)):
            raise Fault(f"{run}: other content after {dict(counts)}: {wrong}")
        if left := left_behind(run):
            raise Fault(f"{run}: left behind: {left}")
        check_nothing_stays(before)
    return counts


def prepare() -> None:
    """Everything that starts have in common; from now on forks are cheap."""
    os.environ[MARK] = f"{os.getpid()}-{time.time()}"
    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario("", {**LORA, "verifier": "exact", "num_iterations": 1})
        train(config_of(scenario, Path(folder) / "run"))
    gc.collect()
    gc.freeze()  # else collections in the children, of which training has several, would walk all that was imported


def main() -> int:
    from harness import commit, machine, table, versions, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument(
        "--kills", type=int, default=300, help="in all, the fewest with engines, which take long to start"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    shares = {"judged": 0.42, "lora": 0.2, "sharded": 0.17, "lora-2": 0.17, "engines": 0.04}
    names = options.scenarios or list(SCENARIOS)
    rows = []
    prepare()
    for name in names:
        kills = round(options.kills * shares[name] / sum(shares[n] for n in names) + 0.5)
        began, counts, fault = time.monotonic(), Counter[str](), ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts = run_scenario(name, kills, Path(folder), options.seed)
            except Exception as error:
                traceback.print_exc()
                fault = f"{type(error).__name__}: {error}"
        rows.append({"scenario": name, "kills": counts.total(), **counts, "fault": fault})
        rows[-1]["seconds"] = round(time.monotonic() - began, 1)
        print(rows[-1], file=sys.stderr, flush=True)
    header = ("scenario", "kills", "at a write", "SIGKILL", "SIGTERM", "seconds", "fault")
    print(table(header, ([str(row.get(key, 0)) for key in header] for row in rows)))
    if options.out:
        facts = {"machine": machine(), "versions": versions("tso-fast", "torch"), "commit": commit()}
        write_json(options.out, {**facts, "seed": options.seed, "scenarios": rows})
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

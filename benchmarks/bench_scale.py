"""Training over processes, with adapters and with checkpoints: memory of a rank, pairs a second, what saving costs.

    python benchmarks/bench_scale.py             all sections, some 15 minutes on two cores
    python benchmarks/bench_scale.py --only speed --rounds 5

A Llama of 60 million parameters (hidden 512, 8 layers, vocabulary 32000) in float32. Each case is a fresh process, or
two that talk by gloo; cases take turns, and ratios are taken within a round. Memory is the most that a process has
touched beyond what the libraries take, with the pages of mapped weights; its allocator gives large blocks back at once.
What is kept are weights, gradients and the optimizer's moments, counted tensor by tensor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import RESULTS, commit, machine, spread, table, versions, write_json

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024}  # fmt: skip
LORA = {"peft": "lora", "lora_r": 16}
MIB = 2**20
Case = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a case trains on, and how."""

    processes: int = 1
    threads: int = 2
    settings: Case = dataclasses.field(default_factory=dict)
    pairs: int = 8
    batch: int = 8
    """Pairs of a step, over all processes."""
    tokens: int = 64
    """Tokens of a response; half as many of its prompt."""
    steps: int = 4
    save_every: int = 0
    waits: bool = False
    """Whether a checkpoint is waited for before training goes on."""


MEMORY = {
    "one process": Work(batch=2, tokens=16, pairs=4),
    "two, sharded": Work(processes=2, threads=1, settings={"shard": "full"}, batch=2, tokens=16, pairs=4),
    "one process, LoRA": Work(settings=LORA, batch=2, tokens=16, pairs=4),
    "two, sharded, LoRA": Work(processes=2, threads=1, settings={"shard": "full", **LORA}, batch=2, tokens=16, pairs=4),
    "one process, long": Work(batch=8, tokens=256, pairs=8, steps=1),
    "one process, long, LoRA": Work(settings=LORA, batch=8, tokens=256, pairs=8, steps=1),
}
SPEED = {
    "1 x 2 threads": Work(batch=16, tokens=128, pairs=32, steps=4),
    "2 x 1 thread, replicas": Work(processes=2, threads=1, batch=16, tokens=128, pairs=32, steps=4),
    "2 x 1 thread, sharded": Work(
        processes=2, threads=1, settings={"shard": "full"}, batch=16, tokens=128, pairs=32, steps=4
    ),
}
CHECKPOINTS = {
    "none": Work(batch=8, tokens=128, pairs=32, steps=8),
    "waited for": Work(batch=8, tokens=128, pairs=32, steps=8, save_every=4, waits=True),
    "in the background": Work(batch=8, tokens=128, pairs=32, steps=8, save_every=4),
}
SECTIONS = {"memory": MEMORY, "speed": SPEED, "checkpoints": CHECKPOINTS}


# ------------------------------------------------------------------------------------------------------- in a process


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The most bytes that this process has allocated and touched beyond what it has now, looked at every 5 ms."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    before, most, is_over = now(), [0], threading.Event()

    def look() -> None:
        while not is_over.wait(0.005):
            most[0] = max(most[0], now() - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        is_over.set()
        thread.join()


def train(work: Work, folder: Path) -> dict[str, float]:
    """Trains in this process, one of ``work.processes``; seconds and bytes."""
    import torch

    from tso_fast.config.settings import CellConfig, TrainConfig
    from tso_fast.files.run import Run
    from tso_fast.training import optimise as module
    from tso_fast.training.checkpoint import Checkpoints
    from tso_fast.training.load import load_policy
    from tso_fast.types import Weights

    torch.set_num_threads(work.threads)
    saving = [0.0]
    if work.save_every:
        save = Checkpoints.save

        def timed(self: Checkpoints, step: int) -> None:
            start = time.perf_counter()
            save(self, step)
            if work.waits:
                self.wait()
            saving[0] += time.perf_counter() - start

        Checkpoints.save = timed  # type: ignore[method-assign]
    config = TrainConfig(
        output_dir=str(folder), prompts="-", cells=[CellConfig(path="-")], use_cpu=True, learning_rate=1e-5,
        per_device_train_batch_size=work.batch // work.processes, save_steps=work.save_every,
        num_train_epochs=max(1, work.steps * work.batch // work.pairs), **work.settings,
    )  # fmt: skip
    accelerator = module.make_accelerator(config, str(folder))
    accelerator.wait_for_everyone()
    weights = Weights(folder / "model", folder / "model")
    with peak_memory() as peak:
        policy = load_policy(config, weights, accelerator, has_adapter=config.peft == "lora")
        run = Run(folder / f"run-{os.getpid()}" if work.processes == 1 else folder / "run", {}, None)
        run.iteration(1).folder.mkdir(parents=True, exist_ok=True)
        seconds: list[float] = []
        step = module._Training.one_step

        kept = [0]

        def one_step(self: Any, number: int, of: Any) -> float:
            start = time.perf_counter()
            norm = step(self, number, of)
            seconds.append(time.perf_counter() - start)
            kept[0] = _kept(policy, self.optimizer)
            return norm

        module._Training.one_step = one_step  # type: ignore[method-assign]
        start = time.perf_counter()
        module.optimise(policy, _pairs(work), config, files=run.iteration(1), accelerator=accelerator, reference=None,
                        pad_token_id=0)  # fmt: skip
        total = time.perf_counter() - start
        most = peak() + _mapped()
    return {
        "seconds": total,
        "step": sum(sorted(seconds)[: len(seconds) // 2 + 1]) / (len(seconds) // 2 + 1),
        "saving": saving[0],
        "peak": float(most),
        "kept": float(kept[0]),
    }


def _kept(policy: Any, optimizer: Any) -> int:
    """Bytes of weights, gradients and moments in this process."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    parameters = list(policy.parameters())
    return sum(map(_bytes, [*parameters, *(p for p in parameters if p.requires_grad), *moments]))


def _mapped() -> int:
    """Bytes of weights' files that are in memory as they are on disk."""
    found, is_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split()[0]:
            is_weights = line.endswith(".safetensors")
        elif is_weights and name in ("Rss", "Anonymous"):
            found += int(value.split()[0]) * 1024 * (1 if name == "Rss" else -1)
    return found


def _bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _pairs(work: Work) -> list[Any]:
    import numpy as np

    from tso_fast.training.batches import EncodedPair

    r = np.random.default_rng(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(r.integers(3, 32000, count).tolist())

    return [
        EncodedPair(
            prompt=tokens(work.tokens // 2),
            chosen=tokens(work.tokens),
            rejected=tokens(work.tokens),
            scale=1.0,
            soft_label=1.0,
            margin=0.0,
            prompt_id=str(i),
        )
        for i in range(work.pairs)
    ]


# ----------------------------------------------------------------------------------------------------------- outside


def run_case(work: Work, folder: Path) -> dict[str, float]:
    """The figures of the first process of a case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(work.processes):
        env = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "MALLOC_MMAP_THRESHOLD_": str(MIB)}
        if work.processes > 1:
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(work.processes),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(work.processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        child = json.dumps([dataclasses.asdict(work), str(folder)])
        children.append(
            subprocess.Popen(
                [sys.executable, __file__, "--child", child],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
        )
    ends = [child.communicate() for child in children]
    if failed := next((err for child, (_, err) in zip(children, ends, strict=True) if child.returncode), None):
        raise RuntimeError(failed[-2000:])
    figures: dict[str, float] = json.loads(ends[0][0].splitlines()[-1])
    return figures


def rounds_of(cases: dict[str, Work], rounds: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Figures of every case in every round; each round starts with another case."""
    names, found = list(cases), {name: [] for name in cases}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(run_case(cases[name], folder))
            print(f"{name}: {found[name][-1]}", flush=True)
    return found


def ratios(found: dict[str, list[dict[str, float]]], name: str, base: str, key: str, inverse: bool = False) -> Any:
    """Of a case to another, round by round: median and quartiles."""
    values = [a[key] / b[key] for a, b in zip(found[name], found[base], strict=True)]
    return spread([1 / value for value in values] if inverse else values)


def summary(found: dict[str, dict[str, list[dict[str, float]]]]) -> list[list[str]]:
    """Rows of the table: what, goal, median (quartiles)."""

    def row(what: str, goal: str, value: dict[str, float]) -> list[str]:
        return [what, goal, f"{value['median']:.2f} ({value['q1']:.2f}–{value['q3']:.2f})"]

    rows = []
    if "memory" in found:
        of = found["memory"]
        rows.append(
            row("kept by a rank, 2 sharded / 1 process", "≤ 0.55", ratios(of, "two, sharded", "one process", "kept"))
        )
        rows.append(row("peak of a rank, 2 sharded / 1 process", "", ratios(of, "two, sharded", "one process", "peak")))
        rows.append(row("peak, LoRA / full, short", "≤ 0.45", ratios(of, "one process, LoRA", "one process", "peak")))
        rows.append(
            row(
                "peak, LoRA / full, 8 pairs of 2 x 256",
                "",
                ratios(of, "one process, long, LoRA", "one process, long", "peak"),
            )
        )
    if "speed" in found:
        of = found["speed"]
        for name, goal in (("2 x 1 thread, replicas", "≥ 0.95"), ("2 x 1 thread, sharded", "≥ 0.85")):
            rows.append(row(f"pairs/s, {name} / 1 x 2", goal, ratios(of, name, "1 x 2 threads", "step", inverse=True)))
    if "checkpoints" in found:
        of = found["checkpoints"]
        rows.append(
            row("saving seen by training, background / waited for", "≤ 0.25",
                ratios(of, "in the background", "waited for", "saving"))
        )  # fmt: skip
        extra = [
            (b["seconds"] - n["seconds"]) / (w["seconds"] - n["seconds"])
            for b, w, n in zip(of["in the background"], of["waited for"], of["none"], strict=True)
        ]
        rows.append(row("time added to training, background / waited for", "", spread(extra)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child is not None:
        work, folder = given.child
        print(json.dumps(train(Work(**work), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        from transformers import AutoModelForCausalLM, LlamaConfig

        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(f"{folder}/model")
        found = {name: rounds_of(SECTIONS[name], given.rounds, Path(folder)) for name in given.only}
    rows = summary(found)
    print(table(["", "goal", "median (quartiles)"], rows))
    facts = {
        "machine": machine(),
        "versions": versions("torch", "transformers", "accelerate", "peft"),
        "commit": commit(),
    }
    write_json(given.output, {**facts, "rounds": found, "summary": rows})


if __name__ == "__main__":
    main()

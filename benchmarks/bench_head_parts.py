"""A preference step with the output head split over several processes, against one process with all of it, on the CPU.

    python benchmarks/bench_head_parts.py                 2 processes x 1 thread against 1 x 2, about 2 minutes
    python benchmarks/bench_head_parts.py --ranks 4       more parts of the head

It uses the first shape of `bench_fused_loss.py`. In each round the single process does a step, then the parts do one
together, so that both see the same noise; ratios are taken within a round. Memory is the peak resident size of a
process during a step minus its size before it made any tensor: inputs, gradients and everything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_fused_loss import C1, isa_used
from fused_cases import Case, make
from harness import RESULTS, commit, machine, resident_mib, spread, table, versions, write_json

from tso_fast import preference_loss

OUT = RESULTS / "head_parts-cpu.json"
TIME_GOAL, MEMORY_GOAL = 1.1, 0.55


def process(case: Case, rank: int, ranks: int, threads: int, store: str, pipe: Any) -> None:
    """One of ``ranks`` processes: reports its memory, then does a step on each request and reports its seconds."""
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    group = None
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=120)
        )
        group = dist.group.WORLD
    # A step of no size first, so that the libraries it loads are not counted.
    small = torch.zeros(2, 1, 8, dtype=torch.bfloat16, requires_grad=True), torch.zeros(8, 8, dtype=torch.bfloat16)
    targets = torch.zeros(2, 1, dtype=torch.int64)
    preference_loss(*small, targets, ref_logprobs=torch.zeros(2), impl="cpu", vocab_group=group).loss.backward()
    given = torch.load(f"{store}.{ranks}.{rank}.pt", mmap=True)
    base_mib = resident_mib("VmRSS")
    tensors = {name: x.clone() for name, x in given.items()}
    hidden, weight = tensors.pop("hidden").requires_grad_(), tensors.pop("weight").requires_grad_()

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        out = preference_loss(hidden, weight, **tensors, loss=case.loss, impl="cpu", vocab_group=group)
        out.loss.backward()
        return out.loss.detach()

    del given
    step()
    Path("/proc/self/clear_refs").write_text("5")
    loss = step()
    pipe.send({"memory_mib": resident_mib("VmHWM") - base_mib, "loss": loss.item()})
    while pipe.recv() == "step":
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


def inputs(case: Case, store: str, ranks: int) -> None:
    """Writes a file of tensors for each process of a world."""
    problem = make(case)
    parts = [x.tensor_split(ranks) for x in (problem.weight, problem.ref_weight)]
    for rank in range(ranks):
        tensors = {
            "hidden": problem.hidden,
            "targets": problem.targets,
            "ref_hidden": problem.ref_hidden,
            "weight": parts[0][rank].clone(),
            "ref_weight": parts[1][rank].clone(),
        }
        torch.save(tensors, f"{store}.{ranks}.{rank}.pt")


class World:
    """The processes that do a step together."""

    def __init__(self, case: Case, ranks: int, threads: int, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            self.pipes.append(here)
            self.processes.append(
                context.Process(target=process, args=(case, rank, ranks, threads, store, there), daemon=True)
            )
            self.processes[-1].start()
        self.facts = [pipe.recv() for pipe in self.pipes]

    def step(self) -> float:
        """Does a step; returns the seconds of the slowest process."""
        for pipe in self.pipes:
            pipe.send("step")
        return max(pipe.recv() for pipe in self.pipes)

    def end(self) -> None:
        for pipe, worker in zip(self.pipes, self.processes, strict=True):
            pipe.send("end")
            worker.join(10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs=4, metavar=("PAIRS", "LENGTH", "D", "V"))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    case = Case(name="C1", what="4 pairs of 2 x 256, D 512, V 32000", **C1)
    if arguments.shape:
        changed = dict(zip(("pairs", "length", "dim", "vocab"), arguments.shape, strict=True))
        case = dataclasses.replace(case, what="trial", **changed)
    with tempfile.TemporaryDirectory() as folder:
        stores = {ranks: f"{folder}/{ranks}" for ranks in (1, arguments.ranks)}
        for ranks, store in stores.items():
            inputs(case, store, ranks)
        one = World(case, 1, arguments.ranks, stores[1])
        parts = World(case, arguments.ranks, 1, stores[arguments.ranks])
        times = [(one.step(), parts.step()) for _ in range(arguments.rounds)]
        one.end()
        parts.end()
    ratio = spread([b / a for a, b in times])
    memory = max(x["memory_mib"] for x in parts.facts) / one.facts[0]["memory_mib"]
    record = {
        "command": " ".join(["python benchmarks/bench_head_parts.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine() | {"isa_used": isa_used()},
        "versions": versions("torch", "tso-fast"),
        "case": dataclasses.asdict(case),
        "ranks": arguments.ranks,
        "rounds": arguments.rounds,
        "goals": {"time": TIME_GOAL, "memory": MEMORY_GOAL},
        "one_s": spread([a for a, _ in times]),
        "parts_s": spread([b for _, b in times]),
        "ratio": ratio,
        "memory_ratio": memory,
        "memory_mib": {"one": one.facts[0]["memory_mib"], "parts": [x["memory_mib"] for x in parts.facts]},
        "loss": {"one": one.facts[0]["loss"], "parts": [x["loss"] for x in parts.facts]},
    }
    write_json(arguments.out, record)
    rows = [
        [
            f"1 process x {arguments.ranks} threads",
            f"{1e3 * record['one_s']['median']:.0f}",
            "1",
            f"{record['memory_mib']['one']:.0f}",
            "1",
        ],
        [
            f"{arguments.ranks} processes x 1 thread",
            f"{1e3 * record['parts_s']['median']:.0f}",
            f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})",
            f"{max(record['memory_mib']['parts']):.0f}",
            f"{memory:.2f}",
        ],
        ["goal", "", f"≤ {TIME_GOAL:g}", "", f"≤ {MEMORY_GOAL:g}"],
    ]
    print(table(["", "ms a step", "ratio (quartiles)", "MiB a process", "ratio"], rows))
    difference = abs(parts.facts[0]["loss"] - one.facts[0]["loss"])
    if difference > 1e-5:
        print(f"wrong: the losses differ by {difference:.1e}", file=sys.stderr)
    return int(difference > 1e-5)


if __name__ == "__main__":
    sys.exit(main())

"""A preference step at the output head on one GPU: ours, the matmul floor and the peers, side by side.

    python benchmarks/gpu_suite.py                           under 8 minutes on an H200; most important first
    python benchmarks/gpu_suite.py --smoke                   the first case, ours and plain torch, in a minute
    python benchmarks/gpu_suite.py --only llama3_8b frozen   some cases
    python benchmarks/gpu_suite.py --resume                  what --out does not hold yet; failures once more, last
    python benchmarks/gpu_suite.py --dry_run                 the same code at tiny shapes, in Triton's interpreter
    python benchmarks/gpu_suite.py --readme                  the README's tables from the last results

It also runs from a plain copy of the repository, where nothing can be installed, compiled or downloaded (it needs
torch, triton and numpy; a peer is measured if its folder can be imported):

    ln -sfn ../kernels tso_fast/kernels
    PYTHONPATH=. python benchmarks/gpu_suite.py

On a fresh machine run `first_contact.py` first: it fills Triton's cache from many processes at once.

A step is the loss and its backward, from hidden states to the gradients of hidden states and head, host time
included. The floor is its matrix products alone, `torch.mm` on the completion rows. Times are CUDA events around
interleaved steps with the L2 cache overwritten in between; ratios are taken within a round and shown as median and
quartiles. Errors are against float64 on the same inputs, and come first. Extra memory is the peak of allocated memory
minus inputs and returned gradients.

Every provider of a case runs in its own process, a fork of this one, which never touches the GPU: a crash, a hang or a
lost device becomes a row's entry like any other. Results are written after each provider, and partial results of a
process that died are kept.
"""

from __future__ import annotations

import os
import sys

if "--dry_run" in sys.argv:  # before triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import math
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fused_cases import (
    GOALS,
    GPU_GOALS,
    PEERS,
    Case,
    Cuda,
    Device,
    Problem,
    Provider,
    attempt,
    error_cells,
    errors,
    floors,
    make,
    misses,
    ours,
    solve,
)
from harness import RESULTS, Say, commit, in_child, interleave, machine, spread, table, versions, write_json

OUT = RESULTS / "gpu_suite.json"
PACKAGES = (
    "torch",
    "triton",
    "tso-fast",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "transformers",
    "nvidia-cutlass-dsl",
    "quack-kernels",
)

# 16384 completion tokens each, most important first.
LLAMA = {"pairs": 8, "length": 1024, "dim": 4096, "vocab": 128256}
CASES = {
    case.name: case
    for case in [
        Case(name="llama3_8b", what="Llama-3-8B, 8 pairs of 2 x 1024", **LLAMA),
        Case(name="cached", what="Llama-3-8B, reference log-probs given", is_ref_cached=True, **LLAMA),
        Case(
            name="frozen",
            what="Llama-3-8B, frozen head shared with the reference",
            is_head_trained=False,
            is_head_shared=True,
            **LLAMA,
        ),
        Case(
            name="clipped",
            what="Llama-3-8B, dual clip, half of the sequences at their bound",
            loss="dual_clip",
            is_half_clipped=True,
            **LLAMA,
        ),
        Case(name="qwen3_8b", what="Qwen3-8B, 8 pairs of 2 x 1024", **LLAMA | {"vocab": 151936}),
        Case(
            name="gemma2_2b",
            what="Gemma-2-2B, softcap 30, 8 pairs of 2 x 1024",
            softcap=30.0,
            **LLAMA | {"dim": 2304, "vocab": 256000},
        ),
        Case(
            name="half_prompt",
            what="Llama-3-8B, 8 pairs of 2 x 2048, half of every sequence is prompt",
            prompt_share=0.5,
            **LLAMA | {"length": 2048},
        ),
        Case(name="short", what="Llama-3-8B, 32 pairs of 2 x 256", **LLAMA | {"pairs": 32, "length": 256}),
        Case(name="float16", what="Llama-3-8B, 8 pairs of 2 x 1024", dtype="float16", **LLAMA),
    ]
}
HEADLINE = next(iter(CASES))
TINY = {"pairs": 1, "length": 8, "dim": 24, "vocab": 67}
OURS, NAIVE = "tso-fast", "naive"
PEER_NAMES = ["trl", "liger_scaled", "cce", "liger_compiled", "quack", "cce_kahan", "liger", "torch_lce"]
LEAST_S = 15
"""Seconds that an item needs once everything is compiled; no item starts with less time left."""


# ------------------------------------------------------------------------------------------------------ one process


def measure(case: Case, provider: Provider, device: Device, rounds: int, limit_s: float, say: Say) -> None:
    """Measures a provider and reports each result at once: errors, then memory, then times against the floor."""
    start = time.monotonic()
    problem, truth = solve(make(case, device.name), block=1024)
    device.synchronize()
    say({"setup_s": time.monotonic() - start})
    result, first_s = timed(device, provider, problem)
    if isinstance(result, str):
        return say({"status": result})
    found = errors(result, truth)
    say({"first_s": first_s, "errors": found})
    if provider.is_ours:
        say({"misses": misses(found, GPU_GOALS)})
    truth = dataclasses.replace(truth, dhidden=truth.loss, dweight=None)  # their memory is free again
    del result

    (result, second_s), peak = device.peak_bytes(functools.partial(timed, device, provider, problem))
    if isinstance(result, str):
        return say({"status": result})
    grad_bytes = result.grad_bytes
    say({"grad_mib": grad_bytes / 2**20} | ({} if peak is None else {"extra_mib": (peak - grad_bytes) / 2**20}))
    del result
    floor = floors(problem, truth)
    for call in floor.values():
        call()
    device.synchronize()
    left_s = limit_s - (time.monotonic() - start)
    rounds = max(1, min(rounds, int(0.6 * left_s / max(second_s, 1e-3))))  # a slow peer gets as many as there is time
    say({"rounds": rounds, **times(provider, problem, floor, device, rounds), "status": "ok"})


def timed(device: Device, provider: Provider, problem: Problem) -> tuple[Any, float]:
    start = time.monotonic()
    return attempt(provider, problem, device), time.monotonic() - start


def times(provider: Provider, problem: Problem, floor: dict[str, Any], device: Device, rounds: int) -> dict[str, Any]:
    calls: dict[str, Callable[[], Any]] = {**floor, OURS: lambda: provider.run(problem)}
    seconds = interleave(
        {name: functools.partial(device.seconds, call) for name, call in calls.items()}, dict.fromkeys(calls, rounds)
    )
    device.synchronize()
    step = seconds.pop(OURS)
    best = min(floor, key=lambda name: spread(seconds[name])["median"])
    return {
        "time_s": spread(step),
        "ratio": spread([a / b for a, b in zip(step, seconds[best], strict=True)]),
        "floor": {"best": best, **{name: spread(values) for name, values in seconds.items()}},
    }


# ---------------------------------------------------------------------------------------------------- injected faults


class LostDevice(Device):
    """A device on which a kernel fails after its launch, and which then never answers again."""

    is_lost = False

    def synchronize(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self) -> None:
        self.synchronize()


def _crash(problem: Problem) -> Any:
    ctypes.string_at(0)


def _leave(problem: Problem) -> Any:
    os._exit(3)


def _hang(problem: Problem) -> Any:
    time.sleep(3600)


def _lose(problem: Problem) -> Any:
    LostDevice.is_lost = True
    return PEERS[NAIVE].run(problem)


def _run_out(problem: Problem) -> Any:
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")


FAULTS = {
    "crash": Provider(label="a segmentation fault", run=_crash),
    "exit": Provider(label="a process that leaves", run=_leave),
    "hang": Provider(label="a hang", run=_hang),
    "late_error": Provider(label="an error after the launch", run=_lose),
    "oom": Provider(label="out of memory", run=_run_out),
}
"""Faulty providers for the test of this script; the others must still be measured."""


# ---------------------------------------------------------------------------------------------------------- the suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    case: Case
    name: str
    provider: Provider

    @property
    def title(self) -> str:
        return f"{self.case.name}/{self.name}"


def items(arguments: argparse.Namespace) -> Iterator[Item]:
    """The first case with all providers, then ours on the other cases, then the other providers."""
    known = {OURS: ours("triton" if arguments.dry_run else arguments.impl), **PEERS, **FAULTS}
    wanted = [OURS, NAIVE] if arguments.smoke else arguments.providers
    names = [HEADLINE] if arguments.smoke else arguments.only or list(CASES)
    cases = [dataclasses.replace(CASES[n], **TINY) if arguments.dry_run else CASES[n] for n in names]
    first = [OURS, NAIVE] if arguments.dry_run else wanted  # a peer in the interpreter's company is no news
    plan = [(cases[0], name) for name in wanted[:2] + arguments.inject + wanted[2:]]
    plan += [(case, name) for case in cases[1:] for name in wanted[:1]]
    plan += [(case, name) for case in cases[1:] for name in wanted[1:] if name in first]
    yield from (Item(case=case, name=name, provider=known[name]) for case, name in plan)


def run(item: Item, device: Device, rounds: int, limit_s: float) -> dict[str, Any]:
    """An item's entry, measured in its own process."""
    entry: dict[str, Any] = {"label": item.provider.label, "status": "no result"}
    package = item.provider.package
    if reason := item.provider.unsupported(item.case):
        return entry | {"status": reason, "is_final": True}
    if package is not None and importlib.util.find_spec(package) is None:
        return entry | {"status": f"not installed: {package}", "is_final": True}

    def work(say: Say) -> None:
        measure(item.case, item.provider, device, rounds, limit_s, say)

    start = time.monotonic()
    if (ended := in_child(work, entry.update, limit_s=limit_s)) is not None:
        entry["status"] = ended
    is_final = entry["status"] == "ok" or entry["status"].startswith("not installed")
    return entry | {"wall_s": time.monotonic() - start, "is_final": is_final}


def facts_of(device: Device) -> dict[str, Any]:
    """Facts about the GPU, found in a child process; empty: no GPU."""
    found: dict[str, Any] = {}

    def ask(say: Say) -> None:
        if not isinstance(device, Cuda) or torch.cuda.is_available():
            say({"device": device.name, **device.facts()})

    if (ended := in_child(ask, found.update, limit_s=60)) is not None:
        print(f"the device does not answer: {ended}", file=sys.stderr)
    return found


def preload() -> None:
    """Imports the kernels once for all children, where errors will show."""
    with contextlib.suppress(Exception):
        importlib.import_module("tso_fast.kernels.linear_logprob_backward")
        importlib.import_module("tso_fast.kernels.pair_loss")


class Record:
    """The results, on disk after every change."""

    def __init__(self, out: Path, arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
        self.out, self.start = out, time.monotonic()
        self.data: dict[str, Any] = {"is_dry_run": arguments.dry_run, "goals": GPU_GOALS, "runs": [], "rows": []}
        earlier = json.loads(out.read_text()) if arguments.resume and out.exists() else {}
        if "runs" in earlier and earlier["is_dry_run"] == arguments.dry_run:
            self.data = earlier
        self.data["runs"].append(
            {
                "command": " ".join(["python benchmarks/gpu_suite.py", *sys.argv[1:]]),
                "commit": arguments.commit or commit(),
                "machine": machine() | facts,
                "versions": versions(*PACKAGES),
                "rounds": arguments.rounds,
            }
        )
        self.write()

    def entry(self, item: Item) -> dict[str, Any] | None:
        row = next((row for row in self.data["rows"] if row["case"]["name"] == item.case.name), None)
        return None if row is None else row["providers"].get(item.name)

    def add(self, item: Item, entry: dict[str, Any]) -> None:
        rows = self.data["rows"]
        row = next((row for row in rows if row["case"]["name"] == item.case.name), None)
        if row is None:
            row = {
                "case": dataclasses.asdict(item.case) | {"products": item.case.products, "tflop": tflop(item.case)},
                "providers": {},
            }
            rows.append(row)
            rows.sort(key=lambda row: list(CASES).index(row["case"]["name"]))
        row["providers"][item.name] = entry | {"run": len(self.data["runs"]) - 1}
        self.write()

    def write(self) -> None:
        self.data["runs"][-1]["wall_s"] = time.monotonic() - self.start
        write_json(self.out, self.data)


def tflop(case: Case) -> float:
    return case.products * 2 * (2 * case.pairs * case.completion) * case.dim * case.vocab / 1e12


def run_all(arguments: argparse.Namespace, record: Record, device: Device) -> None:
    """Runs every item that is not done, previously failed ones last, and none that could exceed the budget."""
    todo = []
    for item in items(arguments):
        earlier = record.entry(item)
        if earlier is None or not earlier.get("is_final"):
            todo.append((earlier is not None and "wall_s" in earlier, item))
    for _, item in sorted(todo, key=lambda pair: pair[0]):
        left_s = arguments.budget_s - (time.monotonic() - record.start)
        if left_s < LEAST_S:
            if record.entry(item) is None:
                record.add(item, {"label": item.provider.label, "status": "not reached"})
            print(f"{item.title}: not reached", flush=True)
            continue
        entry = run(item, device, arguments.rounds, min(arguments.limit_s, left_s))
        record.add(item, entry)
        print(line(item, entry), flush=True)


# ------------------------------------------------------------------------------------------------------------ tables


def line(item: Item, entry: dict[str, Any]) -> str:
    if entry["status"] != "ok":
        return f"{item.title}: {entry['status']}"
    ms, ratio, mib, margin, gradient = cells(entry)
    return (
        f"{item.title}: {ms} ms, {ratio} of the floor, {mib} MiB, margin {margin}, gradient {gradient} "
        f"[{entry['first_s']:.0f} s the first time, {entry['wall_s']:.0f} s in all]"
    )


def cells(entry: dict[str, Any]) -> list[str]:
    """Table cells of an entry: ms, ratio, extra MiB, errors."""
    if entry["status"] != "ok":
        found = error_cells(entry) if "errors" in entry else ["", ""]
        return [entry["status"][:80], "", f"{entry['extra_mib']:,.0f}" if "extra_mib" in entry else "", *found]
    ratio = entry["ratio"]
    return [
        f"{1e3 * entry['time_s']['median']:.1f}",
        f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})",
        f"{entry['extra_mib']:,.0f}" if "extra_mib" in entry else "-",
        *error_cells(entry),
    ]


def floor_s(row: dict[str, Any]) -> float:
    """Median of the floor measured with ours, or with the first provider that has one; NaN: there is none."""
    found = [row["providers"].get(OURS, {}), *row["providers"].values()]
    floor = next((entry["floor"] for entry in found if "floor" in entry), None)
    return math.nan if floor is None else float(floor[floor["best"]]["median"])


def section(row: dict[str, Any]) -> str:
    case, best_s = row["case"], floor_s(row)
    title = (
        f"{case['what']} (D {case['dim']}, V {case['vocab']}, {case['dtype']}): {case['products']:g} products, "
        f"{1e3 * best_s:.1f} ms, {case['tflop'] / best_s:.0f} TFLOP/s"
    )
    header = ["", "ms", "time / floor (quartiles)", "extra MiB", "margin error, nat", "gradient error"]
    return f"**{title}**\n\n" + table(header, [[e["label"], *cells(e)] for e in row["providers"].values()])


def what(case: dict[str, Any]) -> str:
    return case["what"] + ("" if case["dtype"] == "bfloat16" else f", {case['dtype']}")


def readme(data: dict[str, Any]) -> str:
    first = table(
        [
            "case",
            "floor, ms",
            "ours, ms",
            "time / floor (quartiles)",
            "extra MiB",
            "margin error, nat",
            "gradient error",
        ],
        [
            [what(row["case"]), f"{1e3 * floor_s(row):.1f}", *cells(row["providers"][OURS])]
            for row in data["rows"]
            if OURS in row["providers"]
        ],
    )
    last = data["runs"][-1]
    gpus, commits = (
        dict.fromkeys(found)
        for found in zip(
            *(
                (
                    f"{run['machine'].get('gpu', run['machine']['processor'])}, driver "
                    f"{run['machine'].get('driver_version', '-')}",
                    run["commit"],
                )
                for run in data["runs"]
            ),
            strict=True,
        )
    )
    foot = (
        f"{'; '.join(gpus)}; {', '.join(f'{name} {version}' for name, version in last['versions'].items())}; "
        f"commit {', '.join(commits)}; medians (quartiles) of {last['rounds']} interleaved rounds. Goals for "
        f"errors: margin ≤ {GOALS['margin_nat']:g} nat, gradient of hidden states ≤ {GPU_GOALS['dhidden']:g} and "
        f"of the head ≤ {GPU_GOALS['dweight']:g}. `{last['command']}`"
    )
    return "\n\n".join([first, *map(section, data["rows"][:1]), foot])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = [OURS, NAIVE, *PEER_NAMES]
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--providers",
        nargs="+",
        default=everyone,
        choices=[OURS, *PEERS],
        metavar="PROVIDER",
        help=f"of {', '.join([OURS, *PEERS])}, in this order",
    )
    parser.add_argument("--smoke", action="store_true", help="first case, ours and plain torch, in a minute")
    parser.add_argument("--impl", default="triton", help="of ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget_s", type=float, default=430, help="everything ends before")
    parser.add_argument("--limit_s", type=float, default=90, help="the most that one provider of a case may take")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}; of a dry run: a temporary file")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds and add what it lacks")
    parser.add_argument("--commit", help="for the results, where the checkout has no .git")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes in Triton's interpreter on the CPU")
    parser.add_argument("--readme", action="store_true", help="print the README's tables from --out and exit")
    parser.add_argument("--inject", nargs="+", default=[], choices=list(FAULTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.budget_s = min(arguments.rounds, 3), min(arguments.budget_s, 56)
        arguments.limit_s = min(arguments.limit_s, 40)
    return arguments


def main() -> int:
    arguments = parse()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    out = arguments.out or (Path(tempfile.mkdtemp()) / "gpu_suite.json" if arguments.dry_run else OUT)
    if arguments.readme:
        data = json.loads(out.read_text()) if out.exists() else {"is_dry_run": True}
        print("not measured" if data["is_dry_run"] or not data["rows"] else readme(data))
        return 0
    device = LostDevice() if arguments.dry_run else Cuda()
    facts = facts_of(device)
    if not facts:
        print("gpu_suite: needs an NVIDIA GPU that torch can see; nothing was measured (--dry_run tries the code)")
        return 0
    preload()
    record = Record(out, arguments, facts)
    run_all(arguments, record, device)
    record.write()
    rows = record.data["rows"]
    print("\n" + "\n\n".join([*map(section, rows[1:]), readme(record.data)]))
    print(f"\n{record.data['runs'][-1]['wall_s']:.0f} s, written to {out}")
    wrong = [
        f"{row['case']['name']}: {'; '.join(entry.get('misses') or [entry['status']])}"
        for row in rows
        if (entry := row["providers"].get(OURS)) and (entry["status"] != "ok" or entry["misses"])
    ]
    for text in wrong:
        print(f"wrong: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""A preference step at the output head on the CPU: ours, the matmul floor and the peers, side by side.

    python benchmarks/bench_fused_loss.py                            everything, about 15 minutes on two cores
    python benchmarks/bench_fused_loss.py --only C1 --threads 2      one case
    python benchmarks/bench_fused_loss.py --only C1 --shape 2,32,64,1003 --no_memory --out trial.json
    python benchmarks/bench_fused_loss.py --readme                   the README's tables from the last results

A step is the loss and its backward, from hidden states to the gradients of hidden states and head, everything
included. The floor is its matrix products alone, `torch.mm` on the completion rows: policy, reference, dhidden,
dweight (fewer for a frozen head, a cached reference or clipped sequences). Times are medians of interleaved rounds;
ratios are taken within a round and shown as median and quartiles. Errors are against float64 on the same rounded
inputs, and come first: an error of ours beyond its goal is marked in the table and makes the exit status 1. Extra
memory is the peak resident size minus inputs and returned gradients, in a fresh process.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fused_cases import (
    GOALS,
    PEERS,
    Case,
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
from harness import RESULTS, commit, interleave, machine, resident_mib, spread, table, versions, write_json

from tso_fast.logprob import cpu

OUT = RESULTS / "fused_loss-cpu.json"
PACKAGES = ("torch", "tso-fast", "liger-kernel", "cut-cross-entropy", "trl", "triton", "transformers")

C1 = {"pairs": 4, "length": 256, "dim": 512, "vocab": 32000}
CASES = {
    case.name: case
    for case in [
        Case(name="C1", what="4 pairs of 2 x 256, D 512, V 32000", **C1),
        Case(
            name="frozen",
            what="C1, frozen head shared with the reference",
            is_head_trained=False,
            is_head_shared=True,
            **C1,
        ),
        Case(name="C2", what="C1 with D 1024", **C1 | {"dim": 1024}),
        Case(name="C3", what="2 pairs of 2 x 128, D 512, V 128256", pairs=2, length=128, dim=512, vocab=128256),
        Case(name="half_prompt", what="C1, half of every sequence is prompt", prompt_share=0.5, **C1),
        Case(name="float32", what="C1 in float32", dtype="float32", **C1),
        Case(name="cached", what="C1, reference log-probs given", is_ref_cached=True, **C1),
        Case(
            name="clipped",
            what="C1, dual clip, half of the sequences at their bound",
            loss="dual_clip",
            is_half_clipped=True,
            **C1,
        ),
        Case(name="dual_clip", what="C1, dual clip, no sequence at its bound", loss="dual_clip", **C1),
    ]
}
TIME_GOALS = dict.fromkeys(["C1", "frozen", "C2", "C3", "half_prompt", "float32"], 1.1)
"""Largest allowed ratio of step to floor."""
MEMORY_GOALS = {"C1": 112, "frozen": 48}
"""Largest allowed extra memory, MiB."""

# A first run fits in 15 minutes: all peers on C1; on the other cases the quickest three, on all threads only.
ALL_PEERS = ["naive", "liger", "liger_compiled", "cce_compile", "trl", "torch_lce"]
SOME_PEERS = ["naive", "liger", "cce_compile"]
WITHOUT_GOAL = ["cached", "clipped", "dual_clip"]
PEER_ROUNDS, SLOW = 3, 5  # a peer slower than SLOW floors runs once


def providers(case: Case, threads: int, arguments: argparse.Namespace) -> dict[str, Provider]:
    chosen = {f"tso-fast {impl}": ours(impl) for impl in arguments.impls}
    if arguments.peers == ["auto"]:
        peers = ALL_PEERS if case.name == "C1" else SOME_PEERS if threads == max(arguments.threads) else []
    else:
        peers = [name for name in arguments.peers if name != "none"]
    return chosen | {name: PEERS[name] for name in peers}


def cases(arguments: argparse.Namespace) -> list[Case]:
    selected = [CASES[name] for name in arguments.only or CASES]
    if not arguments.shape:
        return selected
    pairs, length, dim, vocab = arguments.shape
    shape = f"{pairs} pairs of 2 x {length}, D {dim}, V {vocab}"
    changed = {"pairs": pairs, "length": length, "dim": dim, "vocab": vocab}
    return [dataclasses.replace(case, what=f"{case.name} at {shape}", **changed) for case in selected]


def isa_used() -> dict[str, str]:
    """Instruction set by dtype: TSO_FAST_CPU_ISA, or the machine's best, AMX before AVX512."""
    try:
        known = {dtype: cpu.isas(dtype) for dtype in (torch.bfloat16, torch.float32)}
    except ImportError:  # the extension is not built
        return {}
    return {
        str(dtype).removeprefix("torch."): cpu.ISA if cpu.ISA in names else names[0] for dtype, names in known.items()
    }


def tiny(case: Case) -> Case:
    return dataclasses.replace(case, pairs=2, length=32, dim=64, vocab=1024)


# -------------------------------------------------------------------------------------------------------------- time


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a call, whose result is freed after the clock stops."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    del result
    return wall, cpu


def measure(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of a case, one row per number of threads."""
    torch.set_num_threads(max(arguments.threads))
    problem, truth = solve(make(case))
    small = make(tiny(case))
    rows = []
    for threads in sorted(arguments.threads, reverse=True):
        if case.name in WITHOUT_GOAL and threads < max(arguments.threads) and not arguments.only:
            continue
        torch.set_num_threads(threads)
        torch.compiler.reset()  # else cases recompile until torch gives up
        floor = floors(problem, truth)
        for call in floor.values():
            call()
        floor_s = min(timed(call)[0] for call in floor.values())
        found: dict[str, Any] = {}
        calls: dict[str, Callable[[], Any]] = dict(floor)
        rounds = dict.fromkeys(floor, arguments.rounds)
        for name, provider in providers(case, threads, arguments).items():
            if not provider.is_compiled:
                attempt(provider, small)  # imports and other first costs, which would make it look slow
            start = time.perf_counter()
            result = attempt(provider, problem)
            first_s = time.perf_counter() - start
            if isinstance(result, str):
                found[name] = {"label": provider.label, "status": result}
                continue
            found[name] = {"label": provider.label, "status": "ok", "errors": errors(result, truth), "first_s": first_s}
            if provider.is_ours:
                found[name]["misses"] = misses(found[name]["errors"])
            del result
            calls[name] = lambda run=provider.run: run(problem)
            is_slow = (first_s if not provider.is_compiled else 0) > SLOW * floor_s
            rounds[name] = (
                arguments.rounds if provider.is_ours else 1 if is_slow else min(PEER_ROUNDS, arguments.rounds)
            )
        rows.append(
            {
                "case": dataclasses.asdict(case) | {"products": case.products},
                "threads": threads,
                **ratios(calls, rounds, list(floor)),
            }
        )
        times = rows[-1].pop("times")
        rows[-1]["providers"] = {name: {**entry, **times.get(name, {})} for name, entry in found.items()}
        print(text([rows[-1]]), flush=True)
    return rows


def ratios(calls: dict[str, Callable[[], Any]], rounds: dict[str, int], floor: list[str]) -> dict[str, Any]:
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def wall(name: str) -> float:
        gc.collect()
        wall_s, cpu_s = timed(calls[name])
        cpu[name].append(cpu_s)
        return wall_s

    times = interleave({name: lambda name=name: wall(name) for name in calls}, rounds)
    medians = {name: spread(times[name])["median"] for name in floor}
    best = min(floor, key=medians.__getitem__)
    found = {
        name: {
            "wall_s": spread(times[name]),
            "cpu_s": spread(cpu[name]),
            "ratio": spread([a / b for a, b in zip(times[name], times[best], strict=False)]),
            "rounds": rounds[name],
        }
        for name in calls
        if name not in floor
    }
    walls = {name: {"wall_s": spread(times[name]), "cpu_s": spread(cpu[name])} for name in floor}
    return {"floor": {"best": best, **walls}, "times": found}


# ------------------------------------------------------------------------------------------------------------ memory


def memory(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory of every provider of a case, each in its own process."""
    (case,) = [case for case in cases(arguments) if case.name == name]
    threads = max(arguments.threads)
    rows = []
    for provider, entry in providers(case, threads, arguments).items():
        command = [sys.executable, __file__, "--memory_of", case.name, provider, "--threads", str(threads)]
        if arguments.shape:
            command += ["--shape", ",".join(map(str, arguments.shape))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            found = {"status": " ".join(done.stderr.split())[-300:]}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"case": case.name, "provider": provider, "label": entry.label, "threads": threads, **found})
        print(f"memory, {case.name}: {entry.label}: {found.get('extra_mib', found['status'])}", flush=True)
    return rows


def memory_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory of one provider, measured in the child process."""
    name, key = arguments.memory_of
    (case,) = [case for case in cases(arguments) if case.name == name]
    provider = ours(key.removeprefix("tso-fast ")) if key.startswith("tso-fast ") else PEERS[key]
    torch.set_num_threads(max(arguments.threads))
    small = make(tiny(case))
    if isinstance(reason := attempt(provider, small), str):  # also loads every library a step needs
        return {"status": reason}
    del small, reason
    problem = make(case)
    if provider.is_compiled:
        attempt(provider, problem)
    gc.collect()
    if sys.platform != "linux":
        return {"status": "peak memory is read from Linux's /proc"}
    ctypes.CDLL(None).malloc_trim(0)
    base = resident(problem)
    result = provider.run(problem)
    peak = resident_mib("VmHWM") - base
    grad_mib = result.grad_bytes / 2**20
    return {"status": "ok", "extra_mib": peak - grad_mib, "grad_mib": grad_mib}


def resident(problem: Problem) -> float:
    """Resident MiB with every input paged in; also resets the peak."""
    for tensor in (problem.hidden, problem.weight, problem.ref_hidden, problem.ref_weight):
        tensor.sum()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


# ------------------------------------------------------------------------------------------------------------ tables


def ratio_text(entry: dict[str, Any]) -> str:
    ratio = entry["ratio"]
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def text(rows: list[dict[str, Any]]) -> str:
    """All results of some rows as text."""
    lines = []
    for row in rows:
        case, floor = row["case"], row["floor"]
        floor_s = floor[floor["best"]]["wall_s"]["median"]
        goal = TIME_GOALS.get(case["name"])
        lines.append(
            f"\n{case['name']}: {case['what']}, {case['dtype']}, {row['threads']} threads; "
            f"{floor['best']}, {case['products']:g} products: {1e3 * floor_s:.0f} ms"
            + (f"; goal {goal:g}" if goal else "")
        )
        body = []
        for entry in row["providers"].values():
            if entry["status"] != "ok":
                body.append([entry["label"], entry["status"][:100], "", "", "", ""])
                continue
            body.append(
                [
                    entry["label"],
                    ratio_text(entry),
                    f"{1e3 * entry['wall_s']['median']:.0f}",
                    f"{entry['errors']['loss']:.1e}",
                    *error_cells(entry),
                ]
            )
        header = ["", "time / floor (quartiles)", "ms", "loss error", "margin error, nat", "gradient error"]
        lines.append(table(header, body))
    return "\n".join(lines)


def isa_text(facts: dict[str, Any]) -> str:
    return ", ".join(f"{dtype} by {isa}" for dtype, isa in facts.get("isa_used", {}).items()) or "not known"


def readme(record: dict[str, Any]) -> str:
    rows = {(row["case"]["name"], row["threads"]): row for row in record["rows"]}
    threads = sorted({row["threads"] for row in record["rows"]})
    extra = {(row["case"], row["provider"]): row for row in record["memory"]}
    names = dict.fromkeys(row["case"]["name"] for row in record["rows"])

    def ratio(name: str, key: str, number: int) -> str:
        entry = rows.get((name, number), {"providers": {}})["providers"].get(key)
        return "-" if entry is None else ratio_text(entry) if entry["status"] == "ok" else entry["status"][:60]

    def mib(name: str, key: str) -> str:
        row = extra.get((name, key))
        return "-" if row is None else f"{row['extra_mib']:.0f}" if row["status"] == "ok" else row["status"][:60]

    def error(name: str, key: str) -> list[str]:
        for number in reversed(threads):
            entry = rows.get((name, number), {"providers": {}})["providers"].get(key)
            if entry and entry["status"] == "ok":
                return error_cells(entry)
        return ["-", "-"]

    def goal(value: float | None, form: str) -> str:
        return "-" if value is None else f"≤ {value:{form}}"

    columns = [f"time / floor, {number} thread{'s' * (number > 1)}" for number in threads]
    ours_key = f"tso-fast {record['settings']['impls'][0]}"
    first = table(
        ["case", *columns, "goal", "extra MiB", "goal", "margin error, nat", "gradient error"],
        [
            [
                rows[name, max(n for c, n in rows if c == name)]["case"]["what"],
                *(ratio(name, ours_key, number) for number in threads),
                goal(TIME_GOALS.get(name), ".2f"),
                mib(name, ours_key),
                goal(MEMORY_GOALS.get(name), "d"),
                *error(name, ours_key),
            ]
            for name in names
        ],
    )
    parts = [first]
    if main := next(iter(names), None):
        labels = {
            key: e["label"]
            for number in threads
            if (main, number) in rows
            for key, e in rows[main, number]["providers"].items()
        }
        parts.append(
            table(
                [main, *columns, "extra MiB", "margin error, nat", "gradient error"],
                [
                    [label, *(ratio(main, key, number) for number in threads), mib(main, key), *error(main, key)]
                    for key, label in labels.items()
                ],
            )
        )
    facts = record["machine"]
    parts.append(
        f"{facts['processor']}, {facts['cores']} cores, {' '.join(facts['isa'])}; used: {isa_text(facts)}; "
        f"{', '.join(f'{name} {version}' for name, version in record['versions'].items())}; commit {record['commit']}; "
        f"medians (quartiles) of {record['settings']['rounds']} interleaved rounds, peers at most {PEER_ROUNDS}. Goals "
        f"for errors: margin ≤ {GOALS['margin_nat']:g} nat, gradients ≤ {GOALS['dhidden']:g}. `{record['command']}`"
    )
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--shape",
        type=lambda value: [int(n) for n in value.split(",")],
        metavar="PAIRS,LENGTH,D,V",
        help="instead of the cases' own",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--impls", nargs="+", default=["cpu"], help="of ours: cpu, reference, auto")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["auto"],
        choices=["auto", "none", *PEERS],
        metavar="PEER",
        help=f"auto (all on C1, some elsewhere), none, or of {', '.join(PEERS)}",
    )
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--budget_s", type=float, default=840, help="no case starts later than this")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--readme", action="store_true", help="print the README's tables from --out and exit")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    if arguments.readme:
        print(readme(json.loads(arguments.out.read_text())) if arguments.out.exists() else "not measured")
        return 0
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments)))
        return 0

    start = time.perf_counter()
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/bench_fused_loss.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": {
            **machine(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "isa_used": isa_used(),
        },
        "versions": versions(*PACKAGES),
        "settings": {"rounds": arguments.rounds, "impls": arguments.impls, "load": os.getloadavg()},
        "goals": {"time_over_floor": TIME_GOALS, "extra_mib": MEMORY_GOALS, "errors": GOALS},
        "rows": [],
        "memory": [],
        "skipped": [],
    }
    print(f"used: {isa_text(record['machine'])}", flush=True)
    for case in cases(arguments):
        if time.perf_counter() - start > arguments.budget_s:
            record["skipped"].append(case.name)
            print(f"{case.name}: no time left", flush=True)
            continue
        record["rows"] += measure(case, arguments)
        if case.name in MEMORY_GOALS and not arguments.no_memory:
            record["memory"] += memory(case.name, arguments)
        write_json(arguments.out, record)
    record["wall_s"] = time.perf_counter() - start
    write_json(arguments.out, record)
    print(f"\n{readme(record)}\n\n{record['wall_s']:.0f} s, written to {arguments.out}")

    wrong = [
        f"{row['case']['name']}, {row['threads']} threads, {name}: {'; '.join(e.get('misses') or [e['status']])}"
        for row in record["rows"]
        for name, e in row["providers"].items()
        if name.startswith("tso-fast") and (e["status"] != "ok" or e["misses"])
    ]
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

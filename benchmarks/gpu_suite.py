"""A preference step at the output head on one GPU: ours, the matmul floor and the peers, side by side.

    pip install --no-build-isolation --no-deps -e .          where nothing can be downloaded
    python benchmarks/gpu_suite.py                           under 10 minutes on an H200; most important rows first
    python benchmarks/gpu_suite.py --only llama3_8b frozen   some rows
    python benchmarks/gpu_suite.py --resume                  the rows that --out does not hold yet
    python benchmarks/gpu_suite.py --dry_run                 the same code at tiny shapes on the CPU
    python benchmarks/gpu_suite.py --readme                  the README's tables from the last results

A step is the loss and its backward, from hidden states to the gradients of hidden states and head, host time
included. The floor is its matrix products alone, `torch.mm` on the completion rows. Times are CUDA events around
interleaved steps with the L2 cache overwritten in between; a ratio is that of a round, shown as median and quartiles.
Errors are against float64 on the same bf16 inputs, and come first. Extra memory is the peak of allocated memory over
inputs and returned gradients. Results are written after every row; a peer that is missing, fails or runs out of
memory is a row's entry like any other.
"""

from __future__ import annotations

import os

# Peers differ by tens of gigabytes: without it, one's cached blocks make the next one wait for cudaFree.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import dataclasses
import gc
import json
import logging
import subprocess
import sys
import tempfile
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
    Truth,
    attempt,
    error_cells,
    errors,
    floors,
    make,
    misses,
    ours,
    solve,
)
from harness import RESULTS, commit, interleave, machine, spread, table, versions, write_json

OUT = RESULTS / "gpu_suite.json"
PACKAGES = ("torch", "triton", "tso-fast", "liger-kernel", "cut-cross-entropy", "trl", "transformers",
            "nvidia-cutlass-dsl", "quack-kernels")  # fmt: skip

# 16384 completion tokens each, most important first.
LLAMA = {"pairs": 8, "length": 1024, "dim": 4096, "vocab": 128256}
CASES = {case.name: case for case in [
    Case(name="llama3_8b", what="Llama-3-8B, 8 pairs of 2 x 1024", **LLAMA),
    Case(name="cached", what="Llama-3-8B, reference log-probs given", is_ref_cached=True, **LLAMA),
    Case(name="frozen", what="Llama-3-8B, frozen head shared with the reference", is_head_trained=False,
         is_head_shared=True, **LLAMA),
    Case(name="clipped", what="Llama-3-8B, dual clip, half of the sequences at their bound", loss="dual_clip",
         is_half_clipped=True, **LLAMA),
    Case(name="qwen3_8b", what="Qwen3-8B, 8 pairs of 2 x 1024", **LLAMA | {"vocab": 151936}),
    Case(name="gemma2_2b", what="Gemma-2-2B, softcap 30, 8 pairs of 2 x 1024", softcap=30.0,
         **LLAMA | {"dim": 2304, "vocab": 256000}),
    Case(name="half_prompt", what="Llama-3-8B, 8 pairs of 2 x 2048, half of every sequence is prompt",
         prompt_share=0.5, **LLAMA | {"length": 2048}),
    Case(name="short", what="Llama-3-8B, 32 pairs of 2 x 256", **LLAMA | {"pairs": 32, "length": 256}),
]}  # fmt: skip
OURS = "tso-fast"
PROVIDERS = [OURS, "trl", "liger_compiled", "cce", "liger_scaled", "liger", "naive", "cce_kahan", "torch_lce"]
TINY = {"pairs": 2, "length": 64, "dim": 64, "vocab": 517}


class Clock:
    """Seconds of a call: CUDA events with a cold L2, or wall time on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self.l2 = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device != "cuda":
            before = time.perf_counter()
            call()
            return time.perf_counter() - before
        self.l2.zero_()
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / 1e3


def measure(case: Case, providers: dict[str, Provider], device: str, rounds: int, deadline: float) -> dict[str, Any]:
    problem, truth = solve(make(case, device), block=1024)
    clock = Clock(device)
    floor: dict[str, Callable[[], Any]] = dict(floors(problem, truth))
    for call in floor.values():
        call()
    calls = dict(floor)
    found: dict[str, Any] = {}
    for name, provider in providers.items():
        if time.monotonic() > deadline:
            found[name] = {"label": provider.label, "status": "no time left"}
            continue
        found[name] = {"label": provider.label, **check(provider, problem, truth, device)}
        if found[name]["status"] == "ok":
            calls[name] = lambda run=provider.run: run(problem)
        elif is_context_lost(device):
            raise ContextLostError(name, found[name]["status"])
    del truth
    times = interleave({name: lambda call=call: clock(call) for name, call in calls.items()},
                       dict.fromkeys(calls, rounds))  # fmt: skip
    best = min(floor, key=lambda name: spread(times[name])["median"])
    for name in calls:
        if name not in floor:
            found[name]["time_s"] = spread(times[name])
            found[name]["ratio"] = spread([a / b for a, b in zip(times[name], times[best], strict=True)])
    return {
        "case": dataclasses.asdict(case) | {"products": case.products, "tflop": tflop(case)},
        "floor": {"best": best, **{name: spread(times[name]) for name in floor}},
        "rounds": rounds,
        "providers": found,
    }


def tflop(case: Case) -> float:
    return case.products * 2 * (2 * case.pairs * case.completion) * case.dim * case.vocab / 1e12


def check(provider: Provider, problem: Problem, truth: Truth, device: str) -> dict[str, Any]:
    """Errors of a first step, then the memory of a second one, when everything is compiled and tuned."""
    start = time.perf_counter()
    result = attempt(provider, problem)
    if isinstance(result, str):
        return {"status": result}
    first_s = time.perf_counter() - start
    found: dict[str, Any] = {"status": "ok", "first_s": first_s, "errors": errors(result, truth)}
    if provider.is_ours:
        found["misses"] = misses(found["errors"])
    del result
    if device != "cuda":
        return found
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = attempt(provider, problem)
    if isinstance(result, str):
        return {"status": result}
    torch.cuda.synchronize()
    found["extra_mib"] = (torch.cuda.max_memory_allocated() - before - result.grad_bytes) / 2**20
    found["grad_mib"] = result.grad_bytes / 2**20
    return found


class ContextLostError(RuntimeError):
    """A kernel's illegal access, say: no later CUDA call in this process can succeed."""

    def __init__(self, provider: str, status: str) -> None:
        super().__init__(status)
        self.provider = provider


def is_context_lost(device: str) -> bool:
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def gpu() -> dict[str, Any]:
    facts: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "gpu_count": torch.cuda.device_count()}
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
                              capture_output=True, text=True, timeout=30)  # fmt: skip
        facts |= dict(zip(query.split(","), map(str.strip, done.stdout.split(",")), strict=False))
    except (OSError, subprocess.TimeoutExpired):
        pass
    return facts


# ------------------------------------------------------------------------------------------------------------ tables


def cells(entry: dict[str, Any]) -> list[str]:
    """ms, ratio, extra MiB, errors."""
    if entry["status"] != "ok":
        return [entry["status"][:80], "", "", "", ""]
    ratio = entry["ratio"]
    return [
        f"{1e3 * entry['time_s']['median']:.1f}",
        f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})",
        f"{entry['extra_mib']:,.0f}" if "extra_mib" in entry else "-",
        *error_cells(entry),
    ]


def section(row: dict[str, Any]) -> str:
    case, floor = row["case"], row["floor"]
    best_s = floor[floor["best"]]["median"]
    title = (f"{case['what']} (D {case['dim']}, V {case['vocab']}, {case['dtype']}): {case['products']:g} products, "
             f"{1e3 * best_s:.1f} ms, {case['tflop'] / best_s:.0f} TFLOP/s")  # fmt: skip
    header = ["", "ms", "time / floor (quartiles)", "extra MiB", "margin error, nat", "gradient error"]
    return f"**{title}**\n\n" + table(header, [[e["label"], *cells(e)] for e in row["providers"].values()])


def readme(record: dict[str, Any]) -> str:
    first = table(
        ["case", "floor, ms", "ours, ms", "time / floor (quartiles)", "extra MiB", "margin error, nat",
         "gradient error"],
        [[row["case"]["what"], f"{1e3 * row['floor'][row['floor']['best']]['median']:.1f}",
          *cells(row["providers"][OURS])] for row in record["rows"] if OURS in row["providers"]],
    )  # fmt: skip
    facts, found = record["machine"], ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    foot = (f"{facts.get('gpu', facts['processor'])}, driver {facts.get('driver_version', '-')}; {found}; commit "
            f"{record['commit']}; medians (quartiles) of {record['settings']['rounds']} interleaved rounds. Goals for "
            f"errors: margin ≤ {GOALS['margin_nat']:g} nat, gradients ≤ {GOALS['dhidden']:g}. `{record['command']}`"
            )  # fmt: skip
    return "\n\n".join([first, *map(section, record["rows"][:1]), foot])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=[OURS, *PEERS], metavar="PROVIDER",
                        help=f"of {', '.join([OURS, *PEERS])}")  # fmt: skip
    parser.add_argument("--impl", default="triton", help="of ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget_s", type=float, default=540, help="no row or provider starts later than this")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}; of a dry run: a temporary file")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out and add the others")
    parser.add_argument("--without", nargs="*", default=[], metavar="PROVIDER", help="leave out, after a crash")
    parser.add_argument("--commit", help="for the results, where the checkout has no .git")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU, impl=reference")
    parser.add_argument("--readme", action="store_true", help="print the README's tables from --out and exit")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    out = arguments.out or (Path(tempfile.mkdtemp()) / "gpu_suite.json" if arguments.dry_run else OUT)
    if arguments.readme:
        record = json.loads(out.read_text()) if out.exists() else {"is_dry_run": True}
        print("not measured" if record["is_dry_run"] else readme(record))
        return 0
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("gpu_suite: needs an NVIDIA GPU that torch can see; nothing was measured (--dry_run tries the code)")
        return 0

    start = time.monotonic()
    device, impl = ("cpu", "reference") if arguments.dry_run else ("cuda", arguments.impl)
    record = {
        "command": " ".join(["python benchmarks/gpu_suite.py", *sys.argv[1:]]),
        "is_dry_run": arguments.dry_run,
        "commit": arguments.commit or commit(),
        "machine": machine() | ({} if arguments.dry_run else gpu()),
        "versions": versions(*PACKAGES) | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "settings": {"rounds": arguments.rounds, "impl": impl, "providers": arguments.providers},
        "goals": {"errors": GOALS},
        "rows": [],
        "crashes": {},
        "skipped": [],
    }
    if arguments.resume and out.exists():
        earlier = json.loads(out.read_text())
        record |= {"rows": earlier["rows"], "crashes": earlier["crashes"]}
    done = {row["case"]["name"] for row in record["rows"]}
    providers = {name: ours(impl) if name == OURS else PEERS[name]
                 for name in arguments.providers if name not in arguments.without}  # fmt: skip
    for name in arguments.only or CASES:
        if name in done:
            continue
        if time.monotonic() - start > arguments.budget_s:
            record["skipped"].append(name)
            print(f"{name}: no time left", flush=True)
            continue
        case = CASES[name]
        if arguments.dry_run:
            case = dataclasses.replace(case, what=f"dry run of: {case.what}", **TINY)
        try:
            row = measure(case, providers, device, arguments.rounds, start + arguments.budget_s)
        except ContextLostError as error:
            record["crashes"][error.provider] = str(error)
            print(f"{name}: {error.provider} broke the CUDA context ({error}); starting again without it", flush=True)
            write_json(out, record)
            left_s = arguments.budget_s - (time.monotonic() - start)
            again = [*sys.argv, "--resume", "--budget_s", f"{left_s:.0f}", "--without", *arguments.without,
                     error.provider]  # fmt: skip
            os.execv(sys.executable, [sys.executable, *again])
        except torch.OutOfMemoryError as error:
            record["skipped"].append(name)
            print(f"{name}: the problem itself does not fit: {' '.join(str(error).split())[:200]}", flush=True)
            continue
        finally:
            gc.collect()
        record["rows"].append(row)
        record["wall_s"] = time.monotonic() - start
        write_json(out, record)
        print(f"\n{section(row)}\n\n{record['wall_s']:.0f} s", flush=True)
    record["wall_s"] = time.monotonic() - start
    write_json(out, record)
    print(f"\n{readme(record)}\n\n{record['wall_s']:.0f} s, written to {out}")

    wrong = [f"{row['case']['name']}: {'; '.join(entry.get('misses') or [entry['status']])}"
             for row in record["rows"] if (entry := row["providers"].get(OURS)) is not None
             and (entry["status"] != "ok" or entry["misses"])]  # fmt: skip
    if OURS in record["crashes"]:
        wrong.append(f"crashed: {record['crashes'][OURS]}")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

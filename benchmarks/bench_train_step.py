"""Whole preference steps beside those of TRL's DPOTrainer and a loop with Liger's DPO loss.

    python benchmarks/bench_train_step.py                             every case, about an hour on two cores
    python benchmarks/bench_train_step.py --only full gsm8k --rounds 1
    python benchmarks/bench_train_step.py --quick                     a tiny model: does it run?
    python benchmarks/bench_train_step.py --device cuda               8 layers of Llama-3-8B's shape, 2 x 2048 tokens
    python benchmarks/bench_train_step.py --tables                    the tables of the last results

Each run is a fresh process: the same random weights, a step on one pair, then all pairs once, from tokens to new
weights: reference log-probs, steps, metrics. Runs are interleaved in rounds, ratios are taken within a round and shown
as median (quartiles). TRL runs without gradient checkpointing, logging and saving, with the fused optimizer, and with
its reference in each step or before all of them, whichever is faster; its `use_liger_kernel` swaps layers for Triton
kernels, which do not run on a CPU. Memory is the peak of a process over what its libraries take, weights and optimizer
included. The floor is `torch.mm` on the shapes of all products with weights, for each prompt and each response once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, commit, in_child, interleave, machine, spread, table, versions, write_json
from train_step_cases import CASES, GSM8K, LLAMAS, PEERS, RUNNERS, Case, Setting, needed_tokens, products, start_memory

GOALS = {"full": 2.1, "lora": 2.2, "bf16": 2.2, "4 pairs": 3.5, "gsm8k": 2.5}
"""Pairs a second over TRL's."""
PADDED_GOAL, MEMORY_GOAL, OUTSIDE_GOAL, FLOOR_GOAL = 1.5, 0.45, 0.03, 1.5
PACKAGES = ("torch", "transformers", "trl", "peft", "liger-kernel", "accelerate", "tso-fast")
Row = dict[str, Any]


def bench_case(case: Case, arguments: argparse.Namespace) -> Row:
    """All rounds of a case: what each runner measured in each of them."""
    pairs = case.make(arguments.pairs, LLAMAS[arguments.llama]["vocab_size"], arguments.length)
    runs: dict[str, list[Row]] = {name: [] for name in arguments.runners}

    def call(name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(
                case=case, pairs=pairs, llama=arguments.llama, device=arguments.device, folder=Path(folder)
            )

            def work(say: Any) -> None:
                torch.set_num_threads(arguments.threads)
                before = start_memory(arguments.device)
                found = RUNNERS[name](setting)
                say({**found, "peak_mib": found["peak_mib"] - before})

            heard: list[Row] = []
            status = in_child(work, heard.append, limit_s=arguments.limit_s)
        row = {"status": status} if status else heard[0]
        runs[name].append(row)
        print(f"{case.name}: {name}: {row}", file=sys.stderr, flush=True)
        return float(row.get("seconds", "nan"))

    interleave({name: lambda name=name: call(name) for name in runs}, dict.fromkeys(runs, arguments.rounds))
    setting = Setting(case=case, pairs=pairs, llama=arguments.llama, device=arguments.device, folder=Path())
    through, predicted = needed_tokens(setting)
    flops = sum(2 * rows * n * m * times for rows, n, m, times in products(setting))
    counts = {"pairs": len(pairs), "batch": case.batch, "tokens": through, "predicted": predicted, "flops": flops}
    return {"case": case.name, "what": case.what, **counts, "runs": runs}


# -------------------------------------------------------------------------------------------------------------- tables


def best_peer(row: Row) -> str | None:
    """The faster way of TRL, of those that ran in every round."""
    ran = [name for name in PEERS if all("seconds" in run for run in row["runs"].get(name, [{}]))]
    return min(ran, key=lambda name: statistics.median(run["seconds"] for run in row["runs"][name]), default=None)


def ratios(row: Row, over: str | None, under: str, field: str = "seconds") -> list[float]:
    """``over`` divided by ``under``, round by round; empty if one of them did not run."""
    pairs = zip(row["runs"].get(over, []), row["runs"].get(under, []), strict=False)
    return [a[field] / b[field] for a, b in pairs if field in a and field in b]


def shown(values: list[float], goal: float | None = None, *, most: bool = False) -> str:
    if not values:
        return "-"
    of = spread(values)
    if goal is None:
        return f"{of['median']:.2f} ({of['q1']:.2f}–{of['q3']:.2f})"
    is_met = of["median"] <= goal if most else of["median"] >= goal
    return f"{shown(values)}, goal {'≤' if most else '≥'} {goal}{'' if is_met else ': missed'}"


def outside(row: Row) -> list[float]:
    """Share of the time that is in neither model, op nor optimizer."""
    parts = ("forward_s", "backward_s", "optimizer_s")
    runs = [run for run in row["runs"].get("tso-fast, clocked", []) if "forward_s" in run]
    return [1 - sum(run.get(part, 0.0) for part in parts) / run["seconds"] for run in runs]


def tables(record: Row) -> str:
    against = []
    for row in record["cases"]:
        peer = best_peer(row)
        against.append(
            [
                row["what"],
                shown(ratios(row, peer, "tso-fast"), GOALS.get(row["case"])),
                shown(ratios(row, peer, "TSOTrainer")),
                shown(ratios(row, peer, "Liger")),
                shown(ratios(row, peer, "Liger, compiled")),
                shown(ratios(row, "tso-fast, padded", "tso-fast"), PADDED_GOAL),
                shown(ratios(row, "tso-fast", peer or "", "peak_mib"), MEMORY_GOAL, most=True),
                shown(ratios(row, "tso-fast", "floor"), FLOOR_GOAL, most=True),
                shown(outside(row), OUTSIDE_GOAL, most=True),
            ]
        )
    header = ["pairs/s over TRL's", "tso-fast", "TSOTrainer", "Liger", "Liger, compiled", "padded / shared, time",
              "memory / TRL", "time / floor", "outside of model, op, optimizer"]  # fmt: skip
    each = []
    for row in record["cases"]:
        for name, runs in row["runs"].items():
            ran = [run for run in runs if "seconds" in run]
            if not ran:
                each.append([row["case"], name, runs[0]["status"][:120] if runs else "-", "", "", ""])
                continue
            seconds = [run["seconds"] for run in ran]
            rate = statistics.median(row["tokens"] / s for s in seconds)
            peak = max(run["peak_mib"] for run in ran)
            tflops = row["flops"] / statistics.median(seconds) / 1e12
            each.append([row["case"], name, shown(seconds), f"{rate:,.0f}", f"{peak:,.0f}", f"{tflops:.3g}"])
    names = ["case", "run", "seconds", "needed tokens/s", "peak MiB", "needed TFLOP/s"]
    return f"{table(header, against)}\n\n{table(names, each)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], default=None)
    parser.add_argument("--runners", nargs="+", choices=list(RUNNERS), default=list(RUNNERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=8, help="of a run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    parser.add_argument("--limit_s", type=float, default=1800, help="most seconds of a run")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="JSON; default: results/train_step-DEVICE.json")
    arguments = parser.parse_args()
    arguments.llama = "60M" if arguments.device == "cpu" else "8 layers of Llama-3-8B"
    arguments.length = 128 if arguments.device == "cpu" else 1024
    out = arguments.out or (None if arguments.quick else RESULTS / f"train_step-{arguments.device}.json")
    if arguments.tables:
        print(tables(json.loads(out.read_text())))
        return
    if arguments.quick:
        arguments.llama, arguments.length, arguments.rounds = "tiny", 16, 1
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    chosen = [case for case in chosen if case.name != "gsm8k" or GSM8K.exists()]
    record: Row = {
        "command": " ".join(["python benchmarks/bench_train_step.py", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit(),
        "versions": versions(*PACKAGES),
        "threads": arguments.threads,
        "llama": arguments.llama,
        "rounds": arguments.rounds,
        "goals": {**GOALS, "padded": PADDED_GOAL, "memory": MEMORY_GOAL, "outside": OUTSIDE_GOAL, "floor": FLOOR_GOAL},
        "cases": [],
    }
    for case in chosen:
        record["cases"].append(bench_case(case, arguments))
        if out is not None:  # at once: later cases may be stopped
            write_json(out, record)
    print(tables(record))


if __name__ == "__main__":
    main()

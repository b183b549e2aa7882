"""Consensus, pairs and agreement over a million prompts: ours, a plain copy of the scores, vectorised peers, a loop.

    python benchmarks/bench_scoring.py                      1,000,000 prompts x 8 responses x 9 scorers
    python benchmarks/bench_scoring.py --prompts 20000 --rounds 3 --out trial.json

Results are first compared with the numpy reference; a row that differs makes the exit status 1. Times are medians of
interleaved rounds; ratios are taken within a round and shown as median and quartiles. The floor is a copy of the scores
to a buffer that is already paged in, with as many threads as ours (torch's `copy_`; `np.copyto`, one thread, is also
timed). The vectorised peers get the scores as [P, 8, 9], which ragged prompts would not fit; the loop calls numpy
prompt by prompt, and is timed on a part of the prompts. Extra memory is the peak resident size minus the inputs,
outputs included, in a fresh process. Distances of n-grams follow, as in bench_diversity.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_diversity
import numpy as np
import torch
from harness import RESULTS, commit, interleave, machine, resident_mib, spread, table, versions, write_json

import tso_fast.scoring as scoring

OUT = RESULTS / "scoring-cpu.json"
NUM_RESPONSES, NUM_SCORERS = 8, 9
METHODS = [
    ("mean", "z"),
    ("mean", "minmax"),
    ("mean", "none"),
    ("mean", "rank"),
    ("median", "none"),
    ("win_rate", "none"),
    ("bradley_terry", "none"),
]
SLOW = ["none bradley_terry", "agreement"]
GOAL = ("mean", "z")
GOALS = {"copy": 3.0, "vectorised": 5.0, "loop": 30.0, "extra_over_input": 0.5}
CHECKED_PROMPTS, LOOP_PROMPTS = 300, 2000


@dataclass(frozen=True, kw_only=True)
class Problem:
    scores_RM: np.ndarray
    offsets: np.ndarray
    weights_M: np.ndarray

    def head(self, num_prompts: int) -> Problem:
        offsets = self.offsets[: num_prompts + 1]
        return Problem(scores_RM=self.scores_RM[: offsets[-1]], offsets=offsets, weights_M=self.weights_M)


def make(num_prompts: int, missing: float) -> Problem:
    rng = np.random.default_rng(0)
    offsets = np.arange(num_prompts + 1, dtype=np.int64) * NUM_RESPONSES
    scores_RM = rng.standard_normal((offsets[-1], NUM_SCORERS), dtype=np.float32)
    if missing:
        scores_RM[rng.random(scores_RM.shape, dtype=np.float32) < missing] = np.nan
    return Problem(scores_RM=scores_RM, offsets=offsets, weights_M=np.linspace(0.5, 1.5, NUM_SCORERS))


# -------------------------------------------------------------------------------------------------------------- ours


def consensus(problem: Problem, method: Any, normalize: Any, threads: int) -> scoring.Consensus:
    weights = None if method == "median" else problem.weights_M
    return scoring.consensus(
        problem.scores_RM, problem.offsets, method=method, normalize=normalize, weights=weights, num_threads=threads
    )


def best_worst_pairs(consensus_R: np.ndarray, offsets: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    return scoring.select_pairs(consensus_R, offsets, strategy="best_worst", max_pairs=1, num_threads=threads)


def whole(problem: Problem, method: str, normalize: str, threads: int) -> Any:
    values = consensus(problem, method, normalize, threads)
    return values, best_worst_pairs(values.scores, problem.offsets, threads)


# ---------------------------------------------------------------------------------------------- peers, z and mean only


def numpy_vectorised(problem: Problem) -> np.ndarray:
    """Consensus in numpy, in single precision and in place where possible; NaN-aware only if a score is missing."""
    x = problem.scores_RM.reshape(-1, NUM_RESPONSES, NUM_SCORERS)
    weights = problem.weights_M.astype(np.float32)
    if not np.isnan(x.sum()):
        difference = x - x.mean(axis=1, keepdims=True)
        variance = np.einsum("pnm,pnm->pm", difference, difference) / np.float32(NUM_RESPONSES)
        scale = np.divide(weights, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)
        values = np.einsum("pnm,pm->pn", difference, scale) / weights.sum()
    else:
        present = ~np.isnan(x)
        count = np.maximum(present.sum(axis=1, keepdims=True, dtype=np.float32), 1)
        filled = np.where(present, x, np.float32(0))
        difference = np.where(present, filled - filled.sum(axis=1, keepdims=True) / count, np.float32(0))
        variance = np.einsum("pnm,pnm->pm", difference, difference) / count[:, 0]
        scale = np.divide(weights, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)
        weight = present @ weights
        total = np.einsum("pnm,pm->pn", difference, scale)
        values = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    return values.reshape(-1)


def torch_vectorised(problem: Problem) -> np.ndarray:
    x = torch.from_numpy(problem.scores_RM).view(-1, NUM_RESPONSES, NUM_SCORERS)
    weights = torch.from_numpy(problem.weights_M).float()
    if not torch.isnan(x.sum()):
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        scale = torch.where(variance > 0, weights / variance.sqrt(), 0.0)
        values = ((x - mean).mul_(scale)).sum(dim=2) / weights.sum()
    else:
        present = ~torch.isnan(x)
        count = present.sum(dim=1, keepdim=True).clamp_(min=1)
        difference = torch.where(present, x - x.nansum(dim=1, keepdim=True) / count, 0.0)
        variance = difference.square().sum(dim=1, keepdim=True) / count
        scale = torch.where(variance > 0, weights / variance.sqrt(), 0.0)
        values = difference.mul_(scale).sum(dim=2) / (present.float() @ weights)
    return values.flatten().numpy()


def vectorised_pairs(values_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best-worst pairs, checking first whether any score is missing or any prompt has no pair."""
    values = torch.from_numpy(values_R).view(-1, NUM_RESPONSES)
    is_whole = not torch.isnan(values.sum())
    best = (values if is_whole else values.nan_to_num(-torch.inf)).max(dim=1)
    worst = (values if is_whole else values.nan_to_num(torch.inf)).min(dim=1)
    pairs_P2 = torch.stack([best.indices, worst.indices], dim=1)
    pairs_P2 += (torch.arange(len(values)) * NUM_RESPONSES)[:, None]
    margin_P = best.values - worst.values
    is_pair = margin_P > 0
    if not is_pair.all():
        pairs_P2, margin_P = pairs_P2[is_pair], margin_P[is_pair]
    return pairs_P2.numpy(), margin_P.numpy()


def numpy_loop(problem: Problem) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Consensus and pairs as a script would compute them; does not check for responses without scores."""
    weights = problem.weights_M
    values_R, pairs = np.empty(len(problem.scores_RM), np.float32), []
    with np.errstate(invalid="ignore"):
        for first, last in zip(problem.offsets[:-1], problem.offsets[1:], strict=True):
            x = problem.scores_RM[first:last].astype(np.float64)
            is_whole = not np.isnan(x).any()
            mean, std = (x.mean(0), x.std(0)) if is_whole else (np.nanmean(x, axis=0), np.nanstd(x, axis=0))
            z = (x - mean) / np.where(std > 0, std, 1)
            if is_whole:
                values_R[first:last] = z @ weights / weights.sum()
            else:
                present = ~np.isnan(z)
                values_R[first:last] = np.where(present, z, 0) @ weights / (present @ weights)
            pairs.append((first + values_R[first:last].argmax(), first + values_R[first:last].argmin()))
    return values_R, pairs


def with_pairs(values_R: np.ndarray) -> Any:
    return values_R, vectorised_pairs(values_R)


PEERS = {"numpy vectorised": numpy_vectorised, "torch vectorised": torch_vectorised}

# ------------------------------------------------------------------------------------------------------------- measure


def wrong_rows(problem: Problem, threads: int) -> list[str]:
    """Names of results that differ from the reference on the first prompts."""
    small, found = problem.head(CHECKED_PROMPTS), []
    truth: dict[tuple[str, str], np.ndarray] = {}
    for method, normalize in METHODS:
        weights = None if method == "median" else small.weights_M
        expected = scoring.consensus_reference(
            small.scores_RM, small.offsets, method=method, normalize=normalize, weights=weights
        )  # type: ignore[arg-type]
        truth[method, normalize] = expected.scores
        got = consensus(problem, method, normalize, threads).scores[: len(small.scores_RM)]
        if not np.allclose(got, expected.scores, rtol=1e-6, atol=1e-7, equal_nan=True):
            found.append(f"{normalize} {method}")
    values = {name: function(small) for name, function in PEERS.items()} | {"numpy loop": numpy_loop(small)[0]}
    found += [
        name for name, v in values.items() if not np.allclose(v, truth[GOAL], rtol=1e-4, atol=1e-5, equal_nan=True)
    ]
    pairs = best_worst_pairs(truth[GOAL], small.offsets, threads)[0]
    expected_pairs = scoring.select_pairs_reference(truth[GOAL], small.offsets, strategy="best_worst", max_pairs=1)[0]
    for name, p in {"best_worst pairs": pairs, "vectorised pairs": vectorised_pairs(truth[GOAL])[0]}.items():
        if not np.array_equal(p, expected_pairs):
            found.append(name)
    got_, expected_ = (
        scoring.agreement(small.scores_RM, small.offsets),
        scoring.agreement_reference(small.scores_RM, small.offsets),
    )
    if not np.allclose(got_.concordance, expected_.concordance, rtol=1e-6, equal_nan=True):
        found.append("agreement")
    return found


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, whose result is freed after the clock stops."""
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def measure(problem: Problem, threads: int, rounds: int) -> dict[str, Any]:
    buffer = np.ones_like(problem.scores_RM)
    source, target = torch.from_numpy(problem.scores_RM), torch.from_numpy(buffer)
    part = problem.head(min(LOOP_PROMPTS, len(problem.offsets) - 1))
    scale = (len(problem.offsets) - 1) / (len(part.offsets) - 1)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "np.copyto, 1 thread": lambda: np.copyto(buffer, problem.scores_RM),
    }
    for method, normalize in METHODS:
        calls[f"{normalize} {method}"] = lambda m=method, n=normalize: whole(problem, m, n, threads)
    calls["agreement"] = lambda: scoring.agreement(problem.scores_RM, problem.offsets, num_threads=threads)
    calls |= {name: lambda run=function: with_pairs(run(problem)) for name, function in PEERS.items()}
    calls["numpy loop"] = lambda: numpy_loop(part)
    numbers = dict.fromkeys(calls, rounds) | dict.fromkeys([*SLOW, *PEERS, "numpy loop"], min(3, rounds))
    for call in calls.values():  # warm-up, of the peers as well
        call()
    times = interleave({name: lambda call=call: timed(call) for name, call in calls.items()}, numbers)
    times["numpy loop"] = [scale * seconds for seconds in times["numpy loop"]]
    rows = {}
    for name, values in times.items():
        rows[name] = {
            "wall_s": spread(values),
            "over_copy": spread([a / b for a, b in zip(values, times["copy"], strict=False)]),
            "rounds": len(values),
        }
    goal = times[f"{GOAL[1]} {GOAL[0]}"]
    best = min(PEERS, key=lambda name: rows[name]["wall_s"]["median"])
    ratios = {
        "copy": rows[f"{GOAL[1]} {GOAL[0]}"]["over_copy"],
        "vectorised": spread([a / b for a, b in zip(times[best], goal, strict=False)]),
        "loop": spread([a / b for a, b in zip(times["numpy loop"], goal, strict=False)]),
    }
    return {"rows": rows, "goal_row": {"ratios": ratios, "best_vectorised": best}}


# -------------------------------------------------------------------------------------------------------------- memory


def memory(arguments: argparse.Namespace, missing: float) -> dict[str, Any]:
    """Memory of the row that has a goal, measured in its own process."""
    command = [
        sys.executable,
        __file__,
        "--memory_of",
        str(missing),
        "--prompts",
        str(arguments.prompts),
        "--threads",
        str(arguments.threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(arguments: argparse.Namespace) -> dict[str, Any]:
    problem = make(arguments.prompts, arguments.memory_of)
    whole(problem.head(1), *GOAL, arguments.threads)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = resident_mib("VmRSS")
    result = whole(problem, *GOAL, arguments.threads)
    extra, size = resident_mib("VmHWM") - base, problem.scores_RM.nbytes / 2**20
    del result
    return {"extra_mib": extra, "input_mib": size, "extra_over_input": extra / size}


# -------------------------------------------------------------------------------------------------------------- report


def text(section: dict[str, Any]) -> str:
    def show(ratio: dict[str, float]) -> str:
        return f"{ratio['median']:.3g} ({ratio['q1']:.3g}–{ratio['q3']:.3g})"

    body = [
        [name, f"{1e3 * row['wall_s']['median']:.1f}", show(row["over_copy"])] for name, row in section["rows"].items()
    ]
    ratios, extra = section["goal_row"]["ratios"], section["memory"]
    lines = [
        f"\n{section['what']}",
        table(["", "ms", "time / copy (quartiles)"], body),
        f"\nz mean: {show(ratios['copy'])} copies (goal <= {GOALS['copy']:g}); "
        f"{show(ratios['vectorised'])} x {section['goal_row']['best_vectorised']} (goal >= {GOALS['vectorised']:g}); "
        f"{show(ratios['loop'])} x the loop (goal >= {GOALS['loop']:g}); extra memory {extra['extra_mib']:.0f} MiB = "
        f"{extra['extra_over_input']:.2f} x input (goal <= {GOALS['extra_over_input']:g})",
    ]
    return "\n".join(lines)


def dense_and_missing(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    sections = []
    for missing in arguments.missing:
        problem = make(arguments.prompts, missing)
        wrong = wrong_rows(problem, arguments.threads)
        section = {
            "what": f"{arguments.prompts} prompts x {NUM_RESPONSES} x {NUM_SCORERS}, {missing:.0%} missing, "
            f"{arguments.threads} threads; consensus and best_worst pairs",
            "missing": missing,
            "wrong": wrong,
            **measure(problem, arguments.threads, arguments.rounds),
        }
        del problem
        section["memory"] = memory(arguments, missing)
        print(text(section), flush=True)
        sections.append(section)
    return sections


SECTIONS: list[Callable[[argparse.Namespace], list[dict[str, Any]]]] = [dense_and_missing]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--missing", type=float, nargs="+", default=[0.0, 0.1], help="shares of scores that are NaN")
    parser.add_argument("--skip_distances", action="store_true", help="without bench_diversity.py")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--memory_of", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print(json.dumps(memory_of(arguments)))
        return 0
    load = os.getloadavg()
    sections = [section for measure_sections in SECTIONS for section in measure_sections(arguments)]
    record = {
        "command": " ".join(["python benchmarks/bench_scoring.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions("numpy", "torch", "tso-fast"),
        "settings": {"rounds": arguments.rounds, "threads": arguments.threads, "load": load},
        "goals": GOALS,
        "sections": sections,
    }
    write_json(arguments.out, record)
    wrong = [f"{section['what']}: {name}" for section in sections for name in section.get("wrong", [])]
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    print(f"\nload {load[0]:.1f}, written to {arguments.out}\n")
    if arguments.skip_distances:
        return 1 if wrong else 0
    out = arguments.out.with_name(bench_diversity.OUT.name)  # a trial's distances stay beside it
    options = ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds), "--out", str(out)]
    return bench_diversity.main(options) or (1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())

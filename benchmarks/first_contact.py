"""The first minutes on a GPU: each product of the op against cuBLAS, candidate tiles, and facts only hardware can tell.

    python benchmarks/first_contact.py                      under 4 minutes on an H200
    python benchmarks/first_contact.py --out contact.jsonl  the results too, a line each
    python benchmarks/first_contact.py --only tiles         some groups
    python benchmarks/first_contact.py --dry_run            the same code at tiny shapes, in Triton's interpreter

It runs from a plain copy of the repository, as `gpu_suite.py` does. It prints each result at once as a line of JSON,
and at the end the recommended choices in words, with the entry for the cache file of `kernels/tiles.py`. Times are
medians of CUDA events with the L2 cache overwritten in between, on random data for Llama-3-8B's head in bfloat16.

Each group of measurements runs in its own process. A measurement that hangs, crashes or loses the device becomes a line
like any other; a new process then continues after it.
"""

from __future__ import annotations

import os
import sys

if "--dry_run" in sys.argv:  # before triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import argparse
import contextlib
import functools
import itertools
import json
import math
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from fused_cases import LOGIT_STD, PEERS, Case, Cuda, Device, ours
from gpu_suite import CASES, HEADLINE, NAIVE, OURS, TINY, facts_of, measure
from harness import Say, brief, commit, in_child, machine, versions
from tso_fast.kernels import autotune, tiles
from tso_fast.kernels import linear_logprob as forward
from tso_fast.kernels import linear_logprob_backward as backward
from tso_fast.kernels.blocks import load_tile, operand

SPEED_GOAL, MEMORY_GOAL_MIB = 1.2, 2048
LOGITS_GOAL_TFLOPS = 640
"""Below this rate, cuBLAS and a pass over its float32 logits are as fast."""
WORKERS = 12

Measurement = Callable[[], dict[str, Any]]
HEAD: dict[str, Any] = {"softcap": None, "temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """The device and the sizes to measure."""

    device: Device
    dim: int
    vocab: int
    rows: tuple[int, ...]
    case: Case
    dtype: torch.dtype = torch.bfloat16

    @property
    def where(self) -> torch.device:
        return torch.device(self.device.name)

    @property
    def middle(self) -> int:
        """Rows of a chunk at the default memory budget."""
        return self.rows[len(self.rows) // 2]

    def tflops(self, rows: int, ms: float) -> float:
        return 2 * rows * self.dim * self.vocab / ms / 1e9

    def small(self) -> Lab:
        """A smaller lab with the same kernel binaries, which depend only on whether 16 divides the sizes."""
        return (
            replace(self, rows=self.rows[:1]) if self.device.name == "cpu" else replace(self, vocab=1280, rows=(256,))
        )


class Operands:
    """Operands of the products of T rows."""

    def __init__(self, lab: Lab, rows: int) -> None:
        g = torch.Generator(lab.where).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g, device=lab.where)

        self.hidden = normal(rows, lab.dim).to(lab.dtype)
        self.weight = normal(lab.vocab, lab.dim).mul_(LOGIT_STD / math.sqrt(lab.dim)).to(lab.dtype)
        self.targets = torch.randint(lab.vocab, (rows,), generator=g, device=lab.where)
        self.tile = tiles.tiles(lab.dim, lab.vocab, lab.dtype, lab.where)
        columns = forward.padded_vocab(lab.dim, lab.vocab, lab.dtype, lab.where)
        self.room = torch.empty(rows * columns, dtype=lab.dtype, device=lab.where)
        self.target_logit = forward.target_logits(self.hidden, self.weight, None, self.targets, **HEAD)[0]
        self.exp = self.exponentials()[2]

    def exponentials(self, bias: torch.Tensor | None = None, target_logit: torch.Tensor | None = None) -> Any:
        logit = self.target_logit if target_logit is None else target_logit
        return forward.exponentials(
            self.hidden, self.weight, bias, logit, logit.clone(), self.room, **HEAD, tile=self.tile.logits
        )


# ------------------------------------------------------------------------------------------------- device, its manners


def about(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    yield (
        "device",
        lambda: {
            **machine(),
            **lab.device.facts(),
            **versions("torch", "triton"),
            "commit": commit(),
            "key": tiles.key_of(lab.dim, lab.vocab, lab.dtype, lab.where),
            "tiles": {
                name: tiles.to_json(tile)
                for name, tile in tiles.tiles(lab.dim, lab.vocab, lab.dtype, lab.where)._asdict().items()
            },
        },
    )
    yield "power", functools.partial(power, lab)


def power(lab: Lab) -> dict[str, Any]:
    """Power and clocks while cuBLAS computes logits for some seconds."""
    x = Operands(lab, lab.middle)
    out = torch.empty(lab.middle, lab.vocab, dtype=lab.dtype, device=lab.where)
    samples = lab.device.watch(lambda: torch.mm(x.hidden, x.weight.T, out=out), seconds=4)
    late = samples[len(samples) // 2 :]
    return {"samples": len(samples)} | {
        name: {"median": statistics.median(s[name] for s in late), "max": max(s[name] for s in samples)}
        for name in (samples[0] if samples else {})
    }


def questions(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    yield "bits of the target's logit", functools.partial(same_bits, lab)
    yield "accumulation", functools.partial(accumulation, lab)
    yield "TMA with stride 0", functools.partial(stride_zero, lab)  # last, as it may lose the device


def same_bits(lab: Lab) -> dict[str, Any]:
    """Whether k has the product's bits: a bias leaves only the target in a row's sum, exp(x[y] - k), so it is 1."""
    x = Operands(lab, lab.rows[0])
    sums = []
    for target in (0, lab.vocab // 2, lab.vocab - 1):
        bias = torch.full((lab.vocab,), float("-inf"), device=lab.where)
        bias[target] = 0
        targets = torch.full_like(x.targets, target)
        logit = forward.target_logits(x.hidden, x.weight, bias, targets, **HEAD)[0]
        _, sumexp, exp = x.exponentials(bias, logit)
        sums.append(torch.stack([sumexp, exp[:, target].float()]))
    sums_2T = torch.cat(sums, 1)
    return {
        "share_equal": (sums_2T[0] == 1).float().mean().item(),
        "rows": sums_2T.shape[1],
        "largest_nat": (sums_2T[0] - 1).abs().max().item(),
        "share_stored_as_1": (sums_2T[1] == 1).float().mean().item(),
    }


def accumulation(lab: Lab) -> dict[str, Any]:
    """Mean error of logits toward zero, relative to their mean size; negative if sums are truncated."""
    x = Operands(lab, lab.rows[0])
    exact = (x.hidden.double() * x.weight[x.targets].double()).sum(-1)
    by_torch = lab.device.float32_product(x.hidden, x.weight.T).gather(1, x.targets[:, None])[:, 0]
    found = {}
    for name, got in {"ours": x.target_logit, "torch": by_torch}.items():
        error = (got.double() - exact) * exact.sign()
        found[name] = {
            "bias": (error.mean() / exact.abs().mean()).item(),
            "std_nat": error.std().item(),
            "largest_nat": error.abs().max().item(),
        }
    return found


@triton.jit
def copy_tile_kernel(source, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Copies one tile, fetched by TMA, to memory."""
    tile = load_tile(source, 0, 0, ROWS, COLS, COLS, ROWS, COLS, True)
    offs = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offs, tile)


def stride_zero(lab: Lab) -> dict[str, Any]:
    row = torch.randn(64, device=lab.where).to(lab.dtype)
    out = row.new_full((16, 64), float("nan"))
    copy_tile_kernel[(1,)](operand(row.expand(16, 64), (16, 64), True), out, ROWS=16, COLS=64)
    return {"is_right": bool((out == row).all())}


# -------------------------------------------------------------------------------------------------------- the products


def products(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    """Measurements of cuBLAS and ours on the same operands; ``of`` is cuBLAS's result for the same number of rows."""
    for rows in lab.rows:
        x = Operands(lab, rows)
        calls = {f"cublas {name}": (call, None) for name, call in by_cublas(lab, x).items()} | by_ours(lab, x)
        for name, (call, peer) in calls.items():
            yield f"product {rows} {name}", functools.partial(product, lab, rows, name, call, peer)
        del x, calls


def product(lab: Lab, rows: int, name: str, call: Callable[[], Any], peer: str | None) -> dict[str, Any]:
    ms = lab.device.ms(call)
    found: dict[str, Any] = {"ms": ms}
    if name not in ("target_logits", "scaled_hidden"):
        found["tflops"] = lab.tflops(rows, ms)
    return found if peer is None else found | {"of": f"product {rows} cublas {peer}"}


def by_cublas(lab: Lab, x: Operands) -> dict[str, Callable[[], Any]]:
    logits = torch.empty(x.hidden.shape[0], lab.vocab, dtype=lab.dtype, device=lab.where)
    dweight, exp = torch.empty_like(x.weight), x.exp[:, : lab.vocab]
    return {
        "logits": lambda: torch.mm(x.hidden, x.weight.T, out=logits),
        "dhidden": lambda: lab.device.float32_product(exp, x.weight),
        "dhidden in slices": lambda: [lab.device.float32_product(part, x.weight) for part in exp.split(1024)],
        "dweight": lambda: torch.mm(exp.T, x.hidden, out=dweight),
    }


def by_ours(lab: Lab, x: Operands) -> dict[str, tuple[Callable[[], Any], str | None]]:
    factor, dhidden = torch.full_like(x.target_logit, 1e-3), torch.empty_like(x.hidden)
    add = DweightSum(lab, x)
    return {
        "target_logits": (lambda: forward.target_logits(x.hidden, x.weight, None, x.targets, **HEAD), None),
        "logsumexp": (
            lambda: forward.logsumexp(x.hidden, x.weight, None, x.target_logit, **HEAD, tile=x.tile.logits),
            "logits",
        ),
        "exponentials": (x.exponentials, "logits"),
        "dhidden by tiles": (
            lambda: backward.dhidden(x.exp, x.weight, factor, dhidden, x.tile.dhidden_skipping),
            "dhidden",
        ),
        "dhidden by torch": (lambda: backward.dhidden(x.exp, x.weight, factor, dhidden, None), "dhidden"),
        "scaled_hidden": (lambda: backward.scaled_hidden(x.hidden, factor), None),
        "dweight first": (lambda: add(is_first=True, is_last=False), "dweight"),
        "dweight middle": (lambda: add(is_first=False, is_last=False), "dweight"),
        "dweight last": (lambda: add(is_first=False, is_last=True), "dweight"),
        "dweight alone": (lambda: add(is_first=True, is_last=True), "dweight"),
    }


class DweightSum:
    """Adds one chunk's part of dweight to a 24-bit sum."""

    def __init__(self, lab: Lab, x: Operands) -> None:
        self.x, self.total = x, torch.zeros_like(x.weight)
        self.rest = torch.zeros_like(x.weight, dtype=torch.uint8)
        blocks = torch.arange(-(-x.hidden.shape[0] // x.tile.dweight.inner), dtype=torch.int32, device=lab.where)
        self.active = blocks, blocks.new_full((), blocks.numel())
        self.scaled, self.norm = backward.scaled_hidden(x.hidden, torch.full_like(x.target_logit, 1e-3))

    def __call__(self, *, is_first: bool, is_last: bool) -> None:
        backward.dweight(
            self.x.exp,
            self.scaled,
            self.norm,
            self.active,
            self.total,
            self.rest,
            self.x.tile.dweight,
            is_first=is_first,
            is_last=is_last,
        )


def bandwidth(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    yield "dweight's sum", functools.partial(sum_bandwidth, lab)


def sum_bandwidth(lab: Lab) -> dict[str, Any]:
    """Cost per chunk of reading the past sum, against a copy that moves as many bytes."""
    x = Operands(lab, lab.middle)
    add = DweightSum(lab, x)
    first, middle = (
        lab.device.ms(functools.partial(add, is_first=is_first, is_last=False)) for is_first in (True, False)
    )
    num_bytes = 3 * lab.vocab * lab.dim
    source, out = (torch.empty(num_bytes // 2, dtype=torch.uint8, device=lab.where) for _ in range(2))
    copy = lab.device.ms(lambda: out.copy_(source))
    return {
        "first_ms": first,
        "middle_ms": middle,
        "read_gb": num_bytes / 1e9,
        "copy_ms": copy,
        "copy_tb_per_s": num_bytes / copy / 1e9,
    }


# ------------------------------------------------------------------------------------------------- tiles, whole steps


def compiled(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    yield "compiling", functools.partial(compile_in_parallel, lab)


def compile_in_parallel(lab: Lab) -> dict[str, Any]:
    """Fills Triton's cache from many processes at once; this process must not have used the GPU yet."""
    num_workers = min(WORKERS, os.cpu_count() or 1)
    pids = []
    for worker in range(num_workers):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                compile_share(lab.small(), worker, num_workers)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return {"workers": num_workers}


def compile_share(lab: Lab, worker: int, num_workers: int) -> None:
    for number, (_, measurement) in enumerate(itertools.chain(candidates(lab), products(lab))):
        if number % num_workers == worker:
            with contextlib.suppress(Exception):  # it fails again, and says so, where it is measured
                measurement()


def candidates(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    head = lab.dim, lab.vocab, lab.dtype, lab.where
    for name, step in autotune.steps(*head, rows=lab.middle):
        if name == "dhidden_skipping":  # the same kernel as dhidden's
            continue
        for tile in autotune.candidates(name, lab.dim, lab.dtype, lab.where):
            yield f"tile {name} {label(tile)}", functools.partial(candidate, lab, name, step, tile)


def candidate(lab: Lab, name: str, step: autotune.Step, tile: tiles.Tile | None) -> dict[str, Any]:
    ms = lab.device.ms(lambda: step(tile))
    return {"product": name, "tile": tiles.to_json(tile), "ms": ms, "tflops": lab.tflops(lab.middle, ms)}


def label(tile: tiles.Tile | None) -> str:
    return tiles.CUBLAS if tile is None else "x".join(map(str, tile))


def steps(lab: Lab) -> Iterator[tuple[str, Measurement]]:
    """The headline step of ours and of plain torch, each against the floor, on its own inputs."""
    for name, provider in ((OURS, ours("triton")), (NAIVE, PEERS[NAIVE])):
        yield f"step {name}", functools.partial(step_of, lab, provider)


def step_of(lab: Lab, provider: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    measure(lab.case, provider, lab.device, 3, 40, found.update)
    return found


# ------------------------------------------------------------------------------------------------------ the processes

GROUPS: dict[str, Callable[[Lab], Iterator[tuple[str, Measurement]]]] = {
    "device": about,
    "compiling": compiled,
    "questions": questions,
    "products": products,
    "steps": steps,
    "bandwidth": bandwidth,
    "tiles": candidates,
}


class Findings:
    """Results by name; each is written at once as a line on stdout and to a file."""

    def __init__(self, out: Path | None) -> None:
        self.by_name: dict[str, dict[str, Any]] = {}
        self.file = None if out is None else out.open("w", encoding="utf-8")

    def add(self, name: str, values: dict[str, Any]) -> None:
        peer = self.by_name.get(values.get("of", ""), {})
        if "ms" in peer:
            values = values | {"ratio": values["ms"] / peer["ms"]}
        self.by_name[name] = values
        line = json.dumps({"name": name, **rounded(values)})
        print(line, flush=True)
        if self.file is not None:
            print(line, file=self.file, flush=True)


def rounded(value: Any) -> Any:
    """The value with floats rounded to four digits, which is more than measurements have."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_group(lab: Lab, group: str, findings: Findings, end: float, quiet_s: float) -> None:
    """Runs every measurement of a group in as many processes as needed, so that a crash costs one measurement only."""
    done: set[str] = set()
    while (left_s := end - time.monotonic()) > 1:
        begun: str | None = None

        def hear(record: dict[str, Any]) -> None:
            nonlocal begun
            if "begin" in record:
                begun = record["begin"]
                done.add(begun)
            elif begun is not None:
                findings.add(begun, record)
                begun = None

        ended = in_child(functools.partial(work, lab, group, done), hear, limit_s=left_s, quiet_s=quiet_s)
        if ended is None:
            return
        if begun is not None:
            findings.add(begun, {"error": ended})
        elif ended != MORE:  # between two measurements, so it would happen again
            findings.add(group, {"error": ended})
            return
    findings.add(group, {"error": "not reached"})


MORE = "Lost: the device"


class Lost(Exception):  # noqa: N818 - an event, whose words are MORE
    """The device no longer answers; the failure has already been reported."""


def work(lab: Lab, group: str, done: Iterable[str], say: Say) -> None:
    """Runs the measurements of a group that are not done, in a child process."""
    before = set(done)
    for name, measurement in GROUPS[group](lab):
        if name in before:
            continue
        say({"begin": name})
        try:
            values = measurement()
            lab.device.synchronize()
        except Exception as error:
            values = {"error": brief(error)}
        say(values)
        if "error" in values:
            try:
                lab.device.empty_cache()
                lab.device.synchronize()
            except Exception as error:
                raise Lost("the device") from error


# ---------------------------------------------------------------------------------------------------------- decisions


def decisions(found: dict[str, dict[str, Any]], middle: int) -> list[str]:
    """Recommended choices, one sentence each."""
    return [
        dhidden_choice(found, middle),
        logits_choice(found, middle),
        *device_manners(found),
        *step_results(found),
        *tile_lines(found),
    ]


def best(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The fastest tile of a product, excluding cuBLAS."""
    timed = [x for x in found.values() if x.get("product") == name and x["tile"] != tiles.CUBLAS]
    return min(timed, key=lambda x: x["ms"], default=None)


def ms_of(found: dict[str, dict[str, Any]], *names: str) -> float:
    """Time of the fastest of some results; infinity if there are none."""
    return min((found[name]["ms"] for name in names if "ms" in found.get(name, {})), default=math.inf)


def dhidden_choice(found: dict[str, dict[str, Any]], middle: int) -> str:
    by_torch = ms_of(found, f"product {middle} dhidden by torch", f"tile dhidden {tiles.CUBLAS}")
    by_tiles = min(
        (best(found, "dhidden") or {"ms": math.inf})["ms"], ms_of(found, f"product {middle} dhidden by tiles")
    )
    if math.inf in (by_torch, by_tiles):
        return "dhidden: not measured."
    choice = "cuBLAS" if by_tiles - by_torch > autotune.CUBLAS_GAIN_MS else "tiles"
    return (
        f"dhidden: by {choice}, at {middle} rows {by_torch:.2f} ms by cuBLAS and {by_tiles:.2f} ms by tiles "
        f"(cuBLAS must win by {autotune.CUBLAS_GAIN_MS} ms)."
    )


def logits_choice(found: dict[str, dict[str, Any]], middle: int) -> str:
    tried = [best(found, "logits"), found.get(f"product {middle} exponentials")]
    tflops = max((x["tflops"] for x in tried if x and "tflops" in x), default=None)
    if tflops is None:
        return "logits: not measured."
    if tflops < LOGITS_GOAL_TFLOPS:
        return (
            f"logits: {tflops:.0f} TFLOP/s at best, below {LOGITS_GOAL_TFLOPS}: make them by cuBLAS into float32 "
            "scratch, with an elementwise kernel behind it."
        )
    return f"logits: by tiles, {tflops:.0f} TFLOP/s with their exponentials stored."


def device_manners(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    power = found.get("power", {})
    if "power_w" in power:
        yield (
            f"power: {power['power_w']['median']:.0f} W of {found.get('device', {}).get('power.limit', '?')} and "
            f"{power['sm_mhz']['median']:.0f} MHz during cuBLAS's product."
        )
    bits = found.get("bits of the target's logit", {})
    if "share_equal" in bits:
        yield (
            f"target's logit: the product's bits in {bits['share_equal']:.2%} of {bits['rows']} rows, off by at "
            f"most {bits['largest_nat']:.1e} nat."
        )
    sums = found.get("accumulation", {})
    if "ours" in sums:
        bias = sums["ours"]["bias"]
        how = "toward zero" if bias < -1e-6 else "without a bias"
        yield (
            f"accumulation: rounds {how}, mean error {bias:+.1e} of a logit, spread {sums['ours']['std_nat']:.1e} "
            f"nat; torch's product {sums['torch']['bias']:+.1e}."
        )
    tma = found.get("TMA with stride 0", {})
    if tma:
        yield "TMA with stride 0: " + ("taken." if tma.get("is_right") else f"not taken, {tma.get('error', 'wrong')}.")
    total = found.get("dweight's sum", {})
    if "middle_ms" in total:
        yield (
            f"dweight's sum: reading {total['read_gb']:.2f} GB costs a chunk "
            f"{total['middle_ms'] - total['first_ms']:.2f} ms, a copy that moves as many bytes "
            f"{total['copy_ms']:.2f} ms ({total['copy_tb_per_s']:.1f} TB/s)."
        )


def step_results(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name in (OURS, NAIVE):
        step = found.get(f"step {name}", {"status": "not measured"})
        if step.get("status") != "ok":
            yield f"step by {name}: {step.get('error', step.get('status'))}."
            continue
        words = f"step by {name}: {1e3 * step['time_s']['median']:.1f} ms, {step['ratio']['median']:.2f} of the floor"
        words += f", {step['extra_mib']:,.0f} MiB extra" if "extra_mib" in step else ""
        if name == OURS:
            floor = step["floor"]
            yield f"floor: {1e3 * floor[floor['best']]['median']:.1f} ms, four products by torch.mm."
            wrong = [f"slower than {SPEED_GOAL}"] * (step["ratio"]["median"] > SPEED_GOAL) + step["misses"]
            wrong += [f"more than {MEMORY_GOAL_MIB} MiB"] * (step.get("extra_mib", 0) > MEMORY_GOAL_MIB)
            words += f"; goals missed: {', '.join(wrong)}" if wrong else "; every goal is met"
        yield words + "."


def tile_lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """This head's entry for the cache file, which is a JSON object of such entries."""
    chosen = {name: best(found, name) for name in ("logits", "dhidden", "dweight")}
    if "key" not in found.get("device", {}) or None in chosen.values():
        yield "tiles: not all measured."
        return
    facts, by_torch = found["device"], ms_of(found, f"tile dhidden {tiles.CUBLAS}")
    entry = {name: x["tile"] for name, x in chosen.items() if x is not None}
    entry["dhidden_skipping"] = entry["dhidden"]
    if chosen["dhidden"] and chosen["dhidden"]["ms"] - by_torch > autotune.CUBLAS_GAIN_MS:
        entry["dhidden"] = tiles.CUBLAS
    times: dict[str, dict[str, float]] = {}
    for name, x in found.items():
        if "product" in x:
            times.setdefault(x["product"], {})[name.split()[-1]] = x["ms"]
    entry |= {"ms": times, "triton": facts.get("triton"), "torch": facts.get("torch")}
    yield f"tiles, for {tiles.cache_file()}:"
    yield json.dumps(rounded({facts["key"]: entry}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument("--budget_s", type=float, default=230, help="everything ends before")
    parser.add_argument("--limit_s", type=float, default=60, help="the most that one measurement may take")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes in Triton's interpreter on the CPU")
    return parser.parse_args()


def main() -> int:
    start, arguments = time.monotonic(), parse()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    device = Device() if arguments.dry_run else Cuda()
    if not facts_of(device):
        print("first_contact: needs an NVIDIA GPU that torch can see; nothing was measured (--dry_run tries the code)")
        return 0
    case = CASES[HEADLINE]
    lab = Lab(device=device, dim=case.dim, vocab=case.vocab, rows=(2048, 4096, 8192), case=case)
    if arguments.dry_run:
        lab = replace(lab, dim=24, vocab=67, rows=(8, 20), case=replace(case, **TINY))
    findings = Findings(arguments.out)
    end = start + arguments.budget_s
    for group in arguments.only:
        if end - time.monotonic() < 5:
            findings.add(group, {"error": "not reached"})
            continue
        run_group(lab, group, findings, end, arguments.limit_s)
    print(f"\n{time.monotonic() - start:.0f} s. What to choose:\n")
    print("\n".join(decisions(findings.by_name, lab.middle)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

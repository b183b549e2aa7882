"""Expected time of a step at Llama-3-8B's head on a GPU, computed from the card's constants; nothing is measured.

    python benchmarks/expected_gpu.py                    the step, product by product, as markdown tables
    python benchmarks/expected_gpu.py --card H100        on another card
    python benchmarks/expected_gpu.py --emulate          rounding errors, emulated on the CPU, in half a minute
    python benchmarks/expected_gpu.py --draw             the pictures of docs/kernels.md

It needs no GPU and compiles nothing. Chunks and bytes come from `tso_fast.logprob.plan`, tiles from the defaults in
`kernels/tiles.py` for compute capability 9.0. The step has 16384 completion tokens, D 4096, V 128256. Assumptions:

1. While a multiprocessor computes, it reaches its share of the matrix rate that torch reaches on random data. The
   card's power limits that rate: on zeros it is 13 % higher. A stall is therefore partly free, and a time is a range.
   *low*: after stalls clocks rise up to the rate on zeros, as long as the whole step stays at the rate on random data.
   *high*: they don't.
2. A tile of 128 x 256 or more has a multiprocessor to itself, since its stages take more than half of shared memory;
   nothing then hides its start and its end. Smaller tiles run in pairs, and each hides the other's.
3. A start costs START_US: launch, descriptors and the latency of the first stage. An end costs OPS[kernel] instructions
   per element on 128 lanes, exponentials at 16 per clock, and its loads and stores: in *low* at 64 bytes per clock, the
   multiprocessor's port to the L2 cache, in *high* at its share of memory bandwidth.
4. Tiles run in whole waves, one tile per place; the last wave counts in full. A wave reads its operands from memory
   once, and not at all if the previous wave had them and its operands fit into 3/4 of the L2 cache. Memory works in
   parallel with products, so it limits only products with more bytes than FLOP.
5. torch's product runs at the matrix rate; in *high*, with tiles of 128 x 256 in whole waves.
6. It is unknown whether the L2 cache can deliver a product's operands at that rate: a column shows the required rate,
   and a table shows the step's time if tiles compute more slowly.
7. Small kernels take SMALL_US, estimates that are mostly latency; in *low*, half of that. The host is ahead of the
   device except while it checks the arguments, CHECK_MS, when the device waits.
8. float32 uses no tensor cores: the rate is that of the lanes, of which torch reaches 85 % and tiles 50-75 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tso_fast.kernels.linear_logprob import REDO_TILES
from tso_fast.kernels.linear_logprob_backward import DHIDDEN_ROWS
from tso_fast.kernels.tiles import LARGE, Tile, default_tiles

from tso_fast.logprob import fused, triton
from tso_fast.logprob.plan import Shape

DIM, VOCAB, ROWS_OF_PAIR, PAIRS = 4096, 128256, 2048, 8
DOCS = Path(__file__).resolve().parent.parent / "docs"
GOAL = 1.2
"""Largest allowed ratio of step to floor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Constants of a card: rates and bandwidth measured with torch on random data, the others from its data sheet."""

    name: str
    multiprocessors: int
    tflops: float
    tb_per_s: float
    l2_mb: float
    ghz: float = 1.7  # under such a load; between 1.5 and 1.98
    on_zeros: float = 894 / 788
    """Ratio of the matrix rate on zeros to that on random data, measured on an H200 and assumed for the H100."""
    tile_tflops: float | None = None
    """Rate of tiles while they compute, in *high*; None: the matrix rate."""

    @property
    def lane_tflops(self) -> float:
        return self.multiprocessors * 128 * 2 * self.ghz / 1e3


CARDS = {
    "H200": Card(name="H200", multiprocessors=132, tflops=790, tb_per_s=4.3, l2_mb=60),
    "H100": Card(name="H100", multiprocessors=132, tflops=798, tb_per_s=3.0, l2_mb=50),
}
START_US = 1.5
OPS = {"sumexp": 8, "exp": 10, "dhidden": 4, "dweight": 8}
SMALL_US = {
    "target logits": 32,  # 64 steps of two gathered tiles, 64 programs
    "maxima and sums of tiles, log-prob": 25,
    "second pass, left at once": 1.2,  # a wave
    "row factors, active blocks": 9,
    "rows of v h": 20,
    "torch's dhidden times v": 10,  # a slice
    "sums, loss and its gradient": 160,  # 40 launches
    "dloss = 1, read by every block": 1,  # a wave of 8 blocks a multiprocessor
}
CHECK_MS = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One row of the table: a kernel in one chunk, or summed over all chunks."""

    name: str
    flop: float = 0.0
    read: float = 0.0
    written: float = 0.0
    tiles: int = 0
    waves: int = 0
    places: int = 1
    l2_tb_per_s: float = 0.0
    low_ms: float = 0.0
    high_ms: float = 0.0

    @property
    def efficiency(self) -> float:
        """Share of places that have a tile, over all waves."""
        return self.tiles / (self.waves * self.places) if self.waves else math.nan


def total(name: str, works: Iterable[Work]) -> Work:
    works = list(works)
    summed = "flop", "read", "written", "tiles", "waves", "low_ms", "high_ms"
    sums: dict[str, Any] = {field: sum(getattr(w, field) for w in works) for field in summed}
    return Work(name=name, places=works[0].places, l2_tb_per_s=max(w.l2_tb_per_s for w in works), **sums)


# ------------------------------------------------------------------------------------------------------------ products


@functools.cache
def operand_bytes(num_rows: int, num_cols: int, tile: Tile, inner: int, size: int, places: int, l2: float) -> float:
    """Bytes of operands that a product reads from memory, in the tile order of ``kernels/blocks.py: tile_of``."""
    pid = np.arange(num_rows * num_cols)
    first = pid // (tile.group * num_cols) * tile.group
    group = np.minimum(num_rows - first, tile.group)
    pid_in = pid % (tile.group * num_cols)
    row, col = first + pid_in % group, pid_in // group
    bytes_read, before = 0.0, set[tuple[str, int]]()
    each = {"row": tile.rows * inner * size, "col": tile.cols * inner * size}
    for start in range(0, pid.size, places):
        wave = {("row", int(r)) for r in row[start : start + places]}
        wave |= {("col", int(c)) for c in col[start : start + places]}
        bytes_read += sum(each[side] for side, _ in wave - before)
        before = wave if sum(each[side] for side, _ in wave) < 0.75 * l2 else set()
    return bytes_read


def product(
    card: Card,
    name: str,
    kernel: str,
    tile: Tile,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    read: float = 0,
    written: float = 0,
    exps: int = 0,
    share: float = 1,
) -> Work:
    """A tiled product, [rows, inner] x [inner, cols]. read, written: bytes per element besides the operands; exps:
    exponentials per element; share: share of the rows, or of the inner dimension, that has a gradient."""
    rows, cols, inner = shape
    num_rows, num_cols = math.ceil(rows / tile.rows), math.ceil(cols / tile.cols)
    programs = 1 if tile.rows * tile.cols >= 128 * 256 else 2
    places, num = card.multiprocessors * programs, num_rows * num_cols
    waves = math.ceil(num * (share if kernel == "dhidden" else 1) / places)
    inner_used = inner * (share if kernel == "dweight" else 1)
    low_rate, high_rate, average = rates(card, dtype)
    flop_of_tile = 2 * tile.rows * tile.cols * inner_used
    main_low, main_high = (
        1e6 * programs * flop_of_tile * card.multiprocessors / (x * 1e12) for x in (low_rate, high_rate)
    )
    elements = tile.rows * tile.cols
    alu = elements * (OPS[kernel] / 128 + exps / 16) / card.ghz / 1e3
    port, memory = 64 * card.ghz * 1e3, card.tb_per_s * 1e6 / card.multiprocessors  # bytes a microsecond
    end_low, end_high = (START_US + alu + elements * (read + written) / x for x in (port, memory))
    if programs > 1:
        end_low = end_high = 0.0
    flop = 2.0 * rows * cols * inner * share
    operands = operand_bytes(num_rows, num_cols, tile, inner, dtype.itemsize, places, card.l2_mb * 1e6) * share
    bytes_read, bytes_written = operands + rows * cols * read, float(rows * cols * written)
    memory_ms = (bytes_read + bytes_written) / card.tb_per_s / 1e9
    low = max(flop / average / 1e9, waves * (main_low + end_low) / 1e3, memory_ms)
    high = max(waves * (main_high + end_high) / 1e3, memory_ms)
    l2 = (tile.rows + tile.cols) * inner_used * dtype.itemsize * programs * card.multiprocessors / main_high / 1e6
    return Work(
        name=name,
        flop=flop,
        read=bytes_read,
        written=bytes_written,
        tiles=num,
        waves=waves,
        places=places,
        l2_tb_per_s=l2,
        low_ms=low,
        high_ms=high,
    )


def rates(card: Card, dtype: torch.dtype) -> tuple[float, float, float]:
    """TFLOP/s of tiles while they compute, in low and high, and of a whole product at best."""
    if dtype == torch.float32:
        return 0.75 * card.lane_tflops, 0.5 * card.lane_tflops, 0.75 * card.lane_tflops
    return card.tflops * card.on_zeros, card.tile_tflops or card.tflops, card.tflops


def torch_rate(card: Card, dtype: torch.dtype) -> float:
    return 0.85 * card.lane_tflops if dtype == torch.float32 else card.tflops


def torch_dhidden(card: Card, rows: int, dtype: torch.dtype) -> Work:
    """dhidden computed by torch's product, in slices."""
    slices = []
    for start in range(0, rows, DHIDDEN_ROWS):
        count = min(DHIDDEN_ROWS, rows - start)
        num = math.ceil(count / LARGE.rows) * math.ceil(DIM / LARGE.cols)
        waves = math.ceil(num / card.multiprocessors)
        flop = 2.0 * count * DIM * VOCAB
        read, written = (VOCAB * DIM + count * VOCAB) * dtype.itemsize, count * DIM * 4
        low = max(flop / card.tflops / 1e9, (read + written) / card.tb_per_s / 1e9)
        main = 2 * LARGE.rows * LARGE.cols * VOCAB * card.multiprocessors / card.tflops / 1e9
        slices.append(
            Work(
                name="dhidden by torch's product",
                flop=flop,
                read=read,
                written=written,
                tiles=num,
                waves=waves,
                places=card.multiprocessors,
                low_ms=low,
                high_ms=max(low, waves * main),
            )
        )
    return total("dhidden by torch's product", slices)


def small(name: str, times: float, bytes_read: float = 0.0, bytes_written: float = 0.0) -> Work:
    ms = SMALL_US[name] * times / 1e3
    return Work(name=name, read=bytes_read, written=bytes_written, low_ms=ms / 2, high_ms=ms)


# --------------------------------------------------------------------------------------------------------------- steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A case and the way it is computed."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    is_cached: bool = False
    needs_dweight: bool = True
    share: float = 1.0
    """Share of rows that have a gradient; less than 1: dual clip, whose dhidden uses tiles."""
    old_rows: int | None = None
    """Rows per chunk of the old plan, which has a 32-bit sum, dhidden by tiles and gradients scaled in bf16."""

    @property
    def shape(self) -> Shape:
        return Shape(
            backend=triton,
            dim=DIM,
            vocab=VOCAB,
            dtype=self.dtype,
            component_rows=[ROWS_OF_PAIR] * PAIRS,
            needs_dweight=self.needs_dweight,
        )

    @property
    def chunks(self) -> list[int]:
        rows = ROWS_OF_PAIR * PAIRS
        return fused.plan(self.shape).chunks if self.old_rows is None else [self.old_rows] * (rows // self.old_rows)

    @property
    def num_products(self) -> float:
        return (1 if self.is_cached else 2) + (2 if self.needs_dweight else 1) * self.share

    def floor_ms(self, card: Card) -> float:
        flop = 2.0 * PAIRS * ROWS_OF_PAIR * DIM * VOCAB
        return self.num_products * flop / torch_rate(card, self.dtype) / 1e9


STEPS = [
    Step(name="bf16"),
    Step(name="bf16, the plan before", old_rows=2048),
    Step(name="bf16, reference cached", is_cached=True),
    Step(name="bf16, frozen head", needs_dweight=False),
    Step(name="bf16, dual clip, half of the rows at their bound", share=0.5),
    Step(name="float16", dtype=torch.float16),
    Step(name="float32", dtype=torch.float32),
]


def chunk(card: Card, step: Step, rows: int, number: int, num_chunks: int) -> list[Work]:
    """All kernels of a chunk."""
    dtype, size = step.dtype, step.dtype.itemsize
    tiles = default_tiles(DIM, dtype, (9, 0))
    row, logits = DIM * size, (rows, VOCAB, DIM)
    make = functools.partial(product, card)
    works, num_models = [], 2 - step.is_cached
    if not step.is_cached:
        works.append(make("reference: log-sum-exp", "sumexp", tiles.logits, logits, dtype, exps=1))
    if dtype == torch.float16:
        works.append(make("policy: log-sum-exp", "sumexp", tiles.logits, logits, dtype, exps=1))
    works.append(make("policy: exponentials", "exp", tiles.logits, logits, dtype, written=size, exps=1))
    if step.share < 1 or step.old_rows or tiles.dhidden is not None:
        tile = tiles.dhidden_skipping
        works.append(
            make("dhidden by tiles", "dhidden", tile, (rows, DIM, VOCAB), dtype, written=size, share=step.share)
        )
    else:
        works.append(torch_dhidden(card, rows, dtype))
        slices = math.ceil(rows / DHIDDEN_ROWS)
        works.append(small("torch's dhidden times v", slices, rows * DIM * 4, rows * row))
    if step.needs_dweight:
        is_first, is_last = number == 0, number == num_chunks - 1
        kept = 4 if step.old_rows or size == 4 else 3
        where = "alone" if is_first and is_last else "first" if is_first else "last" if is_last else "middle"
        works.append(
            make(
                f"dweight, {where}",
                "dweight",
                tiles.dweight,
                (VOCAB, DIM, rows),
                dtype,
                share=step.share,
                read=0 if is_first else kept,
                written=size if is_last else kept,
            )
        )
        works.append(small("rows of v h", 1, rows * row, rows * row))
    num_tiles = math.ceil(VOCAB / tiles.logits.cols)
    statistics = rows * num_tiles * 8.0
    redo = math.ceil(rows / 64) * math.ceil(num_tiles / REDO_TILES) / card.multiprocessors
    return [
        *works,
        small("target logits", num_models, num_models * 2 * rows * row),
        small("maxima and sums of tiles, log-prob", num_models, num_models * statistics, num_models * statistics),
        small("second pass, left at once", redo),
        small("row factors, active blocks", 1),
        small("sums, loss and its gradient", 1),
    ]


def around(card: Card, step: Step) -> list[Work]:
    """Work that is done once per step."""
    rows, row = PAIRS * ROWS_OF_PAIR, DIM * step.dtype.itemsize
    elements = rows * DIM + (VOCAB * DIM if step.needs_dweight else 0)
    moved = rows * row * (2 * (2 - step.is_cached) + 3)  # taken: read and written; dhidden: zeroed, read and written
    gather = moved / card.tb_per_s / 1e9
    works = [
        Work(name="arguments checked on the host", low_ms=CHECK_MS / 2, high_ms=CHECK_MS),
        Work(name="rows taken and put back", read=moved / 2, written=moved / 2, low_ms=gather, high_ms=2 * gather),
        small("dloss = 1, read by every block", elements / 8192 / 8 / card.multiprocessors),
    ]
    if step.old_rows:
        ms = 2 * elements * step.dtype.itemsize / card.tb_per_s / 1e9
        works[2] = Work(name="times dloss", read=2.0 * elements, written=2.0 * elements, low_ms=ms, high_ms=ms)
    return works


def expected(card: Card, step: Step) -> list[Work]:
    """The kernels of a step, each summed over its chunks; the last row is the sum of those without a product."""
    by_name: dict[str, list[Work]] = {}
    for number, rows in enumerate(step.chunks):
        for work in chunk(card, step, rows, number, len(step.chunks)):
            by_name.setdefault(work.name, []).append(work)
    for work in around(card, step):
        by_name.setdefault(work.name, []).append(work)
    return [total(name, works) for name, works in by_name.items()]


def is_product(work: Work) -> bool:
    return work.flop > 0


def ratio(card: Card, step: Step) -> tuple[float, float]:
    works, floor = expected(card, step), step.floor_ms(card)
    return sum(w.low_ms for w in works) / floor, sum(w.high_ms for w in works) / floor


# -------------------------------------------------------------------------------------------------------------- tables


def span(low: float, high: float, digits: int = 1) -> str:
    a, b = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return a if a == b else f"{a}–{b}"


def print_step(card: Card, step: Step) -> None:
    works, floor = expected(card, step), step.floor_ms(card)
    chunks = step.chunks
    print(
        f"\n**{step.name}**, {card.name}: {len(chunks)} chunks of {span(min(chunks), max(chunks), 0)} rows; "
        f"floor {step.num_products:g} products, {floor:.1f} ms\n"
    )
    print("| product | TFLOP | GB read | GB written | tiles | waves | places filled | from L2, TB/s | expected ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for w in [w for w in works if is_product(w)]:
        l2 = f"{w.l2_tb_per_s:.1f}" if w.l2_tb_per_s else "-"
        print(
            f"| {w.name} | {w.flop / 1e12:.1f} | {w.read / 1e9:.1f} | {w.written / 1e9:.1f} | {w.tiles:,} | "
            f"{w.waves} | {w.efficiency:.1%} | {l2} | {span(w.low_ms, w.high_ms)} |"
        )
    for w in [w for w in works if not is_product(w)]:
        print(f"| {w.name} | | {w.read / 1e9:.1f} | {w.written / 1e9:.1f} | | | | | {span(w.low_ms, w.high_ms, 2)} |")
    low, high = sum(w.low_ms for w in works), sum(w.high_ms for w in works)
    print(
        f"| **sum** | {sum(w.flop for w in works) / 1e12:.1f} | {sum(w.read for w in works) / 1e9:.1f} | "
        f"{sum(w.written for w in works) / 1e9:.1f} | | | | | **{span(low, high)}** |"
    )
    print(f"\nover the floor: {span(low / floor, high / floor, 2)}")


def print_summary(card: Card) -> None:
    print(f"\n**All cases, {card.name}**: expected, by computation\n")
    print("| case | chunks | products | floor ms | expected ms | over the floor | extra MiB by the plan |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for step in STEPS:
        works, floor = expected(card, step), step.floor_ms(card)
        low, high = sum(w.low_ms for w in works), sum(w.high_ms for w in works)
        chunks = (
            "+".join(map(str, step.chunks)) if len(set(step.chunks)) > 1 else f"{len(step.chunks)} × {step.chunks[0]}"
        )
        extra = "-" if step.old_rows else f"{fused.plan(step.shape).total_bytes / 2**20:,.0f}"
        print(
            f"| {step.name} | {chunks} | {step.num_products:g} | {floor:.1f} | {span(low, high)} | "
            f"{span(low / floor, high / floor, 2)} | {extra} |"
        )


def print_slower_tiles(card: Card) -> None:
    print(f"\n**bf16, {card.name}, if tiles compute at less than the matrix rate**: expected, by computation\n")
    print("| TFLOP/s while a tile computes | from L2, TB/s | *high*, over the floor |\n| --- | --- | --- |")
    for share in (1, 0.95, 0.9, 0.85, 0.8):
        slower = dataclasses.replace(card, tile_tflops=share * card.tflops)
        l2 = max(w.l2_tb_per_s for w in expected(slower, STEPS[0]))
        print(f"| {share * card.tflops:.0f} | {l2:.1f} | {ratio(slower, STEPS[0])[1]:.2f} |")


# ----------------------------------------------------------------------------------------------------------- emulation


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def to_24_bits(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to its upper 24 bits, to nearest even, as ``dweight_kernel`` does."""
    bits = x.view(torch.int32)
    return (((bits + 0x7F + ((bits >> 8) & 1)) >> 8) << 8).view(torch.float32)


def gradient_errors(num_chunks: int = 4, T: int = 4096, D: int = 256, V: int = 4096) -> dict[str, float]:
    """Relative Frobenius errors of the formulas, rounded as in bf16 kernels, against float64."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=g).bfloat16()
    weight = (torch.randn(V, D, generator=g) * 2.5 * D**-0.5).bfloat16()
    targets = torch.randint(V, (T,), generator=g)
    upstream = torch.randn(T, generator=g).double() / T
    x = hidden.double() @ weight.double().T
    k = x.gather(1, targets[:, None])
    sums = (x - k).exp().sum(1, keepdim=True)
    p = (x - k).exp() / sums
    dlogits = -p * upstream[:, None]
    dlogits[torch.arange(T), targets] += upstream
    dhidden, dweight = dlogits @ weight.double(), dlogits.T @ hidden.double()
    stored = (x - k).exp()
    stored[torch.arange(T), targets] = 1 - sums[:, 0]
    stored, v = stored.float().bfloat16(), (-upstream[:, None] / sums).float()
    scaled = (v * hidden.float()).bfloat16()
    found = {}
    product_TD = stored.float() @ weight.float()
    found["dhidden, product in float32"] = relative((v * product_TD).bfloat16(), dhidden)
    found["dhidden, product rounded to bf16"] = relative((v * product_TD.bfloat16().float()).bfloat16(), dhidden)
    parts = [stored[i::num_chunks].float().T @ scaled[i::num_chunks].float() for i in range(num_chunks)]
    keep = {"32 bits": lambda s: s, "24 bits": to_24_bits, "16 bits, bf16": lambda s: s.bfloat16().float()}
    for name, rounded in keep.items():
        total_VD = torch.zeros(V, D)
        for number, part in enumerate(parts):
            total_VD = total_VD + part
            if number < num_chunks - 1:
                total_VD = rounded(total_VD)
        found[f"dweight, {num_chunks} chunks summed in {name}"] = relative(total_VD.bfloat16(), dweight)
    return found


def truncation_errors(T: int = 128, V: int = 2048, D: int = 4096, logit: float = 20.0) -> dict[str, float]:
    """Errors for confident tokens if logits are summed 16 terms at a time and truncated to float32, toward zero."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) * D**-0.5
    targets = torch.randint(V, (T,), generator=g)
    h = (logit * weight[targets]).bfloat16().double().numpy()
    w = weight.bfloat16().double().numpy()
    acc = np.zeros((T, V), np.float32)
    for d in range(0, D, 16):
        exact = acc + h[:, d : d + 16] @ w[:, d : d + 16].T
        acc = exact.astype(np.float32)
        acc = np.where(np.abs(acc.astype(np.float64)) > np.abs(exact), np.nextafter(acc, np.float32(0)), acc)
    x, cut = h @ w.T, acc.astype(np.float64)
    where = np.arange(T), targets.numpy()

    def lse(z: np.ndarray) -> np.ndarray:
        top = z.max(1)
        return top + np.log(np.exp(z - top[:, None]).sum(1))

    truth = x[where] - lse(x)
    lost = x[where] - cut[where]
    same, apart = cut[where] - lse(cut) - truth, x[where] - lse(cut) - truth
    return {
        "mean logit of a target": float(x[where].mean()),
        "lost of it, mean nat": float(lost.mean()),
        "lost of it, standard deviation": float(lost.std()),
        "log-prob error, target's logit by the same instruction, largest nat": float(np.abs(same).max()),
        "log-prob error, exact target's logit, mean nat": float(apart.mean()),
        "1024 such tokens, same instruction, nat": float(1024 * same.mean()),
        "1024 such tokens, exact target's logit, nat": float(1024 * apart.mean()),
    }


def print_emulation() -> None:
    print("\n| emulated on the CPU: T 4096, D 256, V 4096, bf16; relative error against float64 | |\n| --- | --- |")
    for name, value in {**gradient_errors(), **gradient_errors(num_chunks=8)}.items():
        print(f"| {name} | {value:.3e} |")
    print("\n| emulated on the CPU: D 4096, V 2048, 128 confident tokens, sums of 16 terms cut off | |\n| --- | --- |")
    for name, value in truncation_errors().items():
        print(f"| {name} | {value:.3g} |")


# ------------------------------------------------------------------------------------------------------------ pictures


# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = ["#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#999999"]
INK, PAPER = "#222222", "#F4F4F4"


def draw(card: Card) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 12, "font.family": "DejaVu Sans", "savefig.dpi": 110, "text.color": INK}
    draw_chunk()
    draw_memory()
    draw_sum()
    draw_times(card)


def save(figure: Any, name: str) -> None:
    file = DOCS / f"kernels-{name}.png"
    figure.savefig(file, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    print(file.relative_to(DOCS.parent))


def size_of(num_bytes: float) -> str:
    return (
        f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else "KB"
    )


def draw_chunk() -> None:
    """Draws the kernels of one chunk in order, with their reads and writes."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    rows = fused.plan(STEPS[0].shape).chunks[0]
    W, h, E = VOCAB * DIM * 2, rows * DIM * 2, rows * VOCAB * 2
    parts = 2 * 4 * rows * math.ceil(VOCAB / LARGE.cols)
    chain = [  # title, kernel, reads, writes, colour
        ("target logits, of both models", "target_logit_kernel", f"h, W[y]   {size_of(2 * h)}, twice", "x[y]   KB", 6),
        (
            "reference",
            "sumexp_kernel",
            f"W′   {size_of(W)},  h′   {size_of(h)}",
            f"maxima, sums of tiles   {size_of(parts)}",
            0,
        ),
        (
            "reference’s log-probs",
            "reduce_tiles_kernel, finish_rows_kernel",
            f"maxima, sums   {size_of(parts)}",
            "log-prob   KB",
            6,
        ),
        (
            "policy: exponentials",
            "exp_kernel",
            f"W   {size_of(W)},  h   {size_of(h)}\nk = x[y]   KB",
            f"E   {size_of(E)}\nmaxima, sums of tiles   {size_of(parts)}",
            1,
        ),
        (
            "policy’s log-probs",
            "reduce_tiles, finish_rows; redo_kernel",
            f"maxima, sums   {size_of(parts)}",
            "log-prob, sum E, flags   KB",
            6,
        ),
        (
            "sums, loss and its gradient",
            "segment_sum_kernel, dual_clip_kernel",
            "log-probs of both   KB",
            "loss, g of every row   KB",
            6,
        ),
        (
            "row factors",
            "row_factor_kernel, active_blocks_kernel",
            "g, k, sum E   KB",
            "v, E[y], active blocks   KB",
            6,
        ),
    ]
    ends = [
        (
            "dhidden = v (E W)",
            f"torch.mm by {DHIDDEN_ROWS} rows, scale_rows_kernel",
            f"reads E {size_of(E)}, W {size_of(W)} a slice, v",
            f"writes dh {size_of(h)}",
            2,
        ),
        (
            "dweight (+)= Eᵀ (v h)",
            "scale_rows_kernel, dweight_kernel",
            f"reads E {size_of(E)}, v h {size_of(h)}, the sum {size_of(VOCAB * DIM * 3)}",
            f"writes the sum {size_of(VOCAB * DIM * 3)}",
            3,
        ),
    ]
    figure, axes = plt.subplots(figsize=(13.5, 10))
    axes.set(xlim=(0, 135), ylim=(2, 101))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, colour: int) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0.3",
                facecolor=COLOURS[colour] + "33",
                edgecolor=COLOURS[colour],
                linewidth=2,
            )
        )

    def arrow(start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.5, **style})

    middle, step, top = 67.5, 11.2, 92
    axes.text(22, top + 7, "reads", ha="center", weight="bold")
    axes.text(113, top + 7, "writes", ha="center", weight="bold")
    axes.text(middle, top + 7, f"one chunk of {rows} rows, bf16", ha="center", weight="bold")
    for i, (title, kernel, reads, writes, colour) in enumerate(chain):
        y = top - i * step
        box(middle, y, 42, 6.6, colour)
        axes.text(middle, y + 1.3, title, ha="center", va="center", weight="bold", fontsize=12)
        axes.text(middle, y - 1.8, kernel, ha="center", va="center", fontsize=10.5)
        axes.text(22, y, reads, ha="center", va="center", fontsize=11.5)
        axes.text(113, y, writes, ha="center", va="center", fontsize=11.5)
        arrow((41.5, y), (45.5, y))
        arrow((89.5, y), (93.5, y))
        if i:
            arrow((middle, y + step - 3.8), (middle, y + 3.8))
    y = top - len(chain) * step - 3.5
    for x, (title, kernel, reads, writes, colour) in zip((32, 103), ends, strict=True):
        box(x, y, 58, 12.5, colour)
        axes.text(x, y + 4.4, title, ha="center", va="center", weight="bold", fontsize=12)
        axes.text(x, y + 1.4, kernel, ha="center", va="center", fontsize=10.5)
        axes.text(x, y - 1.7, reads, ha="center", va="center", fontsize=11.5)
        axes.text(x, y - 4.7, writes, ha="center", va="center", fontsize=11.5)
        arrow((middle, y + step + 3.5 - 3.8), (x + (12 if x < middle else -12), y + 6.9))
    save(figure, "chunk")
    plt.close(figure)


def draw_memory() -> None:
    """Draws the planned bytes of a step in addition to inputs and gradients."""
    import matplotlib.pyplot as plt

    rows = [ROWS_OF_PAIR] * PAIRS
    shape = Shape(backend=triton, dim=DIM, vocab=VOCAB, dtype=torch.bfloat16, component_rows=rows)
    cases = {
        "bf16": shape,
        "float16": dataclasses.replace(shape, dtype=torch.float16),
        "float32": dataclasses.replace(shape, dtype=torch.float32),
        "bf16,\nfrozen head": dataclasses.replace(shape, needs_dweight=False),
        "bf16, 70B’s head\n(D 8192)": dataclasses.replace(shape, dim=8192),
        "the same on\n8 ranks, each": dataclasses.replace(shape, dim=8192, num_ranks=8),
    }
    plans = {name: fused.plan(case) for name, case in cases.items()}
    figure, axes = plt.subplots(figsize=(12.5, 6))
    bottom = np.zeros(len(plans))
    for colour, part in zip(COLOURS, next(iter(plans.values())).bytes, strict=True):
        heights = np.array([plan.bytes[part] / 2**20 for plan in plans.values()])
        axes.bar(list(plans), heights, 0.62, bottom=bottom, color=colour, edgecolor="white", label=part)
        bottom += heights
    for x, plan in enumerate(plans.values()):
        counts = (
            "+".join(map(str, plan.chunks)) if len(set(plan.chunks)) > 1 else f"{len(plan.chunks)} × {plan.chunks[0]}"
        )
        axes.text(x, bottom[x] + 25, f"{bottom[x]:,.0f} MiB\n{counts} rows", ha="center", va="bottom", fontsize=11)
    axes.axhline(2048, color=INK, linewidth=1.8)
    axes.text(5.42, 2062, "2 GiB", ha="right", va="bottom", weight="bold")
    axes.axhline(1920, color=INK, linewidth=1.2, linestyle="--")
    axes.text(5.42, 1908, "budget, 1920 MiB", ha="right", va="top")
    axes.set(ylim=(0, 2300), xlim=(-0.5, 5.5), ylabel="MiB beside inputs and gradients")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    save(figure, "memory")
    plt.close(figure)


def draw_sum() -> None:
    """Draws the 24-bit sum of dweight: its bits and its cost."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure, (layout, bars) = plt.subplots(2, 1, figsize=(12.5, 6.4), height_ratios=(1, 1))
    kinds = [("sign", 1, COLOURS[4]), ("exponent", 8, COLOURS[3]), ("mantissa", 23, COLOURS[1])]
    layout.set(xlim=(-0.5, 32.5), ylim=(-1.5, 2.6))
    layout.axis("off")
    x = 0
    for name, count, colour in kinds:
        for bit in range(count):
            is_kept = x + bit < 24
            layout.add_patch(
                Rectangle(
                    (x + bit, 0),
                    1,
                    1,
                    facecolor=colour if is_kept else "white",
                    edgecolor=INK,
                    hatch=None if is_kept else "////",
                    linewidth=1,
                )
            )
            layout.text(x + bit + 0.5, 1.12, str(31 - x - bit), ha="center", va="bottom", fontsize=9)
        layout.text(
            x + count / 2, 1.75, f"{name}, {count}" if count > 1 else name, ha="center", va="bottom", weight="bold"
        )
        x += count
    for start, end, text in (
        (0, 16, "total_VD: the memory of the result, read as bf16"),
        (16, 24, "rest_VD: uint8"),
        (24, 32, "rounded away, to even"),
    ):
        layout.annotate("", (start + 0.1, -0.25), (end - 0.1, -0.25), arrowprops={"arrowstyle": "<->", "color": INK})
        layout.text((start + end) / 2, -0.45, text, ha="center", va="top")
    names, values, colours = [], [], []
    for num_chunks in (4, 8):
        for name, value in gradient_errors(num_chunks).items():
            if name.startswith("dweight"):
                kept = name.split("summed in ")[1].removesuffix(", bf16")
                names.append(f"{num_chunks} chunks, {kept}")
                values.append(1e3 * value)
                colours.append({"32 bits": COLOURS[6], "24 bits": COLOURS[0], "16 bits": COLOURS[5]}[kept])
    bars.barh(names, values, 0.65, color=colours)
    for i, value in enumerate(values):
        bars.text(value + 0.03, i, f"{value:.3f}", va="center")
    bars.invert_yaxis()
    bars.set(xlabel="error of dweight against float64, emulated, 10⁻³ (relative, Frobenius)", xlim=(0, 5))
    bars.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(h_pad=1.5)
    save(figure, "sum24")
    plt.close(figure)


def draw_times(card: Card) -> None:
    """Draws the expected time of every case relative to its floor."""
    import matplotlib.pyplot as plt

    parts = {
        "reference": "reference",
        "policy, with exponentials": "policy",
        "dhidden": "dhidden by",
        "dweight": "dweight",
        "all other kernels, check on the host": "",
    }
    figure, axes = plt.subplots(figsize=(12.5, 5.6))
    for y, step in enumerate(STEPS):
        left, floor, rest = 0.0, step.floor_ms(card), expected(card, step)
        for colour, (label, prefix) in zip([*COLOURS[:4], COLOURS[6]], parts.items(), strict=True):
            mine = [w for w in rest if w.name.startswith(prefix)]
            rest = [w for w in rest if w not in mine]
            middle = sum(w.low_ms + w.high_ms for w in mine) / 2 / floor
            axes.barh(y, middle, 0.6, left=left, color=colour, edgecolor="white", label=label if y == 0 else None)
            left += middle
        low, high = ratio(card, step)
        axes.plot([low, high], [y, y], color=INK, linewidth=2, marker="|", markersize=13, markeredgewidth=2)
        axes.text(1.94, y, f"{low:.2f}–{high:.2f}", ha="right", va="center", weight="bold")
    axes.axvline(1, color=INK, linewidth=1.6)
    axes.axvline(GOAL, color=INK, linewidth=1.2, linestyle="--")
    axes.text(0.99, -0.55, "floor", ha="right", va="bottom")
    axes.text(GOAL + 0.01, -0.55, "goal", va="bottom")
    names = [step.name.replace(", half", ",\nhalf") for step in STEPS]
    axes.set_yticks(
        range(len(STEPS)),
        [f"{name}\nfloor {step.floor_ms(card):,.1f} ms" for name, step in zip(names, STEPS, strict=True)],
    )
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.95), ylim=(len(STEPS) - 0.5, -0.95))
    axes.set_xlabel(f"expected time over the floor, {card.name}, by computation: bars are the middle, lines the range")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=3, frameon=False)
    save(figure, "times")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="H200", choices=list(CARDS))
    parser.add_argument("--emulate", action="store_true", help="rounding errors instead of times")
    parser.add_argument("--draw", action="store_true", help="the pictures of docs/kernels.md instead of tables")
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    if arguments.emulate:
        print_emulation()
    elif arguments.draw:
        draw(card)
    else:
        print(f"Expected, by computation; nothing was measured. Goal: {GOAL} times the floor.")
        print_summary(card)
        print_slower_tiles(card)
        for step in STEPS:
            print_step(card, step)


if __name__ == "__main__":
    main()

"""Times the candidate tiles of a head on this device and writes the fastest into the cache file of ``tiles.py``."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from tso_fast.kernels import linear_logprob as forward
from tso_fast.kernels import linear_logprob_backward as backward
from tso_fast.kernels import tiles as table
from tso_fast.kernels.blocks import INTERPRETED, capability
from tso_fast.kernels.tiles import CANDIDATES, CUBLAS, Tile

logger = logging.getLogger(__name__)

CUBLAS_GAIN_MS = 0.5
"""Time torch's product must save to be chosen over tiles, since a row's bits then no longer depend on the row alone."""

Step = Callable[[Tile | None], object]


def steps(D: int, V: int, dtype: torch.dtype, device: torch.device, rows: int) -> Iterator[tuple[str, Step]]:
    """(name, step) of each product of a chunk of ``rows`` rows on random data; a step is a function of the tile."""
    hidden_TD = torch.randn(rows, D, dtype=dtype, device=device)
    weight_VD = torch.randn(V, D, dtype=dtype, device=device) * D**-0.5
    row_T = torch.zeros(rows, device=device)
    head: dict[str, Any] = {"softcap": None, "temperature": 1.0}
    widest = max(tile.cols for tile in candidates("logits", D, dtype, device) if tile is not None)
    room = torch.rand(rows * triton.cdiv(V, widest) * widest, dtype=dtype, device=device)
    yield (
        "logits",
        lambda tile: forward.exponentials(
            hidden_TD, weight_VD, None, row_T, row_T.clone(), room, **head, tile=_given(tile)
        ),
    )
    exp_TV = room.view(rows, -1)
    dhidden_TD = torch.empty_like(hidden_TD)
    yield "dhidden", lambda tile: backward.dhidden(exp_TV, weight_VD, row_T + 1, dhidden_TD, tile)
    yield "dhidden_skipping", lambda tile: backward.dhidden(exp_TV, weight_VD, row_T + 1, dhidden_TD, _given(tile))
    total_VD = torch.empty_like(weight_VD)
    rest_VD = None if dtype == torch.float32 else torch.empty_like(weight_VD, dtype=torch.uint8)

    def add(tile: Tile | None) -> None:
        blocks = torch.arange(triton.cdiv(rows, _given(tile).inner), dtype=torch.int32, device=device)
        active = blocks, blocks.new_full((), blocks.numel())
        backward.dweight(
            exp_TV, hidden_TD, None, active, total_VD, rest_VD, _given(tile), is_first=False, is_last=False
        )

    total_VD.zero_()
    if rest_VD is not None:
        rest_VD.zero_()
    yield "dweight", add


def _given(tile: Tile | None) -> Tile:
    assert tile is not None
    return tile


def candidates(product: str, D: int, dtype: torch.dtype, device: torch.device) -> list[Tile | None]:
    """Tiles to time for a product; only the table's default if there is no choice."""
    version = capability(device)
    known = CANDIDATES.get(table.architecture(version))
    if known is None or dtype == torch.float32 or D % 8:
        return [getattr(table.default_tiles(D, dtype, version), product)]
    if product == "dhidden_skipping":
        return [tile for tile in known["dhidden"] if tile is not None]
    return [tile for tile in known[product] if tile is not None or table.has_float32_product()]


def time_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call on a GPU; time of a single call in the interpreter."""
    if INTERPRETED:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    median: float = triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
    return median


def fastest(times: dict[Tile | None, float]) -> Tile | None:
    """The fastest tile; None, which is torch's product, only if it wins by ``CUBLAS_GAIN_MS``."""
    return min(times, key=lambda tile: times[tile] + (CUBLAS_GAIN_MS if tile is None else 0.0))


def autotune(D: int, V: int, dtype: torch.dtype, device: torch.device, *, rows: int = 4096) -> dict[str, Any]:
    """A head's entry for the cache file: the fastest tile of each product, and the time of each candidate in ms.

    It takes under a minute, mostly for compiling, and the memory of a chunk of ``rows`` rows and a second head.
    """
    entry: dict[str, Any] = {"rows": rows, "triton": triton.__version__, "torch": torch.__version__, "ms": {}}
    for product, step in steps(D, V, dtype, device, rows):
        times: dict[Tile | None, float] = {}
        for tile in candidates(product, D, dtype, device):
            try:
                times[tile] = time_ms(functools.partial(step, tile))
            except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError) as error:
                logger.warning("autotune: %s with %s left out: %s", product, tile, error)
        best = fastest(times)
        entry[product] = table.to_json(best)
        entry["ms"][product] = {CUBLAS if tile is None else "x".join(map(str, tile)): ms for tile, ms in times.items()}
    return entry


@functools.cache
def ensure(D: int, V: int, dtype: torch.dtype, device: torch.device) -> None:
    """Times a head unless a file already has it, and writes the cache file."""
    key = table.key_of(D, V, dtype, device)
    if any(key in table.read(file) for file in (table.cache_file(), table.SHIPPED)):
        return
    logger.info("autotune: timing the tiles of %s", key)
    table.write(table.cache_file(), key, autotune(D, V, dtype, device))
    table.tiles.cache_clear()

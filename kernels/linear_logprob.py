"""Log-probs of target tokens under a linear head, and their gradients, with no [T, V] matrix of logits in memory.

Letters: T tokens (rows), V vocabulary, D hidden. Of one row, with target y and upstream gradient g::

    x = softcap(h W^T + b) / temperature     L = logsumexp(x)     logprob = x[y] - L      float32, never rounded
    E = exp(x - k) (1 - tanh^2)              the one [T, V] buffer, in the dtype of the inputs
    v = -g exp(k - L) / temperature          E[y] = (p[y] - 1) exp(L - k) (1 - tanh^2)
    dh = v (E W)     dW = E^T (v h)     db = E^T v

The offset k is the target's logit, which costs 64 dot products per row, so the product needs no running maximum and its
exponentials are never rescaled. bf16 and float32 reach e^+-87, so E keeps full precision for every k within ``REACH``
of L. A row with a less likely target is flagged on the device and recomputed with its true maximum; blocks without such
a row return at once.
float16 lacks this range: there k is the exact L, from a separate pass, minus ``FLOAT16_SHIFT``.

Sums have a fixed order and one owner: no atomics. Tiles are chosen by D, V, dtype and device, never by T, so a
row's log-prob has the same bits alone and in a batch. Nothing here waits for the device.

The head's rows may be split over several ranks: maxima, sums and the target's logit are then exchanged by ``gather``,
and every rank continues with the same numbers.

This file is the forward pass; ``linear_logprob_backward.py`` computes the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from tso_fast.kernels.blocks import (
    capability,
    dot,
    has_tma_layout,
    load_tile,
    operand,
    round_to,
    tanh,
    tile_of,
    tma_fits,
)
from tso_fast.kernels.tiles import Tile, tiles, under_softcap

REACH = tl.constexpr(40.0)  # largest allowed distance of an offset from L, nats
CLAMP = tl.constexpr(80.0)  # e^80 is finite in bf16, and a row that reaches it is flagged
FLOAT16_SHIFT = 12 * math.log(2)  # E <= 2^12; normal down to p = 2^-26
REDO_TILES = 8  # vocabulary tiles per program of the second pass

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Function from this rank's tensor to those of all ranks, [ranks, *shape], in rank order and equal on all ranks."""

# ---------------------------------------------------------------------------------------------------- inside kernels


@triton.jit
def _logits(
    hidden, weight, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of h W^T + b; columns past V are not masked yet."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        h = load_tile(hidden, row, d, T, D, stride_hidden_t, BLOCK_T, BLOCK_D, USE_TMA)
        w = load_tile(weight, col, d, V, D, stride_weight_v, BLOCK_V, BLOCK_D, USE_TMA)
        acc = dot(h, w.T, acc)
    if bias_ptr is not None:
        offs_v = col + tl.arange(0, BLOCK_V)
        acc += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _mask_tail(x, col, V, BLOCK_V: tl.constexpr):
    """Sets columns past V to -inf, in a uniform branch, so that only the last tile executes the selects."""
    if col + BLOCK_V > V:
        x = tl.where((col + tl.arange(0, BLOCK_V) < V)[None, :], x, float("-inf"))
    return x


@triton.jit
def _activated(z, softcap, inv_temperature):
    """(u, c) with x = c u: u is z, or tanh(z / softcap) with a softcap. E's factor needs u, not only x."""
    if softcap is not None:
        return tanh(z / softcap), softcap * inv_temperature
    else:
        return z, inv_temperature


@triton.jit
def _exponentials(z, offset_t, col, V, softcap, inv_temperature, BLOCK_V: tl.constexpr):
    """Row maxima of x, row sums of exp(x - k), and the entries of E, for one tile.

    x is recomputed from u where it is needed: keeping both would take the registers of a second program.
    """
    u, c = _activated(z, softcap, inv_temperature)
    u = _mask_tail(u, col, V, BLOCK_V)
    e = tl.exp(tl.minimum(c * u - offset_t[:, None], CLAMP, propagate_nan=tl.PropagateNan.ALL))
    sum_t = tl.sum(e, 1)  # before rounding
    if softcap is not None:
        capped = tl.maximum(u, -1.0)  # u is -inf past V, where e is 0
        e *= (1.0 - capped) * (1.0 + capped)
    return c * tl.max(u, 1), sum_t, e


# ----------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["T"])
def target_logit_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, target_logit_ptr, slope_ptr,
    T, D,
    stride_hidden_t, stride_weight_v,
    softcap, inv_temperature,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[y] of BLOCK_T rows, 0 for a target of -1, and its 1 - tanh^2: the diagonal of their product with the rows W[y].

    It uses the same instruction as the logits, because tensor cores round toward zero when they add: an exact x[y]
    against an inexact sum over the vocabulary would make a confident token's log-prob wrong by 1e-4. Picking x[y] out
    of the product's tiles would cost a compare and an add per element, and spills.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    target = tl.load(targets_ptr + offs_t, mask=mask_t, other=-1).to(tl.int64)
    is_here = target >= 0
    rows_h = hidden_ptr + offs_t.to(tl.int64)[:, None] * stride_hidden_t
    rows_w = weight_ptr + target[:, None] * stride_weight_v
    acc = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = is_here[:, None] & (offs_d < D)[None, :]
        h = tl.load(rows_h + offs_d[None, :], mask=mask, other=0.0)
        w = tl.load(rows_w + offs_d[None, :], mask=mask, other=0.0)
        acc = dot(h, w.T, acc)
    is_diagonal = tl.arange(0, BLOCK_T)[:, None] == tl.arange(0, BLOCK_T)[None, :]
    z = tl.sum(tl.where(is_diagonal, acc, 0.0), 1)
    visible = z - z  # an infinite hidden state stays visible behind a softcap
    if bias_ptr is not None:
        z += tl.load(bias_ptr + target, mask=is_here, other=0.0).to(tl.float32)
    u, c = _activated(z, softcap, inv_temperature)
    tl.store(target_logit_ptr + offs_t, c * u + visible, mask=mask_t)
    if softcap is not None:
        tl.store(slope_ptr + offs_t, (1.0 - u) * (1.0 + u), mask=mask_t)


@triton.jit(do_not_specialize=["T"])
def sumexp_kernel(
    hidden, weight, bias_ptr, max_ptr, sum_ptr,
    T, V, D,
    stride_hidden_t, stride_weight_v,
    softcap, inv_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Maximum of x and sum of exp(x - maximum) for each row of one tile, [V tiles, T]; stores nothing else."""
    pid_t, pid_v = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    row, col = pid_t * BLOCK_T, pid_v * BLOCK_V
    z = _logits(hidden, weight, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
                BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA)  # fmt: skip
    u, c = _activated(z, softcap, inv_temperature)
    x = _mask_tail(c * u, col, V, BLOCK_V)
    max_t = tl.max(x, 1)
    finite_t = tl.where(max_t == float("-inf"), 0.0, max_t)  # a bias of -inf may mask out a whole tile
    sum_t = tl.sum(tl.exp(x - finite_t[:, None]), 1)
    offs_t = row + tl.arange(0, BLOCK_T)
    out = pid_v.to(tl.int64) * T + offs_t
    tl.store(max_ptr + out, max_t, mask=offs_t < T)
    tl.store(sum_ptr + out, sum_t, mask=offs_t < T)


@triton.jit(do_not_specialize=["T"])
def exp_kernel(
    hidden, weight, bias_ptr, offset_ptr, exp, max_ptr, sum_ptr,
    T, V, D,
    stride_hidden_t, stride_weight_v, stride_exp_t,
    softcap, inv_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of E with k = offset, and per row the maximum of x and the sum of exp(x - k), [V tiles, T].

    Each program does one tile: a loop over several would hold the store's staging buffer in addition to those of the
    loads, which costs a stage. E's rows are padded to whole tiles, since a column mask would make the stores scalar.
    """
    pid_t, pid_v = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    row, col = pid_t * BLOCK_T, pid_v * BLOCK_V
    offs_t = row + tl.arange(0, BLOCK_T)
    offset_t = tl.load(offset_ptr + offs_t, mask=offs_t < T, other=0.0)
    z = _logits(hidden, weight, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
                BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA)  # fmt: skip
    max_t, sum_t, e = _exponentials(z, offset_t, col, V, softcap, inv_temperature, BLOCK_V)
    if USE_TMA:
        exp.store([row, col], round_to(e, exp.dtype))
    else:
        offs = offs_t.to(tl.int64)[:, None] * stride_exp_t + (col + tl.arange(0, BLOCK_V))[None, :]
        tl.store(exp + offs, round_to(e, exp.dtype.element_ty), mask=(offs_t < T)[:, None])
    out = pid_v.to(tl.int64) * T + offs_t
    tl.store(max_ptr + out, max_t, mask=offs_t < T)
    tl.store(sum_ptr + out, sum_t, mask=offs_t < T)


@triton.jit(do_not_specialize=["T"])
def redo_kernel(
    hidden_ptr, weight_ptr, bias_ptr, offset_ptr, flag_ptr, exp_ptr, sum_ptr,
    T, V, D,
    stride_hidden_t, stride_weight_v, stride_exp_t,
    softcap, inv_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``exp_kernel`` for flagged rows only, whose offset is now their maximum; TILES tiles per program."""
    row = tl.program_id(0) * BLOCK_T
    offs_t = row + tl.arange(0, BLOCK_T)
    is_flagged = tl.load(flag_ptr + offs_t, mask=offs_t < T, other=0) != 0
    if tl.max(is_flagged.to(tl.int32), 0) != 0:
        offset_t = tl.load(offset_ptr + offs_t, mask=offs_t < T, other=0.0)
        first = tl.program_id(1) * TILES
        sums = sum_ptr + first.to(tl.int64) * T + offs_t
        for tile in range(first, tl.minimum(first + TILES, tl.cdiv(V, BLOCK_V))):
            col = tile * BLOCK_V
            z = _logits(hidden_ptr, weight_ptr, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
                        BLOCK_T, BLOCK_V, BLOCK_D, False)  # fmt: skip
            _, sum_t, e = _exponentials(z, offset_t, col, V, softcap, inv_temperature, BLOCK_V)
            offs = offs_t.to(tl.int64)[:, None] * stride_exp_t + (col + tl.arange(0, BLOCK_V))[None, :]
            tl.store(exp_ptr + offs, round_to(e, exp_ptr.dtype.element_ty), mask=is_flagged[:, None])
            tl.store(sums, sum_t, mask=is_flagged)
            sums += T


@triton.jit(do_not_specialize=["T"])
def reduce_tiles_kernel(
    max_ptr, sum_ptr, flag_ptr, out_ptr,
    T, num_tiles,
    IS_RELATIVE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of every row over its tiles, in order, [2, T]; IS_RELATIVE: sums are relative to the maxima.

    With flags, only blocks that contain a flagged row are computed; they overwrite ``out_ptr``.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    is_due = mask_t
    if flag_ptr is not None:
        is_due = tl.load(flag_ptr + offs_t, mask=mask_t, other=0) != 0
    if tl.max(is_due.to(tl.int32), 0) != 0:
        largest = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
        for n in range(0, num_tiles, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask = (offs_n < num_tiles)[:, None] & mask_t[None, :]
            offs = offs_n.to(tl.int64)[:, None] * T + offs_t[None, :]
            largest = tl.maximum(largest, tl.load(max_ptr + offs, mask=mask, other=float("-inf")))
        max_t = tl.max(largest, 0)
        finite_t = tl.where(max_t == float("-inf"), 0.0, max_t)  # a bias may mask out all classes of these rows
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for n in range(0, num_tiles, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask = (offs_n < num_tiles)[:, None] & mask_t[None, :]
            offs = offs_n.to(tl.int64)[:, None] * T + offs_t[None, :]
            sums = tl.load(sum_ptr + offs, mask=mask, other=0.0)
            if IS_RELATIVE:
                sums *= tl.exp(tl.load(max_ptr + offs, mask=mask, other=float("-inf")) - finite_t[None, :])
            acc += sums
        tl.store(out_ptr + offs_t, max_t, mask=mask_t)
        tl.store(out_ptr + T + offs_t, tl.sum(acc, 0), mask=mask_t)


@triton.jit(do_not_specialize=["T"])
def finish_rows_kernel(
    partial_ptr, offset_ptr, flag_ptr, target_logit_ptr, lse_ptr, logprob_ptr, sumexp_ptr,
    T, num_ranks,
    ONLY_FLAGGED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Turns the maxima and sums of all ranks, [ranks, 2, T], into L and the log-prob.

    Without offsets, a rank's sums are relative to its maxima. With offsets, a row whose L is further than REACH from
    its offset is flagged, and its maximum becomes the new offset; ONLY_FLAGGED finishes such rows after the second
    pass.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    is_due = mask_t
    if ONLY_FLAGGED:
        is_due = tl.load(flag_ptr + offs_t, mask=mask_t, other=0) != 0
    max_t = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for rank in range(num_ranks):
        max_t = tl.maximum(max_t, tl.load(partial_ptr + rank * 2 * T + offs_t, mask=mask_t, other=0.0))
    if offset_ptr is None:
        k = max_t
    else:
        k = tl.load(offset_ptr + offs_t, mask=mask_t, other=0.0)
    sumexp = tl.zeros((BLOCK_T,), tl.float32)
    for rank in range(num_ranks):
        sums = tl.load(partial_ptr + (rank * 2 + 1) * T + offs_t, mask=mask_t, other=1.0)
        if offset_ptr is None:
            sums *= tl.exp(tl.load(partial_ptr + rank * 2 * T + offs_t, mask=mask_t, other=0.0) - k)
        sumexp += sums
    log_sum = tl.log(sumexp)
    tl.store(lse_ptr + offs_t, k + log_sum, mask=is_due)
    # Not target_logit - lse, which rounds where they are large; and a log-prob is never above 0.
    logprob = tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0) - k - log_sum
    tl.store(logprob_ptr + offs_t, tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=is_due)
    if offset_ptr is not None:
        tl.store(sumexp_ptr + offs_t, sumexp, mask=is_due)
    if offset_ptr is not None and not ONLY_FLAGGED:
        is_flagged = mask_t & ~(tl.abs(log_sum) <= REACH)  # also flags NaN and infinity
        tl.store(flag_ptr + offs_t, is_flagged.to(tl.int32), mask=mask_t)
        tl.store(offset_ptr + offs_t, max_t, mask=is_flagged)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """State of T rows for the backward pass."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    targets_T: torch.Tensor
    """Rows of ``weight_VD``; -1 if another rank has the target."""
    exp_TV: torch.Tensor
    """E before its target entries are set; rows are padded to whole tiles, zero past V."""
    offset_T: torch.Tensor
    sumexp_T: torch.Tensor
    """Sum of exp(x - k), which is exp(L - k) without the rounding of L."""
    target_logit_T: torch.Tensor
    slope_T: torch.Tensor | None
    """1 - tanh^2 of the target's logit; None: no softcap."""
    temperature: float


def padded_vocab(D: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Maximum number of columns of ``Saved.exp_TV``."""
    block = tiles(D, V, dtype, device).logits.cols
    return triton.cdiv(V, block) * block


def target_logits(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x[y] of every row, [T] float32, and with a softcap its 1 - tanh^2."""
    T, D = hidden_TD.shape
    out_T = hidden_TD.new_empty(T, dtype=torch.float32)
    slope_T = None if softcap is None else torch.empty_like(out_T)
    rows, inner = (32, 16) if hidden_TD.dtype == torch.float32 else (64, 64 if D % 8 == 0 else 32)
    target_logit_kernel[(triton.cdiv(T, rows),)](
        hidden_TD, weight_VD, bias_V, targets_T, out_T, slope_T,
        T, D,
        hidden_TD.stride(0), weight_VD.stride(0),
        softcap, 1 / temperature,
        BLOCK_T=rows, BLOCK_D=inner, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return out_T, slope_T


class _Rows:
    """Partial maxima and sums of every row over the tiles of a product, and the log-probs computed from them."""

    def __init__(self, T: int, num_tiles: int, target_logit_T: torch.Tensor, gather: Gather | None) -> None:
        self.partials = [target_logit_T.new_empty(num_tiles, T) for _ in range(2)]  # maxima and sums
        self.reduced_2T = target_logit_T.new_empty(2, T)
        self.target_logit_T, self.gather = target_logit_T, gather
        self.lse_T, self.logprob_T, self.sumexp_T = (torch.empty_like(target_logit_T) for _ in range(3))
        self.flag_T = torch.empty_like(target_logit_T, dtype=torch.int32)

    def finish(self, offset_T: torch.Tensor | None = None, only_flagged: bool = False) -> None:
        """Computes the log-probs and L or sums from the partial maxima and sums."""
        num_tiles, T = self.partials[0].shape
        grid = (triton.cdiv(T, 32),)
        reduce_tiles_kernel[grid](
            *self.partials, self.flag_T if only_flagged else None, self.reduced_2T,
            T, num_tiles,
            IS_RELATIVE=offset_T is None, BLOCK_T=32, BLOCK_N=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        ranks_R2T = self.reduced_2T[None] if self.gather is None else self.gather(self.reduced_2T)
        is_kept = offset_T is not None
        finish_rows_kernel[grid](
            ranks_R2T, offset_T, self.flag_T if is_kept else None, self.target_logit_T, self.lse_T, self.logprob_T,
            self.sumexp_T if is_kept else None,
            T, ranks_R2T.shape[0],
            ONLY_FLAGGED=only_flagged, BLOCK_T=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def logsumexp(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_logit_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    tile: Tile,
    gather: Gather | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logprob [T] and lse [T], computed with exact maxima; stores no exponentials."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    rows = _Rows(T, triton.cdiv(V, tile.cols), target_logit_T, gather)
    use_tma = tma_fits(hidden_TD, weight_VD)
    sumexp_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(V, tile.cols),)](
        operand(hidden_TD, (tile.rows, tile.inner), use_tma),
        operand(weight_VD, (tile.cols, tile.inner), use_tma),
        bias_V, *rows.partials,
        T, V, D,
        hidden_TD.stride(0), weight_VD.stride(0),
        softcap, 1 / temperature,
        BLOCK_T=tile.rows, BLOCK_V=tile.cols, BLOCK_D=tile.inner, GROUP=tile.group, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    rows.finish()
    return rows.logprob_T, rows.lse_T


def exponentials(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_logit_T: torch.Tensor,
    offset_T: torch.Tensor,
    room: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    tile: Tile,
    gather: Gather | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprob and sum of exp(x - k), both [T], and E [T, padded V]; corrects ``offset_T`` where it was out of reach."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    num_tiles = triton.cdiv(V, tile.cols)
    exp_TV = room[: T * num_tiles * tile.cols].view(T, -1)
    rows = _Rows(T, num_tiles, target_logit_T, gather)
    use_tma = tma_fits(hidden_TD, weight_VD, exp_TV)
    numbers = (T, V, D, hidden_TD.stride(0), weight_VD.stride(0), exp_TV.stride(0), softcap, 1 / temperature)
    exp_kernel[(triton.cdiv(T, tile.rows) * num_tiles,)](
        operand(hidden_TD, (tile.rows, tile.inner), use_tma),
        operand(weight_VD, (tile.cols, tile.inner), use_tma),
        bias_V, offset_T,
        operand(exp_TV, (tile.rows, tile.cols), use_tma),
        *rows.partials, *numbers,
        BLOCK_T=tile.rows, BLOCK_V=tile.cols, BLOCK_D=tile.inner, GROUP=tile.group, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    rows.finish(offset_T)
    redo = tile._replace(rows=min(tile.rows, 64), num_stages=min(tile.num_stages, 2))
    redo_kernel[(triton.cdiv(T, redo.rows), triton.cdiv(num_tiles, REDO_TILES))](
        hidden_TD, weight_VD, bias_V, offset_T, rows.flag_T, exp_TV, rows.partials[1],
        *numbers,
        BLOCK_T=redo.rows, BLOCK_V=redo.cols, BLOCK_D=redo.inner, TILES=REDO_TILES,
        num_warps=redo.num_warps, num_stages=redo.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    rows.finish(offset_T, only_flagged=True)
    return rows.logprob_T, rows.sumexp_T, exp_TV


def linear_logprob_forward(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    room: torch.Tensor | None,
    gather: Gather | None = None,
) -> tuple[torch.Tensor, Saved | None]:
    """Log-probs of the targets.

    Args:
        hidden_TD: [T, D] float16, bfloat16 or float32, T > 0.
        weight_VD: [V, D], same dtype.
        bias_V: [V] of any float dtype, or None.
        targets_T: [T] int64 or int32 in [0, V); with ``gather``, -1 if the target is a row of another rank's weight.
        room: [T * ``padded_vocab``] or more in the dtype of hidden, where E is kept for ``linear_logprob_backward``;
            None: E is not kept.
        gather: exchanges statistics of rows among the ranks that share the head; None: this rank has all of it.

    Returns:
        logprob [T] float32 and, with ``room``, the state for the backward pass. A row that is not finite gives a
        log-prob that is not finite.
    """
    hidden_TD, weight_VD, targets_T = _aligned(hidden_TD), _aligned(weight_VD), targets_T.contiguous()
    bias_V = None if bias_V is None else bias_V.contiguous()
    V, D = weight_VD.shape
    tile = tiles(D, V, hidden_TD.dtype, hidden_TD.device).logits
    if softcap is not None:
        tile = under_softcap(tile, capability(hidden_TD.device))
    head: dict[str, Any] = {"softcap": softcap, "temperature": temperature}
    options: dict[str, Any] = head | {"tile": tile, "gather": gather}
    target_logit_T, slope_T = target_logits(hidden_TD, weight_VD, bias_V, targets_T, **head)
    if gather is not None:
        target_logit_T = gather(target_logit_T).sum(0)  # it is 0 on all ranks but one
    if room is None:
        return logsumexp(hidden_TD, weight_VD, bias_V, target_logit_T, **options)[0], None
    if hidden_TD.dtype == torch.float16:
        offset_T = logsumexp(hidden_TD, weight_VD, bias_V, target_logit_T, **options)[1] - FLOAT16_SHIFT
    else:
        offset_T = target_logit_T.clone()
    logprob_T, sumexp_T, exp_TV = exponentials(hidden_TD, weight_VD, bias_V, target_logit_T, offset_T, room, **options)
    saved = Saved(
        hidden_TD=hidden_TD,
        weight_VD=weight_VD,
        targets_T=targets_T,
        exp_TV=exp_TV,
        offset_T=offset_T,
        sumexp_T=sumexp_T,
        target_logit_T=target_logit_T,
        slope_T=slope_T,
        temperature=temperature,
    )
    return logprob_T, saved


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """A copy if TMA can fetch the copy but not the matrix, so that D alone decides how tiles are fetched."""
    has_good_copy = matrix.shape[1] * matrix.itemsize % 16 == 0
    if has_tma_layout(matrix) or (matrix.stride(1) == 1 and not has_good_copy):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)

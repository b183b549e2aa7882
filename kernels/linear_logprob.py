"""Log-probs of target tokens under a linear head, and their gradients, with no [T, V] matrix of logits in memory.

Letters: T tokens (rows), V vocabulary, D hidden. Of one row, with target y and upstream gradient g::

    x = softcap(h W^T + b) / temperature     L = logsumexp(x)     logprob = x[y] - L      float32, never rounded
    E = exp(x - k) (1 - tanh^2)              the one [T, V] buffer, in the dtype of the inputs
    v = -g exp(k - L) / temperature          E[y] = (p[y] - 1) exp(L - k) (1 - tanh^2)
    dh = v (E W)     dW = E^T (v h)     db = E^T v

The offset k is the target's logit, which costs one dot product a row, so the product needs no running maximum and its
exponentials are never rescaled. bf16 and float32 reach e^+-87: every k within ``REACH`` of L keeps the full precision
of E. A row whose target is less likely than that is flagged on the device and done again with its true maximum; blocks
without such a row leave at once.
float16 has no such range: there k is the exact L, from a pass of its own, less ``FLOAT16_SHIFT``.

Sums have a fixed order and one owner: no atomics. Tiles are chosen by D, V, dtype and architecture, never by T, so a
row has the same bits alone and in a batch. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# The interpreter (seen in 3.6 and 3.9) multiplies the bit patterns of bf16 operands and truncates float32 to bf16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
REACH = tl.constexpr(40.0)  # nats that an offset may be wrong by
CLAMP = tl.constexpr(80.0)  # e^80 is finite in bf16, and a row that has one is flagged
FLOAT16_SHIFT = 12 * math.log(2)  # E <= 2^12; normal down to p = 2^-26
GROUP = 16  # row tiles that run side by side: a wave then touches a near-square patch, which stays in L2
REDO_TILES = 8  # vocabulary tiles that one program of the second pass walks


class Tile(NamedTuple):
    """Shape and schedule of one matrix product [rows, inner] x [inner, cols]."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    logits: Tile
    """T x V over D"""
    dhidden: Tile
    """T x D over V"""
    dweight: Tile
    """V x D over T"""


def _default_tiles(D: int, dtype: torch.dtype, capability: tuple[int, int], has_softcap: bool) -> Tiles:
    """Tiles that fit shared memory and registers, with no spills (tests/test_kernels.py compiles them)."""
    if capability == (0, 0):  # interpreter: small enough that small shapes have several
        return Tiles(Tile(16, 64, 32, 4, 1), Tile(32, 32, 32, 4, 1), Tile(32, 32, 16, 4, 1))
    if dtype == torch.float32:  # no tensor cores: input_precision="ieee"
        return Tiles(*[Tile(64, 64, 16, 8, 2)] * 3)
    if capability not in _DATACENTER:  # 99 KB of shared memory
        return Tiles(*[Tile(128, 128, 32, 8, 3)] * 3)
    small, large = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 4)
    if capability[0] == 8 or D < 2048 or D % 8:  # two programs a multiprocessor; element loads, which take registers
        return Tiles(small, small, small)
    return Tiles(small if has_softcap else large, large, large)


_DATACENTER = [(8, 0), (8, 7), (9, 0), (10, 0), (10, 1), (10, 3), (11, 0)]
# Timed by `autotune`.
_CANDIDATES = [Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3)]


@functools.cache
def tiles(D: int, V: int, dtype: torch.dtype, device: torch.device, has_softcap: bool) -> Tiles:
    """The tiles of a head, decided once a process. ``TSO_FAST_AUTOTUNE=1`` times candidates on first use."""
    capability = _capability(device)
    default = _default_tiles(D, dtype, capability, has_softcap)
    can_choose = capability in _DATACENTER and capability[0] >= 9 and dtype != torch.float32 and D % 8 == 0
    if os.environ.get("TSO_FAST_AUTOTUNE") != "1" or not can_choose:
        return default
    best = autotune(D, V, dtype, device)
    return best._replace(logits=default.logits) if has_softcap else best


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _tma_fits(*matrices: torch.Tensor) -> bool:
    """Whether the copy engine of Hopper and later can fetch tiles of these; other tiles go by pointers."""
    return all(
        _capability(x.device)[0] in (0, 9, 10, 11, 12)
        and x.numel() > 0
        and x.stride(1) == 1
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.itemsize % 16 == 0
        for x in matrices
    )


def _operand(matrix: torch.Tensor, block: tuple[int, int], use_tma: bool) -> torch.Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, list(block)) if use_tma else matrix


# ---------------------------------------------------------------------------------------------------- inside kernels


@triton.jit
def _tile_of(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles for each column tile, then the next."""
    per_group = GROUP * num_cols
    first = pid // per_group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def _load_tile(
    matrix, row, col, num_rows, num_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, USE_TMA: tl.constexpr
):
    """[ROWS, COLS] from (row, col) on, zero outside the matrix, which is a descriptor or a pointer."""
    if USE_TMA:
        tile = matrix.load([row, col])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = col + tl.arange(0, COLS)
        mask = (offs_r < num_rows)[:, None] & (offs_c < num_cols)[None, :]
        tile = tl.load(matrix + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _tanh(x):
    """libdevice's is not in the interpreter. Below 1/4 a series, exact to float32, as the difference cancels near 0."""
    u = tl.exp(-2.0 * tl.abs(x))
    tail = 1.0 - 2.0 * u / (1.0 + u)
    q = x * x
    series = x * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -tail, tail))


@triton.jit
def _logits(
    hidden, weight, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of h W^T + b; what lies past V is not masked yet."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        h = _load_tile(hidden, row, d, T, D, stride_hidden_t, BLOCK_T, BLOCK_D, USE_TMA)
        w = _load_tile(weight, col, d, V, D, stride_weight_v, BLOCK_V, BLOCK_D, USE_TMA)
        acc = _dot(h, w.T, acc)
    if bias_ptr is not None:
        offs_v = col + tl.arange(0, BLOCK_V)
        acc += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _mask_tail(x, col, V, BLOCK_V: tl.constexpr):
    """-inf past V, under a branch that is uniform, so that all tiles but the last skip the selects."""
    if col + BLOCK_V > V:
        x = tl.where((col + tl.arange(0, BLOCK_V) < V)[None, :], x, float("-inf"))
    return x


@triton.jit
def _exponentials(z, offset_t, col, V, softcap, inv_temperature, BLOCK_V: tl.constexpr):
    """Of one tile: row maxima of x, row sums of exp(x - k), and what is stored."""
    if softcap is not None:
        tanh = _tanh(z / softcap)
        z = softcap * tanh
    x = _mask_tail(z * inv_temperature, col, V, BLOCK_V)
    max_t = tl.max(x, 1)
    e = tl.exp(tl.minimum(x - offset_t[:, None], CLAMP, propagate_nan=tl.PropagateNan.ALL))
    sum_t = tl.sum(e, 1)  # of the unrounded ones
    if softcap is not None:
        e *= (1.0 - tanh) * (1.0 + tanh)
    return max_t, sum_t, e


# ----------------------------------------------------------------------------------------------------------- forward


@triton.jit
def target_logit_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, target_logit_ptr,
    D,
    stride_hidden_t, stride_weight_v,
    softcap, inv_temperature,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[y] of one row. Picked out of the product's tiles it would cost a compare and an add an element, and spills."""
    pid_t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + pid_t).to(tl.int64)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + pid_t * stride_hidden_t + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + target * stride_weight_v + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        acc += h * w
    dot = tl.sum(acc, 0)
    z = dot
    if bias_ptr is not None:
        z += tl.load(bias_ptr + target).to(tl.float32)
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    # dot - dot: an infinite hidden state stays visible behind a softcap.
    tl.store(target_logit_ptr + pid_t, z * inv_temperature + (dot - dot))


@triton.jit(do_not_specialize=["T"])
def sumexp_kernel(
    hidden, weight, bias_ptr, max_ptr, sum_ptr,
    T, V, D,
    stride_hidden_t, stride_weight_v,
    softcap, inv_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Per row of one tile: the maximum of x and the sum of exp(x - maximum), [V tiles, T]. Nothing else is kept."""
    pid_t, pid_v = _tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    row, col = pid_t * BLOCK_T, pid_v * BLOCK_V
    z = _logits(hidden, weight, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
                BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA)  # fmt: skip
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    x = _mask_tail(z * inv_temperature, col, V, BLOCK_V)
    max_t = tl.max(x, 1)
    finite_t = tl.where(max_t == float("-inf"), 0.0, max_t)  # a bias of -inf may rule out a whole tile
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

    One tile a program: a loop over several keeps the staging buffer of the store beside those of the loads, which
    costs a stage. E's rows are padded to whole tiles, as a column mask would make the stores scalar.
    """
    pid_t, pid_v = _tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    row, col = pid_t * BLOCK_T, pid_v * BLOCK_V
    offs_t = row + tl.arange(0, BLOCK_T)
    offset_t = tl.load(offset_ptr + offs_t, mask=offs_t < T, other=0.0)
    z = _logits(hidden, weight, bias_ptr, row, col, T, V, D, stride_hidden_t, stride_weight_v,
                BLOCK_T, BLOCK_V, BLOCK_D, USE_TMA)  # fmt: skip
    max_t, sum_t, e = _exponentials(z, offset_t, col, V, softcap, inv_temperature, BLOCK_V)
    if USE_TMA:
        exp.store([row, col], _round_to(e, exp.dtype))
    else:
        offs = offs_t.to(tl.int64)[:, None] * stride_exp_t + (col + tl.arange(0, BLOCK_V))[None, :]
        tl.store(exp + offs, _round_to(e, exp.dtype.element_ty), mask=(offs_t < T)[:, None])
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
    """``exp_kernel`` for flagged rows alone, whose offset has become their maximum; TILES tiles a program."""
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
            tl.store(exp_ptr + offs, _round_to(e, exp_ptr.dtype.element_ty), mask=is_flagged[:, None])
            tl.store(sums, sum_t, mask=is_flagged)
            sums += T


@triton.jit
def _max_over_tiles(max_ptr, offs_t, T, num_tiles, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    acc = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
    for n in range(0, num_tiles, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask = (offs_n < num_tiles)[:, None] & (offs_t < T)[None, :]
        offs = offs_n.to(tl.int64)[:, None] * T + offs_t[None, :]
        acc = tl.maximum(acc, tl.load(max_ptr + offs, mask=mask, other=float("-inf")))
    return tl.max(acc, 0)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    max_ptr, sum_ptr, offset_ptr, flag_ptr, target_logit_ptr, lse_ptr, logprob_ptr, sumexp_ptr,
    T, num_tiles,
    ONLY_FLAGGED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row sums of all tiles, in order, to L and the log-prob.

    Without offsets the sums of a tile are relative to its maxima. With them, a row further than REACH from its offset
    is flagged and its maximum becomes the new offset; once more with ONLY_FLAGGED when it has been done again.
    """
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    is_due = mask_t
    if ONLY_FLAGGED:
        is_due = tl.load(flag_ptr + offs_t, mask=mask_t, other=0) != 0
    if tl.max(is_due.to(tl.int32), 0) != 0:
        if offset_ptr is None:
            k = _max_over_tiles(max_ptr, offs_t, T, num_tiles, BLOCK_T, BLOCK_N)
            k = tl.where(mask_t, k, 0.0)  # not inf - inf in rows past T
        else:
            k = tl.load(offset_ptr + offs_t, mask=mask_t, other=0.0)
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for n in range(0, num_tiles, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask = (offs_n < num_tiles)[:, None] & mask_t[None, :]
            offs = offs_n.to(tl.int64)[:, None] * T + offs_t[None, :]
            sums = tl.load(sum_ptr + offs, mask=mask, other=0.0)
            if offset_ptr is None:
                sums *= tl.exp(tl.load(max_ptr + offs, mask=mask, other=float("-inf")) - k[None, :])
            acc += sums
        sumexp = tl.where(mask_t, tl.sum(acc, 0), 1.0)
        log_sum = tl.log(sumexp)
        tl.store(lse_ptr + offs_t, k + log_sum, mask=mask_t)
        # Not target_logit - lse, which rounds where they are large. The target's logit was summed in another order than
        # the product's; a log-prob is never above 0.
        logprob = tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0) - k - log_sum
        tl.store(logprob_ptr + offs_t, tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=mask_t)
        if offset_ptr is not None:
            tl.store(sumexp_ptr + offs_t, sumexp, mask=mask_t)
        if offset_ptr is not None and not ONLY_FLAGGED:
            is_flagged = mask_t & ~(tl.abs(log_sum) <= REACH)  # also what is not finite
            tl.store(flag_ptr + offs_t, is_flagged.to(tl.int32), mask=mask_t)
            if tl.max(is_flagged.to(tl.int32), 0) != 0:
                k = _max_over_tiles(max_ptr, offs_t, T, num_tiles, BLOCK_T, BLOCK_N)
                tl.store(offset_ptr + offs_t, k, mask=is_flagged)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What the backward pass of T rows needs."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    targets_T: torch.Tensor
    exp_TV: torch.Tensor
    """E before its target entries are set; rows padded to whole tiles, zero past V"""
    offset_T: torch.Tensor
    sumexp_T: torch.Tensor
    """sum of exp(x - k) = exp(L - k), without the rounding of L"""
    target_logit_T: torch.Tensor
    softcap: float | None
    temperature: float


def padded_vocab(D: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """Columns of ``Saved.exp_TV``, at most."""
    block = tiles(D, V, dtype, device, False).logits.cols
    return triton.cdiv(V, block) * block


def target_logits(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
) -> torch.Tensor:
    """x[y] of every row, [T] float32."""
    T, D = hidden_TD.shape
    out_T = hidden_TD.new_empty(T, dtype=torch.float32)
    target_logit_kernel[(T,)](
        hidden_TD, weight_VD, bias_V, targets_T, out_T,
        D,
        hidden_TD.stride(0), weight_VD.stride(0),
        softcap, 1 / temperature,
        BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out_T


def _combine(
    partials: tuple[torch.Tensor, torch.Tensor],
    target_logit_T: torch.Tensor,
    lse_T: torch.Tensor,
    logprob_T: torch.Tensor,
    offset_T: torch.Tensor | None = None,
    flag_T: torch.Tensor | None = None,
    sumexp_T: torch.Tensor | None = None,
    only_flagged: bool = False,
) -> None:
    num_tiles, T = partials[0].shape
    combine_kernel[(triton.cdiv(T, 32),)](
        *partials, offset_T, flag_T, target_logit_T, lse_T, logprob_T, sumexp_T,
        T, num_tiles,
        ONLY_FLAGGED=only_flagged, BLOCK_T=32, BLOCK_N=32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _partials(T: int, V: int, tile: Tile, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (triton.cdiv(V, tile.cols), T)
    return torch.empty(shape, device=device), torch.empty(shape, device=device)


def logsumexp(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_logit_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logprob [T] and lse [T] with exact maxima; stores no exponentials."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    partials = _partials(T, V, tile, hidden_TD.device)
    use_tma = _tma_fits(hidden_TD, weight_VD)
    sumexp_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(V, tile.cols),)](
        _operand(hidden_TD, (tile.rows, tile.inner), use_tma),
        _operand(weight_VD, (tile.cols, tile.inner), use_tma),
        bias_V, *partials,
        T, V, D,
        hidden_TD.stride(0), weight_VD.stride(0),
        softcap, 1 / temperature,
        BLOCK_T=tile.rows, BLOCK_V=tile.cols, BLOCK_D=tile.inner, GROUP=GROUP, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    lse_T, logprob_T = torch.empty_like(target_logit_T), torch.empty_like(target_logit_T)
    _combine(partials, target_logit_T, lse_T, logprob_T)
    return logprob_T, lse_T


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprob and sum of exp(x - k), both [T], and E [T, padded V]; mends ``offset_T`` where it was out of reach."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    num_tiles = triton.cdiv(V, tile.cols)
    exp_TV = room[: T * num_tiles * tile.cols].view(T, -1)
    partials = _partials(T, V, tile, hidden_TD.device)
    use_tma = _tma_fits(hidden_TD, weight_VD, exp_TV)
    numbers = (T, V, D, hidden_TD.stride(0), weight_VD.stride(0), exp_TV.stride(0), softcap, 1 / temperature)
    exp_kernel[(triton.cdiv(T, tile.rows) * num_tiles,)](
        _operand(hidden_TD, (tile.rows, tile.inner), use_tma),
        _operand(weight_VD, (tile.cols, tile.inner), use_tma),
        bias_V, offset_T,
        _operand(exp_TV, (tile.rows, tile.cols), use_tma),
        *partials, *numbers,
        BLOCK_T=tile.rows, BLOCK_V=tile.cols, BLOCK_D=tile.inner, GROUP=GROUP, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    lse_T, logprob_T, sumexp_T = (torch.empty_like(target_logit_T) for _ in range(3))
    flag_T = torch.empty_like(target_logit_T, dtype=torch.int32)
    _combine(partials, target_logit_T, lse_T, logprob_T, offset_T, flag_T, sumexp_T)
    redo = tile._replace(rows=min(tile.rows, 64), num_stages=min(tile.num_stages, 2))
    redo_kernel[(triton.cdiv(T, redo.rows), triton.cdiv(num_tiles, REDO_TILES))](
        hidden_TD, weight_VD, bias_V, offset_T, flag_T, exp_TV, partials[1],
        *numbers,
        BLOCK_T=redo.rows, BLOCK_V=redo.cols, BLOCK_D=redo.inner, TILES=REDO_TILES,
        num_warps=redo.num_warps, num_stages=redo.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    _combine(partials, target_logit_T, lse_T, logprob_T, offset_T, flag_T, sumexp_T, only_flagged=True)
    return logprob_T, sumexp_T, exp_TV


def linear_logprob_forward(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    room: torch.Tensor | None,
) -> tuple[torch.Tensor, Saved | None]:
    """Log-probs of the targets.

    Args:
        hidden_TD: [T, D] float16, bfloat16 or float32, T > 0.
        weight_VD: [V, D], same dtype.
        bias_V: [V] of any float dtype, or None.
        targets_T: [T] int64 or int32 in [0, V).
        room: [T * ``padded_vocab``] or more of the dtype of hidden, where E is kept for ``linear_logprob_backward``;
            None: nothing is.

    Returns:
        logprob [T] float32, and with ``room`` what backward needs. A row that is not finite gives a log-prob that is
        not finite.
    """
    hidden_TD, weight_VD, targets_T = _aligned(hidden_TD), _aligned(weight_VD), targets_T.contiguous()
    bias_V = None if bias_V is None else bias_V.contiguous()
    V, D = weight_VD.shape
    tile = tiles(D, V, hidden_TD.dtype, hidden_TD.device, softcap is not None).logits
    head: dict[str, Any] = {"softcap": softcap, "temperature": temperature}
    target_logit_T = target_logits(hidden_TD, weight_VD, bias_V, targets_T, **head)
    if room is None:
        return logsumexp(hidden_TD, weight_VD, bias_V, target_logit_T, **head, tile=tile)[0], None
    if hidden_TD.dtype == torch.float16:
        offset_T = logsumexp(hidden_TD, weight_VD, bias_V, target_logit_T, **head, tile=tile)[1] - FLOAT16_SHIFT
    else:
        offset_T = target_logit_T.clone()
    logprob_T, sumexp_T, exp_TV = exponentials(
        hidden_TD, weight_VD, bias_V, target_logit_T, offset_T, room, **head, tile=tile
    )
    saved = Saved(
        hidden_TD=hidden_TD,
        weight_VD=weight_VD,
        targets_T=targets_T,
        exp_TV=exp_TV,
        offset_T=offset_T,
        sumexp_T=sumexp_T,
        target_logit_T=target_logit_T,
        **head,
    )
    return logprob_T, saved


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """A copy if only that can be fetched by TMA, so that how tiles are fetched is a matter of D alone."""
    is_good = matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    has_good_copy = matrix.shape[1] * matrix.itemsize % 16 == 0
    if is_good or (matrix.stride(1) == 1 and not has_good_copy):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["T"])
def row_factor_kernel(
    dlogprob_ptr, offset_ptr, sumexp_ptr, target_logit_ptr, targets_ptr, exp_ptr, factor_ptr, active_ptr,
    T, num_cols,
    stride_exp_t,
    softcap, temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """v and the target's entry of E for BLOCK_T rows, and whether one of them has a gradient."""
    pid_t = tl.program_id(0)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    g = tl.load(dlogprob_ptr + offs_t, mask=mask_t, other=0.0)
    k = tl.load(offset_ptr + offs_t, mask=mask_t, other=0.0)
    sumexp = tl.load(sumexp_ptr + offs_t, mask=mask_t, other=1.0)
    target_logit = tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0)
    target = tl.load(targets_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    is_active = g != 0
    tl.store(factor_ptr + offs_t, tl.where(is_active, -g / (sumexp * temperature), 0.0), mask=mask_t)
    tl.store(active_ptr + pid_t, tl.max(is_active.to(tl.int32), 0))
    # (p[y] - 1) exp(L - k)
    entry = tl.minimum(tl.exp(target_logit - k) - sumexp, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if softcap is not None:
        tanh = target_logit * temperature / softcap
        entry *= (1.0 - tanh) * (1.0 + tanh)
    rows = exp_ptr + offs_t.to(tl.int64) * stride_exp_t
    tl.store(rows + target, _round_to(entry, exp_ptr.dtype.element_ty), mask=is_active)
    # A row without a gradient still meets its zero factor in dW, and 0 * inf is NaN.
    is_bad = mask_t & ~is_active & ~(sumexp < float("inf"))
    if tl.max(is_bad.to(tl.int32), 0) != 0:
        for v in range(0, num_cols, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            zeros = tl.zeros((BLOCK_T, BLOCK_V), exp_ptr.dtype.element_ty)
            tl.store(rows[:, None] + offs_v[None, :], zeros, mask=is_bad[:, None] & (offs_v < num_cols)[None, :])


@triton.jit
def active_blocks_kernel(active_ptr, blocks_ptr, count_ptr, num_blocks, BLOCK: tl.constexpr):
    """Indices of the row blocks that have a gradient, in order, and how many there are. One program."""
    count = 0
    for start in range(0, num_blocks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        is_active = tl.load(active_ptr + offs, mask=offs < num_blocks, other=0)
        place = count + tl.cumsum(is_active, 0) - 1
        tl.store(blocks_ptr + place, offs, mask=is_active != 0)
        count += tl.sum(is_active, 0)
    tl.store(count_ptr, count)


@triton.jit
def scaled_hidden_kernel(
    hidden_ptr, factor_ptr, norm_ptr, scaled_ptr,
    D,
    stride_hidden_t, stride_scaled_t,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """v h / norm of one row, exactly 0 where v is, whatever h holds."""
    pid_t = tl.program_id(0).to(tl.int64)
    v = tl.load(factor_ptr + pid_t)
    scale = v
    if norm_ptr is not None:
        scale = v / tl.load(norm_ptr)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + pid_t * stride_hidden_t + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        scaled = _round_to(tl.where(v == 0, 0.0, h * scale), scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + pid_t * stride_scaled_t + offs_d, scaled, mask=offs_d < D)


@triton.jit(do_not_specialize=["T"])
def dhidden_kernel(
    exp, weight, factor_ptr, dhidden_ptr,
    T, V, D, num_cols,
    stride_exp_t, stride_weight_v, stride_dhidden_t,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of v (E W), over all of V."""
    pid_t, pid_d = _tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D), GROUP)
    row, col = pid_t * BLOCK_T, pid_d * BLOCK_D
    offs_t = row + tl.arange(0, BLOCK_T)
    v = tl.load(factor_ptr + offs_t, mask=offs_t < T, other=0.0)
    # No gradient in these rows: a trip count of 0, as a branch around the loop would undo its pipeline.
    end = tl.where(tl.max((v != 0).to(tl.int32), 0) != 0, V, 0)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(0, end, BLOCK_V):
        e = _load_tile(exp, row, k, T, num_cols, stride_exp_t, BLOCK_T, BLOCK_V, USE_TMA)
        w = _load_tile(weight, k, col, V, D, stride_weight_v, BLOCK_V, BLOCK_D, USE_TMA)
        acc = _dot(e, w, acc)
    v = tl.load(factor_ptr + offs_t, mask=offs_t < T, other=0.0)  # again, rather than held in registers meanwhile
    out = tl.where((v == 0)[:, None], 0.0, acc * v[:, None])
    offs_d = col + tl.arange(0, BLOCK_D)
    offs = offs_t.to(tl.int64)[:, None] * stride_dhidden_t + offs_d[None, :]
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    tl.store(dhidden_ptr + offs, _round_to(out, dhidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def dweight_kernel(
    exp, scaled, past, past_low, blocks_ptr, count_ptr, norm_ptr, out_ptr, low_ptr,
    T, V, D, num_cols,
    stride_exp_t, stride_scaled_t, stride_past_v, stride_out_v,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of (past +) E^T (v h), over the row blocks that have a gradient.

    With past_low the past sum is a float32 whose upper half is past, bf16; with low_ptr the new one is left so.
    """
    pid_v, pid_d = _tile_of(tl.program_id(0), tl.cdiv(V, BLOCK_V), tl.cdiv(D, BLOCK_D), GROUP)
    row, col = pid_v * BLOCK_V, pid_d * BLOCK_D
    if past is not None:  # before the loop, where it costs no registers
        acc = _load_tile(past, row, col, V, D, stride_past_v, BLOCK_V, BLOCK_D, USE_TMA)
        if past_low is not None:
            bits = acc.to(tl.int16, bitcast=True).to(tl.int32) << 16
            low = _load_tile(past_low, row, col, V, D, stride_past_v, BLOCK_V, BLOCK_D, USE_TMA)
            acc = (bits | (low.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)
        if norm_ptr is not None:
            acc /= tl.load(norm_ptr)
    else:
        acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    count = tl.load(count_ptr)
    block = tl.load(blocks_ptr)
    for i in range(count):
        t = block * BLOCK_T
        # One ahead: a tile whose place is loaded in its own iteration would take a stage from the pipeline.
        block = tl.load(blocks_ptr + i + 1, mask=i + 1 < count, other=0)
        e = _load_tile(exp, t, row, T, num_cols, stride_exp_t, BLOCK_T, BLOCK_V, USE_TMA)
        h = _load_tile(scaled, t, col, T, D, stride_scaled_t, BLOCK_T, BLOCK_D, USE_TMA)
        acc = _dot(e.T, h, acc)
    if norm_ptr is not None:
        acc *= tl.load(norm_ptr)
    # Within the tile 32 bits do, and 64 would spill.
    offs_v, offs_d = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    start = row.to(tl.int64) * stride_out_v + col
    offs = offs_v[:, None] * stride_out_v + offs_d[None, :]
    mask = (offs_v < V - row)[:, None] & (offs_d < D - col)[None, :]
    if low_ptr is not None:
        bits = acc.to(tl.int32, bitcast=True)
        tl.store(out_ptr + start + offs, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(low_ptr + start + offs, bits.to(tl.int16), mask=mask)
    else:
        tl.store(out_ptr + start + offs, _round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def dbias_kernel(
    exp_ptr, factor_ptr, blocks_ptr, count_ptr, dbias_ptr,
    T, V,
    stride_exp_t,
    ADD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_V entries of (dbias +) E^T v, over the row blocks that have a gradient."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for i in range(tl.load(count_ptr)):
        offs_t = tl.load(blocks_ptr + i) * BLOCK_T + tl.arange(0, BLOCK_T)
        v = tl.load(factor_ptr + offs_t, mask=offs_t < T, other=0.0)
        offs = offs_t.to(tl.int64)[:, None] * stride_exp_t + offs_v[None, :]
        e = tl.load(exp_ptr + offs, mask=(v != 0)[:, None] & mask_v[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(e * v[:, None], 0)
    total = acc.to(dbias_ptr.dtype.element_ty)
    if ADD:
        total += tl.load(dbias_ptr + offs_v, mask=mask_v, other=0.0)
    tl.store(dbias_ptr + offs_v, total, mask=mask_v)


def dhidden(
    exp_TV: torch.Tensor, weight_VD: torch.Tensor, factor_T: torch.Tensor, dhidden_TD: torch.Tensor, tile: Tile
) -> None:
    """Writes v (E W); rows whose v is 0 become exactly 0."""
    (T, num_cols), (V, D) = exp_TV.shape, weight_VD.shape
    assert dhidden_TD.stride(1) == 1 or D == 1
    use_tma = _tma_fits(exp_TV, weight_VD)
    dhidden_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(D, tile.cols),)](
        _operand(exp_TV, (tile.rows, tile.inner), use_tma),
        _operand(weight_VD, (tile.inner, tile.cols), use_tma),
        factor_T, dhidden_TD,
        T, V, D, num_cols,
        exp_TV.stride(0), weight_VD.stride(0), dhidden_TD.stride(0),
        BLOCK_T=tile.rows, BLOCK_D=tile.cols, BLOCK_V=tile.inner, GROUP=GROUP, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def scaled_hidden(hidden_TD: torch.Tensor, factor_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """v h in the dtype of ``hidden_TD``, rows padded to 16 bytes; in float16 divided by max |v|, which comes second."""
    T, D = hidden_TD.shape
    norm = None
    if hidden_TD.dtype == torch.float16:  # gradients are often below float16's smallest number
        norm = factor_T.abs().amax()
        norm = torch.where(norm == 0, 1.0, norm)
    scaled_TD = hidden_TD.new_empty(T, triton.cdiv(D, 8) * 8)[:, :D]
    scaled_hidden_kernel[(T,)](
        hidden_TD, factor_T, norm, scaled_TD,
        D,
        hidden_TD.stride(0), scaled_TD.stride(0),
        BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return scaled_TD, norm


def dweight(
    exp_TV: torch.Tensor,
    scaled_TD: torch.Tensor,
    norm: torch.Tensor | None,
    active: tuple[torch.Tensor, torch.Tensor],
    total_VD: torch.Tensor,
    rest_VD: torch.Tensor | None,
    tile: Tile,
    *,
    is_first: bool,
    is_last: bool,
) -> None:
    """Adds norm E^T scaled to a sum; ``active`` are the row blocks of ``tile.inner`` rows to go over and their count.

    The sum is a float32: ``total_VD`` itself, or for bf16 its upper half and ``rest_VD``, int16, the lower one, or for
    float16 ``rest_VD``. ``is_first``: what they hold is overwritten. ``is_last``: it is rounded into ``total_VD``.
    """
    (T, num_cols), (V, D) = exp_TV.shape, total_VD.shape
    assert total_VD.is_contiguous()
    assert rest_VD is None or rest_VD.is_contiguous()
    assert rest_VD is not None or total_VD.dtype == torch.float32 or (is_first and is_last)
    is_split = total_VD.dtype == torch.bfloat16
    sum_VD = total_VD if rest_VD is None or is_split else rest_VD
    past_VD, past_low_VD = (None, None) if is_first else (sum_VD, rest_VD if is_split else None)
    use_tma = _tma_fits(exp_TV, scaled_TD, *[x for x in (past_VD, past_low_VD) if x is not None])
    past, past_low = (
        None if x is None else _operand(x, (tile.rows, tile.cols), use_tma) for x in (past_VD, past_low_VD)
    )
    dweight_kernel[(triton.cdiv(V, tile.rows) * triton.cdiv(D, tile.cols),)](
        _operand(exp_TV, (tile.inner, tile.rows), use_tma),
        _operand(scaled_TD, (tile.inner, tile.cols), use_tma),
        past, past_low, *active, norm,
        total_VD if is_last else sum_VD, rest_VD if is_split and not is_last else None,
        T, V, D, num_cols,
        exp_TV.stride(0), scaled_TD.stride(0), D, D,
        BLOCK_V=tile.rows, BLOCK_D=tile.cols, BLOCK_T=tile.inner, GROUP=GROUP, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def row_factors(saved: Saved, dlogprob_T: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """v [T], and for every ``block`` rows whether one has a gradient; sets the target entries of ``saved.exp_TV``."""
    T, num_cols = saved.exp_TV.shape
    factor_T = torch.empty_like(saved.sumexp_T)
    is_active = torch.empty(triton.cdiv(T, block), dtype=torch.int32, device=factor_T.device)
    row_factor_kernel[(triton.cdiv(T, block),)](
        dlogprob_T.contiguous(), saved.offset_T, saved.sumexp_T, saved.target_logit_T, saved.targets_T, saved.exp_TV,
        factor_T, is_active,
        T, num_cols,
        saved.exp_TV.stride(0),
        saved.softcap, saved.temperature,
        BLOCK_T=block, BLOCK_V=64, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return factor_T, is_active


def linear_logprob_backward(
    saved: Saved,
    dlogprob_T: torch.Tensor,
    *,
    dhidden_TD: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    dweight_rest_VD: torch.Tensor | None,
    dbias_V: torch.Tensor | None,
    is_first: bool,
    is_last: bool,
) -> None:
    """Gradients of sum(dlogprob * logprob), once per ``saved``: the target entries of its E are overwritten.

    A row whose ``dlogprob`` is 0 adds nothing, whatever it holds; tiles of such rows cost next to nothing.

    Args:
        dlogprob_T: [T] float32.
        dhidden_TD: [T, D], dtype of hidden or float32, overwritten; rows without a gradient become exactly 0.
        dweight_VD, dweight_rest_VD: sum over the chunks, see ``dweight``; None: no product is made.
        dbias_V: [V] float32 or float64, overwritten when ``is_first``, else added to.
    """
    hidden_TD, weight_VD, exp_TV = saved.hidden_TD, saved.weight_VD, saved.exp_TV
    (V, D), T = weight_VD.shape, hidden_TD.shape[0]
    tile = tiles(D, V, hidden_TD.dtype, hidden_TD.device, saved.softcap is not None)
    block = tile.dweight.inner
    factor_T, is_active = row_factors(saved, dlogprob_T, block)
    if dhidden_TD is not None:
        dhidden(exp_TV, weight_VD, factor_T, dhidden_TD, tile.dhidden)
    if dweight_VD is None and dbias_V is None:
        return
    blocks, count = torch.empty_like(is_active), is_active.new_empty(())
    active_blocks_kernel[(1,)](
        is_active, blocks, count, is_active.numel(), BLOCK=1024, num_warps=4, enable_fp_fusion=True
    )
    if dweight_VD is not None:
        scaled_TD, norm = scaled_hidden(hidden_TD, factor_T)
        dweight(
            exp_TV, scaled_TD, norm, (blocks, count), dweight_VD, dweight_rest_VD, tile.dweight,
            is_first=is_first, is_last=is_last,
        )  # fmt: skip
    if dbias_V is not None:
        dbias_kernel[(triton.cdiv(V, 128),)](
            exp_TV, factor_T, blocks, count, dbias_V,
            T, V,
            exp_TV.stride(0),
            ADD=not is_first, BLOCK_V=128, BLOCK_T=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ tuning


def autotune(D: int, V: int, dtype: torch.dtype, device: torch.device, *, rows: int = 4096) -> Tiles:
    """The fastest of the candidates for each of the three products, timed on random data of ``rows`` rows."""
    from triton.testing import do_bench

    hidden_TD = torch.randn(rows, D, dtype=dtype, device=device)
    weight_VD = torch.randn(V, D, dtype=dtype, device=device) * D**-0.5
    row_T = torch.zeros(rows, device=device)
    block = max(tile.inner for tile in _CANDIDATES)
    blocks = torch.arange(triton.cdiv(rows, block), dtype=torch.int32, device=device)
    active = blocks, blocks.new_full((), blocks.numel())
    columns = max(tile.cols for tile in _CANDIDATES)
    exp_TV = torch.rand(rows, triton.cdiv(V, columns) * columns, dtype=dtype, device=device)
    dweight_VD = torch.empty_like(weight_VD)
    head: dict[str, Any] = {"softcap": None, "temperature": 1.0}
    steps = (
        lambda tile: exponentials(hidden_TD, weight_VD, None, row_T, row_T.clone(), exp_TV.view(-1), **head, tile=tile),
        lambda tile: dhidden(exp_TV, weight_VD, row_T + 1, torch.empty_like(hidden_TD), tile),
        lambda tile: dweight(exp_TV, hidden_TD, None, active, dweight_VD, None, tile, is_first=True, is_last=True),
    )

    def fastest(step: Callable[[Tile], object]) -> Tile:
        return min(_CANDIDATES, key=lambda tile: do_bench(functools.partial(step, tile)))

    return Tiles(*map(fastest, steps))

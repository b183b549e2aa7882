"""Gradients of ``linear_logprob.py``: dhidden, dweight and dbias from the stored exponentials of its forward pass.

    row_factors -> dhidden = v (E W) -> active blocks -> scaled rows -> dweight (+)= E^T (v h), dbias

That file's header explains letters and formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from tso_fast.kernels.blocks import dot, load_tile, operand, round_to, tile_of, tma_fits
from tso_fast.kernels.linear_logprob import Saved
from tso_fast.kernels.tiles import Tile, tiles

DHIDDEN_ROWS = 1024  # rows per call of torch's product, whose result is float32


@triton.jit(do_not_specialize=["T"])
def row_factor_kernel(
    dlogprob_ptr, offset_ptr, sumexp_ptr, target_logit_ptr, slope_ptr, targets_ptr, exp_ptr, factor_ptr, active_ptr,
    T, num_cols,
    stride_exp_t,
    temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """v and the target's entry of E for BLOCK_T rows, and whether any of them has a gradient."""
    pid_t = tl.program_id(0)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    g = tl.load(dlogprob_ptr + offs_t, mask=mask_t, other=0.0)
    k = tl.load(offset_ptr + offs_t, mask=mask_t, other=0.0)
    sumexp = tl.load(sumexp_ptr + offs_t, mask=mask_t, other=1.0)
    target_logit = tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0)
    target = tl.load(targets_ptr + offs_t, mask=mask_t, other=-1).to(tl.int64)
    is_active = g != 0
    tl.store(factor_ptr + offs_t, tl.where(is_active, -g / (sumexp * temperature), 0.0), mask=mask_t)
    tl.store(active_ptr + pid_t, tl.max(is_active.to(tl.int32), 0))
    # (p[y] - 1) exp(L - k)
    entry = tl.minimum(tl.exp(target_logit - k) - sumexp, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if slope_ptr is not None:
        entry *= tl.load(slope_ptr + offs_t, mask=mask_t, other=0.0)
    rows = exp_ptr + offs_t.to(tl.int64) * stride_exp_t
    tl.store(rows + target, round_to(entry, exp_ptr.dtype.element_ty), mask=is_active & (target >= 0))
    # In dW a row without a gradient is still multiplied by its zero factor, and 0 * inf is NaN.
    is_bad = mask_t & ~is_active & ~(sumexp < float("inf"))
    if tl.max(is_bad.to(tl.int32), 0) != 0:
        for v in range(0, num_cols, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            zeros = tl.zeros((BLOCK_T, BLOCK_V), exp_ptr.dtype.element_ty)
            tl.store(rows[:, None] + offs_v[None, :], zeros, mask=is_bad[:, None] & (offs_v < num_cols)[None, :])


@triton.jit
def active_blocks_kernel(active_ptr, blocks_ptr, count_ptr, num_blocks, BLOCK: tl.constexpr):
    """Indices of the row blocks that have a gradient, in order, and their number; runs as a single program."""
    count = 0
    for start in range(0, num_blocks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        is_active = tl.load(active_ptr + offs, mask=offs < num_blocks, other=0)
        place = count + tl.cumsum(is_active, 0) - 1
        tl.store(blocks_ptr + place, offs, mask=is_active != 0)
        count += tl.sum(is_active, 0)
    tl.store(count_ptr, count)


@triton.jit
def scale_rows_kernel(
    in_ptr, factor_ptr, norm_ptr, out_ptr,
    D,
    stride_in_t, stride_out_t,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """v x / norm for one row x; exactly 0 if v is 0, whatever x holds."""
    pid_t = tl.program_id(0).to(tl.int64)
    v = tl.load(factor_ptr + pid_t)
    scale = v
    if norm_ptr is not None:
        scale = v / tl.load(norm_ptr)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(in_ptr + pid_t * stride_in_t + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        scaled = round_to(tl.where(v == 0, 0.0, x * scale), out_ptr.dtype.element_ty)
        tl.store(out_ptr + pid_t * stride_out_t + offs_d, scaled, mask=offs_d < D)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, num_elements, BLOCK: tl.constexpr):
    """Multiplies x by one number, in float32 and in place; reads and writes nothing if the number is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < num_elements, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, round_to(x * factor, x_ptr.dtype.element_ty), mask=offs < num_elements)


@triton.jit(do_not_specialize=["T"])
def dhidden_kernel(
    exp, weight, factor_ptr, dhidden_ptr,
    T, V, D, num_cols,
    stride_exp_t, stride_weight_v, stride_dhidden_t,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of v (E W), over all of V."""
    pid_t, pid_d = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D), GROUP)
    row, col = pid_t * BLOCK_T, pid_d * BLOCK_D
    offs_t = row + tl.arange(0, BLOCK_T)
    v = tl.load(factor_ptr + offs_t, mask=offs_t < T, other=0.0)
    # Rows without a gradient get a trip count of 0, since a branch around the loop would prevent pipelining.
    end = tl.where(tl.max((v != 0).to(tl.int32), 0) != 0, V, 0)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(0, end, BLOCK_V):
        e = load_tile(exp, row, k, T, num_cols, stride_exp_t, BLOCK_T, BLOCK_V, USE_TMA)
        w = load_tile(weight, k, col, V, D, stride_weight_v, BLOCK_V, BLOCK_D, USE_TMA)
        acc = dot(e, w, acc)
    v = tl.load(factor_ptr + offs_t, mask=offs_t < T, other=0.0)  # reloaded to save registers during the loop
    out = tl.where((v == 0)[:, None], 0.0, acc * v[:, None])
    offs_d = col + tl.arange(0, BLOCK_D)
    offs = offs_t.to(tl.int64)[:, None] * stride_dhidden_t + offs_d[None, :]
    mask = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    tl.store(dhidden_ptr + offs, round_to(out, dhidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def dweight_kernel(
    exp, scaled, past, past_low, blocks_ptr, count_ptr, norm_ptr, out_ptr, low_ptr,
    T, V, D, num_cols,
    stride_exp_t, stride_scaled_t, stride_past_v, stride_out_v,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of (past +) E^T (v h), over the row blocks that have a gradient.

    With past_low the past sum is a float32 cut to 24 bits, split into past (bf16) and past_low (uint8); with low_ptr
    the new sum is stored in the same form.
    """
    pid_v, pid_d = tile_of(tl.program_id(0), tl.cdiv(V, BLOCK_V), tl.cdiv(D, BLOCK_D), GROUP)
    row, col = pid_v * BLOCK_V, pid_d * BLOCK_D
    if past is not None:  # loaded before the loop, where it costs no registers
        acc = load_tile(past, row, col, V, D, stride_past_v, BLOCK_V, BLOCK_D, USE_TMA)
        if past_low is not None:
            bits = acc.to(tl.int16, bitcast=True).to(tl.int32) << 16
            low = load_tile(past_low, row, col, V, D, stride_past_v, BLOCK_V, BLOCK_D, USE_TMA)
            acc = (bits | (low.to(tl.int32) << 8)).to(tl.float32, bitcast=True)
        if norm_ptr is not None:
            acc /= tl.load(norm_ptr)
    else:
        acc = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    count = tl.load(count_ptr)
    block = tl.load(blocks_ptr)
    for i in range(count):
        t = block * BLOCK_T
        # Loads the next index one iteration ahead; loading it in its own iteration would cost a pipeline stage.
        block = tl.load(blocks_ptr + i + 1, mask=i + 1 < count, other=0)
        e = load_tile(exp, t, row, T, num_cols, stride_exp_t, BLOCK_T, BLOCK_V, USE_TMA)
        h = load_tile(scaled, t, col, T, D, stride_scaled_t, BLOCK_T, BLOCK_D, USE_TMA)
        acc = dot(e.T, h, acc)
    if norm_ptr is not None:
        acc *= tl.load(norm_ptr)
    # 32-bit offsets suffice within the tile, and 64-bit ones would spill.
    offs_v, offs_d = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    start = row.to(tl.int64) * stride_out_v + col
    offs = offs_v[:, None] * stride_out_v + offs_d[None, :]
    mask = (offs_v < V - row)[:, None] & (offs_d < D - col)[None, :]
    if low_ptr is not None:
        bits = acc.to(tl.int32, bitcast=True)
        # Rounds to nearest even at 24 bits; a NaN's bits may be all ones, and a carry would turn it into zero.
        bits = tl.where(acc == acc, (bits + 0x7F + ((bits >> 8) & 1)) >> 8, 0x7FC000)
        tl.store(out_ptr + start + offs, (bits >> 8).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
        tl.store(low_ptr + start + offs, bits.to(tl.uint8), mask=mask)
    else:
        tl.store(out_ptr + start + offs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


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
    exp_TV: torch.Tensor, weight_VD: torch.Tensor, factor_T: torch.Tensor, dhidden_TD: torch.Tensor, tile: Tile | None
) -> None:
    """Writes v (E W); rows whose v is 0 become exactly 0. If ``tile`` is None, torch computes the whole product."""
    (T, num_cols), (V, D) = exp_TV.shape, weight_VD.shape
    assert dhidden_TD.stride(1) == 1 or D == 1
    if tile is None:
        for rows in (slice(start, start + DHIDDEN_ROWS) for start in range(0, T, DHIDDEN_ROWS)):
            _scale_rows(_float32_product(exp_TV[rows, :V], weight_VD), factor_T[rows], None, dhidden_TD[rows])
        return
    use_tma = tma_fits(exp_TV, weight_VD)
    dhidden_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(D, tile.cols),)](
        operand(exp_TV, (tile.rows, tile.inner), use_tma),
        operand(weight_VD, (tile.inner, tile.cols), use_tma),
        factor_T, dhidden_TD,
        T, V, D, num_cols,
        exp_TV.stride(0), weight_VD.stride(0), dhidden_TD.stride(0),
        BLOCK_T=tile.rows, BLOCK_D=tile.cols, BLOCK_V=tile.inner, GROUP=tile.group, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product a b of 16-bit matrices in float32, never rounded to their dtype."""
    if a.device.type != "cuda":  # the interpreter uses CPU tensors, and torch has this product only on GPUs
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _scale_rows(in_TD: torch.Tensor, factor_T: torch.Tensor, norm: torch.Tensor | None, out_TD: torch.Tensor) -> None:
    T, D = in_TD.shape
    scale_rows_kernel[(T,)](
        in_TD, factor_T, norm, out_TD,
        D,
        in_TD.stride(0), out_TD.stride(0),
        BLOCK_D=min(1024, triton.next_power_of_2(D)), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def scaled_hidden(hidden_TD: torch.Tensor, factor_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """v h in the dtype of ``hidden_TD``, rows padded to 16 bytes; for float16, v h / max |v| and max |v|."""
    T, D = hidden_TD.shape
    norm = None
    if hidden_TD.dtype == torch.float16:  # gradients are often smaller than float16's smallest number
        norm = factor_T.abs().amax()
        norm = torch.where(norm == 0, 1.0, norm)
    scaled_TD = hidden_TD.new_empty(T, triton.cdiv(D, 8) * 8)[:, :D]
    _scale_rows(hidden_TD, factor_T, norm, scaled_TD)
    return scaled_TD, norm


def scale_in_place(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a contiguous tensor by a scalar tensor on its device, without reading it on the host."""
    assert x.is_contiguous()
    block = 8192
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), block),)](
            x, factor, x.numel(), BLOCK=block, num_warps=8, enable_fp_fusion=True
        )


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
    """Adds norm E^T scaled to a sum; ``active`` holds the indices and the number of blocks of ``tile.inner`` rows.

    The sum is a float32: ``total_VD`` itself, or for 16-bit weights 24 bits of one, the upper 16 in the memory of
    ``total_VD`` and 8 more in ``rest_VD``, uint8. ``is_first`` overwrites them; ``is_last`` rounds the sum into
    ``total_VD``.
    """
    (T, num_cols), (V, D) = exp_TV.shape, total_VD.shape
    assert total_VD.is_contiguous()
    assert rest_VD is None or (rest_VD.is_contiguous() and rest_VD.dtype == torch.uint8)
    is_split = total_VD.dtype != torch.float32
    assert rest_VD is not None or not is_split or (is_first and is_last)
    sum_VD = total_VD.view(torch.bfloat16) if is_split else total_VD
    past_VD, past_low_VD = (None, None) if is_first else (sum_VD, rest_VD if is_split else None)
    use_tma = tma_fits(exp_TV, scaled_TD, *[x for x in (past_VD, past_low_VD) if x is not None])
    past, past_low = (
        None if x is None else operand(x, (tile.rows, tile.cols), use_tma) for x in (past_VD, past_low_VD)
    )
    dweight_kernel[(triton.cdiv(V, tile.rows) * triton.cdiv(D, tile.cols),)](
        operand(exp_TV, (tile.inner, tile.rows), use_tma),
        operand(scaled_TD, (tile.inner, tile.cols), use_tma),
        past, past_low, *active, norm,
        total_VD if is_last else sum_VD, rest_VD if is_split and not is_last else None,
        T, V, D, num_cols,
        exp_TV.stride(0), scaled_TD.stride(0), D, D,
        BLOCK_V=tile.rows, BLOCK_D=tile.cols, BLOCK_T=tile.inner, GROUP=tile.group, USE_TMA=use_tma,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def row_factors(saved: Saved, dlogprob_T: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """v [T], and for every ``block`` rows whether any has a gradient; sets the target entries of ``saved.exp_TV``."""
    T, num_cols = saved.exp_TV.shape
    factor_T = torch.empty_like(saved.sumexp_T)
    is_active = torch.empty(triton.cdiv(T, block), dtype=torch.int32, device=factor_T.device)
    row_factor_kernel[(triton.cdiv(T, block),)](
        dlogprob_T.contiguous(), saved.offset_T, saved.sumexp_T, saved.target_logit_T, saved.slope_T, saved.targets_T,
        saved.exp_TV, factor_T, is_active,
        T, num_cols,
        saved.exp_TV.stride(0),
        saved.temperature,
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
    may_skip: bool,
) -> None:
    """Gradients of sum(dlogprob * logprob); can run once per ``saved``, since it overwrites E's target entries.

    A row whose ``dlogprob`` is 0 adds nothing, whatever it holds; tiles of such rows cost next to nothing.

    Args:
        dlogprob_T: [T] float32.
        dhidden_TD: [T, D], dtype of hidden or float32, overwritten; rows without a gradient become exactly 0.
        dweight_VD, dweight_rest_VD: sum over the chunks, see ``dweight``; None: not computed.
        dbias_V: [V] float32 or float64, overwritten if ``is_first``, else added to.
        may_skip: rows without a gradient are expected; dhidden then uses tiles that skip them.
    """
    hidden_TD, weight_VD, exp_TV = saved.hidden_TD, saved.weight_VD, saved.exp_TV
    (V, D), T = weight_VD.shape, hidden_TD.shape[0]
    tile = tiles(D, V, hidden_TD.dtype, hidden_TD.device)
    block = tile.dweight.inner
    factor_T, is_active = row_factors(saved, dlogprob_T, block)
    if dhidden_TD is not None:
        dhidden(exp_TV, weight_VD, factor_T, dhidden_TD, tile.dhidden_skipping if may_skip else tile.dhidden)
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

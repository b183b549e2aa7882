"""Sums of token log-probs over sequences, and the dual-clip loss on pairs of them.

Letters: T tokens, S sequences, N pairs. One program owns each sum and adds its terms in order, without atomics.
Everything is float64: there are few numbers, and a margin is a small difference of large sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def segment_sum_kernel(logprob_ptr, token_weight_ptr, cu_seqlens_ptr, sum_ptr, BLOCK_T: tl.constexpr):
    pid_s = tl.program_id(0)
    end = tl.load(cu_seqlens_ptr + pid_s + 1)
    acc = tl.zeros((BLOCK_T,), tl.float64)
    for t in range(tl.load(cu_seqlens_ptr + pid_s), end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        x = tl.load(logprob_ptr + offs_t, mask=offs_t < end, other=0.0).to(tl.float64)
        if token_weight_ptr is not None:
            x *= tl.load(token_weight_ptr + offs_t, mask=offs_t < end, other=0.0)
        acc += x
    tl.store(sum_ptr + pid_s, tl.sum(acc, 0))


@triton.jit
def _softplus(x):
    """log(1 + e^x); NaN stays NaN, which tl.maximum alone would drop."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def dual_clip_kernel(
    logprob_ptr, ref_logprob_ptr, pairs_ptr, scale_ptr, soft_label_ptr, margin_ptr, weight_sum_ptr,
    losses_ptr, dpair_ptr,
    N,
    beta: tl.float64, clip_chosen: tl.float64, clip_rejected: tl.float64,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Without the annotations, Python floats would be passed as float32.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    chosen = tl.load(pairs_ptr + 2 * offs_n, mask=mask, other=0)
    rejected = tl.load(pairs_ptr + 2 * offs_n + 1, mask=mask, other=0)
    a = beta * (tl.load(logprob_ptr + chosen, mask=mask) - tl.load(ref_logprob_ptr + chosen, mask=mask))
    b = beta * (tl.load(logprob_ptr + rejected, mask=mask) - tl.load(ref_logprob_ptr + rejected, mask=mask))
    is_chosen_clipped = a >= clip_chosen
    is_rejected_clipped = b <= -clip_rejected
    z = tl.where(is_chosen_clipped, clip_chosen, a) - tl.where(is_rejected_clipped, -clip_rejected, b)
    if margin_ptr is not None:
        z -= tl.load(margin_ptr + offs_n, mask=mask)
    sigmoid, one_less = 1.0 / (1.0 + tl.exp(-z)), 1.0 / (1.0 + tl.exp(z))
    if soft_label_ptr is not None:
        p = tl.load(soft_label_ptr + offs_n, mask=mask)
        loss = p * _softplus(-z) + (1.0 - p) * _softplus(z)
        dz = (1.0 - p) * sigmoid - p * one_less
    else:
        loss = _softplus(-z)
        dz = -one_less
    tl.store(losses_ptr + offs_n, loss, mask=mask)
    weight = 1.0
    if scale_ptr is not None:
        weight = tl.load(scale_ptr + offs_n, mask=mask)
    dz *= beta * (weight / tl.load(weight_sum_ptr))
    tl.store(dpair_ptr + 2 * offs_n, tl.where(is_chosen_clipped, 0.0, dz), mask=mask)
    tl.store(dpair_ptr + 2 * offs_n + 1, tl.where(is_rejected_clipped, 0.0, -dz), mask=mask)


@triton.jit
def gather_pairs_kernel(pairs_ptr, dpair_ptr, dlogprob_ptr, num_sides, BLOCK_N: tl.constexpr):
    """Sums the gradients of all pair sides that use this program's sequence."""
    pid_s = tl.program_id(0)
    acc = tl.zeros((BLOCK_N,), tl.float64)
    for n in range(0, num_sides, BLOCK_N):
        offs = n + tl.arange(0, BLOCK_N)
        is_here = tl.load(pairs_ptr + offs, mask=offs < num_sides, other=-1) == pid_s
        acc += tl.load(dpair_ptr + offs, mask=is_here, other=0.0)
    tl.store(dlogprob_ptr + pid_s, tl.sum(acc, 0))


def segment_sum(logprob_T: torch.Tensor, token_weight_T: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums [S] float64 of logprob (times token weight) over the rows cu_seqlens[s]:cu_seqlens[s+1].

    Args:
        logprob_T: [T] float32 or float64.
        token_weight_T: [T] or None.
        cu_seqlens: [S+1] int32 or int64.
    """
    num_sequences = cu_seqlens.numel() - 1
    sum_S = logprob_T.new_empty(num_sequences, dtype=torch.float64)
    if num_sequences:
        segment_sum_kernel[(num_sequences,)](
            logprob_T.contiguous(), _dense(token_weight_T), cu_seqlens.contiguous(), sum_S,
            BLOCK_T=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return sum_S


def dual_clip_epilogue(
    logprob_S: torch.Tensor,
    ref_logprob_S: torch.Tensor,
    pairs_N2: torch.Tensor,
    scale_N: torch.Tensor | None,
    soft_label_N: torch.Tensor | None,
    margin_N: torch.Tensor | None,
    beta: float,
    clip_chosen: float,
    clip_rejected: float,
    weight_sum: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dual-clip loss of every pair, and the gradient of the weighted sum of losses.

    With rewards a, b = beta (logprob - ref_logprob) of the chosen and the rejected sequence::

        z = min(a, clip_chosen) - max(b, -clip_rejected) - margin
        loss = -p log sigma(z) - (1 - p) log sigma(-z)

    A side at its bound has a gradient of exactly 0.

    Args:
        logprob_S, ref_logprob_S: [S] sums.
        pairs_N2: [N, 2] int64 or int32 (chosen, rejected) indices of sequences; a sequence may be in several pairs.
        scale_N, soft_label_N, margin_N: [N], or None for 1, 1 and 0.
        clip_chosen, clip_rejected: >= 0; infinite: no clip.
        weight_sum: scalar tensor by which scale is divided: sum(scale) over all chunks.

    Returns:
        Unweighted losses [N] float64, and the gradient d sum(scale / weight_sum * losses) / d logprob, [S] float64.
    """
    num_pairs = pairs_N2.shape[0]
    pairs_N2 = pairs_N2.contiguous()
    logprob_S = logprob_S.to(torch.float64)
    losses_N, dpair_N2 = logprob_S.new_empty(num_pairs), logprob_S.new_empty(num_pairs, 2)
    if num_pairs:
        dual_clip_kernel[(triton.cdiv(num_pairs, 128),)](
            _dense(logprob_S), _dense(ref_logprob_S), pairs_N2,
            _dense(scale_N), _dense(soft_label_N), _dense(margin_N), _dense(weight_sum),
            losses_N, dpair_N2,
            num_pairs,
            beta, clip_chosen, clip_rejected,
            BLOCK_N=128, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    dlogprob_S = torch.empty_like(logprob_S)
    if logprob_S.numel():
        gather_pairs_kernel[(logprob_S.numel(),)](
            pairs_N2, dpair_N2, dlogprob_S, 2 * num_pairs, BLOCK_N=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return losses_N, dlogprob_S


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as contiguous float64, as the kernels expect it."""
    return None if x is None else x.to(torch.float64).contiguous()

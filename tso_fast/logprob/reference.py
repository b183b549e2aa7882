"""Plain torch log-probs of targets under a linear head, tile by tile: the definition of correct, on any device.

Logits exist one tile [ROWS, VOCAB] at a time, in float32 from the float32 product of the inputs (in float64 for
float64 inputs), so they are never rounded to bf16 on their way into the log-sum-exp. The backward pass computes
the tiles again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

ROWS, VOCAB = 1024, 8192  # one float32 tile is at most 32 MiB


def _tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, softcap: float | None, scale: float
) -> torch.Tensor:
    with torch.autocast(hidden_TD.device.type, enabled=False):  # it would round the product to its own dtype
        logits_TV = hidden_TD @ weight_VD.T
    if bias_V is not None:
        logits_TV += bias_V
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return logits_TV * scale


class LinearLogprobs(torch.autograd.Function):
    """log softmax(softcap(hidden @ weight.T + bias) / temperature)[targets], [T] rows; all rows count."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_T: torch.Tensor,
        softcap: float | None,
        temperature: float,
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        # Not -inf: the difference of two of them is NaN, and a bias may mask out a whole tile.
        max_T = hidden_TD.new_full((T,), torch.finfo(dtype).min, dtype=dtype)
        sumexp_T = hidden_TD.new_zeros(T, dtype=dtype)
        target_logit_T = hidden_TD.new_zeros(T, dtype=dtype)
        for vocab in _tiles(V, VOCAB):
            weight = weight_VD[vocab].to(dtype)
            bias = None if bias_V is None else bias_V[vocab].to(dtype)
            for rows in _tiles(T, ROWS):
                logits = _logits(hidden_TD[rows].to(dtype), weight, bias, softcap, 1 / temperature)
                new_max = torch.maximum(max_T[rows], logits.amax(dim=1))
                sumexp_T[rows] *= torch.exp(max_T[rows] - new_max)
                sumexp_T[rows] += torch.exp(logits - new_max[:, None]).sum(dim=1)
                max_T[rows] = new_max
                local = targets_T[rows] - vocab.start
                is_here = (local >= 0) & (local < logits.shape[1])
                picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                target_logit_T[rows] = torch.where(is_here, picked, target_logit_T[rows])
        lse_T = max_T + sumexp_T.log()
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, lse_T)
        ctx.softcap, ctx.temperature = softcap, temperature
        return target_logit_T - lse_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dlogprob_T,) = grads
        hidden_TD, weight_VD, bias_V, targets_T, lse_T = ctx.saved_tensors
        need_dhidden, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        dtype = lse_T.dtype
        dhidden_TD = torch.zeros_like(hidden_TD, dtype=dtype) if need_dhidden else None
        dweight_VD = torch.empty_like(weight_VD) if need_dweight else None
        dbias_V = torch.empty_like(bias_V) if need_dbias else None
        scale = 1 / ctx.temperature
        for vocab in _tiles(weight_VD.shape[0], VOCAB):
            weight = weight_VD[vocab].to(dtype)
            bias = None if bias_V is None else bias_V[vocab].to(dtype)
            dweight = torch.zeros_like(weight) if need_dweight else None
            dbias = torch.zeros_like(weight[:, 0]) if need_dbias else None
            for rows in _tiles(hidden_TD.shape[0], ROWS):
                hidden = hidden_TD[rows].to(dtype)
                logits = _logits(hidden, weight, bias, ctx.softcap, scale)
                dlogits = -torch.exp(logits - lse_T[rows, None])
                local = targets_T[rows] - vocab.start
                here = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
                dlogits[here, local[here]] += 1
                dlogits *= dlogprob_T[rows, None] * scale
                if ctx.softcap is not None:
                    dlogits *= 1 - (logits / (scale * ctx.softcap)) ** 2
                if dhidden_TD is not None:
                    dhidden_TD[rows].addmm_(dlogits, weight)
                if dweight is not None:
                    dweight.addmm_(dlogits.T, hidden)
                if dbias is not None:
                    dbias += dlogits.sum(dim=0)
            if dweight_VD is not None and dweight is not None:
                dweight_VD[vocab] = dweight
            if dbias_V is not None and dbias is not None:
                dbias_V[vocab] = dbias
        dhidden = None if dhidden_TD is None else dhidden_TD.to(hidden_TD.dtype)
        return dhidden, dweight_VD, dbias_V, None, None, None


def linear_logprobs(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
) -> torch.Tensor:
    """Log-probs [T] of checked arguments; see ``tso_fast.linear_logprobs``."""
    out: torch.Tensor = LinearLogprobs.apply(hidden_TD, weight_VD, bias_V, targets_T, softcap, temperature)
    return out

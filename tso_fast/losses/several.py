"""Losses of more than a pair under one reference: a second reference, or further sequences."""

from __future__ import annotations

import torch

from tso_fast.losses.rows import check_positive, check_weight, log_ratios, logistic, required
from tso_fast.types import PairLogprobs


def mrpo(pairs: PairLogprobs, *, beta: float = 0.1, alpha: float = -1.0, eta: float = 0.1) -> torch.Tensor:
    """DPO with two references merged into one, [N] (arXiv 2405.16388; as in its code).

    The merged reference is a weighted harmonic mean, log r = -log(alpha / pi_2 + (1 - alpha) / pi_1). pi_1 is the
    reference, an extra model; pi_2 is the second reference (``ref2_logprobs``), the initial policy. The code gives
    alpha to pi_2, which reads the wrong way round, and so does this. log pi_1 is first clipped to
    [(1 + e) log pi_2, (1 - e) log pi_2], e = eta s for the chosen and eta (1 - s) for the rejected response, where
    s = |b_w| / (|b_w| + |b_l|) and b is the mean of the two references' log-probs. Equal references give DPO.

    Args:
        alpha: weight in [0, 1]; < 0: |D_1| / (|D_1| + |D_2|), where D is a reference's log-prob of the chosen response
            minus that of the rejected one. (The code adds 1e-6 to the denominator; here 0 / 0 is 0.)
        eta: width of the clip; < 0: the same width, -eta, for both responses.
    """
    check_positive("beta", beta)
    if not (alpha <= 1 and abs(eta) < torch.inf):
        raise ValueError(f"alpha must be <= 1 and eta finite, got alpha {alpha!r} and eta {eta!r}")
    with torch.no_grad():
        ref_chosen, ref_rejected = _merged_references(pairs, alpha, eta)
    return logistic(beta * (pairs.chosen - ref_chosen) - beta * (pairs.rejected - ref_rejected), pairs)


def _merged_references(pairs: PairLogprobs, alpha: float, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.stack([pairs.ref_chosen, pairs.ref_rejected])
    second = torch.stack([
        required("ref2_chosen", pairs.ref2_chosen, "mrpo"), required("ref2_rejected", pairs.ref2_rejected, "mrpo")
    ])  # fmt: skip
    gaps = torch.stack([first[0] - first[1], second[0] - second[1]])
    weight = _shares(gaps)[0] if alpha < 0 else torch.full_like(first[0], alpha)
    width = eta * _shares((first + second) / 2) if eta >= 0 else torch.full_like(first, -eta)
    first = torch.minimum(torch.maximum(first, second * (1 + width)), second * (1 - width))
    ref_chosen, ref_rejected = -torch.logaddexp(weight.log() - second, torch.log1p(-weight) - first)
    return ref_chosen, ref_rejected


def _shares(values_2N: torch.Tensor) -> torch.Tensor:
    """Each value's share in the sum of both magnitudes, [2, N]; 0 if both are 0."""
    sizes = values_2N.abs()
    return sizes / sizes.sum(0).clamp(min=torch.finfo(sizes.dtype).tiny)


def selm(pairs: PairLogprobs, *, beta: float = 0.01, alpha: float = 0.001) -> torch.Tensor:
    """SELM, [N]: DPO + alpha beta (log pi(y_o | x) - log pi_ref(y_o | x)) (arXiv 2405.19332, eq. 4.2, and its code).

    y_o is the pair's third sequence, the reference's greedy response: the policy is led away from what it knows. Where
    y_o is the chosen or the rejected response, the pair names that sequence again. ``alpha`` was 0.001 for Zephyr and
    0.0001 for Llama-3.
    """
    check_positive("beta", beta)
    check_weight("alpha", alpha)
    chosen, rejected = (beta * ratio for ratio in log_ratios(pairs))
    (optimistic,) = _extra_log_ratios(pairs, 1, "selm")
    return logistic(chosen - rejected, pairs) + alpha * beta * optimistic


def srpo(pairs: PairLogprobs, *, beta: float = 0.1, alpha: float = 0.5) -> torch.Tensor:
    """Self-improving robust preference optimisation, [N] (arXiv 2406.01660; derived, and its defaults unsourced).

    D(y | c) is the log-ratio of y in the context c, and P = p, the soft label (1 without). With the joint loss and the
    self-improvement loss of both orders, loss = (1 - alpha) joint + alpha improvement, where::

        joint       = (P - 1/2 - beta/2 [D(w|x) - D(l|x) + D(w|x,l) - D(l|x,w)])^2      the same in both orders
        improvement = mean of (P - 1/2 - beta [D(w|x,l) - D(l|x,l)])^2 and (1/2 - P - beta [D(l|x,w) - D(w|x,w)])^2

    A pair has four further sequences, in this order: l after (x, w), w after (x, l), w after (x, w), l after (x, l).
    The min-max objective is the paper's; this loss is worked out from it, with the weighting alpha from memory.
    """
    check_positive("beta", beta)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    chosen, rejected = log_ratios(pairs)
    l_after_w, w_after_l, w_after_w, l_after_l = _extra_log_ratios(pairs, 4, "srpo")
    gain = (torch.ones_like(chosen) if pairs.soft_label is None else pairs.soft_label) - 0.5
    joint = (gain - beta / 2 * (chosen - rejected + w_after_l - l_after_w)) ** 2
    up = (gain - beta * (w_after_l - l_after_l)) ** 2
    down = (-gain - beta * (l_after_w - w_after_w)) ** 2
    return (1 - alpha) * joint + alpha * (up + down) / 2


def _extra_log_ratios(pairs: PairLogprobs, count: int, loss: str) -> tuple[torch.Tensor, ...]:
    """Log-ratios of a pair's further sequences, ``count`` tensors [N]."""
    policy, reference = required("extra", pairs.extra, loss), required("ref_extra", pairs.ref_extra, loss)
    if policy.shape != (*pairs.chosen.shape, count) or reference.shape != policy.shape:
        raise ValueError(f"{loss} needs extra and ref_extra [N, {count}], one column for each further sequence of a "
                         f"pair, got {tuple(policy.shape)} and {tuple(reference.shape)}")  # fmt: skip
    return (policy - reference).unbind(-1)

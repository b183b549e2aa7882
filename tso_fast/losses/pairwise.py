"""Losses of a pair's log-ratios to one reference.

A, B: log-ratios of the chosen and the rejected response, sums over tokens; z = beta (A - B); p: soft label; m: margin;
n_w, n_l: numbers of tokens; sigma: the logistic function. ``docs/losses.md`` has all losses in one table.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tso_fast.losses.rows import check_positive, check_weight, log_ratios, logistic, mean_nll, soft_logistic
from tso_fast.types import PairLogprobs


def dual_clip(
    pairs: PairLogprobs,
    *,
    beta: float = 0.1,
    clip_chosen: float = 0.5,
    clip_rejected: float = 0.3,
    nll_weight: float = 0.0,
) -> torch.Tensor:
    """TSO's dual-clip loss, [N].

    With A, B the policy-to-reference log-ratios of the chosen and the rejected response::

        u = min(beta A, clip_chosen)      v = max(beta B, -clip_rejected)      z = u - v - m
        loss = -p log sigma(z) - (1 - p) log sigma(-z) + nll_weight * (mean NLL of the chosen response's tokens)

    Each clip is one-sided: a chosen response whose reward fell is still pulled up. A side at its bound has exactly zero
    gradient, apart from that of the NLL. Infinite bounds give DPO. The paper (arXiv 2409.02118) names a "dual clip
    reward loss", but no public page gives its formula, so this one is ours.

    Args:
        pairs: sums of log-probs, [N] each.
        beta: > 0, reward per nat of log-ratio.
        clip_chosen: >= 0, reward at which a chosen response is no longer pushed up.
        clip_rejected: >= 0, negated reward at which a rejected response is no longer pushed down.
        nll_weight: >= 0, weight of the chosen response's negative log-likelihood.

    Raises:
        ValueError: an option is outside its range.
    """
    check_positive("beta", beta)
    check_weight("nll_weight", nll_weight)
    for name, bound in (("clip_chosen", clip_chosen), ("clip_rejected", clip_rejected)):
        if not bound >= 0:
            raise ValueError(f"{name} must be a number >= 0 (inf: no clip), got {bound!r}")
    chosen, rejected = (beta * ratio for ratio in log_ratios(pairs))
    is_clipped = clipped_sides(chosen, rejected, clip_chosen=clip_chosen, clip_rejected=clip_rejected)
    # where(), not clamp(): clamp passes the gradient at equality, but a side at its bound must have none.
    u = torch.where(is_clipped[:, 0], clip_chosen, chosen)
    v = torch.where(is_clipped[:, 1], -clip_rejected, rejected)
    losses = logistic(u - v, pairs)
    return losses + nll_weight * mean_nll(pairs) if nll_weight else losses


def clipped_sides(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    clip_chosen: float = math.inf,
    clip_rejected: float = math.inf,
) -> torch.Tensor:
    """Which sides ``dual_clip`` clips: [N, 2] bool (chosen, rejected), from rewards [N]."""
    return torch.stack([chosen_rewards >= clip_chosen, rejected_rewards <= -clip_rejected], dim=-1)


def dpo(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """Direct preference optimisation with soft label and margin, [N] (arXiv 2305.18290, eq. 7).

    loss = -p log sigma(z - m) - (1 - p) log sigma(-(z - m)). Called ``sigmoid`` in TRL, and sigmoid-norm by RSO (arXiv
    2309.06657); TRL's ``sigmoid_norm`` is length-normalised, a different loss.
    """
    check_positive("beta", beta)
    chosen, rejected = (beta * ratio for ratio in log_ratios(pairs))
    return logistic(chosen - rejected, pairs)


def soft_ce(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """Cross-entropy with the pair's soft label, [N]: -p log sigma(z) - (1 - p) log sigma(-z).

    The loss of MMPO (arXiv 2410.03145), OSP (2405.14103; p inferred from its name), CREAM (2410.12735), MCTS-DPO
    (2405.00451) and UPO (2409.11212), which differ in how they make p. UPO's printed p = 1 - 1 / (P + 1) trains on
    reversed labels and must be given inverted. p = 1 is DPO. MMPO used beta 0.01, the others 0.1.
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    return soft_logistic(beta * (chosen - rejected), pairs.soft_label)


def margin_dpo(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """DPO with an offset, [N]: -log sigma(z - m); the form of Self-Ref's margin loss (arXiv 2406.11190)."""
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    z = beta * (chosen - rejected)
    return -F.logsigmoid(z if pairs.margin is None else z - pairs.margin)


def cdpo(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> torch.Tensor:
    """Conservative DPO, [N]: -(1 - e) log sigma(z) - e log sigma(-z), with e = ``label_smoothing`` in [0, 0.5].

    As in HALOs' CDPOTrainer. TRL 1.16 has no such loss: its ``sigmoid`` ignores ``label_smoothing``.
    """
    check_positive("beta", beta)
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5], got {label_smoothing!r}")
    chosen, rejected = log_ratios(pairs)
    z = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def robust(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> torch.Tensor:
    """Robust DPO, [N]: (-(1 - e) log sigma(z) + e log sigma(-z)) / (1 - 2 e) (arXiv 2403.00409; TRL ``robust``).

    Unbiased if labels are flipped with probability e = ``label_smoothing``, in [0, 0.5). It can be negative.
    """
    check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    chosen, rejected = log_ratios(pairs)
    z = beta * (chosen - rejected)
    clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(pairs: PairLogprobs, *, beta: float = 0.1, average: bool = False) -> torch.Tensor:
    """IPO, [N]: (A - B - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17, whose tau is ``beta``).

    Args:
        average: the log-ratios are means over tokens, A / n_w and B / n_l, as in TRL's ``ipo``; else sums, as printed.
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    if average:
        chosen, rejected = chosen / pairs.num_chosen_tokens, rejected / pairs.num_rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """Hinge loss on the reward margin, [N]: max(0, 1 - z) (RSO's hinge-norm, arXiv 2309.06657, eq. 10; TRL ``hinge``).

    TRL lists SLiC under this name, but SLiC has no reference: see ``slic``.
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    return torch.relu(1 - beta * (chosen - rejected))


def sppo(pairs: PairLogprobs, *, beta: float = 0.001) -> torch.Tensor:
    """SPPO, [N]: (A - (P_w - 1/2) / beta)^2 / 2 + (B - (P_l - 1/2) / beta)^2 / 2 (arXiv 2405.00675 and its code).

    P_w, P_l are the responses' win rates over the samples of their prompt (``win_rates``). Without them P_w = p, the
    soft label, and P_l = 1 - p; without labels P_w = 1, P_l = 0, which is half of TRL's ``sppo_hard``.
    """
    check_positive("beta", beta)
    chosen, rejected = log_ratios(pairs)
    if pairs.win_rates is not None:
        win_w, win_l = pairs.win_rates.unbind(-1)
    else:
        win_w = torch.ones_like(chosen) if pairs.soft_label is None else pairs.soft_label
        win_l = 1 - win_w
    return ((chosen - (win_w - 0.5) / beta) ** 2 + (rejected - (win_l - 0.5) / beta) ** 2) / 2


def nca(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """NCA of a pair, [N]: -log sigma(beta A) - log sigma(-beta A) / 2 - log sigma(-beta B) / 2.

    arXiv 2402.05369; TRL's ``nca_pair``.
    """
    check_positive("beta", beta)
    chosen, rejected = (beta * ratio for ratio in log_ratios(pairs))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco(pairs: PairLogprobs, *, beta: float = 0.1, delta: float = 0.0) -> torch.Tensor:
    """BCO of a pair, [N]: -log sigma(beta A - delta) - log sigma(-(beta B - delta)) (arXiv 2404.04656).

    ``delta`` is a constant here: 0 is TRL 1.16's ``bco_pair``; the paper tracks the running mean of rewards.
    """
    check_positive("beta", beta)
    if not math.isfinite(delta):
        raise ValueError(f"delta must be a finite number, got {delta!r}")
    chosen, rejected = (beta * ratio - delta for ratio in log_ratios(pairs))
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def apo_zero(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """APO-zero, [N]: 1 - sigma(beta A) + sigma(beta B) (arXiv 2408.06266, eq. 7; TRL ``apo_zero``).

    For chosen responses that are better than the policy's own.
    """
    check_positive("beta", beta)
    chosen, rejected = (beta * ratio for ratio in log_ratios(pairs))
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """APO-down, [N]: sigma(beta A) + 1 - sigma(z) (arXiv 2408.06266, eq. 8; TRL ``apo_down``).

    For chosen responses that are worse than the policy's own: both get less likely, the rejected one more so.
    """
    check_positive("beta", beta)
    chosen, rejected = (beta * ratio for ratio in log_ratios(pairs))
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def dpop(pairs: PairLogprobs, *, beta: float = 0.1, lam: float = 50.0) -> torch.Tensor:
    """DPO-Positive, [N]: -log sigma(beta (A - B - lam max(0, -A))) (arXiv 2402.13228).

    It penalises a chosen response that gets less likely than under the reference. The formula is that of three
    implementations by others; lam = 50 as in the paper is from memory, and some use 5. Some put the penalty outside of
    sigma, a different loss.
    """
    check_positive("beta", beta)
    check_weight("lam", lam)
    chosen, rejected = log_ratios(pairs)
    return -F.logsigmoid(beta * (chosen - rejected - lam * torch.relu(-chosen)))


def bdpo(pairs: PairLogprobs, *, beta: float = 0.1, lam: float = 0.5) -> torch.Tensor:
    """Bounded DPO, [N]: -log sigma(beta (A - log(lam e^B + 1 - lam))) (arXiv 2506.12725, by its author's page).

    DPO with the rejected probability replaced by a mixture of policy and reference, which bounds what can be gained by
    pushing it down. ``lam`` is in (0, 1]; 1 is DPO.
    """
    check_positive("beta", beta)
    if not 0 < lam <= 1:
        raise ValueError(f"lam must be in (0, 1], got {lam!r}")
    chosen, rejected = log_ratios(pairs)
    if lam < 1:
        rest = torch.full_like(rejected, math.log1p(-lam))
        rejected = torch.logaddexp(rejected + math.log(lam), rest)
    return -F.logsigmoid(beta * (chosen - rejected))


def rpo_sft(pairs: PairLogprobs, *, beta: float = 0.01, eta: float = 0.005, average: bool = False) -> torch.Tensor:
    """Regularised preference optimisation, [N]: DPO plus SFT on the chosen response (arXiv 2405.16436 and its code).

    loss = DPO - eta beta log pi(y_w | x), the log-prob summed over tokens: beta 0.01 and eta 0.005 are those of the
    authors' run on Mistral-7B.

    Args:
        average: loss = DPO + eta * (mean NLL of the chosen tokens) instead, the authors' OpenRLHF form, which they ran
            with beta 0.5 and eta 0.2. TRL's index suggests such a mean with the summed form's eta of 0.005.
    """
    check_positive("beta", beta)
    check_weight("eta", eta)
    return dpo(pairs, beta=beta) + (eta * mean_nll(pairs) if average else -eta * beta * pairs.chosen)

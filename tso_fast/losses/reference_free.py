"""Losses that need no reference: its log-probs may be NaN.

a, b: log-probs of the chosen and the rejected response, sums over tokens; n_w, n_l: numbers of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tso_fast.losses.rows import check_positive, check_weight, mean_nll
from tso_fast.types import PairLogprobs


def sft(pairs: PairLogprobs) -> torch.Tensor:
    """Negative log-likelihood of the chosen response, mean over its tokens, [N].

    TRL's ``sft`` is the mean over all chosen tokens of a batch instead, so that long responses count more.
    """
    return mean_nll(pairs)


def slic(pairs: PairLogprobs, *, gamma: float = 0.05) -> torch.Tensor:
    """SLiC's calibration loss, [N]: max(0, 1 - gamma (a - b)) (arXiv 2305.10425, as RSO's eq. 9, arXiv 2309.06657).

    SLiC's delta is 1 / ``gamma``; its regulariser is ``sft``, to be added by a weight. TRL files SLiC under ``hinge``,
    which subtracts a reference.
    """
    check_positive("gamma", gamma)
    return torch.relu(1 - gamma * (pairs.chosen - pairs.rejected))


def simpo(pairs: PairLogprobs, *, beta: float = 2.0, gamma: float = 0.5) -> torch.Tensor:
    """SimPO, [N]: -log sigma(beta (a / n_w - b / n_l) - gamma) (arXiv 2405.14734 and its code).

    ``gamma`` is TRL's ``simpo_gamma``. The authors' code has ``gamma_beta_ratio`` = gamma / beta instead: 0.25 by
    default, 0.1 to 0.8 in their runs.
    """
    check_positive("beta", beta)
    check_weight("gamma", gamma)
    means = pairs.chosen / pairs.num_chosen_tokens - pairs.rejected / pairs.num_rejected_tokens
    return -F.logsigmoid(beta * means - gamma)


def orpo(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """ORPO, [N]: mean NLL of the chosen tokens - beta log sigma(log odds ratio) (arXiv 2403.07691, eq. 6 and 7).

    The odds p / (1 - p) are those of the mean log-prob of a token, p = exp(a / n_w). ``beta`` is the paper's lambda, as
    in TRL, whose NLL also covers the prompt's tokens.
    """
    check_positive("beta", beta)
    chosen, rejected = pairs.chosen / pairs.num_chosen_tokens, pairs.rejected / pairs.num_rejected_tokens
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: torch.Tensor) -> torch.Tensor:
    """log p - log(1 - p); a probability that rounds to 1 counts as 1 - 1e-12, and has no slope."""
    logprob = logprob.clamp(max=-1e-12)
    return logprob - torch.log(-torch.expm1(logprob))

"""Losses with a term of every token, and those terms.

The op sums a term over each sequence, with the token weights if there are any, into ``chosen_terms`` and
``rejected_terms``.
"""

from __future__ import annotations

import torch

from tso_fast.losses.rows import check_positive, check_weight, logistic, required
from tso_fast.types import PairLogprobs, TokenLogprobs


def _difference(pairs: PairLogprobs, loss: str) -> torch.Tensor:
    return required("chosen_terms", pairs.chosen_terms, loss) - required("rejected_terms", pairs.rejected_terms, loss)


def humanline(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """Humanline DPO, [N]: DPO whose log-ratios are sums of clamped log-ratios of tokens (arXiv 2509.24207).

    loss = -p log sigma(z) - (1 - p) log sigma(-z), z = beta (chosen_terms - rejected_terms) - m, see
    ``clamped_log_ratio``. A token counts no further than its bounds and has no gradient beyond them. The bounds' names
    are those of the authors' code (HALOs); that they are applied before the sum is not verified in it.
    """
    check_positive("beta", beta)
    return logistic(beta * _difference(pairs, "humanline"), pairs)


def clamped_log_ratio(
    tokens: TokenLogprobs, *, log_epsilon_P: float = -1.0, log_epsilon_R: float = 1.5
) -> torch.Tensor:
    """clamp(log pi - log pi_ref, log_epsilon_P, log_epsilon_R) of each token, [R]."""
    if not log_epsilon_P < log_epsilon_R:
        raise ValueError(f"log_epsilon_P must be < log_epsilon_R, got {log_epsilon_P!r} and {log_epsilon_R!r}")
    return (tokens.logprobs - _reference(tokens, "humanline")).clamp(log_epsilon_P, log_epsilon_R)


def bmc(pairs: PairLogprobs, *, beta: float = 0.01) -> torch.Tensor:
    """BMC, [N]: DPO on weighted sums of log-probs (arXiv 2408.07471, its code).

    loss = -p log sigma(z) - (1 - p) log sigma(-z), z = beta (chosen_terms - rejected_terms) - m, see
    ``confidence_weighted``. Without marks it is DPO.
    """
    check_positive("beta", beta)
    return logistic(beta * _difference(pairs, "bmc"), pairs)


def confidence_weighted(tokens: TokenLogprobs, *, delta: float = 1.5) -> torch.Tensor:
    """w log pi - w_ref log pi_ref of each token, [R], with weights w = 1 + mark * min(1 / pi, delta), detached.

    ``values`` are marks: 1 for the tokens in which chosen and rejected response differ, 0 elsewhere. As in the code,
    the reference's weights come from its own probabilities; the paper describes the policy's. ``delta`` was 1.5 for
    instruction following, 3.0 for question answering and 2.5 for mathematics.
    """
    check_weight("delta", delta)
    reference, marks = _reference(tokens, "bmc"), required("values", tokens.values, "bmc")

    def weights(logprobs: torch.Tensor) -> torch.Tensor:
        return 1 + marks * (-logprobs.detach()).exp().clamp(max=delta)

    return weights(tokens.logprobs) * tokens.logprobs - weights(reference) * reference


def inverse_q(pairs: PairLogprobs) -> torch.Tensor:
    """Token regression of Inverse-Q*, [N]: the sum of both responses' ``token_regression`` (arXiv 2408.14874; derived).

    The paper's equations were not found. This follows from the identity of maximum-entropy RL between token rewards and
    log-ratios; it uses a pair as two responses, neither of them preferred.
    """
    chosen = required("chosen_terms", pairs.chosen_terms, "inverse_q")
    return chosen + required("rejected_terms", pairs.rejected_terms, "inverse_q")


def token_regression(tokens: TokenLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """(beta (log pi - log pi_ref) - r)^2 of each token, [R]; ``values`` are its rewards r."""
    check_positive("beta", beta)
    rewards = required("values", tokens.values, "inverse_q").detach()
    return (beta * (tokens.logprobs - _reference(tokens, "inverse_q")) - rewards) ** 2


def _reference(tokens: TokenLogprobs, loss: str) -> torch.Tensor:
    return required("ref_logprobs", tokens.ref_logprobs, loss)

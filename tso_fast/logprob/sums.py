"""Sums of log-probs over sequences, and the pairs that a loss makes of them."""

from __future__ import annotations

import dataclasses

import torch

from tso_fast.types import PairLogprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the tokens of some sequences, one value a sequence."""

    logprob: torch.Tensor
    ref_logprob: torch.Tensor
    ref2_logprob: torch.Tensor | None
    """Under a second reference."""
    term: torch.Tensor | None
    """Of the loss's ``token_term``."""
    num_tokens: torch.Tensor

    def of_pairs(
        self, columns: list[torch.Tensor], soft_label_N: torch.Tensor | None, margin_N: torch.Tensor | None,
        win_rates_N2: torch.Tensor | None,
    ) -> PairLogprobs:  # fmt: skip
        """The pairs whose chosen, rejected and further sequences the columns name."""
        chosen, rejected, *others = columns
        further: dict[str, torch.Tensor] = {}
        if others:
            extra = torch.stack(others, 1)
            further = {
                "extra": self.logprob[extra],
                "ref_extra": self.ref_logprob[extra],
                "num_extra_tokens": self.num_tokens[extra],
            }
        if self.ref2_logprob is not None:
            further |= {"ref2_chosen": self.ref2_logprob[chosen], "ref2_rejected": self.ref2_logprob[rejected]}
        if self.term is not None:
            further |= {"chosen_terms": self.term[chosen], "rejected_terms": self.term[rejected]}
        return PairLogprobs(
            chosen=self.logprob[chosen],
            rejected=self.logprob[rejected],
            ref_chosen=self.ref_logprob[chosen],
            ref_rejected=self.ref_logprob[rejected],
            num_chosen_tokens=self.num_tokens[chosen],
            num_rejected_tokens=self.num_tokens[rejected],
            soft_label=soft_label_N,
            margin=margin_N,
            win_rates=win_rates_N2,
            **further,
        )


def checked_losses(losses: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """The losses. Raises ValueError unless they are one value per pair."""
    if losses.shape != (num_pairs,):
        raise ValueError(f"the loss must return one value a pair, [{num_pairs}], got {tuple(losses.shape)}")
    return losses

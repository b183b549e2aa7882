"""A loss and what others must know of it, and the parts that several losses share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

from tso_fast.types import PairLogprobs, TokenLogprobs

LossFunction = Callable[..., torch.Tensor]
"""Function from ``PairLogprobs`` and keyword-only options to [N] losses."""

FURTHER_INPUTS = frozenset({"ref2_logprobs", "win_rates", "token_values"})
"""Arguments of ``preference_loss`` that only some losses read."""


@dataclass(frozen=True)
class Loss:
    """A loss and its properties; callable like its function."""

    function: LossFunction
    title: str
    """Name in tables and reports."""
    needs_reference: bool = True
    """Whether the loss uses the reference's log-probs; if not, they may be NaN."""
    takes_labels: bool | Literal["soft_label", "margin"] = True
    """Whether the loss uses soft labels and margins, or which of the two."""
    is_per_pair: bool = True
    """Whether a pair's loss depends on that pair alone, so that pairs can be computed in chunks."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Bound options; the others have the function's defaults."""
    token_term: Callable[..., torch.Tensor] | None = None
    """Function from ``TokenLogprobs`` and keyword-only options to one term per token, [R], which depends on that token
    alone; None: there are no terms. The op sums them over each sequence into ``chosen_terms`` and ``rejected_terms``.
    With ``needs_reference`` the function gets the reference's log-prob of each token."""
    needs: frozenset[str] = frozenset()
    """Which of ``FURTHER_INPUTS`` the loss cannot do without."""
    takes: frozenset[str] = frozenset()
    """Which of ``FURTHER_INPUTS`` it uses if they are given."""
    num_extra: int | None = 0
    """Number of further sequences of a pair that it uses; None: any."""

    def __call__(self, pairs: PairLogprobs, **options: Any) -> torch.Tensor:
        given = {**self.options, **options}
        if self.token_term is not None:
            of_terms = keyword_options(self.token_term).keys() - keyword_options(self.function).keys()
            given = {name: value for name, value in given.items() if name not in of_terms}
        return self.function(pairs, **given)

    def terms(self, tokens: TokenLogprobs, **options: Any) -> torch.Tensor:
        """The terms of tokens, [R], at the loss's options; only of a loss with a ``token_term``."""
        assert self.token_term is not None
        known = keyword_options(self.token_term)
        given = {name: value for name, value in {**self.options, **options}.items() if name in known}
        return self.token_term(tokens, **given)

    @property
    def labels(self) -> frozenset[str]:
        """``soft_label`` and ``margin``, as far as the loss uses them."""
        if isinstance(self.takes_labels, str):
            return frozenset({self.takes_labels})
        return frozenset({"soft_label", "margin"} if self.takes_labels else ())


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters of a function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def log_ratios(pairs: PairLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy-to-reference log-ratios A of the chosen and B of the rejected responses, [N] each."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def logistic(z: torch.Tensor, pairs: PairLogprobs) -> torch.Tensor:
    """-p log sigma(z - m) - (1 - p) log sigma(-(z - m)) with the pairs' soft labels p and margins m."""
    return soft_logistic(z if pairs.margin is None else z - pairs.margin, pairs.soft_label)


def soft_logistic(z: torch.Tensor, soft_label: torch.Tensor | None) -> torch.Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z); p is 1 if ``soft_label`` is None."""
    if soft_label is None:
        return -F.logsigmoid(z)
    return -soft_label * F.logsigmoid(z) - (1 - soft_label) * F.logsigmoid(-z)


def mean_nll(pairs: PairLogprobs) -> torch.Tensor:
    """Negative log-likelihood of the chosen responses, mean over their tokens, [N]."""
    return -pairs.chosen / pairs.num_chosen_tokens


def required(name: str, value: torch.Tensor | None, loss: str) -> torch.Tensor:
    """The field of ``PairLogprobs``, which this loss needs.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"{loss} needs PairLogprobs.{name}, got None")
    return value


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_weight(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")

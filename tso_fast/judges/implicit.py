"""Implicit scores: the log-probs that a cell of the matrix gives to responses, whoever wrote them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tso_fast.errors import InputError
from tso_fast.judges.judge import Bench, Judge, Judged, Opinion, as_verdicts
from tso_fast.matrix import ModelMatrix, require_weights
from tso_fast.models.layout import padded
from tso_fast.models.load import device_of, load_model
from tso_fast.models.memory import release
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import encode_prompt, padding_id, response_ids
from tso_fast.types import Candidates, Cell


@dataclass(frozen=True, kw_only=True)
class SequenceLogprob:
    """``SequenceLogprob(logprob=-12.5, num_tokens=8)``"""

    logprob: float
    """Sum over the completion's tokens, nats."""
    num_tokens: int


NOTHING = SequenceLogprob(logprob=0.0, num_tokens=0)
"""What is subtracted where there is no reference."""


TOO_LONG = Opinion(None, "longer than the context")


class CellsJudge(Judge):
    """A judge by what cells give to responses: ``cell``, and ``reference`` where there is one."""

    needs_models = True

    @property
    def cells(self) -> list[str]:
        """The cells that are asked, the reference last."""
        return [self.config.cell or "policy", *([self.config.reference] if self.config.reference else [])]

    def check(self, matrix: ModelMatrix | None) -> None:
        for name in self.cells:
            find_cell(name, self.name, matrix)

    def num_steps(self, candidates: Sequence[Candidates]) -> int:
        return len(self.cells) * sum(len(item.responses) for item in candidates)


class ImplicitJudge(CellsJudge):
    """Judge of kind ``implicit``: log-probs of a cell, less those of a reference cell where there is one.

    The difference is the DPO reward over beta.
    """

    takes = ("cell", "reference", "length_normalized")

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        scores = [logprobs_by(name, self.name, candidates, bench) for name in self.cells]
        verdicts = []
        for item, *by_cell in zip(candidates, *scores, strict=True):
            opinions = [self._opinion(*by_response) for by_response in zip(*by_cell, strict=True)]
            verdicts += as_verdicts(item, self.name, opinions)
        return Judged(verdicts)

    def _opinion(self, own: SequenceLogprob | None, base: SequenceLogprob | None = NOTHING) -> Opinion:
        reward = implicit_reward(own, base, self.config.length_normalized)
        return TOO_LONG if reward is None else Opinion(reward)


def implicit_reward(own: SequenceLogprob | None, base: SequenceLogprob | None, length_normalized: bool) -> float | None:
    """Log-prob less the reference's, a token if told so; None: one of them is not known."""
    if own is None or base is None:
        return None
    score = own.logprob - base.logprob
    return score / own.num_tokens if length_normalized else score


def find_cell(name: str, judge: str, matrix: ModelMatrix | None) -> Cell:
    """The cell of a name, whose weights are here.

    Raises:
        InputError: there is none; says which judge asks for it.
    """
    if matrix is None:
        raise InputError(f"judges: {judge!r} asks for cell {name!r}, and there are no cells; set cells")
    found = matrix.named
    if name not in found:
        hint = "; no cell is older than the policy" if name == "previous" else ""
        raise InputError(
            f"judges: {judge!r} asks for cell {name!r}; the cells are {', '.join(found)}; "
            f"the current one is policy{hint}"
        )
    require_weights(found[name], f"judges: {judge!r}")
    return found[name]


def logprobs_by(
    name: str, judge: str, candidates: Sequence[Candidates], bench: Bench
) -> list[list[SequenceLogprob | None]]:
    """What the cell of a name gives to every response of every prompt, see ``cell_logprobs``."""
    assert bench.matrix is not None
    return cell_logprobs(
        find_cell(name, judge, bench.matrix),
        candidates,
        bench.matrix.tokenizer,
        **loading(bench),
        impl=bench.impl,
        advance=bench.advance,
    )


def loading(bench: Bench) -> dict[str, Any]:
    """How cells are loaded, for ``loaded`` and ``cell_logprobs``."""
    assert bench.settings is not None
    return {
        "dtype": bench.settings.dtype,
        "attn_implementation": bench.settings.attn_implementation,
        "device": device_of(bench.settings.use_cpu),
    }


@contextlib.contextmanager
def loaded(cell: Cell, **options: Any) -> Iterator[PreTrainedModel]:
    """A cell's model for the while, its adapter unmerged."""
    model = load_model(cell.path, base=cell.base, **options)
    try:
        yield model
    finally:
        release(model)


@torch.inference_mode()
def response_logprobs(
    model: PreTrainedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_token_id: int,
    tokens_per_batch: int = 16384,
    impl: str = "auto",
    advance: Callable[[int], None] = lambda n: None,
    is_training: bool = False,
) -> list[SequenceLogprob]:
    """Log-probs of completions after their prompts, in the order of the rows; full logits never exist.

    Args:
        rows: token ids of (prompt, completion).
        tokens_per_batch: most tokens of a forward pass, padding included; a longer row goes alone.
        impl: implementation of ``linear_logprobs``.
        advance: is told how many more rows are done.
        is_training: leave dropout on.

    Raises:
        ValueError: a prompt or a completion without tokens.
        InputError: the model gives log-probs that are not finite.
    """
    for i, (prompt, completion) in enumerate(rows):
        if not prompt or not completion:
            raise ValueError(
                f"row {i}: its prompt has {len(prompt)} tokens and its completion {len(completion)}; "
                "expected at least one each"
            )
    policy = Policy(model.eval())
    model.train(is_training)
    out: dict[int, SequenceLogprob] = {}
    for index in batches([len(prompt) + len(completion) for prompt, completion in rows], tokens_per_batch):
        batch = [(tuple(rows[i][0]), tuple(rows[i][1])) for i in index]
        sums = policy.logprobs(padded(batch, pad_token_id).to(model.device), impl=impl).sum(dim=1, dtype=torch.float64)
        if not sums.isfinite().all():
            raise InputError(
                f"{model.name_or_path}: the model gives log-probs that are not finite; its weights are "
                f"damaged, or {model.dtype} is too narrow for it"
            )
        for i, logprob in zip(index, sums.tolist(), strict=True):
            out[i] = SequenceLogprob(logprob=logprob, num_tokens=len(rows[i][1]))
        advance(len(index))
    return [out[i] for i in range(len(rows))]


def batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Rows of like length together, the longest first: what does not fit in memory fails at once."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The last token of a row is only a target.
        if batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] - 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def encoded(
    cell: Cell, candidates: Sequence[Candidates], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], list[list[bool]]]:
    """Token ids of (prompt, response) of all responses that fit the cell's context; by prompt, whether each fits."""
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    is_scored: list[list[bool]] = []
    for item in candidates:
        prompt = encode_prompt(tokenizer, item.prompt)
        responses = [response_ids(tokenizer, item.prompt, response) for response in item.responses]
        is_scored.append([cell.context is None or len(prompt) + len(ids) <= cell.context for ids in responses])
        rows += [(prompt, ids) for ids, fits in zip(responses, is_scored[-1], strict=True) if fits]
    return rows, is_scored


def cell_logprobs(
    cell: Cell,
    candidates: Sequence[Candidates],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    attn_implementation: str,
    device: torch.device | str,
    tokens_per_batch: int = 16384,
    impl: str = "auto",
    advance: Callable[[int], None] = lambda n: None,
) -> list[list[SequenceLogprob | None]]:
    """What a cell gives to every response of every prompt; None where prompt and response exceed its context.

    What was sampled is scored token by token, what was written by the tokens of its text. The model is loaded, its
    adapter unmerged, and freed again.
    """
    rows, is_scored = encoded(cell, candidates, tokenizer)
    pad = padding_id(tokenizer)
    with loaded(cell, dtype=dtype, attn_implementation=attn_implementation, device=device) as model:
        scores = iter(
            response_logprobs(
                model, rows, pad_token_id=pad, tokens_per_batch=tokens_per_batch, impl=impl, advance=advance
            )
        )
    return [[next(scores) if fits else None for fits in flags] for flags in is_scored]

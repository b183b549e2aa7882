"""Preference pairs to batches, and the order of the steps that use them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tso_fast.models.layout import padded, shared
from tso_fast.models.tokens import IGNORE, encode_prompt, response_ids, revision_prompt
from tso_fast.types import PairBatch, PreferencePair

InContext = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context, mostly the prompt, and of the completion that is scored in it."""


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """Token ids of a pair, its scalars and where it came from. All pairs of an iteration have as many sequences."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    scale: float
    soft_label: float
    margin: float
    prompt_id: str
    win_rates: tuple[float, float] | None = None
    extra: tuple[InContext, ...] = ()
    """Further sequences, whose meaning is the loss's."""

    @property
    def sequences(self) -> tuple[InContext, ...]:
        """The chosen and the rejected sequence and the further ones."""
        return (self.prompt, self.chosen), (self.prompt, self.rejected), *self.extra

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(context) + len(completion) for context, completion in self.sequences)


class Encoded(NamedTuple):
    """What is trained on, and the ids of the prompts whose pair is not, or not whole."""

    pairs: list[EncodedPair]
    too_long: list[str]
    """Left out: they do not fit the context, or ``max_length`` leaves no room for a response."""
    truncated: list[str]
    """The end of a response was cut off, so that prompt and response have ``max_length`` tokens."""


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    context: int | None,
    max_length: int | None = None,
    revision_template: str | None = None,
) -> Encoded:
    """Encodes pairs; the prompt is never cut.

    Args:
        revision_template: each response is a sequence after the other one and after itself too, see
            ``revision_prompt``.
    """
    found = Encoded([], [], [])
    for pair in pairs:
        whole = _sequences(tokenizer, pair, revision_template)
        cut = [
            (before, ids[: None if max_length is None else max(0, max_length - len(before))]) for before, ids in whole
        ]
        item = EncodedPair(
            prompt=cut[0][0],
            chosen=cut[0][1],
            rejected=cut[1][1],
            scale=pair.scale,
            soft_label=pair.soft_label,
            margin=pair.margin,
            prompt_id=pair.prompt.id,
            win_rates=pair.win_rates,
            extra=tuple(cut[2:]),
        )
        if not all(ids for _, ids in cut) or (context is not None and item.length > context):
            found.too_long.append(pair.prompt.id)
            continue
        found.pairs.append(item)
        if cut != whole:
            found.truncated.append(pair.prompt.id)
    return found


def _sequences(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, revision_template: str | None
) -> list[InContext]:
    """The sequences of a pair; with a template also rejected after chosen, chosen after rejected, and each after
    itself, in this order."""
    prompt = encode_prompt(tokenizer, pair.prompt)
    responses = [pair.chosen, pair.rejected, *pair.extra]
    ids = [response_ids(tokenizer, pair.prompt, response) for response in responses]
    if revision_template is None:
        return [(prompt, own) for own in ids]
    after_chosen, after_rejected = (
        encode_prompt(tokenizer, revision_prompt(pair.prompt, response.text, revision_template))
        for response in responses[:2]
    )
    chosen, rejected = ids[:2]
    revised = (after_chosen, rejected), (after_rejected, chosen), (after_chosen, chosen), (after_rejected, rejected)
    return [*((prompt, own) for own in ids), *revised]


def completion_lengths(pairs: Sequence[EncodedPair]) -> list[int]:
    """Numbers of tokens of all completions, pair by pair the chosen and the rejected one, then the further ones."""
    return [len(completion) for pair in pairs for _, completion in pair.sequences]


def collate(
    pairs: Sequence[EncodedPair],
    index: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device,
    share_prompts: bool = False,
    ref_logprobs: torch.Tensor | None = None,
    ref_tokens: Sequence[torch.Tensor] | None = None,
    ref2_logprobs: torch.Tensor | None = None,
    token_values: Sequence[torch.Tensor] | None = None,
    is_padding: Sequence[bool] | None = None,
) -> PairBatch:
    """Batch of the pairs ``index``; a response that is in several of them is in it once.

    Args:
        share_prompts: a prompt once for all of its responses, else each sequence in a row of its own.
        ref_logprobs: [number of pairs, 2 + E] reference sums (chosen, rejected, further ones), or None.
        ref_tokens: reference log-probs of the tokens of each completion, pair by pair as in ``EncodedPair.sequences``.
        ref2_logprobs: like ``ref_logprobs``, under a second reference.
        token_values: like ``ref_tokens``, numbers for the loss; sequences that differ in them are not the same.
        is_padding: pairs that only fill the batch; they get scale 0.
    """
    each = len(pairs[0].sequences)
    owners = [each * i + side for i in index for side in range(each)]
    sequences = [sequence for i in index for sequence in pairs[i].sequences]
    values = [None if token_values is None else tuple(token_values[at].tolist()) for at in owners]
    sides = list(zip(sequences, values, strict=True))
    first: dict[Any, int] = {}
    for at in (at for side in range(each) for at in range(side, len(sides), each)):  # the chosen ones first
        first.setdefault(sides[at], at)
    number = {side: n for n, side in enumerate(first)}
    layout = (shared if share_prompts else padded)([sequences[at] for at in first.values()], pad_token_id).to(device)
    owner = [owners[at] for at in first.values()]

    def of_tokens(by_completion: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
        if by_completion is None:
            return None
        out = torch.zeros(layout.targets.shape, device=device)
        out[layout.targets != IGNORE] = torch.cat([by_completion[at] for at in owner]).to(device)
        return out

    def of_sequences(sums: torch.Tensor | None) -> torch.Tensor | None:
        return None if sums is None else sums.reshape(-1)[owner].to(device)

    keep = 1.0 - torch.tensor(is_padding if is_padding is not None else [False] * len(index), dtype=torch.float32)
    win_rates = [rates for i in index if (rates := pairs[i].win_rates) is not None]
    return PairBatch(
        layout=layout,
        pairs=torch.tensor([number[side] for side in sides]).reshape(-1, each).to(device),
        scale=(torch.tensor([pairs[i].scale for i in index]) * keep).to(device),
        soft_label=torch.tensor([pairs[i].soft_label for i in index]).to(device),
        margin=torch.tensor([pairs[i].margin for i in index]).to(device),
        ref_logprobs=of_sequences(ref_logprobs),
        ref_token_logprobs=of_tokens(ref_tokens),
        ref2_logprobs=of_sequences(ref2_logprobs),
        win_rates=torch.tensor(win_rates).to(device) if win_rates else None,
        token_values=of_tokens(token_values),
    )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one process computes in one forward pass."""

    index: list[int]
    is_padding: list[bool]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step: this process's share, and what all processes share."""

    epoch: int
    micro_batches: list[MicroBatch]
    all_index: list[int]


def plan_steps(
    prompts: Sequence[Hashable],
    *,
    epochs: int,
    micro_size: int,
    accumulation: int,
    rank: int,
    world: int,
    seed: int,
    grouped: bool = False,
    fits: Callable[[Sequence[int]], bool] = lambda index: True,
) -> Iterator[Step]:
    """Steps of an iteration; the pairs of a step do not depend on how many processes or passes share it.

    Pairs of a prompt that are in the same step are in the same pass, as far as they fit, and share it. A share that
    runs short is filled with a repeated pair of scale 0, so that every process makes as many passes.

    Args:
        prompts: what the prompt of each pair is known by.
        grouped: pairs of a prompt are in the same step, else they fall where chance puts them.
        fits: whether pairs fit into one pass; a step is made in more passes until they do, or are single.
    """
    size = micro_size * accumulation * world
    members = list(_by_prompt(prompts, range(len(prompts))).values()) if grouped else []
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        if grouped:
            order = [i for g in random.permutation(len(members)) for i in random.permutation(members[g]).tolist()]
        else:
            order = random.permutation(len(prompts)).tolist()
        for start in range(0, len(order), size):
            batch = [i for group in _by_prompt(prompts, order[start : start + size]).values() for i in group]
            parts = -(-len(batch) // (micro_size * world))
            while not all(map(fits, _shares_of(batch, parts * world))) and parts * world < len(batch):
                parts += 1
            micro_batches = [
                MicroBatch(index=share or batch[:1], is_padding=[not share] * max(1, len(share)))
                for share in _shares_of(batch, parts * world)[rank::world]
            ]
            yield Step(epoch=epoch, micro_batches=micro_batches, all_index=batch)


def _shares_of(batch: list[int], count: int) -> list[list[int]]:
    """So many runs of pairs, as equal as can be; the last ones may be empty."""
    bounds = [-(-len(batch) * share // count) for share in range(count + 1)]
    return [batch[a:b] for a, b in itertools.pairwise(bounds)]


def num_tokens(pairs: Sequence[EncodedPair], index: Iterable[int], share_prompts: bool) -> int:
    """Tokens that the model computes for pairs, their padding left out."""
    sequences = {sequence for i in index for sequence in pairs[i].sequences}
    prompts = {prompt for prompt, _ in sequences} if share_prompts else [prompt for prompt, _ in sequences]
    return sum(map(len, prompts)) + sum(len(side) - 1 for _, side in sequences)


def _by_prompt(prompts: Sequence[Hashable], index: Iterable[int]) -> dict[Hashable, list[int]]:
    """Pairs by their prompts, in the order in which they come."""
    groups: dict[Hashable, list[int]] = {}
    for i in index:
        groups.setdefault(prompts[i], []).append(i)
    return groups


def num_steps(num_pairs: int, *, epochs: int, micro_size: int, accumulation: int, world: int) -> int:
    return epochs * -(-num_pairs // (micro_size * accumulation * world))

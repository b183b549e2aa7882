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
from tso_fast.models.tokens import IGNORE, encode_prompt, response_ids
from tso_fast.types import PairBatch, PreferencePair


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """Token ids of a pair, its scalars and where it came from."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    scale: float
    soft_label: float
    margin: float
    prompt_id: str

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


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
) -> Encoded:
    """Encodes pairs; the prompt is never cut."""
    found = Encoded([], [], [])
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair.prompt)
        sides = [response_ids(tokenizer, pair.prompt, response) for response in (pair.chosen, pair.rejected)]
        room = None if max_length is None else max(0, max_length - len(prompt))
        chosen, rejected = (side[:room] for side in sides)
        item = EncodedPair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            scale=pair.scale,
            soft_label=pair.soft_label,
            margin=pair.margin,
            prompt_id=pair.prompt.id,
        )
        if room == 0 or (context is not None and item.length > context):
            found.too_long.append(pair.prompt.id)
            continue
        found.pairs.append(item)
        if [chosen, rejected] != sides:
            found.truncated.append(pair.prompt.id)
    return found


def completion_lengths(pairs: Sequence[EncodedPair]) -> list[int]:
    """Numbers of tokens of all completions, pair by pair the chosen and the rejected one."""
    return [len(completion) for pair in pairs for completion in (pair.chosen, pair.rejected)]


def collate(
    pairs: Sequence[EncodedPair],
    index: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device,
    share_prompts: bool = False,
    ref_logprobs: torch.Tensor | None = None,
    ref_tokens: Sequence[torch.Tensor] | None = None,
    is_padding: Sequence[bool] | None = None,
) -> PairBatch:
    """Batch of the pairs ``index``; a response that is in several of them is in it once.

    Args:
        share_prompts: a prompt once for all of its responses, else each sequence in a row of its own.
        ref_logprobs: [number of pairs, 2] reference sums (chosen, rejected), or None.
        ref_tokens: reference log-probs of the tokens of each completion, pair by pair the chosen and the rejected one.
        is_padding: pairs that only fill the batch; they get scale 0.
    """
    sides = [(pairs[i].prompt, response) for i in index for response in (pairs[i].chosen, pairs[i].rejected)]
    owners = [2 * i + side for i in index for side in (0, 1)]
    in_order = [*range(0, len(sides), 2), *range(1, len(sides), 2)]  # the chosen ones first
    first: dict[Any, int] = {}
    for at in in_order:
        first.setdefault(sides[at], at)
    number = {sequence: n for n, sequence in enumerate(first)}
    layout = (shared if share_prompts else padded)(list(number), pad_token_id).to(device)
    keep = 1.0 - torch.tensor(is_padding if is_padding is not None else [False] * len(index), dtype=torch.float32)
    owner = [owners[at] for at in first.values()]
    tokens = None
    if ref_tokens is not None:
        tokens = torch.zeros(layout.targets.shape, device=device)
        tokens[layout.targets != IGNORE] = torch.cat([ref_tokens[at] for at in owner]).to(device)
    return PairBatch(
        layout=layout,
        pairs=torch.tensor([number[sequence] for sequence in sides]).reshape(-1, 2).to(device),
        scale=(torch.tensor([pairs[i].scale for i in index]) * keep).to(device),
        soft_label=torch.tensor([pairs[i].soft_label for i in index]).to(device),
        margin=torch.tensor([pairs[i].margin for i in index]).to(device),
        ref_logprobs=None if ref_logprobs is None else ref_logprobs.reshape(-1)[owner].to(device),
        ref_token_logprobs=tokens,
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
    sequences = {(pairs[i].prompt, side) for i in index for side in (pairs[i].chosen, pairs[i].rejected)}
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

"""Preference pairs to padded batches, and the order of the steps that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tso_fast.models.tokens import IGNORE, encode_prompt, pad_sequences, response_ids
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
    ref_logprobs: torch.Tensor | None = None,
    ref_tokens: Sequence[torch.Tensor] | None = None,
    is_padding: Sequence[bool] | None = None,
) -> PairBatch:
    """Batch of the pairs ``index``.

    Args:
        ref_logprobs: [number of pairs, 2] reference sums (chosen, rejected), or None.
        ref_tokens: reference log-probs of the tokens of each completion, pair by pair the chosen and the rejected one.
        is_padding: pairs that only fill the batch; they get scale 0.
    """
    chosen = [(pairs[i].prompt, pairs[i].chosen) for i in index]
    rejected = [(pairs[i].prompt, pairs[i].rejected) for i in index]
    ids, mask, targets = pad_sequences(chosen + rejected, pad_token_id)
    keep = 1.0 - torch.tensor(is_padding if is_padding is not None else [False] * len(index), dtype=torch.float32)
    reference = None if ref_logprobs is None else ref_logprobs[list(index)].T.reshape(-1).to(device)
    tokens = None
    if ref_tokens is not None:
        tokens = torch.zeros(targets.shape)
        tokens[targets != IGNORE] = torch.cat([ref_tokens[2 * i + side] for side in (0, 1) for i in index])
    return PairBatch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        targets=targets.to(device),
        scale=(torch.tensor([pairs[i].scale for i in index]) * keep).to(device),
        soft_label=torch.tensor([pairs[i].soft_label for i in index]).to(device),
        margin=torch.tensor([pairs[i].margin for i in index]).to(device),
        ref_logprobs=reference,
        ref_token_logprobs=None if tokens is None else tokens.to(device),
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
    num_pairs: int, *, epochs: int, micro_size: int, accumulation: int, rank: int, world: int, seed: int
) -> Iterator[Step]:
    """Steps of an iteration; the pairs of a step do not depend on how many processes or passes share it.

    A share that runs short is filled with a repeated pair of scale 0, so that every process makes as many passes.
    """
    size = micro_size * accumulation * world
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()
        for start in range(0, num_pairs, size):
            batch = order[start : start + size]
            parts = min(accumulation, -(-len(batch) // (micro_size * world)))
            micro_batches = []
            for part in range(parts):
                share = batch[part * world + rank :: parts * world]
                micro_batches.append(MicroBatch(index=share or batch[:1], is_padding=[not share] * max(1, len(share))))
            yield Step(epoch=epoch, micro_batches=micro_batches, all_index=batch)


def num_steps(num_pairs: int, *, epochs: int, micro_size: int, accumulation: int, world: int) -> int:
    return epochs * -(-num_pairs // (micro_size * accumulation * world))

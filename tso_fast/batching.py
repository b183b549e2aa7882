"""Text to tokens, and pairs to padded batches.

What a cell sampled is trained on token by token; only text from elsewhere is tokenised here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tso_fast.errors import InputError
from tso_fast.types import PairBatch, PreferencePair, Prompt, Response

IGNORE = -100


def _render(tokenizer: Any, prompt: Prompt, response: str | None = None) -> str:
    """The prompt by the chat template, ready for an answer, or with ``response`` as one."""
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
    except TemplateError as error:
        raise InputError(f"{prompt.where or prompt.id}: field 'prompt' is refused by the chat template: {error}; "
                         f"it has the roles {', '.join(m.role for m in prompt.messages)}") from error  # fmt: skip
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt, up to where the response starts.

    With a chat template the prompt is rendered by it, a plain string as one user message. Without one it must be a
    plain string, and gets the tokens that the tokenizer puts before a text.

    Raises:
        InputError: a conversation without a chat template, or a prompt without tokens.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = _ids(tokenizer, _render(tokenizer, prompt))
    else:
        if not isinstance(prompt.prompt, str):
            raise InputError(f"{prompt.where or prompt.id}: field 'prompt' is a conversation, but the tokenizer has no "
                             "chat template; expected a string, or a tokenizer with one")  # fmt: skip
        ids = tokenizer(prompt.prompt, verbose=False)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    if not ids:
        raise InputError(f"{prompt.where or prompt.id}: field 'prompt' has no tokens")
    return tuple(ids)


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> tuple[int, ...]:
    """Token ids of a response that was written, not sampled: its text and the one token that ends it.

    With a chat template it is what the template puts after the prompt, as far as the end of the turn.
    """
    completion = text
    if getattr(tokenizer, "chat_template", None):
        before, full = _render(tokenizer, prompt), _render(tokenizer, prompt, text)
        # Some templates rewrite earlier turns once an answer follows; then the bare text is all there is.
        if full.startswith(before):
            completion = full[len(before) :]
    end = end_of_turn(tokenizer)
    ids = [*_ids(tokenizer, completion), end]
    length = next(i for i, token in enumerate(ids, start=1) if token in (end, tokenizer.eos_token_id))
    return tuple(ids[:length])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response: the first special one that the chat template puts after it, else end-of-sequence.

    They differ in the templates of Gemma and Phi: what is sampled ends with "<end_of_turn>", no "<eos>" follows.
    """
    return _end_of_turn(tokenizer, getattr(tokenizer, "chat_template", None), tokenizer.eos_token_id)


@functools.lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, chat_template: str | None, eos: int) -> int:
    """Asked for every written response; what may be replaced in a tokenizer is an argument, so that it is seen."""
    if not chat_template:
        return eos
    answer = "tso-fast"
    after = _render(tokenizer, Prompt(id="end_of_turn", prompt="-"), answer).rpartition(answer)[2]
    added = tokenizer.added_tokens_decoder
    return next((i for i in _ids(tokenizer, after) if i in added and added[i].special), eos)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: a text longer than the context is for check_fits to refuse.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def response_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Response) -> tuple[int, ...]:
    """The tokens that were sampled, else those of the text."""
    return response.token_ids or encode_response(tokenizer, prompt, response.text)


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


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], context: int | None
) -> tuple[list[EncodedPair], list[str]]:
    """Encodes pairs; the second list names prompts whose pair does not fit the context and is left out, untruncated."""
    encoded, too_long = [], []
    for pair in pairs:
        item = EncodedPair(
            prompt=encode_prompt(tokenizer, pair.prompt),
            chosen=response_ids(tokenizer, pair.prompt, pair.chosen),
            rejected=response_ids(tokenizer, pair.prompt, pair.rejected),
            scale=pair.scale,
            soft_label=pair.soft_label,
            margin=pair.margin,
            prompt_id=pair.prompt.id,
        )
        if context is not None and item.length > context:
            too_long.append(pair.prompt.id)
        else:
            encoded.append(item)
    return encoded, too_long


def pad_sequences(
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded inputs, attention mask and shifted targets, [S, L] int64 each, of (prompt, completion) rows."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows) - 1  # the last token is only a target
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORE)
    for row, (prompt, completion) in enumerate(rows):
        sequence = torch.tensor(prompt + completion)
        ids[row, : len(sequence) - 1] = sequence[:-1]
        mask[row, : len(sequence) - 1] = 1
        targets[row, len(prompt) - 1 : len(sequence) - 1] = sequence[len(prompt) :]
    return ids, mask, targets


def collate(
    pairs: Sequence[EncodedPair],
    index: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device,
    ref_logprobs: torch.Tensor | None = None,
    is_padding: Sequence[bool] | None = None,
) -> PairBatch:
    """Batch of the pairs ``index``.

    Args:
        ref_logprobs: [number of pairs, 2] reference sums (chosen, rejected), or None.
        is_padding: pairs that only fill the batch; they get scale 0.
    """
    chosen = [(pairs[i].prompt, pairs[i].chosen) for i in index]
    rejected = [(pairs[i].prompt, pairs[i].rejected) for i in index]
    ids, mask, targets = pad_sequences(chosen + rejected, pad_token_id)
    keep = 1.0 - torch.tensor(is_padding if is_padding is not None else [False] * len(index), dtype=torch.float32)
    reference = None if ref_logprobs is None else ref_logprobs[list(index)].T.reshape(-1).to(device)
    return PairBatch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        targets=targets.to(device),
        index=torch.tensor(list(index)),
        scale=(torch.tensor([pairs[i].scale for i in index]) * keep).to(device),
        soft_label=torch.tensor([pairs[i].soft_label for i in index]).to(device),
        margin=torch.tensor([pairs[i].margin for i in index]).to(device),
        ref_logprobs=reference,
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

"""Tokenises prompts and written responses.

Sampled responses already have token ids, and training uses exactly those.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tso_fast.errors import InputError
from tso_fast.types import Prompt, Response

IGNORE = -100


def _render(tokenizer: Any, prompt: Prompt, response: str | None = None) -> str:
    """The prompt rendered by the chat template, up to where an answer starts, or with ``response`` as the answer."""
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
    except Exception as error:  # a template can raise anything: it may add a number to a text, or recurse
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{prompt.where or prompt.id}: field 'prompt' is refused by the chat template: {reason}; "
            f"it has the roles {', '.join(m.role for m in prompt.messages)}"
        ) from error
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt, up to where the response starts, or goes on from the prompt's ``prefix``.

    If the tokenizer has a chat template, it renders the prompt; a plain string becomes one user message. Otherwise the
    prompt must be a plain string, and the tokenizer adds its usual tokens before it.

    Raises:
        InputError: the prompt is a conversation but there is no chat template, or it has no tokens.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = _ids(tokenizer, _render(tokenizer, prompt))
    else:
        if not isinstance(prompt.prompt, str):
            raise InputError(
                f"{prompt.where or prompt.id}: field 'prompt' is a conversation, but the tokenizer has no "
                "chat template; expected a string, or a tokenizer with one"
            )
        ids = tokenizer(prompt.prompt, verbose=False)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    if not ids:
        raise InputError(f"{prompt.where or prompt.id}: field 'prompt' has no tokens")
    return (*ids, *prompt.prefix)


def revision_prompt(prompt: Prompt, response: str, template: str) -> Prompt:
    """A prompt that asks for a better response than an earlier one.

    Args:
        template: text of the last message, with ``{prompt}``, what it said before, and ``{response}`` in it.
    """
    *before, last = prompt.messages
    parts = {"{prompt}": last.content, "{response}": response.strip()}
    text = "".join(parts.get(part, part) for part in re.split(r"({prompt}|{response})", template))
    if isinstance(prompt.prompt, str):
        return dataclasses.replace(prompt, prompt=text)
    return dataclasses.replace(prompt, prompt=(*before, dataclasses.replace(last, content=text)))


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> tuple[int, ...]:
    """Token ids of a response that was written, not sampled: its text and the token that ends it.

    If there is a chat template, these are the tokens that it puts after the prompt, up to the end of the turn.
    """
    completion = text
    if getattr(tokenizer, "chat_template", None):
        before, full = _render(tokenizer, prompt), _render(tokenizer, prompt, text)
        # Some templates rewrite earlier turns once an answer follows; then only the bare text is used.
        if full.startswith(before):
            completion = full[len(before) :]
    end = end_of_turn(tokenizer)
    ids = [*_ids(tokenizer, completion), end]
    length = next(i for i, token in enumerate(ids, start=1) if token in (end, tokenizer.eos_token_id))
    return tuple(ids[:length])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response: the first special token that the chat template puts after it, else eos_token.

    The two differ for Gemma and Phi: a sampled response ends with "<end_of_turn>" and no "<eos>" follows.
    """
    return _end_of_turn(tokenizer, getattr(tokenizer, "chat_template", None), tokenizer.eos_token_id)


@functools.lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, chat_template: str | None, eos: int) -> int:
    """Cached, since every written response needs it; mutable tokenizer attributes are arguments, so that changes are
    seen."""
    if not chat_template:
        return eos
    answer = "tso-fast"
    after = _render(tokenizer, Prompt(id="end_of_turn", prompt="-"), answer).rpartition(answer)[2]
    added = tokenizer.added_tokens_decoder
    return next((i for i in _ids(tokenizer, after) if i in added and added[i].special), eos)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: check_fits refuses texts longer than the context.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def response_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Response) -> tuple[int, ...]:
    """The sampled tokens, or the tokens of the text if none were sampled; those after the prompt's ``prefix``.

    Raises:
        InputError: the text goes on after a token that ends a response, or does not begin with the prefix.
    """
    if response.token_ids:
        return response.token_ids
    for end in dict.fromkeys((end_of_turn(tokenizer), tokenizer.eos_token_id)):
        token = tokenizer.decode([end])
        after = response.text.partition(token)[2] if token else ""
        if after.replace(token, "").strip() and end in _ids(tokenizer, response.text):
            field = "human_response" if response.is_human else f"responses[{response.model}]"
            raise InputError(
                f"{prompt.where or prompt.id}: field {field!r} goes on after {token!r}, which ends a response: "
                f"{after[:40]!r} would not be trained on; take the token out, or what follows it"
            )
    ids = encode_response(tokenizer, prompt, response.text)
    given = len(prompt.prefix)
    if ids[:given] != prompt.prefix or not ids[given:]:
        raise InputError(
            f"{prompt.where or prompt.id}: the text {response.text[:40]!r} does not go on from field 'prefix', which "
            f"is {tokenizer.decode(prompt.prefix)!r:.60}; expected a text that begins so, or its token_ids"
        )
    return ids[given:]


def padding_id(tokenizer: Any) -> int:
    """What rows are filled up with: the padding token, else the one that ends a response."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def whole_text(tokenizer: Any, prefix: Sequence[int], token_ids: Sequence[int], text: str) -> str:
    """The text of a response that goes on from a prefix; ``text`` is that of ``token_ids`` alone.

    Decoded together, since a word may begin with a space only after another one; without what a stop text cut off.
    """
    alone, both = (tokenizer.decode(list(ids), skip_special_tokens=True) for ids in (token_ids, (*prefix, *token_ids)))
    return str(both[: len(both) - max(0, len(alone) - len(text))])


def pad_sequences(
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded input ids, attention mask and shifted targets, [S, L] int64 each, for (prompt, completion) rows."""
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

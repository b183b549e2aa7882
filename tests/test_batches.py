"""Text to tokens with the templates of well-known families, padding and shifting, and who computes which pair."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from tso_fast.errors import InputError
from tso_fast.models.layout import attention_mask, padded, shared
from tso_fast.models.tokens import (
    IGNORE,
    encode_prompt,
    encode_response,
    end_of_turn,
    pad_sequences,
    response_ids,
    revision_prompt,
)
from tso_fast.training.batches import EncodedPair, collate, encode_pairs, num_steps, num_tokens, plan_steps
from tso_fast.types import Message, PreferencePair, Prompt, Response

SYSTEM, QUESTION, ANSWER = "Be brief.", "What is 2 plus 3?", "It is 5."
# As published in the tokenizer_config.json of each family (tool calls left out of Qwen's): template, bos, eos, and the
# token that ends a turn.
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == "
    '"user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not '
    "message.tool_calls) %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + "
    "'\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' "
    "}}\n{%- endif %}\n"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant "
    "roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif "
    "message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
FAMILIES = {
    "qwen": (QWEN, None, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "mistral": (MISTRAL, "<s>", "</s>", "</s>"),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "phi3": (PHI3, None, "<|endoftext|>", "<|end|>"),
    # A reasoning template: an answer is asked for with an opened thought that a given answer does not have.
    "thinking": (QWEN.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"), None, "<|im_end|>", "<|im_end|>"),
}
SPECIAL = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
]


def bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    special = [AddedToken(token, special=True) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SYSTEM, QUESTION, ANSWER, "user assistant model system [INST] [/INST]"] * 5, trainer)
    return tokenizer.to_str()


BPE = bpe()


def make_tokenizer(template: str | None, bos: str | None, eos: str, *, adds: str = "") -> PreTrainedTokenizerFast:
    """``adds``: the post-processor's template, such as ``<s> $A`` for a tokenizer that puts a BOS before every text."""
    base = Tokenizer.from_str(BPE)
    if adds:
        tokens = [(token, base.token_to_id(token)) for token in adds.split() if token != "$A"]
        base.post_processor = processors.TemplateProcessing(single=adds, special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token=bos, eos_token=eos, pad_token="<pad>", chat_template=template
    )


def family(name: str) -> tuple[PreTrainedTokenizerFast, str]:
    template, bos, eos, end = FAMILIES[name]
    return make_tokenizer(template, bos, eos, adds=f"{bos} $A" if bos else ""), end


def chat(*turns: str, system: str | None = None) -> Prompt:
    messages = [Message(role=role, content=turn) for turn, role in zip(turns, itertools.cycle(["user", "assistant"]))]
    first = [Message(role="system", content=system)] if system else []
    return Prompt(id="p", prompt=(*first, *messages))


def messages_of(prompt: Prompt, answer: str) -> list[dict[str, str]]:
    return [
        *({"role": m.role, "content": m.content} for m in prompt.messages),
        {"role": "assistant", "content": answer},
    ]


# ------------------------------------------------------------------------------------------------- text to tokens

PROMPTS = {
    "string": Prompt(id="p", prompt=QUESTION),
    "one turn": chat(QUESTION),
    "multi-turn": chat("Hello there", "Hi! How may I help?", QUESTION),
    "long": chat("one", "two", "three", "four", "five", "six", QUESTION),
    "system": chat(QUESTION, system=SYSTEM),
    "system, multi-turn": chat("Hello", "Hi", QUESTION, system=SYSTEM),
}


@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_chat_templates(name: str, which: str) -> None:
    tokenizer, end = family(name)
    prompt = PROMPTS[which]
    if prompt.messages[0].role == "system" and name in ("gemma", "mistral"):
        for encode in (lambda: encode_prompt(tokenizer, prompt), lambda: encode_response(tokenizer, prompt, ANSWER)):
            with pytest.raises(InputError, match=r"p: field 'prompt' is refused by the chat template: .*roles system"):
                encode()
        return
    before, response = encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, ANSWER)
    # The whole is what the template makes of the conversation, token for token, as far as the end of the turn.
    whole = tokenizer.apply_chat_template(messages_of(prompt, ANSWER), tokenize=False)
    whole = whole[: whole.rindex(end) + len(end)]
    if name == "thinking":
        whole = whole.replace(ANSWER + end, "<think>\n" + ANSWER + end)
    assert tokenizer.decode(before + response, skip_special_tokens=False) == whole
    if name != "thinking":
        assert list(before + response) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    # One token ends the response, one BOS starts the prompt, every turn and one system prompt is in it.
    assert response[-1] == tokenizer.convert_tokens_to_ids(end)
    assert not {response[-1], tokenizer.eos_token_id} & set(response[:-1])
    text = tokenizer.decode(before, skip_special_tokens=False)
    if tokenizer.bos_token_id is not None:
        assert (before + response).count(tokenizer.bos_token_id) == 1
        assert before[0] == tokenizer.bos_token_id
    for message in prompt.messages:
        assert text.count(message.content) == 1
    has_system = name in ("qwen", "thinking") or prompt.messages[0].role == "system"
    assert text.count("system") == int(has_system)
    assert sum(text.count(word) for word in (SYSTEM, "You are Qwen")) <= 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", ["", " 5", "5\n", "end", "assistant", "a\n\nb", "Ünïcödé 🙂"])
def test_any_answer_has_one_end(name: str, text: str) -> None:
    tokenizer, end = family(name)
    response = encode_response(tokenizer, chat(QUESTION), text)
    assert response.count(tokenizer.convert_tokens_to_ids(end)) == 1
    assert response[-1] == end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.decode(response[:-1]).strip() == text.strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_that_is_in_the_text_already_is_not_doubled(name: str) -> None:
    tokenizer, end = family(name)
    for written in {end, tokenizer.eos_token}:
        response = encode_response(tokenizer, chat(QUESTION), ANSWER + written)
        assert response == (
            *encode_response(tokenizer, chat(QUESTION), ANSWER)[:-1],
            tokenizer.convert_tokens_to_ids(written),
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_text_after_an_end_is_not_lost_silently(name: str) -> None:
    tokenizer, end = family(name)
    prompt = Prompt(id="p", prompt=chat(QUESTION).prompt, where="p.jsonl:7")
    for token in {end, tokenizer.eos_token}:
        written = Response(model="human", text=f"{ANSWER}{token} Or 6.{token}")
        with pytest.raises(InputError) as caught:
            response_ids(tokenizer, prompt, written)
        assert str(caught.value).startswith(f"p.jsonl:7: field 'human_response' goes on after {token!r}, which ends a ")
        last = Response(model="human", text=f"{ANSWER}{token}\n")
        assert response_ids(tokenizer, prompt, last) == encode_response(tokenizer, prompt, ANSWER + token)


def test_an_end_without_a_special_token_is_the_eos() -> None:
    template = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"  # noqa: E501
    tokenizer = make_tokenizer(template, None, "</s>")
    response = encode_response(tokenizer, chat(QUESTION), ANSWER)
    assert tokenizer.decode(response, skip_special_tokens=False) == f" {ANSWER}\n</s>"


# The tokenizer adds nothing, a BOS, an EOS, or both; bos and eos may be one token.
@pytest.mark.parametrize(
    ("bos", "eos", "adds"),
    [
        ("<s>", "</s>", ""),
        ("<s>", "</s>", "<s> $A"),
        ("<s>", "</s>", "$A </s>"),
        ("<s>", "</s>", "<s> $A </s>"),
        ("<|endoftext|>", "<|endoftext|>", ""),
        ("<|endoftext|>", "<|endoftext|>", "<|endoftext|> $A"),
    ],
)
def test_without_a_chat_template(bos: str, eos: str, adds: str) -> None:
    tokenizer = make_tokenizer(None, bos, eos, adds=adds)
    prompt = Prompt(id="p", prompt=QUESTION)
    before, response = encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, " " + ANSWER)
    start = bos if adds.startswith(bos) else ""
    assert tokenizer.decode(before, skip_special_tokens=False) == start + QUESTION
    assert tokenizer.decode(response, skip_special_tokens=False) == f" {ANSWER}{eos}"
    assert response.count(tokenizer.eos_token_id) == 1
    assert encode_response(tokenizer, prompt, f" {ANSWER}{eos}") == response
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_prompts_that_cannot_be_encoded_are_named() -> None:
    plain = make_tokenizer(None, None, "</s>")
    where = Prompt(id="p", prompt=chat("a").prompt, where="prompts.jsonl:7")
    with pytest.raises(
        InputError, match=r"prompts\.jsonl:7: field 'prompt' is a conversation, but the tokenizer has no ch"
    ):
        encode_prompt(plain, where)
    with pytest.raises(InputError, match="p: field 'prompt' has no tokens"):
        encode_prompt(plain, Prompt(id="p", prompt=""))


def test_what_was_sampled_is_trained_on_token_by_token() -> None:
    """These ids are not how the tokenizer would write their text, and hold no end: the answer was cut at its limit."""
    tokenizer, _ = family("qwen")
    ids = tuple(tokenizer(letter)["input_ids"][0] for letter in "It is 5.")
    assert ids != tuple(tokenizer("It is 5.")["input_ids"])
    prompt = chat(QUESTION)
    sampled = Response(model="m", text="It is 5.", token_ids=ids, finish_reason="length")
    assert response_ids(tokenizer, prompt, sampled) == ids
    written = Response(model="human", text="It is 5.")
    assert response_ids(tokenizer, prompt, written) == encode_response(tokenizer, prompt, "It is 5.")


def preference(prompt: Prompt, chosen: str, rejected: str, **scalars: float) -> PreferencePair:
    responses = (Response(model="m", text=text) for text in (chosen, rejected))
    return PreferencePair(
        prompt=prompt, chosen=next(responses), rejected=next(responses), score_chosen=1.0, score_rejected=0.0, **scalars
    )


def test_pairs_that_do_not_fit_are_set_aside_whole() -> None:
    tokenizer, _ = family("llama3")
    pairs = [
        preference(Prompt(id="fits", prompt=QUESTION), "5", "6", scale=2.0, soft_label=0.8, margin=0.3),
        preference(Prompt(id="long rejected", prompt=QUESTION), "5", ANSWER * 9),
        preference(Prompt(id="long chosen", prompt=QUESTION), ANSWER * 9, "5"),
        preference(Prompt(id="long prompt", prompt=QUESTION * 9), "5", "6"),
    ]
    every, *none = encode_pairs(tokenizer, pairs, None)
    assert len(every) == 4
    assert none == [[], []]
    fits = every[0]
    assert (fits.scale, fits.soft_label, fits.margin, fits.prompt_id) == (2.0, 0.8, 0.3, "fits")
    assert fits.prompt == encode_prompt(tokenizer, pairs[0].prompt)
    assert fits.chosen == encode_response(tokenizer, pairs[0].prompt, "5")
    assert fits.length == len(fits.prompt) + max(len(fits.chosen), len(fits.rejected))
    for context, left in ((fits.length, every[:1]), (fits.length - 1, [])):
        assert encode_pairs(tokenizer, pairs, context) == (left, [p.prompt.id for p in pairs[len(left) :]], [])


def test_max_length_cuts_the_end_of_responses_and_leaves_out_what_has_no_room() -> None:
    tokenizer, _ = family("llama3")
    pairs = [
        preference(Prompt(id="fits", prompt=QUESTION), "5", "6"),
        preference(Prompt(id="long rejected", prompt=QUESTION), "5", ANSWER * 9),
        preference(Prompt(id="long prompt", prompt=QUESTION * 9), "5", "6"),
    ]
    whole = encode_pairs(tokenizer, pairs, None).pairs
    longest = whole[0].length
    assert encode_pairs(tokenizer, pairs, None, max(pair.length for pair in whole)) == (whole, [], [])
    cut = encode_pairs(tokenizer, pairs, longest, longest)
    assert (cut.too_long, cut.truncated) == (["long prompt"], ["long rejected"])
    assert [pair.length for pair in cut.pairs] == [longest, longest]
    fits, long = cut.pairs
    assert (fits, long.prompt, long.chosen) == (whole[0], whole[1].prompt, whole[1].chosen)
    assert long.rejected == whole[1].rejected[: len(long.rejected)]
    shortest = encode_pairs(tokenizer, pairs, None, len(fits.prompt) + 1).pairs
    assert [(len(pair.chosen), len(pair.rejected)) for pair in shortest] == [(1, 1), (1, 1)]
    assert encode_pairs(tokenizer, pairs, None, len(fits.prompt)).pairs == []


def test_further_sequences_are_encoded_cut_and_counted_like_others() -> None:
    tokenizer, _ = family("llama3")
    prompt, template = Prompt(id="q", prompt=QUESTION), "{prompt} Better than {response}, {prompt}?"
    plain = preference(prompt, "5", ANSWER)
    pair = dataclasses.replace(plain, extra=(Response(model="m", text="6"),))
    (whole,) = encode_pairs(tokenizer, [pair], None, None, template).pairs
    after = [encode_prompt(tokenizer, revision_prompt(prompt, text, template)) for text in ("5", ANSWER)]
    assert f"{QUESTION} Better than 5, {QUESTION}?" in tokenizer.decode(after[0])
    assert whole.extra == (
        (whole.prompt, encode_response(tokenizer, prompt, "6")),
        (after[0], whole.rejected),
        (after[1], whole.chosen),
        (after[0], whole.chosen),
        (after[1], whole.rejected),
    )
    longest = len(after[1]) + len(whole.rejected)
    assert whole.length == longest
    assert encode_pairs(tokenizer, [pair], longest - 1, None, template).too_long == ["q"]
    assert encode_pairs(tokenizer, [pair], None, len(after[1]), template).too_long == ["q"]
    (cut,), _, truncated = encode_pairs(tokenizer, [pair], None, longest - 1, template)
    assert (truncated, cut.rejected, cut.extra[1][1]) == (["q"], whole.rejected, whole.rejected)
    assert cut.extra[4][1] == whole.rejected[:-1]
    computed = sum(map(len, (whole.prompt, *after))) + sum(len(ids) - 1 for _, ids in whole.sequences)
    assert num_tokens([whole], [0], share_prompts=True) == computed
    batch = collate([whole], [0], pad_token_id=0, device=torch.device("cpu"), share_prompts=True)
    assert batch.pairs.tolist() == [list(range(7))]
    assert int((batch.layout.attention_mask).sum()) == computed  # each context is there once


# --------------------------------------------------------------------------------------------------------- batches


def test_padding_and_shift() -> None:
    ids, mask, targets = pad_sequences([((5, 6, 7), (8, 2)), ((9,), (10, 11, 2)), ((3, 4), (2,))], pad_token_id=0)
    assert ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 0], [3, 4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    i = IGNORE
    assert targets.tolist() == [[i, i, 8, 2], [10, 11, 2, i], [i, 2, i, i]]
    assert ids.dtype == mask.dtype == targets.dtype == torch.int64


def test_padding_is_known_by_its_place_not_its_token() -> None:
    _, mask, targets = pad_sequences([((2, 2), (2, 2, 2)), ((2,), (7,))], pad_token_id=2)
    assert mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert targets.tolist() == [[IGNORE, 2, 2, 2], [7, IGNORE, IGNORE, IGNORE]]


def encoded(n: int) -> list[EncodedPair]:
    return [
        EncodedPair(
            prompt=(5,) * (1 + i % 3),
            chosen=(6, 2),
            rejected=(7, 8, 2),
            scale=1.0 + i,
            soft_label=0.9,
            margin=0.1 * i,
            prompt_id=str(i),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_collate_has_each_sequence_once_and_carries_the_scalars(share_prompts: bool) -> None:
    pairs = encoded(4)
    pairs[3] = dataclasses.replace(pairs[3], rejected=pairs[3].chosen)  # prompt and chosen are those of the first
    reference = torch.arange(8.0).reshape(4, 2)
    options: dict[str, Any] = {"pad_token_id": 0, "device": torch.device("cpu"), "share_prompts": share_prompts}
    batch = collate(pairs, [2, 0, 3], ref_logprobs=reference, is_padding=[False, False, True], **options)
    sequences = [(pairs[i].prompt, side) for side in ((6, 2), (7, 8, 2)) for i in (2, 0)]
    want = (shared if share_prompts else padded)(sequences, 0)
    for name, value in vars(want).items():
        assert value is None or torch.equal(getattr(batch.layout, name), value), name
    assert batch.pairs.tolist() == [[0, 2], [1, 3], [1, 1]]
    assert batch.sides.tolist() == [0, 1, 1, 2, 3, 1]
    assert batch.scale.tolist() == [3.0, 1.0, 0.0]
    torch.testing.assert_close(batch.soft_label, torch.full((3,), 0.9))
    torch.testing.assert_close(batch.margin, torch.tensor([0.2, 0.0, 0.3]))
    assert batch.ref_logprobs.tolist() == [4.0, 0.0, 5.0, 1.0]
    assert collate(pairs, [1], **options).ref_logprobs is None
    tokens = [
        torch.full((len(side),), 10.0 * i + n)
        for i, p in enumerate(pairs)
        for n, side in enumerate((p.chosen, p.rejected))
    ]
    batch = collate(pairs, [2, 0, 3], ref_tokens=tokens, **options)
    found = batch.ref_token_logprobs[batch.layout.targets != IGNORE]
    assert found.tolist() == [20.0] * 2 + [0.0] * 2 + [21.0] * 3 + [1.0] * 3


def test_a_prompt_is_in_a_row_once_before_all_of_its_responses() -> None:
    layout = shared([((5, 6, 7), (8, 9, 2)), ((5, 6, 7), (2,)), ((3,), (4, 2)), ((5, 6, 7), (8, 2))], pad_token_id=0)
    assert layout.input_ids.tolist() == [[5, 6, 7, 8, 9, 8], [3, 4, 0, 0, 0, 0]]
    assert layout.attention_mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 0, 0, 0, 0]]
    assert layout.groups.tolist() == [[0] * 6, [1, 1, -1, -1, -1, -1]]
    assert layout.branches.tolist() == [[0, 0, 0, 1, 1, 3], [0, 1, 0, 0, 0, 0]]
    assert layout.targets.tolist() == [[8, 9, 2], [2, IGNORE, IGNORE], [4, 2, IGNORE], [8, 2, IGNORE]]
    assert layout.rows.tolist() == [[2, 3, 4], [2, 0, 0], [6, 7, 0], [2, 5, 0]]


def test_short_groups_fill_the_rows_of_long_ones() -> None:
    def group(length: int, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (number, *[1] * (length - 1)), (9,)

    layout = shared([group(n, i + 10) for i, n in enumerate((3, 10, 4, 6, 7))], pad_token_id=0)
    assert layout.input_ids.shape == (3, 10)  # 10; 7 + 3; 6 + 4
    assert layout.attention_mask.all()
    mask = attention_mask(layout, SimpleNamespace(_attn_implementation="sdpa"), torch.float32)
    assert mask.shape == (3, 1, 10, 10)
    assert mask[0, 0].equal(torch.ones(10, 10).tril().bool())
    assert not mask[1, 0, 7:, :7].any()


# ----------------------------------------------------------------------------------------------------------- steps


def steps_of(
    num_pairs: int,
    micro: int,
    accumulation: int,
    world: int,
    *,
    epochs: int = 2,
    seed: int = 3,
    prompts: Sequence[int] = (),
    grouped: bool = False,
) -> list[Any]:
    """For each step the shares of all processes."""
    plans = [
        list(
            plan_steps(
                prompts or range(num_pairs),
                epochs=epochs,
                micro_size=micro,
                accumulation=accumulation,
                rank=rank,
                world=world,
                seed=seed,
                grouped=grouped,
            )
        )
        for rank in range(world)
    ]
    assert len({len(plan) for plan in plans}) == 1
    return list(zip(*plans, strict=True))


# One pair; fewer than a step; a whole number of steps; a last step of one pair; of one more than a pass holds.
@pytest.mark.parametrize("num_pairs", [1, 3, 16, 33, 37])
@pytest.mark.parametrize(
    ("micro", "accumulation", "world"), [(1, 1, 1), (4, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2), (4, 1, 3), (1, 1, 5)]
)
def test_every_pair_is_used_once_an_epoch(num_pairs: int, micro: int, accumulation: int, world: int) -> None:
    steps = steps_of(num_pairs, micro, accumulation, world)
    assert len(steps) == num_steps(num_pairs, epochs=2, micro_size=micro, accumulation=accumulation, world=world)
    used: dict[int, list[int]] = {0: [], 1: []}
    for step in steps:
        real = []
        for share in step:
            assert (share.all_index, share.epoch) == (step[0].all_index, step[0].epoch)
            for part in share.micro_batches:
                assert 1 <= len(part.index) <= micro
                assert len(part.index) == len(part.is_padding)
                real += [i for i, pads in zip(part.index, part.is_padding, strict=True) if not pads]
        # All processes make as many passes, or the slower ones would wait for ever.
        assert len({len(share.micro_batches) for share in step}) == 1
        assert len(step[0].micro_batches) == -(-len(step[0].all_index) // (micro * world))  # no more than needed
        assert sorted(real) == sorted(step[0].all_index)
        used[step[0].epoch] += real
    assert sorted(used[0]) == sorted(used[1]) == list(range(num_pairs))
    assert num_pairs < 16 or used[0] != used[1]


@pytest.mark.parametrize("num_pairs", [4, 13, 32])
def test_steps_do_not_depend_on_how_they_are_shared_out(num_pairs: int) -> None:
    plans = [
        [step[0].all_index for step in steps_of(num_pairs, micro, accumulation, world)]
        for micro, accumulation, world in ((4, 1, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1))
    ]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0] == [step[0].all_index for step in steps_of(num_pairs, 4, 1, 1)]  # no hidden state
    if num_pairs > 4:
        assert plans[0] != [step[0].all_index for step in steps_of(num_pairs, 4, 1, 1, seed=4)]


def test_pairs_of_a_prompt_come_together() -> None:
    prompts = [0, 1, 2, 3, 4, 5] * 4
    steps = steps_of(24, 4, 2, 1, epochs=2, prompts=prompts, grouped=True)
    orders = []
    for epoch in (0, 1):
        order = [i for (step,) in steps if step.epoch == epoch for i in step.all_index]
        assert sorted(order) == list(range(24))
        runs = [key for key, _ in itertools.groupby(prompts[i] for i in order)]
        assert sorted(runs) == [0, 1, 2, 3, 4, 5]
        orders.append((runs, order))
        assert all([i for part in step.micro_batches for i in part.index] == step.all_index for (step,) in steps)
    assert orders[0][0] != orders[1][0]  # prompts are shuffled
    first = [[i for i in order if prompts[i] == 0] for _, order in orders]
    assert first[0] != first[1]  # and so are the pairs of one


def test_pairs_of_a_prompt_in_a_step_are_in_the_same_pass() -> None:
    prompts = [0, 1, 2, 3] * 8
    alone = [step.all_index for (step,) in steps_of(32, 16, 1, 1, epochs=1)]
    steps = [step for (step,) in steps_of(32, 4, 4, 1, epochs=1, prompts=prompts)]
    assert [sorted(step.all_index) for step in steps] == [sorted(index) for index in alone]  # the same pairs
    for step in steps:
        order = [prompts[i] for part in step.micro_batches for i in part.index]
        assert len(list(itertools.groupby(order))) == len(set(order))


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_of_many_tokens_is_made_in_more_passes(world: int) -> None:
    lengths = [1, 2, 3, 50, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    plans = [
        list(
            plan_steps(
                range(16),
                epochs=1,
                micro_size=16 // world,
                accumulation=1,
                rank=rank,
                world=world,
                seed=0,
                fits=lambda index: sum(lengths[i] for i in index) <= 40,
            )
        )
        for rank in range(world)
    ]
    (first,), *_ = plans
    assert sorted(i for (step,) in plans for part in step.micro_batches for i in part.index) == list(range(16))
    passes = [len(step.micro_batches) for (step,) in plans]
    assert len(set(passes)) == 1
    assert passes[0] > 170 // 40 // world
    for (step,) in plans:
        for part in step.micro_batches:
            assert sum(lengths[i] for i in part.index) <= 40 or len(part.index) == 1
    assert sorted(first.all_index) == list(range(16))


def test_tokens_of_a_pass() -> None:
    pairs = encoded(4)  # prompts of 1, 2, 3 and 1 tokens, chosen of 2, rejected of 3
    assert num_tokens(pairs, [0, 1], share_prompts=False) == 2 * (1 + 2) + 2 * (1 + 2)
    assert num_tokens(pairs, [0, 1], share_prompts=True) == 3 + 2 * (1 + 2)
    assert num_tokens(pairs, [0, 3], share_prompts=True) == 1 + (1 + 2)  # the same sequences


def test_a_process_without_pairs_computes_one_of_scale_0() -> None:
    ((first, second),) = steps_of(1, 4, 1, 2, epochs=1)
    assert (first.micro_batches[0].is_padding, second.micro_batches[0].is_padding) == ([False], [True])
    part = second.micro_batches[0]
    batch = collate(encoded(1), part.index, pad_token_id=0, device=torch.device("cpu"), is_padding=part.is_padding)
    assert batch.scale.tolist() == [0.0]

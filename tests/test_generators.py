"""HFGenerator on a tiny random Llama: what a response depends on, and from which distribution it comes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tso_fast.errors import InputError
from tso_fast.generators import Completion, Request, Sampling, hf
from tso_fast.generators.hf import HFGenerator, SeededSampler, eos_token_ids, uniforms
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.seeds import seed_of

TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4
TOKENIZER = make_tokenizer(TEXTS, Recipe(seed=0))
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=TOKENIZER.bos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.lm_head.weight, std=0.35)  # a distribution that is neither flat nor a single token
    return model


@pytest.fixture
def generator(model: Any) -> HFGenerator:
    return HFGenerator(model, TOKENIZER)


def requests(n: int, name: str = "r") -> list[Request]:
    """Prompts of 1 to 13 tokens, some of which hold the padding token."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, len(TOKENIZER), rng.integers(1, 14)).tolist()) for _ in range(n)]
    return [Request(token_ids=prompt, seed=seed_of(name, i)) for i, prompt in enumerate(prompts)]


def same_prompt(n: int, prompt: tuple[int, ...] = (5, 9, 33)) -> list[Request]:
    return [Request(token_ids=prompt, seed=seed_of("same", i)) for i in range(n)]


def next_logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[:, -1]


def drop_logprob(completion: Completion) -> Completion:
    return dataclasses.replace(completion, logprob=0.0)


def test_a_response_depends_on_its_request_alone(generator: HFGenerator) -> None:
    asked, sampling = requests(24), Sampling(max_tokens=12)
    want = generator.generate(asked, sampling)
    for batch_size in (1, 5):
        again = HFGenerator(generator.model, TOKENIZER, batch_size).generate(asked, sampling)
        assert list(map(drop_logprob, again)) == list(map(drop_logprob, want))
        assert [c.logprob for c in again] == pytest.approx([c.logprob for c in want], abs=1e-3)
    back = generator.generate(asked[::-1], sampling)[::-1]
    assert list(map(drop_logprob, back)) == list(map(drop_logprob, want))
    torch.manual_seed(99)  # the global stream is not used
    assert generator.generate(asked, sampling) == want
    others = generator.generate(requests(24, "other"), sampling)
    assert sum(a.token_ids == b.token_ids for a, b in zip(others, want, strict=True)) < 3


def test_longer_limit_only_goes_on(generator: HFGenerator) -> None:
    asked = requests(12)
    short, long = (generator.generate(asked, Sampling(max_tokens=n)) for n in (4, 12))
    assert all(b.token_ids[:4] == a.token_ids for a, b in zip(short, long, strict=True))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.7, top_k=9),
                                      Sampling(top_p=0.6)], ids=str)  # fmt: skip
def test_tokens_follow_the_distribution(generator: HFGenerator, sampling: Sampling) -> None:
    asked = same_prompt(6000)
    sampled = [c.token_ids for c in generator.generate(asked, dataclasses.replace(sampling, max_tokens=2))]
    for before in ((), Counter(ids[:1] for ids in sampled if len(ids) == 2).most_common(1)[0][0]):
        tokens = [ids[len(before)] for ids in sampled if ids[: len(before)] == before]
        logits = next_logits(generator.model, asked[0].token_ids + before)
        probs = warped(logits, sampling).softmax(-1)[0].double().numpy()
        counts = np.bincount(tokens, minlength=len(probs))
        assert not counts[probs == 0].any()
        expected = probs * len(tokens)
        rare = expected < 5  # one bin
        bins = np.array([np.append(x[~rare], x[rare].sum()) for x in (counts, expected)])
        observed, expected = bins[:, bins[1] > 0]
        chi2, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
        assert freedom >= 3
        # Wilson and Hilferty: the cube root is nearly normal. Bound: 1 in 1000.
        normal = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        assert -3.1 < normal < 3.1


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (0.25, 4), (0.5, 4), (1 - 2.0**-53, 5)])
def test_no_token_of_probability_0_even_at_the_ends(
    uniform: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "uniforms", lambda seeds, step: np.full(len(seeds), uniform))
    logits = torch.tensor([0.0, 0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()[None]
    out = SeededSampler([7], Sampling())(torch.zeros(1, 1), logits)
    assert out.isfinite().nonzero().tolist() == [[0, token]]


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By transformers' own processors, in the order of its generate()."""
    if sampling.temperature not in (0, 1):
        logits = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    return TopPLogitsWarper(sampling.top_p)(None, logits) if sampling.top_p < 1 else logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (10**6, 1.0), (0, 0.01), (0, 0.9), (12, 0.7)]
)
def test_filters_keep_what_transformers_keeps(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(SeededSampler([0], sampling)._filter(logits / temperature), warped(logits, sampling))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_k=6, top_p=0.9),
                                      Sampling(temperature=0.0)], ids=str)  # fmt: skip
def test_logprob_is_that_of_the_tokens_under_the_sampling_distribution(
    generator: HFGenerator, sampling: Sampling
) -> None:
    asked = requests(8)
    for request, got in zip(asked, generator.generate(asked, dataclasses.replace(sampling, max_tokens=6)), strict=True):
        total = 0.0
        for t, token in enumerate(got.token_ids):
            logits = warped(next_logits(generator.model, request.token_ids + got.token_ids[:t]), sampling)
            total += logits.log_softmax(-1)[0, token].item()
        assert got.logprob == pytest.approx(total, abs=1e-4)


def test_greedy_is_greedy(generator: HFGenerator) -> None:
    asked = requests(8)
    for request, got in zip(asked, generator.generate(asked, Sampling(temperature=0.0, max_tokens=10)), strict=True):
        ids = torch.tensor([request.token_ids])
        want = generator.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        assert got.token_ids == tuple(want[0, ids.shape[1] :].tolist())


def test_the_models_own_generation_config_changes_nothing(model: Any, generator: HFGenerator) -> None:
    asked, sampling = requests(12), Sampling(max_tokens=8)
    want = generator.generate(asked, sampling)
    own = model.generation_config
    try:
        model.generation_config = strange = type(own).from_dict({
            **own.to_dict(), "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5,
            "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 80)),
            "min_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 2, "use_cache": False,
        })  # fmt: skip
        assert HFGenerator(model, TOKENIZER).generate(asked, sampling) == want
        assert model.generation_config is strange
        with pytest.raises(IndexError):
            HFGenerator(model, TOKENIZER).generate([Request(token_ids=(10**6,), seed=0)], sampling)
        assert model.generation_config is strange  # after an error too
    finally:
        model.generation_config = own


def test_ends_at_any_end_of_sequence_token(model: Any) -> None:
    """The model's generation config may name more than the tokenizer's; the others go on after a sequence ended."""
    own = model.generation_config
    ends = [EOS, *range(40, 52)]
    try:
        model.generation_config = type(own)(eos_token_id=ends[1:], pad_token_id=PAD)
        generator = HFGenerator(model, TOKENIZER)
        assert generator.eos == eos_token_ids(model, TOKENIZER) == ends
        completions = generator.generate(requests(60), Sampling(max_tokens=9))
    finally:
        model.generation_config = own
    reasons = Counter()
    for c in completions:
        *before, last = c.token_ids
        assert not set(before) & set(ends)
        assert c.finish_reason == ("stop" if last in ends else "length")
        assert len(c.token_ids) == 9 if c.finish_reason == "length" else len(c.token_ids) <= 9
        assert c.text == TOKENIZER.decode(c.token_ids, skip_special_tokens=True)
        assert "<eos>" not in c.text
        reasons[c.finish_reason] += 1
    assert min(reasons["stop"], reasons["length"]) > 5


def test_the_chat_templates_end_of_turn_ends_a_response(model: Any) -> None:
    """As <end_of_turn> does in Gemma's, where the tokenizer's own end-of-sequence token is another."""
    tokenizer = make_tokenizer(TEXTS, Recipe(seed=0))
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<bos>'")
    assert eos_token_ids(model, tokenizer) == [EOS, tokenizer.bos_token_id]


def test_without_any_end_of_sequence_token_is_an_error(model: Any) -> None:
    own = model.generation_config
    bare = make_tokenizer(TEXTS, Recipe(seed=0))
    bare.eos_token = None
    try:
        model.generation_config = None
        assert eos_token_ids(model, TOKENIZER) == [EOS]
        with pytest.raises(ValueError, match="names an end-of-sequence token"):
            eos_token_ids(model, bare)
    finally:
        model.generation_config = own


def test_logits_that_are_not_finite_are_an_error(model: Any) -> None:
    broken = LlamaForCausalLM(model.config)
    nn.init.constant_(broken.model.norm.weight, math.nan)
    broken.name_or_path = "cells/broken"
    for temperature in (0.0, 1.0):
        with pytest.raises(
            InputError, match=r"cells/broken: the model gives logits that are not finite.*torch.float32"
        ):
            HFGenerator(broken, TOKENIZER).generate(requests(3), Sampling(temperature=temperature, max_tokens=2))


def test_a_tokenizer_without_padding_token(generator: HFGenerator) -> None:
    bare = make_tokenizer(TEXTS, Recipe(seed=0))
    bare.pad_token = None
    asked = requests(6)
    unpadded = HFGenerator(generator.model, bare)
    assert unpadded.pad == EOS
    assert unpadded.generate(asked, Sampling(max_tokens=5)) == generator.generate(asked, Sampling(max_tokens=5))


def test_progress_order_and_nothing_to_do(generator: HFGenerator) -> None:
    done: list[int] = []
    assert generator.generate([], Sampling(), done.append) == []
    HFGenerator(generator.model, TOKENIZER, batch_size=4).generate(requests(10), Sampling(max_tokens=1), done.append)
    assert done == [4, 4, 2]


def test_close_lets_go_of_the_model(model: Any) -> None:
    generator = HFGenerator(model, TOKENIZER)
    generator.close()
    assert generator.model is None


# -------------------------------------------------------------------------------------------------- random numbers


def test_uniforms_are_splitmix64() -> None:
    """The first outputs for seed 1234567, as published with the algorithm."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                 16408922859458223821]  # fmt: skip
    got = [uniforms(np.array([1234567], dtype=np.uint64), step)[0] for step in range(5)]
    assert got == [(value >> 11) * 2.0**-53 for value in published]
    assert uniforms(np.array([0, 2**63 - 1], dtype=np.uint64), 2**40).tolist() == [
        uniforms(np.array([s], dtype=np.uint64), 2**40)[0] for s in (0, 2**63 - 1)
    ]


def test_uniforms_are_uniform_and_independent() -> None:
    n = 20_000
    hashed = np.array([seed_of("x", i) for i in range(n)], dtype=np.uint64)
    for seeds in (hashed, np.arange(n, dtype=np.uint64)):
        draws = np.stack([uniforms(seeds, step) for step in range(4)])
        assert draws.min() >= 0
        assert draws.max() < 1
        for row in draws:  # Kolmogorov and Smirnov; bound: 1 in 1000
            assert np.abs(np.sort(row) - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)
        between_steps = np.corrcoef(draws) - np.eye(4)
        between_seeds = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in draws]
        assert max(np.abs(between_steps).max(), np.abs(between_seeds).max()) < 4 / math.sqrt(n)


def test_seeds_come_from_names_and_stay() -> None:
    assert seed_of(0, "q1", "abc", 3) == 2177709496000534996
    assert seed_of("a", "bc") != seed_of("ab", "c") != seed_of("abc")
    assert seed_of(1) == seed_of("1")
    many = [seed_of("s", i) for i in range(5000)]
    assert len(set(many)) == len(many)
    assert all(0 <= seed < 2**63 for seed in many)

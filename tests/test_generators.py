"""How hf batches, samples and loads: rows that join and leave, the distribution, memory.

What an engine owes its caller is in test_engine_contract.py.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from helpers import SHAPE
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tso_fast.errors import InputError
from tso_fast.generators import Completion, Engine, EngineSpec, Refusal, Request, Sampling, generate, hf, open_engine
from tso_fast.generators.hf import BatchGenerator, HFEngine, filtered, has_plain_cache, sample, uniforms
from tso_fast.models.memory import trim_heap
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.seeds import seed_of
from tso_fast.types import Cell

TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4
TOKENIZER = make_tokenizer(TEXTS, Recipe(seed=0))
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(TOKENIZER),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": TOKENIZER.bos_token_id,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.lm_head.weight, std=0.35)  # a distribution that is neither flat nor a single token
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def requests(
    n: int, name: str = "r", sampling: Sampling | None = None, cell: str = "a", vocab: int = 0
) -> list[Request]:
    """Prompts of 1 to 13 tokens, some of which hold the padding token."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, vocab or len(TOKENIZER), rng.integers(1, 14)).tolist()) for _ in range(n)]
    return [
        Request(
            key=f"{cell} {name} {i}".encode(),
            cell=cell,
            token_ids=prompt,
            seed=seed_of(name, i),
            sampling=sampling or Sampling(max_tokens=12),
        )
        for i, prompt in enumerate(prompts)
    ]


def same_prompt(n: int, prompt: tuple[int, ...] = (5, 9, 33)) -> list[Request]:
    return [dataclasses.replace(r, token_ids=prompt) for r in requests(n, "same")]


def complete(
    model: Any,
    asked: Sequence[Request],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 64,
    tokenizer: Any = TOKENIZER,
    ends: Iterable[int] = (EOS,),
) -> list[Completion]:
    """In the order of the requests."""
    if sampling is not None:
        asked = [dataclasses.replace(r, sampling=sampling) for r in asked]
    generator = BatchGenerator(model, tokenizer, list(ends), batch_size=batch_size)
    done = {c.key: c for c in itertools.chain.from_iterable(generator.run(asked))}
    assert len(done) == len(asked)
    return [done[r.key] for r in asked]


def next_logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[:, -1]


def assert_same(got: Sequence[Completion], want: Sequence[Completion]) -> None:
    """But for what another batch rounds otherwise in the log-probs."""
    for a, b in zip(got, want, strict=True):
        assert dataclasses.replace(a, logprob=0.0) == dataclasses.replace(b, logprob=0.0)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


@pytest.fixture(params=["joining", "generate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to run a batch."""
    if request.param == "generate":
        monkeypatch.setattr(hf, "has_plain_cache", lambda model: False)
    return request.param


# ---------------------------------------------------------------------------------------------------- one response


@pytest.mark.slow
def test_a_response_depends_on_its_request_alone(model: Any, way: str) -> None:
    asked = requests(24)
    want = complete(model, asked)
    for batch_size in (1, 5, 8):
        assert_same(complete(model, asked, batch_size=batch_size), want)
    assert_same(complete(model, asked[::-1])[::-1], want)
    for request, completion in zip(asked, want, strict=True):
        assert_same(complete(model, [request]), [completion])
    torch.manual_seed(99)  # the global stream is not used
    assert complete(model, asked) == want
    others = complete(model, [dataclasses.replace(r, seed=r.seed + 1) for r in asked])
    assert sum(a.token_ids == b.token_ids for a, b in zip(others, want, strict=True)) < 3
    assert min(Counter(c.finish_reason for c in want).values()) > 3


def test_longer_limit_only_goes_on(model: Any, way: str) -> None:
    asked = requests(12)
    short, long = (complete(model, asked, Sampling(max_tokens=n)) for n in (4, 12))
    assert all(b.token_ids[:4] == a.token_ids for a, b in zip(short, long, strict=True))
    mixed = [dataclasses.replace(r, sampling=Sampling(max_tokens=(4, 12)[i % 2])) for i, r in enumerate(asked)]
    assert_same(complete(model, mixed, batch_size=5), [(short, long)[i % 2][i] for i in range(12)])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.7, top_k=9), Sampling(top_p=0.6)],
    ids=str,
)
@pytest.mark.slow
def test_tokens_follow_the_distribution(model: Any, sampling: Sampling) -> None:
    asked = same_prompt(6000)
    sampled = [c.token_ids for c in complete(model, asked, dataclasses.replace(sampling, max_tokens=2), batch_size=500)]
    for before in ((), Counter(ids[:1] for ids in sampled if len(ids) == 2).most_common(1)[0][0]):
        tokens = [ids[len(before)] for ids in sampled if ids[: len(before)] == before]
        logits = next_logits(model, asked[0].token_ids + before)
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
@pytest.mark.parametrize("before", [0, 254, 600])
def test_no_token_of_probability_0_even_at_the_ends(uniform: float, token: int, before: int) -> None:
    logits = torch.tensor([0.0, 0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    logits = nn.functional.pad(logits, (before, 300), value=-torch.inf)[None]  # blocks with and without anything
    tokens, logprobs = sample(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert tokens.tolist() == [before + token]
    assert logprobs.exp().tolist() == pytest.approx([0.5 if token == 4 else 0.25])


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 5000])
def test_tokens_are_where_the_cumulative_distribution_first_exceeds_the_number(vocab: int) -> None:
    rng = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(200, vocab, generator=rng)
    uniform = torch.rand(200, dtype=torch.float64, generator=rng)
    tokens, logprobs = sample(logits, uniform, Sampling())
    cdf = logits.double().softmax(-1).cumsum(-1)
    want = (cdf <= uniform[:, None]).sum(-1).clamp(max=vocab - 1)
    assert (tokens == want).float().mean() > 0.99  # float32 weights move a few edges
    assert ((tokens - want).abs() <= 1).all() or (cdf.gather(1, tokens[:, None])[:, 0] - uniform).abs().min() < 1e-6
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By transformers' own processors, in the order of its generate()."""
    if sampling.temperature not in (0, 1):
        logits = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    return TopPLogitsWarper(sampling.top_p)(None, logits) if sampling.top_p < 1 else logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("candidates", [8, 1024])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (10**6, 1.0), (0, 0.01), (0, 0.9), (12, 0.7)]
)
def test_filters_keep_what_transformers_keeps(
    temperature: float, top_k: int, top_p: float, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "TOP_P_CANDIDATES", candidates)
    logits = 3 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(filtered(logits / temperature, sampling), warped(logits, sampling))


def test_of_equal_logits_at_the_edge_all_stay() -> None:
    """Those of a bfloat16 model often are equal; which of them a sort puts first is not for it to decide."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -3.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
        assert filtered(logits, sampling).isfinite().tolist() == [[False, True, True, True, True, False]]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.6, top_k=6, top_p=0.9), Sampling(temperature=0.0)], ids=str
)
def test_logprob_is_that_of_the_tokens_under_the_sampling_distribution(
    model: Any, sampling: Sampling, way: str
) -> None:
    asked = requests(8)
    got_all = complete(model, asked, dataclasses.replace(sampling, max_tokens=6), batch_size=3)
    for request, got in zip(asked, got_all, strict=True):
        total = 0.0
        for t, token in enumerate(got.token_ids):
            logits = warped(next_logits(model, request.token_ids + got.token_ids[:t]), sampling)
            total += logits.log_softmax(-1)[0, token].item()
        assert got.logprob == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=3, top_logprobs=7),
        Sampling(temperature=0.0, max_tokens=3, top_logprobs=1),
        Sampling(temperature=0.5, max_tokens=3, top_k=2, top_logprobs=10**6),
    ],
    ids=str,
)
def test_top_logprobs_are_the_models_own_at_the_first_token(model: Any, way: str, sampling: Sampling) -> None:
    asked = requests(9)
    for request, got in zip(asked, complete(model, asked, sampling, batch_size=4), strict=True):
        want = next_logits(model, request.token_ids)[0].log_softmax(-1)
        top = want.topk(min(sampling.top_logprobs, len(want)))
        assert got.top_logprobs is not None
        assert [token for token, _ in got.top_logprobs] == top.indices.tolist()
        assert [value for _, value in got.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert all(got.top_logprobs is None for got in complete(model, asked))


def test_greedy_is_greedy(model: Any, way: str) -> None:
    asked = requests(8)
    for request, got in zip(asked, complete(model, asked, Sampling(temperature=0.0, max_tokens=10)), strict=True):
        ids = torch.tensor([request.token_ids])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        assert got.token_ids == tuple(want[0, ids.shape[1] :].tolist())


def test_the_models_own_generation_config_changes_nothing(model: Any, way: str) -> None:
    asked = requests(12)
    want = complete(model, asked)
    own = model.generation_config
    try:
        model.generation_config = strange = type(own).from_dict(
            {
                **own.to_dict(),
                "do_sample": True,
                "temperature": 0.1,
                "top_k": 1,
                "top_p": 0.1,
                "min_p": 0.5,
                "repetition_penalty": 9.0,
                "no_repeat_ngram_size": 1,
                "suppress_tokens": list(range(40, 80)),
                "min_new_tokens": 8,
                "num_beams": 3,
                "num_return_sequences": 2,
                "max_new_tokens": 2,
                "use_cache": False,
            }
        )
        assert complete(model, asked) == want
        assert model.generation_config is strange
        with pytest.raises(IndexError):
            complete(model, [dataclasses.replace(asked[0], token_ids=(10**6,))])
        assert model.generation_config is strange  # after an error too
    finally:
        model.generation_config = own


def test_ends_at_any_end_of_sequence_token(model: Any, way: str) -> None:
    ends = [EOS, *range(40, 52)]
    reasons: Counter[str] = Counter()
    for c in complete(model, requests(60), Sampling(max_tokens=9), ends=ends, batch_size=16):
        *before, last = c.token_ids
        assert not set(before) & set(ends)
        assert c.finish_reason == ("stop" if last in ends else "length")
        assert len(c.token_ids) == 9 if c.finish_reason == "length" else len(c.token_ids) <= 9
        assert c.text == TOKENIZER.decode(c.token_ids, skip_special_tokens=True)
        assert "<eos>" not in c.text
        reasons[c.finish_reason] += 1
    assert min(reasons["stop"], reasons["length"]) > 5


def test_logits_that_are_not_finite_are_an_error(model: Any, way: str) -> None:
    broken = LlamaForCausalLM(model.config)
    nn.init.constant_(broken.model.norm.weight, math.nan)
    broken.name_or_path = "cells/broken"
    for temperature in (0.0, 1.0):
        with pytest.raises(
            InputError, match=r"cells/broken: the model gives logits that are not finite.*torch.float32"
        ):
            complete(broken, requests(3), Sampling(temperature=temperature, max_tokens=2))


def test_a_tokenizer_without_padding_token(model: Any, way: str) -> None:
    bare = make_tokenizer(TEXTS, Recipe(seed=0))
    bare.pad_token = None
    asked = requests(6)
    assert complete(model, asked, tokenizer=bare) == complete(model, asked)


# ------------------------------------------------------------------------------------------------- joining and leaving

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "grouped": ("LlamaConfig", SHAPE, True),
    "gpt2": ("GPT2Config", {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, True),
    "opt": ("OPTConfig", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    "alibi": ("BloomConfig", {"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 4}, True),
    "sliding": ("MistralConfig", {**SHAPE, "sliding_window": 6}, True),
    "half-sliding": ("Gemma2Config", {**SHAPE, "head_dim": 8, "sliding_window": 6}, True),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 8, "sliding_window": 6}, True),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 8}, True),
    "phi3": ("Phi3Config", {**SHAPE, "sliding_window": 7}, True),
    "latent": (
        "DeepseekV3Config",
        {
            **SHAPE,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
        True,
    ),
    "state-space": (
        "MambaConfig",
        {
            "vocab_size": 101,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        False,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.slow
def test_rows_that_join_and_leave_are_answered_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, fields, is_plain = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, cls)(**fields, tie_word_embeddings=False)  # tied ones of random weights only repeat
    ).eval()
    nn.init.normal_(model.get_output_embeddings().weight, std=0.4)
    assert has_plain_cache(model) == is_plain
    asked = requests(14, sampling=Sampling(max_tokens=16), vocab=101)
    ends = range(2, 12)
    want = [alone(model, request, ends) for request in asked]
    assert len({len(tokens) for tokens in want}) > 3
    # With few free columns all rows move to another buffer now and then.
    for spare, batch_size in ((3, 1), (3, 4), (3, 64), (128, 4), (128, 64)):
        monkeypatch.setattr(hf._Slots, "SPARE", spare)
        got = complete(model, asked, batch_size=batch_size, ends=ends)
        assert [list(c.token_ids) for c in got] == want


def alone(model: Any, request: Request, ends: Iterable[int]) -> list[int]:
    """Without a batch, padding or cache."""
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens and not (tokens and tokens[-1] in ends):
        uniform = uniforms(np.array([request.seed], dtype=np.uint64), len(tokens))
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *tokens]]), use_cache=False).logits[:, -1]
        tokens.append(int(sample(logits, torch.from_numpy(uniform), request.sampling)[0]))
    return tokens


def test_finished_rows_are_handed_over_while_others_run(model: Any) -> None:
    generator = BatchGenerator(model, TOKENIZER, [EOS], batch_size=4)
    asked = [dataclasses.replace(r, sampling=Sampling(max_tokens=1 + i % 7)) for i, r in enumerate(requests(20))]
    batches = list(generator.run(asked))
    assert len(batches) > 5
    assert sorted(c.key for batch in batches for c in batch) == sorted(r.key for r in asked)


# ---------------------------------------------------------------------------------------------------- stop strings


def test_keys_and_values_are_as_large_as_the_rows_and_go_with_the_last(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    original, held = hf._Slots.__init__, []

    def init(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(weakref.ref(self))

    def note() -> None:
        slots = made[-1]()
        held.append(sum(buffer.nbytes for layer in slots.cache.layers for buffer in layer.buffers))

    monkeypatch.setattr(hf._Slots, "__init__", init)
    asked = [
        dataclasses.replace(r, token_ids=r.token_ids[:3] * 7) for r in requests(96, sampling=Sampling(max_tokens=14))
    ]
    gc.disable()
    try:
        list(BatchGenerator(model, TOKENIZER, [EOS], batch_size=64, on_step=note).run(asked))
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()
    config = model.config
    size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads * model.dtype.itemsize
    longest = max(len(r.token_ids) for r in asked) + 14
    assert 0 < max(held) <= 1.25 * 2 * config.num_hidden_layers * 64 * longest * size


def byte_tokenizer() -> Any:
    """One token a byte, of a, b, space, é and è: most characters are split."""
    vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", "Ã", "©", "¨", "a", "b", "Ġ"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


STOPS = [("é",), ("b", "èé"), ("é a", "a é"), (" é", "é ", "aé"), ("aa",), ("abb", "baa", "éé")]


@pytest.mark.slow
def test_a_row_ends_with_the_token_that_completes_a_stop_string(way: str) -> None:
    tokenizer = byte_tokenizer()
    model = llama(vocab_size=8)
    asked = requests(16, vocab=8, sampling=Sampling(max_tokens=50, temperature=3.0))
    free = complete(model, asked, tokenizer=tokenizer, ends=[])
    for stop in STOPS:
        want, cut = [], 0
        for completion in free:
            for n in range(1, len(completion.token_ids) + 1):
                text = tokenizer.decode(completion.token_ids[:n], skip_special_tokens=True)
                if any(s in text for s in stop):
                    text = text[: min(text.find(s) for s in stop if s in text)]
                    want.append((completion.token_ids[:n], text, "stop"))
                    cut += 1
                    break
            else:
                want.append((completion.token_ids, completion.text, completion.finish_reason))
        assert cut >= 1
        sampling = Sampling(max_tokens=50, temperature=3.0, stop=stop)
        got = complete(model, asked, sampling, tokenizer=tokenizer, ends=[], batch_size=5)
        assert [(c.token_ids, c.text, c.finish_reason) for c in got] == want, stop


def test_a_stop_string_in_the_prompt_stops_nothing(model: Any) -> None:
    prompt = tuple(TOKENIZER("Write Sam twice. Sam")["input_ids"])
    asked = [dataclasses.replace(r, token_ids=prompt) for r in requests(5)]
    stopped = complete(model, asked, Sampling(max_tokens=4, stop=("Sam twice",)))
    assert stopped == complete(model, asked, Sampling(max_tokens=4))


# ------------------------------------------------------------------------------------------------------ the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells a and b of full weights, l a LoRA adapter of a, and their tokenizer."""
    folder = tmp_path_factory.mktemp("cells")
    TOKENIZER.save_pretrained(folder / "tokenizer")
    for seed, name in enumerate("ab"):
        llama(seed).save_pretrained(folder / name)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(llama(0), config).save_pretrained(folder / "l")
    return folder


def cell(folder: Path, name: str, **changes: Any) -> Cell:
    base = folder / ("a" if name == "l" else name)
    fields = {
        "name": name,
        "path": folder / name,
        "base": base,
        "size_b": 1e-5,
        "version_rank": 1,
        "weight_hash": name * 16,
        "architecture": "x",
        "context": None,
        **changes,
    }
    return Cell(**fields)


def spec(folder: Path, names: str = "abl", **changes: Any) -> EngineSpec:
    return EngineSpec(
        **{
            "kind": "hf",
            "cells": tuple(cell(folder, name) for name in names),
            "tokenizer": str(folder / "tokenizer"),
            "dtype": "float32",
            "use_cpu": True,
            "batch_size": 4,
            **changes,
        }
    )


def collect_all(engine: Engine) -> dict[bytes, Completion | Refusal]:
    answers: dict[bytes, Completion | Refusal] = {}
    while got := engine.collect():
        assert not answers.keys() & {a.key for a in got}
        answers.update((a.key, a) for a in got)
    return answers


def shard(name: str, cells: str = "abl", n: int = 9) -> list[Request]:
    return [r for c in cells for r in requests(n, name, cell=c)]


def test_every_step_and_every_model_is_a_sign_of_life(folder: Path) -> None:
    """Whoever watches the engine must not take a long response for a hang."""
    engine = HFEngine(spec(folder, "ab"))
    signs: list[bool] = []
    engine.on_progress = lambda is_loading=False: signs.append(is_loading)  # type: ignore[method-assign]
    requests = [dataclasses.replace(r, sampling=Sampling(max_tokens=7, top_k=3)) for r in shard("x", "ab", 4)]
    engine.submit(requests)
    answers = collect_all(engine)
    assert signs.count(True) == 2
    longest = max(len(a.token_ids) for a in answers.values() if isinstance(a, Completion))
    assert signs.count(False) >= longest
    engine.close()


@pytest.mark.slow
def test_a_shard_done_again_alone_gives_the_same_bytes(folder: Path) -> None:
    shards = [shard("x", n=5), shard("y"), [*shard("z", "b"), *requests(7, "z2", Sampling(temperature=0.5, top_k=5))]]
    engine = open_engine(spec(folder))
    for requests_ in shards:
        engine.submit(requests_)
    want = collect_all(engine)
    assert len(want) == sum(map(len, shards))
    for requests_ in shards[::-1]:
        again = open_engine(spec(folder))
        again.submit(requests_)
        assert collect_all(again) == {r.key: want[r.key] for r in requests_}  # log-probs too


def test_one_model_is_in_memory_and_loaded_as_seldom_as_can_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(model: Any) -> int:
        return 0 if model is None else sum(p.untyped_storage().nbytes() for p in model.parameters())

    loaded: list[str] = []
    models: list[weakref.ref[Any]] = []
    original = hf.load_model

    def load(path: Path, **options: Any) -> Any:
        assert not any(held(ref()) for ref in models)
        loaded.append(path.name)
        model = original(path, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(hf, "load_model", load)
    engine = open_engine(spec(folder))
    for name, cells in (("x", "abab"), ("y", "ab"), ("z", "la"), ("w", "b")):
        engine.submit([r for i, c in enumerate(cells) for r in requests(3, f"{name}{i}", cell=c)])
    collect_all(engine)
    assert loaded == ["a", "b", "a", "l", "b"]
    engine.submit(shard("v", "b"))
    assert engine.collect()
    assert held(models[-1]())
    engine.close()
    assert not held(models[-1]())
    assert engine.collect() == []
    engine.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
@pytest.mark.slow
def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    def resident() -> int:
        gc.collect()
        trim_heap()  # what earlier tests freed may still be resident, and a model would fill it unseen
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    big = llama(vocab_size=20_000, hidden_size=512)
    size = sum(p.numel() * p.element_size() for p in big.parameters())
    big.save_pretrained(tmp_path / "big")
    del big
    engine = open_engine(spec(tmp_path, cells=(cell(tmp_path, "big"),)))
    before = resident()
    engine.submit(requests(8, cell="big"))
    engine.collect()
    with_model = resident()
    engine.close()
    after = resident()
    assert with_model - before > 0.8 * size > 60e6
    assert after - before < 0.2 * size


def test_what_cannot_be_answered_is_refused_and_the_rest_goes_on(folder: Path) -> None:
    engine = open_engine(spec(folder, "ab", cells=(cell(folder, "a", context=30), cell(folder, "b")), context=40))
    fine = requests(3)

    def wrong(tokens: Sequence[int], cell: str = "a") -> Request:
        return dataclasses.replace(
            fine[0], key=f"{cell} {len(tokens)} {tokens[:1]}".encode(), cell=cell, token_ids=tuple(tokens)
        )

    cases = [
        (wrong([5] * 19), "cell a: a prompt of 19 tokens and a response of up to 12 exceed its context of 30"),
        (
            wrong([5] * 29, "b"),
            "cell b: a prompt of 29 tokens and a response of up to 12 exceed its context of 40",
        ),
        (wrong([]), "cell a: the prompt has no tokens"),
        (
            wrong([len(TOKENIZER), 3]),
            f"has token {len(TOKENIZER)}, beyond the {len(TOKENIZER)} of the model's embeddings",
        ),
        (wrong([-1]), "the prompt has token -1, beyond the"),
    ]
    fits = [wrong([5] * 18), wrong([5] * 28, "b")]
    engine.submit([*(request for request, _ in cases), *fine, *fits])
    answers = collect_all(engine)
    for request, reason in cases:
        answer = answers[request.key]
        assert isinstance(answer, Refusal)
        assert reason in answer.reason
    assert all(isinstance(answers[r.key], Completion) for r in fine + fits)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        generate(engine, [cases[2][0]])
    with pytest.raises(ValueError, match="request for the cell 'c'; this engine has a, b"):
        engine.submit(requests(1, cell="c"))


def test_a_broken_cell_is_named_and_the_next_shard_still_runs(folder: Path, tmp_path: Path) -> None:
    broken = llama()
    nn.init.constant_(broken.model.norm.weight, math.nan)
    broken.save_pretrained(tmp_path / "n")
    engine = open_engine(spec(folder, cells=(cell(folder, "a"), cell(tmp_path, "n"), cell(tmp_path, "gone"))))
    for name in ("n", "gone", "a"):
        engine.submit(requests(3, cell=name))
    with pytest.raises(InputError, match=r"^n: the model gives logits that are not finite"):
        engine.collect()
    with pytest.raises(InputError, match="gone: no causal language model can be loaded from here"):
        engine.collect()
    assert len(collect_all(engine)) == 3


def test_an_engine_without_its_tokenizer_does_not_open(folder: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        open_engine(spec(folder, tokenizer=str(folder / "nowhere")))


# -------------------------------------------------------------------------------------------------- random numbers


def test_uniforms_are_splitmix64() -> None:
    """The first outputs for seed 1234567, as published with the algorithm."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
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

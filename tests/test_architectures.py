"""Models of many architectures answer as transformers in float64 says, or are refused, before anything is generated.

All of them are in benchmarks/check_architectures.py; here are some of each kind.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import SHAPE, write_rows
from torch import nn

from tso_fast.errors import InputError
from tso_fast.generators import EngineSpec, generate, hf, proof, prove_models
from tso_fast.generators.hf import BatchGenerator, HFEngine
from tso_fast.models.policy import Policy

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "check_architectures.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("check_architectures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["check_architectures"] = module
    spec.loader.exec_module(module)
    return module


KINDS = {
    "GPT2": "right",
    "Gemma2": "right",
    "Mixtral": "right",
    "DeepseekV3": "right",
    "Mamba": "right",
    "Jamba": "right",
    "Rwkv": "right, one at a time",
    "MiniMax": "right, one at a time",
    "RecurrentGemma": "refused",
    "Bert": "refused",
}


@pytest.mark.parametrize("name", KINDS)
def test_an_architecture_is_right_or_refused(script: Any, name: str) -> None:
    checked = script.check(name)
    assert checked.generation.partition(":")[0] == KINDS[name]
    assert not checked.is_wrong
    assert (checked.training == "right") == (KINDS[name] != "refused")


def test_the_script_checks_many_and_tells_what_is_wrong(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert len(script.ARCHITECTURES) >= 80
    monkeypatch.setattr("sys.argv", ["check", "Llama", "Rwkv", "--out", str(tmp_path / "found.json")])
    monkeypatch.setattr(script, "quiet", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert script.main() == 0
    assert "2 of 2 right or refused" in capsys.readouterr().out
    monkeypatch.setattr(BatchGenerator, "prove", lambda self: None)  # as it was: padding is read as text
    assert script.main() == 1
    assert "1 of 2 right or refused; WRONG: Rwkv" in capsys.readouterr().out


# ---- through the engine and the command line


def save(folder: Path, config: Any, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight, std=0.4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(script: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("models"), script.tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "tie_word_embeddings": False, "initializer_range": 0.15}
    rwkv = transformers.RwkvConfig(**{**shape, "attention_hidden_size": 32, "context_length": 64})
    return {
        "rwkv": save(root / "rwkv", rwkv, tokenizer),
        "bert": save(root / "bert", transformers.BertConfig(**shape), tokenizer),
    }


def spec_of(path: Path, **options: Any) -> EngineSpec:
    from tso_fast.config.settings import CellConfig
    from tso_fast.matrix import open_cell

    cell = open_cell(CellConfig(path=str(path)))
    options = {"dtype": "float32", "attn_implementation": "auto", "use_cpu": True, **options}
    return EngineSpec(kind="hf", cells=(cell,), tokenizer=str(path), **options)


def test_a_recurrent_model_answers_in_a_shard_as_alone_and_says_that_it_is_slow(
    script: Any, folders: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_proven", {})
    asked = [r.__class__(**{**vars(r), "cell": "rwkv"}) for r in script.requests(1.0)]
    with caplog.at_level(logging.WARNING, "tso_fast"):
        together = generate(engine := HFEngine(spec_of(folders["rwkv"])), asked)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "rwkv: RwkvForCausalLM answers one prompt at a time, which is slow: in a batch"
    )
    assert together == [generate(engine, [request])[0] for request in asked]
    engine.close()
    monkeypatch.setattr(proof, "problem", lambda *args: pytest.fail("proved again"))
    prove_models(spec_of(folders["rwkv"]))


def test_a_model_that_sees_later_tokens_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Any
) -> None:
    monkeypatch.setattr(hf, "_proven", {})
    message = "bert: BertLMHeadModel cannot be used for generation: answered token by token, its logits are off by "
    with pytest.raises(InputError, match=f"^{message}"):
        prove_models(spec_of(folders["bert"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["bert"])
    with pytest.raises(InputError, match=r"BertLMHeadModel: its logits, of up to .* change by .* with the tokens that"):
        Policy(model)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "Add 1 and 2.", "answer": "3"}])
    run = tmp_path / "run"
    given = {"prompts": prompts, "output_dir": run, "verifier": "exact", "use_cpu": "true", "num_iterations": 1}
    arguments = [part for key, value in given.items() for part in (f"--{key}", value)]
    ended = cli("train", [*arguments, "--cells", f"[{{path: {folders['bert']}}}]", "--max_completion_length", "4"])
    assert ended.status == 2
    assert f"error: {message}" in ended.err
    assert not run.exists()


def test_an_error_of_an_architecture_is_a_reason_and_damaged_weights_are_blamed(script: Any) -> None:
    model = script.make_model("Llama")
    generator = BatchGenerator(model, script.tokenizer(), [2], batch_size=4, name="cell")
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(InputError, match="it fails with ZeroDivisionError: division by zero; expected a causal"):
        generator.prove()
    del model.forward
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(InputError, match="cell: the model gives logits that are not finite; its weights are damaged"):
        generator.prove()

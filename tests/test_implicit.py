"""Implicit scores against the model's own full logits in float64."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers import write_rows
from test_models import CONFIGS, LOAD, VOCAB, tiny
from torch import nn

from tso_fast.errors import InputError
from tso_fast.judges import implicit
from tso_fast.judges.implicit import SequenceLogprob, cell_logprobs, response_logprobs
from tso_fast.models import policy as policy_module
from tso_fast.models.tokens import encode_prompt, response_ids
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.types import HUMAN, Candidates, Cell, Prompt, Response

Row = tuple[tuple[int, ...], tuple[int, ...]]


def rows(n: int, vocab: int = VOCAB) -> list[Row]:
    """Of 1 to 20 tokens and 1 to 30 tokens; some hold the padding token."""
    rng = np.random.default_rng(0)
    sizes = zip(rng.integers(1, 21, n), rng.integers(1, 31, n), strict=True)
    return [tuple(tuple(rng.integers(0, vocab, size).tolist()) for size in pair) for pair in sizes]  # type: ignore[misc]


def reference(model: Any, row: Row) -> float:
    ids = torch.tensor([row[0] + row[1]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(logprobs.gather(1, ids[0, 1:, None])[len(row[0]) - 1 :].sum())


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_full_logits_in_float64(name: str) -> None:
    model, asked = tiny(name).double(), rows(17)
    want = [reference(model, row) for row in asked]
    got = response_logprobs(model, asked, pad_token_id=0)
    assert [score.logprob for score in got] == pytest.approx(want, abs=1e-9)
    assert [score.num_tokens for score in got] == [len(completion) for _, completion in asked]
    model.float()
    for tokens_per_batch in (1, 100, 10**6):
        got = response_logprobs(model, asked, pad_token_id=0, tokens_per_batch=tokens_per_batch)
        assert [score.logprob for score in got] == pytest.approx(want, abs=2e-3, rel=1e-5)
    assert response_logprobs(model, [], pad_token_id=0) == []


def test_batches_hold_as_many_tokens_as_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny(), rows(60)
    shapes: list[torch.Size] = []
    original = implicit.padded

    def pad(batch: Any, pad_token_id: int) -> Any:
        layout = original(batch, pad_token_id)
        shapes.append(layout.input_ids.shape)
        return layout

    monkeypatch.setattr(implicit, "padded", pad)
    done: list[int] = []
    response_logprobs(model, asked, pad_token_id=0, tokens_per_batch=200, advance=done.append)
    assert done == [shape[0] for shape in shapes]
    assert sum(done) == 60
    assert all(shape.numel() <= 200 for shape in shapes)
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(shapes))
    tokens = sum(len(p) + len(c) - 1 for p, c in asked)
    assert tokens > 0.85 * sum(shape.numel() for shape in shapes)
    assert len(shapes) < 1.3 * tokens / 200 + 1
    shapes.clear()
    response_logprobs(model, asked, pad_token_id=0, tokens_per_batch=20)
    assert all(shape.numel() <= 20 or shape[0] == 1 for shape in shapes)


def test_what_cannot_be_scored_is_an_error() -> None:
    for row, message in (
        (((5, 6), ()), "row 1: its prompt has 2 tokens and its completion 0"),
        (((), (5,)), "row 1: its prompt has 0 tokens and its completion 1"),
    ):
        with pytest.raises(ValueError, match=message):
            response_logprobs(tiny(), [rows(1)[0], row], pad_token_id=0)
    broken = tiny()
    broken.name_or_path = "cells/broken"
    policy = implicit.Policy(broken)
    nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.MonkeyPatch.context() as patch:  # the check of the head would see it first
        patch.setattr(implicit, "Policy", lambda model: policy)
        with pytest.raises(InputError, match="cells/broken: the model gives log-probs that are not finite"):
            response_logprobs(broken, rows(3), pad_token_id=0)


def test_full_logits_do_not_exist() -> None:
    """Of 4 x 200 tokens and 50 000 words they would be 160 MB."""
    model = tiny(vocab_size=50_000, max_position_embeddings=256)
    asked = [(tuple(range(1, 101)), tuple(range(1, 102)))] * 4
    response_logprobs(model, asked, pad_token_id=0)
    with torch.profiler.profile(profile_memory=True) as profile:
        response_logprobs(model, asked, pad_token_id=0)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 40e6


# --------------------------------------------------------------------------------------------------------- one cell

TOKENIZER = make_tokenizer([("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4, Recipe(seed=0))
EOS = TOKENIZER.eos_token_id


def candidates() -> list[Candidates]:
    sampled = Response(model="a", text="3", token_ids=(9, 11, EOS))
    cut = Response(model="a", text="3", token_ids=(9, 11, 12, 13))  # no end of sequence: it ran out of tokens
    human = Response(model=HUMAN, text="Sam Sam Sam")
    return [
        Candidates(prompt=Prompt(id="1", prompt="Add 1 and 2."), responses=(sampled, human, cut)),
        Candidates(prompt=Prompt(id="2", prompt="Write Sam twice."), responses=()),
        Candidates(prompt=Prompt(id="3", prompt="Write Sam twice."), responses=(human,)),
    ]


def a_cell(folder: Path, **changes: Any) -> Cell:
    fields = {
        "name": "a",
        "path": folder / "a",
        "base": folder / "a",
        "size_b": 1e-5,
        "version_rank": 1,
        "weight_hash": "0" * 16,
        "architecture": "x",
        "context": None,
        **changes,
    }
    return Cell(**fields)


def test_a_cell_scores_every_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(vocab_size=len(TOKENIZER))
    model.save_pretrained(tmp_path / "a")
    asked = candidates()
    models: list[weakref.ref[Any]] = []
    original = implicit.load_model

    def load(path: Path, **options: Any) -> Any:
        loaded = original(path, **options)
        models.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(implicit, "load_model", load)
    got = cell_logprobs(a_cell(tmp_path), asked, TOKENIZER, **LOAD)
    assert [len(scores) for scores in got] == [3, 0, 1]
    for item, scores in zip(asked, got, strict=True):
        for response, score in zip(item.responses, scores, strict=True):
            row = (encode_prompt(TOKENIZER, item.prompt), response_ids(TOKENIZER, item.prompt, response))
            assert score is not None
            assert score.logprob == pytest.approx(reference(model, row), abs=1e-3)
            assert score.num_tokens == len(row[1])
    gc.collect()
    assert models[0]() is None
    length = len(encode_prompt(TOKENIZER, asked[0].prompt)) + 3
    fits = cell_logprobs(a_cell(tmp_path, context=length), asked, TOKENIZER, **LOAD)
    assert fits[0][1:] == [None, None]
    assert fits[0][0] is not None
    assert got[0][0] is not None
    assert fits[0][0].logprob == pytest.approx(got[0][0].logprob, abs=1e-4)


def test_the_configured_implementation_reaches_the_op(
    tiny_matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    used: list[str] = []
    original = policy_module.linear_logprobs

    def spy(*args: Any, impl: str, **options: Any) -> Any:
        used.append(impl)
        return original(*args, impl=impl, **options)

    monkeypatch.setattr(policy_module, "linear_logprobs", spy)
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "2 + 3?", "responses": [{"model": "m", "text": "5"}]}])
    cells = f"[{{path: {tiny_matrix / 's.v1'}}}]"
    arguments = ["--responses", rows, "--cells", cells, "--judges", "[{kind: implicit}]", "--use_cpu"]
    for impl in ("reference", "cpu"):
        done = cli("score", [*arguments, "--impl", impl, "--output", tmp_path / impl])
        assert done.status == 0, done.err
    assert used == ["reference", "cpu"]


def test_a_lora_cell_is_scored_with_its_adapter(tmp_path: Path) -> None:
    tiny(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "a")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny(vocab_size=len(TOKENIZER)), config).eval()
    adapted.save_pretrained(tmp_path / "l")
    asked = candidates()
    plain = cell_logprobs(a_cell(tmp_path), asked, TOKENIZER, **LOAD)
    got = cell_logprobs(a_cell(tmp_path, path=tmp_path / "l"), asked, TOKENIZER, **LOAD)
    row = (encode_prompt(TOKENIZER, asked[0].prompt), (9, 11, EOS))
    score = got[0][0]
    assert isinstance(score, SequenceLogprob)
    assert score.logprob == pytest.approx(reference(adapted, row), abs=1e-3)
    assert plain[0][0] is not None
    assert abs(score.logprob - plain[0][0].logprob) > 0.1

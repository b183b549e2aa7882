"""Random Llamas with adapters that every engine can load, what is asked of them, and what transformers says."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tso_fast.config.settings import AnsweringConfig, CellConfig, JudgeConfig, TrainConfig
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows
from tso_fast.generators import Request, Sampling
from tso_fast.judges.judge import Bench, Judged
from tso_fast.judges.llm import LlmJudge
from tso_fast.matrix import ModelMatrix
from tso_fast.models.tokens import encode_prompt
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.training.adapters import adapter_weights
from tso_fast.training.load import load_policy, save_policy
from tso_fast.types import Candidates, Cell, Prompt, Response, Weights

CONTEXT = 320
TEXTS = [("Which response is better, A or B?", "A"), ("? 0 1 2 3 4 5 6 7 8 9", "7")] * 4
TOKENIZER: Any = make_tokenizer(TEXTS, Recipe(seed=0))
VOCAB = len(TOKENIZER)
OTHER_ENDS = [40, 41]
"""What the generation configs name besides the tokenizer's."""
ENDS = [TOKENIZER.eos_token_id, *OTHER_ENDS]


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
        "eos_token_id": ENDS,
    }
    (folder / "generation_config.json").write_text(json.dumps(own))


def save_adapter(base: Path, folder: Path, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **given)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def save_trained_adapter(base: Path, folder: Path, seed: int) -> None:
    """As training saves one, of every linear layer but the head."""
    given: dict[str, Any] = {"output_dir": "", "prompts": "-", "cells": [], "use_cpu": True, "seed": seed}
    config = TrainConfig(**given, peft="lora", lora_r=4, lora_alpha=16)
    accelerator = Accelerator(cpu=True)
    policy = load_policy(config, Weights(base, base), accelerator, has_adapter=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapter_weights(policy.model).items():
            if ".lora_B." in name:
                weight.normal_(std=0.2)
    save_policy(policy, TOKENIZER, folder, accelerator)


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


def make_cells(root: Path) -> dict[str, Cell]:
    """`one` with adapters `one_a one_b`, this one as trained, `two` with `two_a two_b`, `three`, and `judge`."""
    cells = []
    for seed, name in enumerate(("one", "two", "three")):
        save(make_model(seed), root / name)
        cells.append(cell(root / name))
    for seed, name in enumerate(("one_a", "one_b", "two_a", "two_b")):
        base = root / name.split("_")[0]
        (save_trained_adapter if name == "one_b" else save_adapter)(base, root / name, seed)
        cells.append(cell(root / name, base, 4))
    cells.append(cell(make_judge(root)))
    return {c.name: c for c in cells}


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
def _loaded(path: Path, base: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    return model if path == base else PeftModel.from_pretrained(model, path).eval()


def logits(cell: Cell, tokens: Sequence[int]) -> torch.Tensor:
    """By transformers, [T, V]."""
    with torch.no_grad():
        return _loaded(cell.path, cell.base)(torch.tensor([list(tokens)])).logits[0]


def logprob(cell: Cell, request: Request, tokens: Sequence[int]) -> float:
    """By transformers, under the request's sampling distribution."""
    sampling, before = request.sampling, len(request.token_ids)
    z = logits(cell, [*request.token_ids, *tokens])[before - 1 : -1]
    if sampling.temperature not in (0, 1):
        z = TemperatureLogitsWarper(sampling.temperature)(None, z)
    if sampling.top_k:
        z = TopKLogitsWarper(sampling.top_k)(None, z)
    if sampling.top_p < 1:
        z = TopPLogitsWarper(sampling.top_p)(None, z)
    return float(z.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum())


@functools.lru_cache(maxsize=64)
def greedy(cell: Cell, request: Request, ends: Collection[int] = ENDS) -> tuple[int, ...]:
    """By transformers: the likeliest tokens up to an end or the limit."""
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens and not (tokens and tokens[-1] in ends):
        tokens.append(int(logits(cell, [*request.token_ids, *tokens])[-1].argmax()))
    return tuple(tokens)


# --------------------------------------------------------------------------------------------------- a real judge

DIGITS = ((3, 7, 5), (9, 0, 1), (4, 8, 2), (6, 5, 9))
"""What it judges: the larger of two is better."""


def digits() -> list[Candidates]:
    return [
        Candidates(
            prompt=Prompt(id=f"d{i}", prompt="?"), responses=tuple(Response(model="m", text=str(n)) for n in row)
        )
        for i, row in enumerate(DIGITS)
    ]


def make_judge(root: Path) -> Path:
    """The folder `judge` of a model that says A or B, which of two digits is larger; beside it `compare.txt`."""
    (root / "compare.txt").write_text("---\nread: label\n---\n{prompt} {first} {second}")
    model = make_model(7)
    pairs = [(a, b) for row in DIGITS for a in row for b in row if a != b]
    ids = torch.tensor([_shown(a, b) for a, b in pairs])
    label = [TOKENIZER.encode(text, add_special_tokens=False)[0] for text in ("B", "A")]
    want = torch.tensor([label[a > b] for a, b in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = nn.functional.cross_entropy(model(ids).logits[:, -1], want)
        if loss.item() < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model.eval(), root / "judge")
    return root / "judge"


def _shown(a: object, b: object) -> list[int]:
    return encode_prompt(TOKENIZER, Prompt(id="-", prompt=f"? {a} {b}"))


def judge_digits(judge: Path, store: Path, **settings: Any) -> Judged:
    matrix = ModelMatrix([CellConfig(path=str(judge))])
    config = JudgeConfig(kind="llm", cell="policy", template=str(judge.with_name("compare.txt")))
    with ResponseStore(store) as opened:
        answering = AnsweringConfig(use_cpu=True, **settings)
        return LlmJudge(config).judge(digits(), Bench(bad=BadRows(), settings=answering, store=opened, matrix=matrix))


def check_digits(judge: Path, judged: Judged) -> None:
    """What was judged is right, and as sure as the model's own probabilities by transformers say."""
    assert len(judged.verdicts) == 12
    for c in judged.verdicts:
        first, second = (digits()[int(c.prompt_id[1:])].responses[i].text for i in c.responses)
        assert c.orders is not None
        assert abs(c.orders[0] - _prefers_first(judge, first, second)) < 1e-4
        assert abs(c.orders[1] - (1 - _prefers_first(judge, second, first))) < 1e-4
        assert abs(c.probability - sum(c.orders) / 2) < 1e-9
        assert (c.probability > 0.5) == (first > second)
    cost = judged.cost
    assert cost is not None
    assert (cost.requests, cost.new_requests, cost.decided, cost.disagreements) == (24, 24, 12, 0)


def _prefers_first(judge: Path, a: str, b: str) -> float:
    """P(A) / (P(A) + P(B)) over all tokens, in float32."""
    probs = logits(cell(judge), _shown(a, b))[-1].softmax(-1)
    words = [TOKENIZER.decode([i]).strip() for i in range(VOCAB)]
    mass = {label: sum(float(probs[i]) for i, word in enumerate(words) if word == label) for label in "AB"}
    return mass["A"] / (mass["A"] + mass["B"])

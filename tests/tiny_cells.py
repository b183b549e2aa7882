"""Random Llamas with adapters that every engine can load, what is asked of them, and what transformers says."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from tso_fast.generators import Request, Sampling
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.types import Cell

CONTEXT = 320
TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4
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
    """`one` with adapters `one_a one_b`, `two` with `two_a two_b`, and `three`."""
    cells = []
    for seed, name in enumerate(("one", "two", "three")):
        save(make_model(seed), root / name)
        cells.append(cell(root / name))
    for seed, name in enumerate(("one_a", "one_b", "two_a", "two_b")):
        base = root / name.split("_")[0]
        save_adapter(base, root / name, seed)
        cells.append(cell(root / name, base, 4))
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


def greedy(cell: Cell, request: Request, ends: Sequence[int] = ENDS) -> tuple[int, ...]:
    """By transformers: the likeliest tokens up to an end or the limit."""
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens and not (tokens and tokens[-1] in ends):
        tokens.append(int(logits(cell, [*request.token_ids, *tokens])[-1].argmax()))
    return tuple(tokens)

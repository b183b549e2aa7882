"""The model matrix: cells by version and size, who answers a prompt, and growth by one version an iteration."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tso_fast.batching import encode_prompt, response_ids
from tso_fast.config import CellConfig, GenerationConfig, ModelConfig
from tso_fast.errors import InputError
from tso_fast.generators import Completion, Request, Sampling
from tso_fast.generators.hf import HFGenerator
from tso_fast.policy import load_config, load_model, load_tokenizer
from tso_fast.records import BadRows, prompt_row
from tso_fast.seeds import seed_of
from tso_fast.store import sha256_file
from tso_fast.types import HUMAN, Candidates, Response


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model: ``Cell(name="m.v3", path=..., size_b=0.0008, version_rank=3, weight_hash="5f0c...", context=128)``."""

    name: str
    path: Path
    size_b: float
    version_rank: int
    weight_hash: str
    """First 16 hex digits of the sha256 over the weight files."""
    context: int | None
    """Most tokens of prompt and response together; None: no limit known."""


def open_cell(config: CellConfig, place: str = "cells") -> Cell:
    """Looks at a model folder without loading it.

    Raises:
        InputError: no folder, no config or no safetensors weights there.
    """
    path = Path(config.path)
    if not path.is_dir():
        raise InputError(f"{place}: path {config.path!r} is no folder; expected a local Hugging Face model")
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        missing = "config.json" if weights else "*.safetensors weights"
        hint = "; it has pickled *.bin weights: save them with safe_serialization" if [*path.glob("*.bin")] else ""
        raise InputError(f"{place}: {path} has no {missing}; expected config.json and *.safetensors{hint}")
    num_parameters = 0
    digest = hashlib.sha256()
    for file in weights:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        try:
            with safe_open(file, "pt") as tensors:
                num_parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except Exception as error:
            raise InputError(f"{place}: {file} is no readable safetensors file: {error}") from error
    model_config = load_config(path).get_text_config()
    return Cell(
        name=config.name or os.path.basename(os.path.abspath(path)),  # also of "."
        path=path,
        size_b=num_parameters / 1e9 if config.size_b is None else config.size_b,
        version_rank=config.version_rank,
        weight_hash=digest.hexdigest()[:16],
        context=getattr(model_config, "max_position_embeddings", None),
    )


class ModelMatrix:
    """Cells that share a vocabulary, one of them the policy."""

    def __init__(
        self, configs: Sequence[CellConfig], policy: str | None = None, reserved: Collection[str] = ()
    ) -> None:
        if not configs:
            raise InputError("cells: got none, expected at least one {path: ...}")
        self.cells = [open_cell(config, f"cells[{i}]") for i, config in enumerate(configs)]
        names = [cell.name for cell in self.cells]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(f"cells: the name {min(repeated)!r} is given twice; set distinct names")
        if HUMAN in names or any("/" in name for name in names):
            raise InputError(f"cells: got a cell named {HUMAN!r} or with a '/'; choose another name")
        if taken := set(names) & set(reserved):
            raise InputError(f"cells: the name {min(taken)!r} will be that of a trained version; set another name")
        if policy is not None and policy not in names:
            raise InputError(f"policy: got {policy!r}, expected one of the cells {', '.join(names)}")
        newest = max(self.cells, key=lambda cell: (cell.size_b, cell.version_rank))
        self.initial = self.policy = newest if policy is None else self.cells[names.index(policy)]
        self.tokenizer: Any = load_tokenizer(self.policy.path)
        self._check_vocabularies()
        self.trained: list[Cell] = []

    @property
    def context(self) -> int | None:
        return min((cell.context for cell in self.cells if cell.context is not None), default=None)

    def _check_vocabularies(self) -> None:
        vocabulary = self.tokenizer.get_vocab()
        for i, cell in enumerate(self.cells):
            where = f"cells[{i}]: {cell.path}"
            if cell is not self.policy and (other := load_tokenizer(cell.path).get_vocab()) != vocabulary:
                differing = {token for token, _ in other.items() ^ vocabulary.items()}
                raise InputError(f"{where} has another vocabulary ({len(other)} tokens) than {self.policy.path} "
                                 f"({len(vocabulary)} tokens); {len(differing)} differ, such as {min(differing)!r}. "
                                 "All cells need the policy's tokenizer")  # fmt: skip
            size = load_config(cell.path).get_text_config().vocab_size
            if size <= max(vocabulary.values()):
                raise InputError(f"{where} has embeddings for {size} tokens, but the tokenizer has ids up to "
                                 f"{max(vocabulary.values())}")  # fmt: skip

    def add_version(self, path: Path, name: str, max_versions: int = 0) -> None:
        """The trained policy joins as the newest version of its size and is the policy from now on."""
        rank = max(cell.version_rank for cell in self.cells) + 1
        config = CellConfig(path=str(path), name=name, size_b=self.initial.size_b, version_rank=rank)
        cell = open_cell(config)
        self.trained.append(cell)
        self.cells.append(cell)
        if max_versions and len(self.trained) > max_versions:
            self.cells.remove(self.trained[-1 - max_versions])
        self.policy = cell


Advance = Callable[[int], None]


def check_fits(
    candidates: Sequence[Candidates], tokenizer: Any, context: int | None, max_tokens: int, bad: BadRows
) -> list[Candidates]:
    """Those whose prompt and answer fit the context; the others, written answers included, are bad rows."""
    fitting = []
    for item in candidates:
        prompt = item.prompt
        try:
            length = len(encode_prompt(tokenizer, prompt))
            if context is not None and length + max_tokens > context:
                raise InputError(f"{prompt.where or prompt.id}: field 'prompt' has {length} tokens; with "
                                 f"max_completion_length {max_tokens} that exceeds the context of {context}; expected "
                                 f"at most {context - max_tokens}")  # fmt: skip
            for response in item.responses:
                field = "human_response" if response.is_human else f"responses[{response.model}]"
                if response.token_ids and max(response.token_ids) >= len(tokenizer):
                    raise InputError(f"{prompt.where or prompt.id}: field {field!r} has token id "
                                     f"{max(response.token_ids)}; the tokenizer has {len(tokenizer)}")  # fmt: skip
                tokens = len(response_ids(tokenizer, prompt, response))
                if context is not None and length + tokens > context:
                    raise InputError(f"{prompt.where or prompt.id}: field {field!r} has {tokens} tokens; with the "
                                     f"prompt's {length} that exceeds the context of {context}")  # fmt: skip
            fitting.append(item)
        except InputError as error:
            bad.handle(error, prompt_row(prompt))
    if not fitting:
        raise InputError(f"prompts: none of {len(candidates)} can be used; the last: {bad.rows[-1]['error']}")
    return fitting


def answer(
    cell: Cell,
    candidates: Sequence[Candidates],
    tokenizer: Any,
    config: ModelConfig,
    generation: GenerationConfig,
    *,
    num_generations: int,
    device: torch.device,
    advance: Advance = lambda n: None,
) -> list[tuple[Response, ...]]:
    """Responses of one cell to every prompt, ``num_generations`` each; they depend on seeds, not on batches."""
    sampling = Sampling(
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        max_tokens=generation.max_completion_length,
    )
    requests = []
    for item in candidates:
        ids = encode_prompt(tokenizer, item.prompt)
        for sample in range(num_generations):
            seed = seed_of(config.seed, item.prompt.id, cell.weight_hash, sample)
            requests.append(Request(token_ids=ids, seed=seed))
    model = load_model(cell.path, dtype=config.dtype, attn_implementation=config.attn_implementation, device=device)
    generator = HFGenerator(model, tokenizer, generation.generation_batch_size)
    try:
        completions = generator.generate(requests, sampling, advance)
    finally:
        generator.close()
    responses = [
        _response(cell, request, completion, i % num_generations)
        for i, (request, completion) in enumerate(zip(requests, completions, strict=True))
    ]
    return [tuple(responses[i : i + num_generations]) for i in range(0, len(responses), num_generations)]


def _response(cell: Cell, request: Request, completion: Completion, sample: int) -> Response:
    return Response(
        model=cell.name,
        text=completion.text,
        size_b=cell.size_b,
        version_rank=cell.version_rank,
        sample=sample,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        seed=request.seed,
        weight_hash=cell.weight_hash,
        logprob=round(completion.logprob, 5),
    )


def merge(candidates: Sequence[Candidates], answers: Sequence[Sequence[tuple[Response, ...]]]) -> list[Candidates]:
    """Candidates with the responses of all cells after those they came with."""
    return [
        dataclasses.replace(item, responses=item.responses + tuple(r for cell in of_prompt for r in cell))
        for item, *of_prompt in zip(candidates, *answers, strict=True)
    ]

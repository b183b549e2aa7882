"""Checks that an engine uses the right weights: compares one greedy answer with transformers on a CPU.

Engines have silently kept weights that should have been replaced, or answered nonsense after a reload
(vllm#29341, trl#3247).
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tso_fast.errors import EngineError, InputError
from tso_fast.generators.engine import Completion, Engine, EngineSpec, Refusal, Request, Sampling
from tso_fast.models.load import load_model, load_tokenizer, weight_shapes
from tso_fast.models.memory import available_memory
from tso_fast.types import Cell

PROMPT = "The capital of France is"
MAX_TOKENS = 16
MEMORY_SHARE = 0.25

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest difference between two correct implementations, nats."""

    mean: float
    """Difference of the summed log-prob, per token."""
    gap: float
    """Distance of a greedy token's log-prob below the reference's best token."""


# float32 sums in another order differ by 1e-5, or about 1e-3 with TF32 products. float16 and bfloat16 round every
# layer's output to 11 and 8 bits: logits of about 20 are then off by 1/64 and 1/8. Tokens that close may change places,
# and in the mean over tokens much of the error cancels.
TOLERANCES = {
    "float32": Tolerance(mean=5e-3, gap=2e-2),
    "float16": Tolerance(mean=2e-2, gap=1e-1),
    "bfloat16": Tolerance(mean=1e-1, gap=5e-1),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Log-probs by transformers of some tokens after the prompt."""

    logprob: float
    gap: float
    """Largest distance of a token's log-prob below the best token's."""


def request(cell: Cell, spec: EngineSpec) -> Request:
    """The request for the greedy answer that is checked."""
    prompt = _prompt_ids(spec.tokenizer)
    limit = min((n for n in (spec.context, cell.context) if n is not None), default=MAX_TOKENS + len(prompt))
    prompt = prompt[: max(1, limit - MAX_TOKENS)]
    max_tokens = max(1, min(MAX_TOKENS, limit - len(prompt)))
    return Request(
        key=f"canary {cell.name}".encode(),
        cell=cell.name,
        token_ids=prompt,
        seed=0,
        sampling=Sampling(temperature=0.0, max_tokens=max_tokens),
    )


def check(engine: Engine, cell: Cell, spec: EngineSpec) -> Completion:
    """Asks an idle engine and judges its answer.

    Raises:
        EngineError: the answer does not come from the cell's weights; reports the differences.
        InputError: the weights themselves are damaged.
    """
    asked = request(cell, spec)
    engine.submit([asked])
    while not (answers := engine.collect()):
        pass
    answer = answers[0]
    if isinstance(answer, Refusal):
        raise EngineError(f"cell {cell.name}: the engine refuses the canary: {answer.reason}")
    judge(answer, cell, spec)
    return answer


def judge(answer: Completion, cell: Cell, spec: EngineSpec, before: tuple[Cell, Completion] | None = None) -> None:
    """Compares an answer to ``request`` with transformers.

    If the weights take more than a quarter of the free memory, only checks that log-probs are finite.

    Args:
        before: the weights that should have been replaced, and their answer.
    """
    where = f"cell {cell.name}: {cell.path}"
    if not answer.token_ids:
        raise EngineError(f"{where}: the engine's answer has no tokens")
    prompt = request(cell, spec).token_ids
    reference = None
    if _fits_memory(cell.base, spec.dtype):
        reference = _reference(cell, prompt, answer.token_ids, spec)
        if not math.isfinite(reference.logprob):
            raise InputError(
                f"{where}: the model gives logits that are not finite; its weights are damaged, or "
                f"{spec.dtype} is too narrow for it"
            )
    if answer.logprob is None:
        return
    if not math.isfinite(answer.logprob):
        raise EngineError(f"{where}: the engine's log-probs are not finite")
    if reference is None:
        return
    tolerance, n = TOLERANCES[spec.dtype], len(answer.token_ids)
    error = abs(answer.logprob - reference.logprob) / n
    if error > tolerance.mean or reference.gap > tolerance.gap:
        raise EngineError(
            f"{where}: the engine does not answer with these weights: a greedy answer of {n} tokens has "
            f"log-prob {answer.logprob:.4f} by the engine and {reference.logprob:.4f} by transformers, "
            f"{error:.4f} a token, expected at most {tolerance.mean}; its tokens are up to "
            f"{reference.gap:.4f} below the most likely, expected at most {tolerance.gap}"
        )
    if before is None:
        return
    # Two versions of a model may differ by less than the tolerance, but not agree in every bit.
    old, old_answer = before
    is_same = (old_answer.token_ids, old_answer.logprob) == (answer.token_ids, answer.logprob)
    if is_same and _reference(old, prompt, answer.token_ids, spec) != reference:
        raise EngineError(f"{where}: the engine still answers exactly as with the weights before, {old.path}")


@functools.lru_cache(maxsize=8)
def _prompt_ids(tokenizer: str) -> tuple[int, ...]:
    loaded: Any = load_tokenizer(tokenizer)
    return tuple(loaded(PROMPT)["input_ids"]) or (loaded.eos_token_id,)


_references: dict[tuple[Any, ...], Reference] = {}


def _reference(cell: Cell, prompt: tuple[int, ...], tokens: tuple[int, ...], spec: EngineSpec) -> Reference:
    """Cached, since a loop over versions returns to each of them, and the same weights give the same answer."""
    key = (cell.weight_hash, spec.dtype, prompt, tokens)
    if key not in _references:
        _references[key] = _teacher_forced(cell, prompt, tokens, spec)
    return _references[key]


def _teacher_forced(cell: Cell, prompt: tuple[int, ...], tokens: tuple[int, ...], spec: EngineSpec) -> Reference:
    import torch

    # The engine's attention may have no CPU implementation.
    attention = spec.attn_implementation if spec.attn_implementation in ("eager", "sdpa") else "auto"
    loaded = load_model(cell.path, base=cell.base, dtype=spec.dtype, attn_implementation=attention, device="cpu")
    model: Any = loaded.eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt + tokens])
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    gap = (logprobs.max(dim=-1).values - chosen).max()
    return Reference(logprob=float(chosen.double().sum()), gap=float(gap))


def _fits_memory(path: Path, dtype: str) -> bool:
    needed = sum(map(math.prod, weight_shapes(path).values())) * (4 if dtype == "float32" else 2)
    available = available_memory()
    if needed > MEMORY_SHARE * available:
        log.warning(
            "%s: its weights of %.1f GiB are not compared with transformers: %.1f GiB of memory are free, and "
            "the comparison may take a quarter",
            path,
            needed / 2**30,
            available / 2**30,
        )
        return False
    return True

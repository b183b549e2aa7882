"""Whether a model answers in a batch as it does alone, and alone as its own full forward pass says.

Recurrent models read padding as text, some caches hold more than keys and values, and a model that sees later tokens
has no next one; none of this raises an error by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tso_fast.errors import InputError
from tso_fast.generators.engine import Request, Sampling

Run = Callable[[Sequence[Request]], dict[bytes, list[torch.Tensor]]]
"""Answers requests and gives the logits of each one's steps, [V] each, on the CPU."""

LENGTHS = (11, 7, 4, 1)
"""Tokens of the prompts; a state that the one before left behind shows in the last."""
MAX_TOKENS = (2, 5, 4, 3)
"""The longest prompt's row leaves first, and another may join."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest root mean square of the difference of two rows of logits, over that of a row around its mean.

Unmasked padding makes it 0.1 to 1.4; rounding 1e-6 in float32 (1e-4 with TF32 products), 0.01 in bfloat16."""


def requests(token_ids: Sequence[int], limit: int | None) -> list[Request]:
    """Prompts of unequal length, made of ``token_ids`` over again; ``limit`` is the context."""
    longest = max(2, min(LENGTHS[0], (limit or 10**9) - max(MAX_TOKENS)))
    repeated = list(token_ids) * LENGTHS[0]
    return [
        Request(
            key=f"proof {i}".encode(),
            cell="",
            token_ids=tuple(repeated[i : i + min(length, max(1, longest - i))]),
            seed=0,
            sampling=Sampling(temperature=0.0, max_tokens=tokens),
        )
        for i, (length, tokens) in enumerate(zip(LENGTHS, MAX_TOKENS, strict=True))
    ]


def problem(model: Any, asked: Sequence[Request], run: Run) -> str:
    """How the logits of ``run`` differ from those of a full forward pass over the same tokens; empty: they agree."""
    try:
        found = run(asked)
        errors = [error_of(model, request, found[request.key]) for request in asked]
    except InputError:  # damaged weights
        raise
    except Exception as error:  # whatever an architecture raises that was made for something else
        return f"it fails with {type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
    worst, most = max(errors), TOLERANCES[model.dtype]
    return "" if worst <= most else f"its logits are off by {worst:.2g} of their spread, expected at most {most:g}"


@torch.inference_mode()
def error_of(model: Any, request: Request, logits: Sequence[torch.Tensor]) -> float:
    """Error of a row; in 16 bits its median over the steps, since rounding may send single tokens to other experts."""
    tokens = [int(step.argmax()) for step in logits]
    ids = torch.tensor([[*request.token_ids, *tokens]], device=model.device)
    full = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].cpu()
    errors = [_distance(step, whole) for step, whole in zip(logits, full[len(request.token_ids) - 1 :], strict=False)]
    return statistics.median(errors) if model.dtype in (torch.float16, torch.bfloat16) else max(errors)


def _distance(logits_V: torch.Tensor, full_V: torch.Tensor) -> float:
    logits_V, full_V = (x.double() - x.double().mean() for x in (logits_V, full_V))
    spread = float(full_V.square().mean().sqrt()) or 1.0
    return float((logits_V - full_V).square().mean().sqrt()) / spread

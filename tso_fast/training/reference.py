"""Which weights are the reference of an iteration, and their log-probs of its pairs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tso_fast.config.settings import OptimizationConfig, ReferenceConfig, TrainConfig
from tso_fast.files.atomic import TMP, writing
from tso_fast.files.run import Run
from tso_fast.matrix import ModelMatrix
from tso_fast.models.memory import release
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import IGNORE
from tso_fast.training.adapters import another_adapter
from tso_fast.training.batches import EncodedPair, collate, completion_lengths
from tso_fast.training.load import load_policy, save_policy
from tso_fast.training.shard import local_part, reshard
from tso_fast.types import Weights

DEFAULT_EMA_ALPHA = 0.6  # TRL's ref_model_mixup_alpha


def reference_weights(config: ReferenceConfig, matrix: ModelMatrix, run: Run, iteration: int) -> Weights:
    """The reference's weights: ``previous`` is TSO's hard copy of the policy at the iteration's start."""
    if config.reference == "previous" or iteration == 1:
        return matrix.policy.weights
    if config.reference == "initial":
        return matrix.initial.weights
    mean = run.iteration(iteration - 1).reference
    return Weights(mean, mean)


@torch.no_grad()
def save_ema(
    config: TrainConfig, policy: Policy, tokenizer: Any, old: Weights, folder: Path, accelerator: Accelerator
) -> None:
    """reference <- alpha policy + (1 - alpha) reference."""
    alpha = DEFAULT_EMA_ALPHA if config.ref_model_mixup_alpha is None else config.ref_model_mixup_alpha
    reference = load_policy(config, old, accelerator)
    # Parameters, not the state dict: that names tied weights twice, and they must move once.
    for mean, new in zip(reference.parameters(), policy.parameters(), strict=True):
        local_part(mean).lerp_(local_part(new).to(mean.dtype), alpha)
    save_policy(reference, tokenizer, folder, accelerator)
    release(reference)


@contextlib.contextmanager
def scorer_of(
    reference: Weights | None, policy: Any, config: OptimizationConfig, accelerator: Accelerator
) -> Iterator[Any]:
    """The model whose log-probs the policy is compared with.

    It is the policy as it is, the policy with another adapter, or a model that is loaded for the while.
    """
    if reference is None:
        yield policy
        reshard(policy)
    elif config.peft == "lora":
        with another_adapter(accelerator.unwrap_model(policy).model, reference):
            yield policy
    else:
        scorer = load_policy(config, reference, accelerator)
        yield scorer
        release(scorer)


@torch.no_grad()
def reference_logprobs(
    policy: Any,
    pairs: Sequence[EncodedPair],
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    rank: int,
    world: int,
    impl: str,
    share_prompts: bool = False,
    per_token: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    advance: Callable[[int], None] = lambda n: None,
) -> torch.Tensor:
    """Sums of log-probs, [pairs, 2] float32 (chosen, rejected), nats.

    Batches of like length are dealt to the processes; each fills in its own and leaves zeros elsewhere.

    Args:
        share_prompts: see ``collate``.
        per_token: not the sums but the log-probs of all completions' tokens, one after the other in a single dimension,
            see ``completion_lengths``.
        autocast: the context that the policy is trained in, so that both round alike.
    """
    lengths = completion_lengths(pairs)
    out = torch.zeros(sum(lengths)) if per_token else torch.zeros(len(pairs), 2)
    parts = out.split(lengths) if per_token else ()
    longest: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        longest[pair.prompt] = max(pair.length, longest.get(pair.prompt, 0))
    order = sorted(range(len(pairs)), key=lambda i: (longest[pairs[i].prompt], pairs[i].prompt))
    for start in range(0, len(order), batch_size * world):
        index = order[start + rank * batch_size :][:batch_size]
        # Wrapped models communicate in their forward pass, so a process without pairs makes the pass all the same.
        batch = collate(
            pairs, index or order[:1], pad_token_id=pad_token_id, device=device, share_prompts=share_prompts
        )
        with autocast():
            logprobs = policy(batch, impl=impl, per_token=per_token).float()
        if index and per_token:
            sides = [2 * i + side for side in (0, 1) for i in index]
            found = logprobs[batch.layout.targets[batch.sides] != IGNORE].cpu().split([lengths[side] for side in sides])
            for side, values in zip(sides, found, strict=True):
                parts[side].copy_(values)
        elif index:
            out[index] = logprobs.reshape(2, -1).T.cpu()
        advance(batch_size * world)
    return out


def weights_key(weights: Weights) -> str:
    """What tells weights from others that had the same place: names, sizes and times of their files."""
    folders = dict.fromkeys((weights.path, weights.base))
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]
    return json.dumps([[str(file), (found := file.stat()).st_size, found.st_mtime_ns] for file in files])


def cached_logprobs(
    file: Path,
    pairs: Sequence[EncodedPair],
    how: tuple[Any, ...],
    accelerator: Accelerator,
    compute: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """What ``compute`` gives, from ``file`` if it was computed of the same pairs in the same way before."""
    tokens = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    key = hashlib.sha256(repr((how, tokens)).encode()).hexdigest()
    found: list[torch.Tensor | None] = [None]
    if accelerator.is_main_process:
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as stored:
            logprobs, written = stored.get_tensor("logprobs"), stored.metadata()
            if written == {"key": key, "sha256": _digest(logprobs)}:
                found[0] = logprobs
    broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    logprobs = compute()
    if accelerator.is_main_process:
        tmp = file.with_name(TMP + file.name)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logprobs": logprobs.contiguous()}, tmp, {"key": key, "sha256": _digest(logprobs)})
            os.replace(tmp, file)
    return logprobs


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()

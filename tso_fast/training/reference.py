"""Which weights are the reference of an iteration, and their log-probs of its pairs."""

from __future__ import annotations

import contextlib
import dataclasses
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
from tso_fast.errors import InputError, did_you_mean
from tso_fast.files.atomic import TMP, writing
from tso_fast.files.run import Run
from tso_fast.matrix import ModelMatrix, require_weights
from tso_fast.models.memory import release
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import IGNORE
from tso_fast.training.adapters import another_adapter, takes_adapter
from tso_fast.training.batches import EncodedPair, collate, completion_lengths
from tso_fast.training.load import load_policy, save_policy
from tso_fast.training.shard import local_part, reshard
from tso_fast.types import Weights

DEFAULT_EMA_ALPHA = 0.6  # TRL's ref_model_mixup_alpha


@dataclasses.dataclass(frozen=True, kw_only=True)
class Others:
    """Weights beside the policy's and the reference's whose log-probs of the pairs training uses."""

    second: Weights | None = None
    """A second reference."""
    rewarding: Weights | None = None
    """What rewards tokens by its log-ratio to the reference."""


def named_weights(setting: str, name: str, matrix: ModelMatrix) -> Weights:
    """The weights that a setting names: ``previous``, ``initial``, ``largest`` or a cell.

    Raises:
        InputError: there is no such cell, or only a server has its weights.
    """
    largest = max(matrix.cells, key=lambda cell: (cell.has_weights, cell.size_b, cell.version_rank))
    cells = {cell.name: cell for cell in matrix.cells}
    cells |= {"previous": matrix.policy, "initial": matrix.initial, "largest": largest}
    if name not in cells:
        raise InputError(f"{setting}: got {name!r}{did_you_mean(name, cells)}; expected one of {', '.join(cells)}")
    require_weights(cells[name], setting)
    return cells[name].weights


def other_weights(config: ReferenceConfig, matrix: ModelMatrix) -> Others:
    """The weights that training uses beside those of the policy and the reference.

    Raises:
        InputError: a setting names a cell that there is not.
    """
    given = ("second_reference", config.second_reference), ("token_reward_cell", config.token_reward_cell)
    second, rewarding = (None if name is None else named_weights(key, name, matrix) for key, name in given)
    return Others(second=second, rewarding=rewarding)


def check_others(config: ReferenceConfig, matrix: ModelMatrix) -> None:
    """Checks before a run that the weights which settings name are there, and differ where they must.

    Raises:
        InputError: they are not, or do not.
    """
    if other_weights(config, matrix).rewarding == matrix.policy.weights:
        raise InputError(
            f"token_reward_cell: {config.token_reward_cell!r} is the policy, which the first reference is too, so that "
            "every reward would be 0; name another cell, or another policy"
        )


def mixup_alpha(config: ReferenceConfig) -> float:
    """Share of the policy in what the reference is mixed to."""
    if config.ref_model_mixup_alpha is not None:
        return config.ref_model_mixup_alpha
    return DEFAULT_EMA_ALPHA if config.reference == "ema" else 1.0


class RunningMean:
    """A mean of weights beside those that are trained, sharded like them and in their dtype: as much memory once more.

    Args:
        start: the model whose weights it starts from.
    """

    def __init__(self, start: torch.nn.Module) -> None:
        reshard(start)
        self.weights = {name: value.detach().clone() for name, value in start.named_parameters()}

    @torch.no_grad()
    def add(self, policy: torch.nn.Module, alpha: float) -> None:
        """mean <- alpha policy + (1 - alpha) mean."""
        for mean, new in self._beside(policy):
            mean.lerp_(new.to(mean.dtype), alpha)

    @contextlib.contextmanager
    def in_place_of(self, policy: torch.nn.Module) -> Iterator[None]:
        """A context in which the policy has these weights; they change places one by one."""
        self._exchange(policy)
        yield
        self._exchange(policy)

    @torch.no_grad()
    def _exchange(self, policy: torch.nn.Module) -> None:
        for mean, own in self._beside(policy):
            kept = own.clone()
            own.copy_(mean)
            mean.copy_(kept)

    def _beside(self, policy: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each weight of the mean and of the policy, as far as this process holds it."""
        reshard(policy)
        for mean, own in zip(self.weights.values(), policy.parameters(), strict=True):
            yield local_part(mean), local_part(own)


def has_running_mean(config: ReferenceConfig) -> bool:
    """Whether the reference follows a mean inside an iteration, and not the policy itself."""
    return config.ref_model_sync_steps is not None and (config.reference == "ema" or mixup_alpha(config) < 1)


def running_mean(
    config: TrainConfig, policy: Policy, reference: Weights | None, accelerator: Accelerator
) -> RunningMean | None:
    """The mean that the reference follows inside an iteration; None: there is none.

    Args:
        reference: what it starts from; None: the policy as it is.
    """
    if not has_running_mean(config):
        return None
    start = policy if reference is None else load_policy(config, reference, accelerator)
    mean = RunningMean(start)
    if start is not policy:
        release(start)
    return mean


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
    alpha = mixup_alpha(config)
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
    elif config.peft == "lora" and takes_adapter(accelerator.unwrap_model(policy).model, reference):
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
    """Sums of log-probs, [pairs, 2 + E] float32 (chosen, rejected, further sequences), nats.

    Batches of like length are dealt to the processes; each fills in its own and leaves zeros elsewhere.

    Args:
        share_prompts: see ``collate``.
        per_token: not the sums but the log-probs of all completions' tokens, one after the other in a single dimension,
            see ``completion_lengths``.
        autocast: the context that the policy is trained in, so that both round alike.
    """
    lengths, each = completion_lengths(pairs), len(pairs[0].sequences)
    out = torch.zeros(sum(lengths)) if per_token else torch.zeros(len(pairs), each)
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
            sides = [each * i + side for side in range(each) for i in index]
            found = logprobs[batch.layout.targets[batch.sides] != IGNORE].cpu().split([lengths[side] for side in sides])
            for side, values in zip(sides, found, strict=True):
                parts[side].copy_(values)
        elif index:
            out[index] = logprobs.reshape(each, -1).T.cpu()
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
    tokens = [pair.sequences for pair in pairs]
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

"""A model of transformers whose forward pass can be a preference loss, and the batches that it takes.

The loss is computed inside the model's own ``forward``, so that whatever wraps the model (DDP, autocast, peft) does for
it what it does for logits.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from tso_fast.config.settings import OptimizationConfig
from tso_fast.errors import InputError
from tso_fast.losses import Loss
from tso_fast.models.policy import Policy
from tso_fast.training.batches import EncodedPair, collate
from tso_fast.training.load import share_prompts
from tso_fast.training.optimise import configured_loss
from tso_fast.types import PairBatch, PreferenceOutput

Inputs = Mapping[str, torch.Tensor]
"""A batch as of TRL's ``DataCollatorForPreference``: ``input_ids``, ``attention_mask``, ``completion_mask``, [2 N, L],
the chosen sequences first. Also, [N] each, where there are any: ``ref_chosen_logps``, ``ref_rejected_logps``,
``scale``, ``soft_label`` and ``margin``."""

LABELS = {"scale": 1.0, "soft_label": 1.0, "margin": 0.0}
"""Columns of a pair that weigh and mark it, and what holds without them."""


def bound_loss(names: str | Sequence[str], weights: Sequence[float] | None, options: Mapping[str, Any]) -> Loss:
    """The loss of these names with its options, as ``loss_type``, ``loss_weights`` and ``loss_args`` configure it.

    Raises:
        InputError: a loss that is not known or needs what a pair does not have, or options that it does not take.
    """
    return configured_loss(
        OptimizationConfig(
            loss_type=names if isinstance(names, str) else list(names),
            loss_weights=None if weights is None else list(weights),
            loss_args=dict(options),
        )
    )


class _Unpatched:
    """A model as it was before: what a ``Policy`` calls inside the model's own forward pass, whose hooks have run."""

    def __init__(self, model: Any) -> None:
        self._model, self._forward = model, model.forward

    def __call__(self, **inputs: Any) -> Any:
        return self._forward(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def add_pair_forward(model: Any, share_prompt: bool | Literal["auto"]) -> Policy:
    """Lets ``model(pairs=batch, ...)`` return what ``Policy.forward`` does; all other calls are as they were.

    A ``PreferenceOutput`` comes as a dict of its fields, in which wrappers look for tensors.

    Returns:
        The policy, which calls the model past the new forward pass.

    Raises:
        InputError: an architecture that is not supported, or cannot share prompts where ``share_prompt`` is True.
    """
    original = model.forward
    # Where accelerate has put autocast around it, which rounds, what is checked is the model without.
    model.forward = vars(model).get("_original_forward", original)
    policy = share_prompts(Policy(model), share_prompt)
    model.forward = original
    del policy.model  # a module may not become something else
    policy.model = _Unpatched(model)

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(self: Any, *args: Any, pairs: PairBatch | None = None, **options: Any) -> Any:
        if pairs is None:
            return original(*args, **options) if self is model else type(self).forward(self, *args, **options)
        if self is not model:
            raise RuntimeError("a copy of a model cannot train on pairs as the model does; copy it before, not after")
        known = {name: options[name] for name in ("impl", "loss", "per_token") if name in options}
        output = policy(pairs, **known)  # the rest is what peft passes to any model
        return vars(output) if isinstance(output, PreferenceOutput) else output

    model.forward = types.MethodType(forward, model)
    return policy


def pair_batch(inputs: Inputs, *, share_prompts: bool) -> PairBatch:
    """The pairs of a padded batch, laid out anew: no padding, and each prompt and each response once.

    Raises:
        InputError: a sequence that is not a prompt and then a response.
    """
    sequences = _sequences(inputs)
    half = len(sequences) // 2
    labels = {name: inputs[name].tolist() if name in inputs else [default] * half for name, default in LABELS.items()}
    pairs = []
    for i, (chosen, rejected) in enumerate(zip(sequences[:half], sequences[half:], strict=True)):
        of_pair: dict[str, Any] = {name: float(values[i]) for name, values in labels.items()}
        prompt = chosen[0]
        if rejected[0] != prompt:
            raise InputError(
                f"pair {i} of a batch: its chosen and rejected sequences have different prompts, of {len(prompt)} and "
                f"{len(rejected[0])} tokens; cut the ends of responses and not the starts of prompts"
            )
        pairs.append(EncodedPair(prompt=prompt, chosen=chosen[1], rejected=rejected[1], prompt_id=str(i), **of_pair))
    reference = None
    if "ref_chosen_logps" in inputs and "ref_rejected_logps" in inputs:
        reference = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1)
    device = inputs["input_ids"].device
    return collate(
        pairs, range(half), pad_token_id=0, device=device, share_prompts=share_prompts, ref_logprobs=reference
    )


def _sequences(inputs: Inputs) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and response of each row, without padding, on whichever side it is."""
    names = "input_ids", "attention_mask", "completion_mask"
    ids, mask, completion = (inputs[name].cpu().numpy() for name in names)
    found = []
    for row, (tokens, is_token, marks) in enumerate(zip(ids, mask > 0, completion > 0, strict=True)):
        tokens, marks = tokens[is_token], marks[is_token]
        num = int(marks.sum())
        if num in (0, len(tokens)) or not marks[-num:].all():
            where = f"pair {row % (len(ids) // 2)} of a batch, {'chosen' if row < len(ids) // 2 else 'rejected'}"
            raise InputError(
                f"{where}: completion_mask marks {num} of {len(tokens)} tokens; expected a prompt and then a response, "
                "of a token or more each"
            )
        found.append((tuple(tokens[:-num].tolist()), tuple(tokens[-num:].tolist())))
    return found


def with_reference(batch: PairBatch, logprobs: torch.Tensor) -> PairBatch:
    """The batch with its reference's log-probs, as ``Policy.forward`` returns them for all of its sides."""
    shape = batch.layout.targets.shape[: 1 if logprobs.dim() == 1 else 2]
    of_sequences = logprobs.new_zeros(shape).index_copy(0, batch.sides, logprobs)
    name = "ref_logprobs" if logprobs.dim() == 1 else "ref_token_logprobs"
    return dataclasses.replace(batch, **{name: of_sequences})

"""Pairs for a plain ``Trainer`` of transformers: a collator, and a model that returns the loss of what it collates.

model = with_preference_loss(model, "dual_clip", reference=copy.deepcopy(model))
args = TrainingArguments(..., remove_unused_columns=False, label_names=["completion_mask"])
Trainer(model, args, train_dataset=rows, data_collator=PairCollator(tokenizer)).train()
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from tso_fast.errors import InputError
from tso_fast.files.rows import parse_pair
from tso_fast.integrations.forward import LABELS, add_pair_forward, bound_loss, pair_batch, with_reference
from tso_fast.models.policy import Policy, disable_dropout
from tso_fast.training.batches import EncodedPair, encode_pairs

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_INPUTS = ("input_ids", "attention_mask", "completion_mask", *_REFERENCE, *LABELS)


class PairCollator:
    """Collates rows of pairs for ``with_preference_loss``.

    A row has ``prompt``, ``chosen`` and ``rejected``, text or messages as in TRL, or their tokens as ``prompt_ids``,
    ``chosen_ids`` and ``rejected_ids``; also, as far as there are any, ``scale``, ``soft_label``, ``margin``,
    ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Args:
        max_length: most tokens of prompt and response; the end of a longer response is cut off.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch, in the form of TRL's collator.

        Raises:
            InputError: a row that is no pair, or whose prompt leaves no room for a response.
        """
        pairs = [self._encode(row, f"row {i} of a batch") for i, row in enumerate(rows)]
        sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        ids = [torch.tensor(prompt + response) for prompt, response in sequences]
        marks = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(ids, sequences, strict=True)]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "completion_mask": pad_sequence([mark.long() for mark in marks], batch_first=True),
        }
        batch |= {name: torch.tensor([getattr(pair, name) for pair in pairs]) for name in LABELS}
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in _REFERENCE if name in rows[0]}

    def _encode(self, row: Mapping[str, Any], where: str) -> EncodedPair:
        if not row.keys() & {"prompt", "prompt_ids"}:
            raise InputError(
                f"{where} has {', '.join(row) or 'nothing'}; expected prompt, chosen and rejected. A Trainer takes "
                "away what models do not take: set remove_unused_columns=False in TrainingArguments"
            )
        if "prompt_ids" in row:
            prompt = tuple(row["prompt_ids"])
            room = None if self.max_length is None else max(0, self.max_length - len(prompt))
            chosen, rejected = (tuple(row[name])[:room] for name in ("chosen_ids", "rejected_ids"))
            labels: dict[str, Any] = {name: float(row.get(name, default)) for name, default in LABELS.items()}
            pair = EncodedPair(prompt=prompt, chosen=chosen, rejected=rejected, prompt_id=where, **labels)
            pairs = [pair] if chosen and rejected else []
        else:
            pairs = encode_pairs(self.tokenizer, [parse_pair(dict(row), where, where)], None, self.max_length).pairs
        if not pairs:
            raise InputError(
                f"{where}: max_length {self.max_length} leaves no room for its responses; leave the row out"
            )
        return pairs[0]


def with_preference_loss(
    model: Any,
    loss: str | Sequence[str] = "dual_clip",
    *,
    reference: Any = None,
    loss_weights: Sequence[float] | None = None,
    share_prompt: bool | Literal["auto"] = "auto",
    impl: str = "auto",
    **loss_args: Any,
) -> Any:
    """The same model, which returns the loss of batches of ``PairCollator`` as ``{"loss": ..., ...}``, the fields of
    ``PreferenceOutput``. All else that it is called with does what it did; it saves and generates as before.

    Dropout is turned off, in the reference too.

    Args:
        model: of transformers, or one of peft around it.
        loss: a name in ``tso_fast.LOSSES`` or ``package.module:function``; several are added up with ``loss_weights``.
        reference: a model that stays as it is. None: the model of peft without its adapter; or ``ref_chosen_logps``
            and ``ref_rejected_logps`` in the rows; or a loss that needs no reference.
        share_prompt: compute a prompt once for all of its responses; ``auto``: if the architecture can.
        impl: implementation of the op, as in ``preference_loss``.
        loss_args: options of the loss.

    Raises:
        InputError: a loss, an option or an architecture that cannot be used.
    """
    bound = bound_loss(loss, loss_weights, loss_args)
    is_peft = hasattr(model, "peft_config")
    if is_peft and model.active_peft_config.is_prompt_learning:
        raise InputError("prompts are shared, and prompt learning of peft changes them; use LoRA or alike")
    if reference is model:
        raise InputError("reference: it is the model that is trained; give a copy, copy.deepcopy(model)")
    disable_dropout(model)
    base = model.get_base_model() if is_peft else model
    policy = add_pair_forward(base, share_prompt)
    other = None if reference is None else _frozen(reference)
    per_token = bound.token_term is not None
    on_pairs = base.forward.__func__  # not bound, as a copy of the model has it too

    @torch.no_grad()
    def reference_logprobs(batch: Any) -> torch.Tensor:
        if other is None and not is_peft:
            raise InputError(
                f"{bound.title} needs a reference: give reference=copy.deepcopy(model), or {' and '.join(_REFERENCE)} "
                "in each row"
            )
        scorer = policy if other is None else other.to(batch.pairs.device)
        with contextlib.nullcontext() if scorer is other else model.disable_adapter():
            logprobs: torch.Tensor = scorer(batch, impl=impl, per_token=per_token)
        return logprobs

    @functools.wraps(on_pairs)
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        if inputs.get("completion_mask") is None:
            return on_pairs(self, *args, **inputs)
        given = {name: inputs[name] for name in _INPUTS if inputs.get(name) is not None}
        batch = pair_batch(given, share_prompts=policy.shares_prompts)
        if bound.needs_reference and batch.ref_logprobs is None:
            batch = with_reference(batch, reference_logprobs(batch))
        return on_pairs(self, pairs=batch, loss=bound, impl=impl)

    base.forward = types.MethodType(forward, base)
    return model


def _frozen(model: Any) -> Policy:
    disable_dropout(model)
    return Policy(model.eval().requires_grad_(False)).eval()

"""The policy: a language model whose forward pass computes the loss without ever computing full logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from tso_fast.errors import InputError
from tso_fast.logprob import linear_logprobs, preference_loss
from tso_fast.losses import Loss
from tso_fast.types import PairBatch


class Policy(nn.Module):
    """A language model whose forward pass is a preference loss.

    The loss is computed inside ``forward``, so that wrappers which gather weights there (DDP, FSDP) also gather
    the output head. The model computes no logits: its head only records its input.

    Args:
        is_checked: False if the model has no weights yet; then ``check_head`` is to be called when it has.

    Raises:
        InputError: the model changes its logits after the head in a way that the op does not support.
    """

    def __init__(self, model: PreTrainedModel, *, is_checked: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them.
        divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
        self.temperature = float(divisor or 1.0) / float(factor or 1.0)
        if is_checked:
            self.check_head()

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Input of the output head, [S, L, D]."""
        with _capture_head_input(self.head) as captured:
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return captured[0]

    def logprobs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor, *, impl: str
    ) -> torch.Tensor:
        """Log-probs of the targets, [S, L] nats, 0 for ignored targets."""
        hidden = self.hidden(input_ids, attention_mask)
        return linear_logprobs(hidden, self.head.weight, targets, impl=impl, **self._head_options())

    def forward(
        self, batch: PairBatch, *, impl: str, loss: str | Loss | None = None, per_token: bool = False, **options: Any
    ) -> Any:
        """The ``PreferenceOutput`` of a batch, or, if ``loss`` is None, the log-prob of each sequence, [S] nats, or of
        each token, [S, L]."""
        if loss is None:
            logprobs = self.logprobs(batch.input_ids, batch.attention_mask, batch.targets, impl=impl)
            if per_token:
                return logprobs
            # Summed as in preference_loss, so that equal policy and reference have equal sums.
            return logprobs.sum(dim=1, dtype=torch.float64).to(logprobs.dtype)
        return preference_loss(
            self.hidden(batch.input_ids, batch.attention_mask),
            self.head.weight,
            batch.targets,
            loss=loss,
            ref_logprobs=batch.ref_logprobs,
            ref_token_logprobs=batch.ref_token_logprobs,
            scale=batch.scale,
            soft_label=batch.soft_label,
            margin=batch.margin,
            impl=impl,
            **self._head_options(),
            **options,
        )

    def _head_options(self) -> dict[str, Any]:
        return {"bias": self.head.bias, "softcap": self.softcap, "temperature": self.temperature}

    @torch.no_grad()
    def check_head(self) -> None:
        """Raises InputError if the model's logits are not those of its head, with softcap and temperature, or if they
        depend on later tokens."""
        name = type(self.model).__name__
        if not isinstance(self.head, nn.Linear):
            raise InputError(f"{name}: its output head is {type(self.head).__name__}, expected a Linear")
        ids = torch.tensor([[1, 2, 3]], device=self.model.device) % self.head.weight.shape[0]
        was_training = self.model.training
        self.model.eval()
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        ours = self.head(self.hidden(ids, torch.ones_like(ids))).float()
        before = self.model(input_ids=ids[:, :2], attention_mask=torch.ones_like(ids[:, :2]), use_cache=False).logits
        self.model.train(was_training)
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        ours = ours / self.temperature
        # Relative to the largest logit, since logits of untrained weights are near 0. The model rounds to its dtype
        # twice.
        error, largest = float((ours - logits).abs().max()), float(logits.abs().max())
        if not error <= max(1e-4, 4 * torch.finfo(self.head.weight.dtype).eps) * largest:
            raise InputError(
                f"{name}: its logits, of up to {largest:.3g}, differ from head(hidden) by {error:.3g}; "
                "this architecture changes its logits in a way that is not supported"
            )
        seen = float((before.float() - logits[:, :2]).abs().max())
        if not seen <= (1e-3 if self.head.weight.dtype in (torch.float32, torch.float64) else 0.2) * largest:
            raise InputError(
                f"{name}: its logits, of up to {largest:.3g}, change by {seen:.3g} with the tokens that follow; "
                "expected a causal language model"
            )


@contextlib.contextmanager
def _capture_head_input(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Makes the head record its input and return one column, so that full logits never exist."""
    captured: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        captured.append(hidden)
        return hidden[..., :1].clone()  # sharding hooks into what modules return, and a view would lose the hook

    head.forward = forward
    try:
        yield captured
    finally:
        del head.forward


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, including those that modules pass to functions."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)

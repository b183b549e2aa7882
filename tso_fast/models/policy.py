"""The policy: a language model whose forward pass computes the loss without ever computing full logits."""

from __future__ import annotations

import contextlib
import dataclasses
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
from tso_fast.models.layout import Layout, attention_mask, padded, shared
from tso_fast.models.tokens import IGNORE
from tso_fast.types import BalancedOutput, PairBatch, PreferenceOutput


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
        self.shares_prompts = False
        """Whether a prompt is computed once for all of its responses; see ``obstacle_to_sharing``."""
        self.packs_rows = False
        """Whether padding is taken out of padded rows before the model computes them; see ``obstacle_to_packing``."""
        self.aux_weight = 0.0
        """Weight in the loss of a mixture's auxiliary loss, which spreads tokens over the experts; padded rows only."""
        self._aux_loss: torch.Tensor | None = None
        if is_checked:
            self.check_head()

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None = None, **options: Any
    ) -> Any:
        """Input of the output head, [B, L, D]; further options are for the model's attention."""
        if position_ids is not None:
            options["position_ids"] = position_ids
        if self.aux_weight and torch.is_grad_enabled():
            options["output_router_logits"] = True
        with _capture_head_input(self.head) as captured:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
        self._aux_loss = getattr(output, "aux_loss", None)
        return captured[0]

    def hidden_of(self, layout: Layout) -> torch.Tensor:
        """What the targets of a layout are predicted from, with their shape and a dimension D."""
        if self.packs_rows and layout.groups is None:
            return self._packed_hidden(layout)
        config = self.model.config.get_text_config()
        mask = attention_mask(layout, config, self.model.dtype)
        hidden = self.hidden(layout.input_ids, mask, layout.position_ids)
        if layout.rows is None:
            return hidden
        # Not by indexing, whose gradient would add up in any order where prompts end.
        return nn.functional.embedding(layout.rows, hidden.reshape(-1, hidden.shape[-1]))

    def _packed_hidden(self, layout: Layout) -> torch.Tensor:
        """Hidden states of padded rows, computed in a single row without padding; padding has those of other tokens.

        Attention is told once where each sequence begins, so that no layer waits for the device to find out.
        """
        is_token = layout.attention_mask.bool()
        lengths = is_token.sum(dim=1)
        order = is_token.flatten().cumsum(dim=0).view_as(layout.attention_mask) - 1
        bounds = nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
        longest = int(lengths.max())
        hidden = self.hidden(
            layout.input_ids[is_token][None],
            None,
            (is_token.cumsum(dim=1) - 1)[is_token][None],
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
        )
        return nn.functional.embedding(order.clamp(min=0), hidden[0])

    def logprobs(self, layout: Layout, *, impl: str) -> torch.Tensor:
        """Log-probs of the targets, shaped like them, nats, 0 for ignored targets."""
        return linear_logprobs(
            self.hidden_of(layout), self.head.weight, layout.targets, impl=impl, **self._head_options()
        )

    def forward(
        self, batch: PairBatch, *, impl: str, loss: str | Loss | None = None, per_token: bool = False, **options: Any
    ) -> Any:
        """The ``PreferenceOutput`` of a batch with its sequences as ``batch.sides``, the chosen ones first, or, if
        ``loss`` is None, the log-prob of each of these sequences, nats, or of each token, [(2 + E) N, C]."""
        if loss is None:
            logprobs = self.logprobs(batch.layout, impl=impl)
            if per_token:
                return logprobs[batch.sides]
            # Summed as in preference_loss, so that equal policy and reference have equal sums.
            return logprobs.sum(dim=1, dtype=torch.float64).to(logprobs.dtype)[batch.sides]
        output = preference_loss(
            self.hidden_of(batch.layout),
            self.head.weight,
            batch.layout.targets,
            pairs=batch.pairs,
            loss=loss,
            ref_logprobs=batch.ref_logprobs,
            ref_token_logprobs=batch.ref_token_logprobs,
            ref2_logprobs=batch.ref2_logprobs,
            win_rates=batch.win_rates,
            token_values=batch.token_values,
            scale=batch.scale,
            soft_label=batch.soft_label,
            margin=batch.margin,
            impl=impl,
            **self._head_options(),
            **options,
        )
        return self._by_side(output, batch)

    def _by_side(self, output: PreferenceOutput, batch: PairBatch) -> PreferenceOutput:
        """The output with its sequences as ``batch.sides``, and the auxiliary loss in the loss, where there is one."""
        names = ("logprobs", "ref_logprobs", "num_tokens")
        output = dataclasses.replace(output, **{name: getattr(output, name)[batch.sides] for name in names})
        aux, self._aux_loss = self._aux_loss, None
        if aux is None:
            return output
        total = output.loss + self.aux_weight * aux.to(output.loss)
        return BalancedOutput(**{**vars(output), "loss": total, "aux_loss": aux.detach()})

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

    @torch.no_grad()
    def obstacle_to_sharing(self) -> str | None:
        """Why a prompt cannot be computed once for several responses; None: it can, as was tried.

        Some architectures make positions of their own, or carry what came before along in a state.
        """
        config = self.model.config.get_text_config()
        if config._attn_implementation not in ("sdpa", "eager"):
            return f"attn_implementation {config._attn_implementation!r} takes no mask"
        tried = self._sequences_to_try()
        return self._difference(tried, shared(tried, 0))

    @torch.no_grad()
    def obstacle_to_packing(self) -> str | None:
        """Why rows cannot be computed as one without padding; None: they can, as was tried."""
        tried = self._sequences_to_try()
        self.packs_rows = True
        try:
            return self._difference(tried, padded(tried, 0))
        finally:
            self.packs_rows = False

    def _sequences_to_try(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Responses of unequal lengths to two prompts, which are token ids that any vocabulary has."""
        size = min(self.head.weight.shape[0], 97)
        prompts = [tuple((7 * i + j * j) % size for i in range(2 + 3 * j)) for j in (1, 2)]
        return [(p, tuple((5 * i + 3 * k) % size for i in range(2 + k))) for p in prompts for k in range(3)]

    def _difference(self, sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], together: Layout) -> str | None:
        """How hidden states of sequences in a layout differ from those of each alone; None: not at all."""
        was_training, packs = self.model.training, self.packs_rows
        self.model.eval()
        try:
            many = together.to(self.model.device)
            of_many = self.hidden_of(many)[many.targets != IGNORE].float()
            self.packs_rows = False
            ones = [padded([sequence], 0).to(self.model.device) for sequence in sequences]
            alone = torch.cat([self.hidden_of(one)[one.targets != IGNORE] for one in ones]).float()
        except Exception as error:
            return f"it fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self.model.train(was_training)
            self.packs_rows = packs
        off = float((alone - of_many).norm() / alone.norm())
        is_same = off <= max(1e-4, 20 * torch.finfo(self.model.dtype).eps)
        return None if is_same else f"hidden states differ by {off:.2g} of their size"


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


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that an architecture repeats, which it names in ``_no_split_modules``; empty: it names none."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0."""
    set_dropout(model, 0.0)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Sets every dropout probability, including those that modules pass to functions."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, probability)

"""``preference_loss`` behind the interface of Liger's DPO loss module."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tso_fast.logprob import preference_loss
from tso_fast.losses import LOSSES, Loss, LossFunction, loss_options, resolve_loss, scaled_mean
from tso_fast.types import PairLogprobs

VOCAB = 8192  # rows of the head averaged at a time, so that a bf16 head is never copied to float32 as a whole

Aux = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class FusedLinearTSOLoss(torch.nn.Module):
    """TSO's dual-clip loss from hidden states and the output head; call-compatible with ``LigerFusedLinearDPOLoss``.

    It takes the arguments of liger-kernel 0.8.5 in Liger's order, and with infinite clips or ``loss="dpo"`` it returns
    Liger's loss. It holds options, no parameters.

    Args:
        ignore_index: target value that marks ignored positions.
        beta: reward per nat of log-ratio.
        alpha: weight of the NLL in the loss, if ``compute_nll_loss``.
        compute_nll_loss: adds ``alpha`` times the negative log-likelihood of the chosen responses, mean over tokens.
        compiled: no effect.
        use_ref_model: False: reference log-probs are 0.
        average_log_prob: log-probs are means over the completion instead of sums.
        chunk_size: no effect.
        loss_type: ``sigmoid``, the logistic loss on the reward margin; ``loss`` selects others.
        label_smoothing: must be 0; ``forward`` takes a ``soft_label`` for each pair instead.
        discopop_tau: no effect.
        loss: a name in ``LOSSES`` or a function from ``PairLogprobs`` to [N] losses.
        clip_chosen: reward at which a chosen response is no longer pushed up; inf: no clip; None: the loss's default.
        clip_rejected: the same for the negated reward at which a rejected response is no longer pushed down.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None: no softcap.
        temperature: divides the logits, after the softcap.
        impl: ``reference``, ``cpu``, ``triton`` or ``auto``, as in ``preference_loss``.

    Raises:
        ValueError: the loss is unknown, it does not take an option, or an argument of Liger's has no equivalent.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        loss: str | Loss | LossFunction = "dual_clip",
        clip_chosen: float | None = None,
        clip_rejected: float | None = None,
        softcap: float | None = None,
        temperature: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if loss_type != "sigmoid":
            raise ValueError(
                f"loss_type={loss_type!r} is not supported; expected 'sigmoid', or leave it and pass loss="
                f"one of {', '.join(sorted(LOSSES))}, or a function"
            )
        if label_smoothing:
            raise ValueError(
                f"label_smoothing={label_smoothing!r} is not supported (Liger's sigmoid loss ignores it); "
                f"pass soft_label, [N] filled with {1 - label_smoothing:g}, to forward"
            )
        clips = {"clip_chosen": clip_chosen, "clip_rejected": clip_rejected}
        self.loss = loss
        self.loss_options: dict[str, Any] = {name: value for name, value in clips.items() if value is not None}
        if "beta" in loss_options(loss):
            self.loss_options["beta"] = beta
        resolve_loss(loss, self.loss_options)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.softcap = softcap
        self.temperature = temperature
        self.impl = impl

    def forward(
        self,
        lin_weight: torch.Tensor,
        _input: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
        ref_input: torch.Tensor | None = None,
        ref_weight: torch.Tensor | None = None,
        ref_bias: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | None = None,
        soft_label: torch.Tensor | None = None,
        margin: torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Aux]:
        """The loss of N pairs, chosen sequences first.

        Args:
            lin_weight: [V, D] output head.
            _input: [2N, L, D] hidden states; the first N sequences are chosen, the others rejected.
            target: [2N, L] int64, already shifted, ``ignore_index`` outside the completion.
            bias: [V] or None.
            ref_input: [2N, L, D] hidden states of the reference.
            ref_weight: [V, D]; None: ``lin_weight`` with ``bias``.
            ref_bias: [V] or None.
            scale: [N] >= 0, weight of each pair. ``soft_label``: [N] in [0, 1]. ``margin``: [N] >= 0.
            ref_logprobs: [2N] sums of reference log-probs, instead of ``ref_input``.
            token_weights: [2N, L], weight of each token in its sequence's sum.

        Returns:
            ``(loss, aux)``. ``loss`` is a differentiable scalar. ``aux``, detached and in Liger's order: chosen and
            rejected log-probs, [N] each; chosen and rejected mean logit over all positions and classes, before
            softcap and temperature, scalars; the NLL, 0 without ``compute_nll_loss``; chosen and rejected rewards,
            [N] each.

        Raises:
            ValueError: arguments do not fit, or a sequence has no completion token (Liger scores it as 0).
        """
        num_tokens = (target != self.ignore_index).sum(dim=-1)
        if not self.use_ref_model:
            if ref_logprobs is not None:
                raise ValueError("ref_logprobs has no effect with use_ref_model=False; leave one of them out")
            ref_input = ref_weight = ref_bias = None
            ref_logprobs = torch.zeros(target.shape[0], device=target.device)
        if self.average_log_prob:
            per_token = num_tokens.clamp(min=1).to(torch.promote_types(_input.dtype, torch.float32)).reciprocal()
            weights = per_token[..., None].expand(target.shape)
            token_weights = weights if token_weights is None else weights * token_weights
            if ref_logprobs is not None:
                if ref_logprobs.shape != per_token.shape:
                    raise ValueError(
                        f"ref_logprobs must be {tuple(per_token.shape)}, one sum a sequence, "
                        f"got {tuple(ref_logprobs.shape)}"
                    )
                ref_logprobs = ref_logprobs * per_token
        loss: str | Loss | LossFunction = self.loss
        options = self.loss_options
        if self.compute_nll_loss:
            loss, options = self._with_nll(scale), {}
        out = preference_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            ref_logprobs=ref_logprobs,
            ref_hidden=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            loss=loss,
            scale=scale,
            soft_label=soft_label,
            margin=margin,
            token_weights=token_weights,
            softcap=self.softcap,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            impl=self.impl,
            **options,
        )
        chosen, rejected = out.logprobs.chunk(2)
        chosen_rewards, rejected_rewards = (self.beta * (out.logprobs - out.ref_logprobs)).chunk(2)
        chosen_logits_mean, rejected_logits_mean = _mean_logits(_input, lin_weight, bias)
        nll = self._nll(chosen, num_tokens.chunk(2)[0]) if self.compute_nll_loss else torch.zeros_like(out.loss)
        return out.loss, (
            chosen,
            rejected,
            chosen_logits_mean,
            rejected_logits_mean,
            nll.detach(),
            chosen_rewards,
            rejected_rewards,
        )

    def _nll(self, chosen: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        sums = chosen * num_tokens if self.average_log_prob else chosen
        return -sums.sum() / num_tokens.sum()

    def _with_nll(self, scale: torch.Tensor | None) -> Loss:
        """A loss that gives every pair the mean preference loss plus the NLL.

        The NLL then has weight alpha whatever the scales are, and both come from one pass over the head.
        """
        preference = resolve_loss(self.loss, self.loss_options)

        def loss(pairs: PairLogprobs, **bound_in_preference: Any) -> torch.Tensor:
            losses = preference(pairs)
            mean = scaled_mean(losses, scale)
            return (mean + self.alpha * self._nll(pairs.chosen, pairs.num_chosen_tokens)).expand_as(losses)

        return dataclasses.replace(preference, function=loss, is_per_pair=False)

    def extra_repr(self) -> str:
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", repr(self.loss))
        options = "".join(f", {name}={value}" for name, value in self.loss_options.items())
        return f"loss={loss}{options}, impl={self.impl}"


@torch.no_grad()
def _mean_logits(
    hidden_SLD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean logit of the chosen and the rejected half: mean(hidden) . mean(weight) + mean(bias), by linearity."""
    dtype = torch.promote_types(hidden_SLD.dtype, torch.float32)
    weight_D = torch.stack([rows.sum(dim=0, dtype=dtype) for rows in weight_VD.split(VOCAB)]).sum(0)
    weight_D /= weight_VD.shape[0]
    hidden_SD = torch.stack([sequence.mean(dim=0, dtype=dtype) for sequence in hidden_SLD])
    chosen, rejected = (hidden_SD @ weight_D).chunk(2)
    bias = hidden_SD.new_zeros(()) if bias_V is None else bias_V.mean(dtype=dtype)
    return chosen.mean() + bias, rejected.mean() + bias

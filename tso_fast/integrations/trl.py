"""TRL's ``DPOTrainer`` with our losses, our op, and prompts that are computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from tso_fast.errors import InputError
from tso_fast.integrations.forward import LABELS, Inputs, add_pair_forward, bound_loss, pair_batch, with_reference
from tso_fast.losses import Loss, loss_options
from tso_fast.models.policy import Policy, disable_dropout
from tso_fast.training.monitors import Meter
from tso_fast.types import PairBatch, PreferenceOutput

try:
    from accelerate.utils import is_peft_model
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter
except ImportError as error:
    raise ImportError(f"tso_fast.integrations.trl needs TRL 1.16: pip install 'tso-fast[trl]' ({error})") from error

_BELONGS_HERE = {"loss_type": "pass loss= to TSOTrainer", "loss_weights": "pass loss_weights= to TSOTrainer"}
_ONLY_IN_TRL = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau")
"""Arguments of ``DPOConfig`` that say what TRL's own losses are."""


class TSOTrainer(DPOTrainer):
    """A ``trl.DPOTrainer`` whose loss is one of ``tso_fast.LOSSES``; it takes the same datasets and arguments.

    Chosen and rejected share their prompt's forward and backward pass, as do other pairs of that prompt in the batch,
    a response that is in several pairs is computed once, and padding is not computed. The reference is TRL's:
    ``ref_model``, a copy, the adapter turned off, or ``precompute_ref_log_probs``. Columns ``scale``, ``soft_label``
    and ``margin`` of the dataset weigh and mark its pairs; the loss of a step is sum(scale * loss) / sum(scale) over
    all of its passes and processes.

    Metrics have TRL's names; ``entropy``, ``mean_token_accuracy`` and ``logits/*`` would each cost a pass over the
    vocabulary and are left out. ``clip/*``, the share of responses at their bound, and ``num_tokens/*``, mean lengths,
    are added.

    Args:
        args: of TRL. ``beta`` and ``label_smoothing`` are the loss's. What has no effect here raises.
        loss: a name in ``tso_fast.LOSSES`` or ``package.module:function``; several are added up.
        loss_weights: a weight for each of several losses.
        loss_args: options of the loss, such as ``{"clip_chosen": 0.5}``.
        share_prompt: compute a prompt once; ``auto``: if the architecture can.
        impl: implementation of the op, as in ``preference_loss``.

    Raises:
        InputError: an argument that cannot be honoured; it says what to do.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ("trl", "tso-fast")
    _paper: Mapping[str, str] = {}

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *rest: Any,
        loss: str | Sequence[str] = "dual_clip",
        loss_weights: Sequence[float] | None = None,
        loss_args: Mapping[str, Any] | None = None,
        share_prompt: bool | Literal["auto"] = "auto",
        impl: str = "auto",
        **options: Any,
    ) -> None:
        names = [loss] if isinstance(loss, str) else list(loss)
        self.tso_loss = bound_loss(loss, loss_weights, _options_of(args, names, loss_args or {}))
        self._name = self.tso_loss.title  # in the model's card
        if args is not None:
            _check_arguments(args, self.tso_loss)
        self._impl, self._share_prompt = impl, share_prompt
        self._policies: dict[int, Policy] = {}
        super().__init__(model, ref_model, args, *rest, **options)
        self._check_setting()
        if not self.tso_loss.needs_reference:
            self.ref_model = None
        self._policy_of(self.model)
        self.data_collator: Any = _with_labels(self.data_collator)

    def _check_setting(self) -> None:
        """Raises InputError for what only TRL finds out from model, data and launcher, and is not to be had here."""
        if self._is_vision_dataset:
            raise InputError("TSOTrainer takes no images; use trl.DPOTrainer")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "TSOTrainer trains whole models, on one or many GPUs (DDP), not with FSDP or DeepSpeed; use tso-fast "
                "train with shard, or trl.DPOTrainer"
            )
        if self.aux_loss_enabled:
            raise InputError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, by DPOConfig or the model's configuration, but "
                "TSOTrainer adds no loss that balances experts; set router_aux_loss_coef=0.0, or use trl.DPOTrainer"
            )

    def _policy_of(self, model: Any) -> Policy:
        """The policy in a model, which can take pairs from now on."""
        base = self.accelerator.unwrap_model(model)
        if is_peft_model(base):
            if base.active_peft_config.is_prompt_learning:
                raise InputError(
                    "TSOTrainer shares prompts, and prompt learning of peft changes them; use LoRA or alike"
                )
            base = base.get_base_model()
        if id(base) not in self._policies:
            if self.args.disable_dropout:
                disable_dropout(base)  # TRL leaves on what models pass to functions, such as attention_dropout
            self._policies[id(base)] = add_pair_forward(base, self._share_prompt)
        return self._policies[id(base)]

    def _batch_of(self, inputs: Inputs, *models: Any) -> PairBatch:
        policies = [self._policy_of(model) for model in models]
        return pair_batch(inputs, share_prompts=all(policy.shares_prompts for policy in policies))

    def _reference(self, model: Any, batch: PairBatch) -> torch.Tensor:
        """Log-probs under the reference, of all sides or of their tokens, as the loss wants them."""
        adapter: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            per_token = self.tso_loss.token_term is not None
            logprobs: torch.Tensor = model(pairs=batch, impl=self._impl, per_token=per_token)
        return logprobs

    def compute_ref_log_probs(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Sums of log-probs under the reference, (chosen, rejected), [N] each: what TRL keeps with the dataset."""
        return self._reference(model, self._batch_of(inputs, model)).chunk(2)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """The loss of a pass, as its part of the step's.

        Args:
            num_items_in_batch: sum of the scales of all pairs of the step; None: this pass is all.
        """
        reference = self.model if self.ref_model is None else self.ref_model
        batch = self._batch_of(inputs, model, reference)
        if self.tso_loss.needs_reference and batch.ref_logprobs is None:
            batch = with_reference(batch, self._reference(reference, batch))
        output = PreferenceOutput(**model(pairs=batch, loss=self.tso_loss, impl=self._impl))
        self._note(output, batch, inputs)
        loss = output.loss
        if num_items_in_batch is not None:
            # preference_loss divided by this pass's scales, and DDP divides by the processes.
            loss = loss * batch.scale.sum() * (self.accelerator.num_processes / num_items_in_batch)
        if not return_outputs:
            return loss
        with torch.no_grad():  # as TRL does for compute_metrics
            return loss, model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The passes of a step, and the sum of their scales over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        scales = [batch.get("scale", torch.ones(len(batch["input_ids"]) // 2)).float().sum() for batch in batches]
        total = torch.stack([scale.to(device) for scale in scales]).sum()
        return batches, self.accelerator.reduce(total).clamp(min=torch.finfo(total.dtype).tiny)

    def _note(self, output: PreferenceOutput, batch: PairBatch, inputs: Inputs) -> None:
        """Keeps what TRL logs, under its names."""
        mode = "train" if self.model.training else "eval"
        meter = Meter()
        meter.add(output, batch.scale, [False] * len(batch.pairs))
        for name, value in meter.means(self.accelerator).items():
            if name != "loss" and not math.isnan(value):  # without a reference there are no rewards
                self._metrics[mode][name].append(value)
        if mode == "train":
            num_tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += num_tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*dict.fromkeys([*self._signature_columns, *LABELS])]


def _with_labels(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A collator that also hands on what weighs and marks pairs."""

    def collated(rows: list[Any]) -> Any:
        return {**collate(rows), **{name: _numbers(rows, name) for name in LABELS if name in rows[0]}}

    return collated


def _numbers(rows: list[Any], name: str) -> torch.Tensor:
    try:
        return torch.tensor([float(row[name]) for row in rows])
    except (TypeError, ValueError) as error:
        raise InputError(f"column {name!r} of the dataset: {error}; give each row a number, or rename it") from error


def _default(name: str) -> Any:
    field = next(field for field in dataclasses.fields(DPOConfig) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _options_of(args: DPOConfig | None, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the losses: those given, and what ``DPOConfig`` says for them.

    Raises:
        InputError: ``DPOConfig`` says what no loss reads, what is given too, or, by default, another value than the
            loss's own default.
    """
    options = dict(given)
    for option in ("beta", "label_smoothing"):
        default = _default(option)
        value = default if args is None else getattr(args, option)
        own = {name: loss_options(name)[option] for name in names if option in loss_options(name)}
        said = option in given or (own and all(option in given.get(name, {}) for name in own))
        if value != default and (said or not own):
            why = "is given in loss_args too" if said else f"has no effect on {', '.join(names)}"
            raise InputError(f"DPOConfig.{option} is {value!r} and {why}; leave one of them out")
        if not said and value == default and (other := {n: v for n, v in own.items() if v != value}):
            name, usual = next(iter(other.items()))
            raise InputError(
                f"{option}: DPOConfig's default is {value!r} and that of {name} {usual!r}; say which, as "
                f"loss_args={{{option!r}: {usual!r}}}"
            )
        if own and not said:
            options[option] = value
    return options


def _check_arguments(args: DPOConfig, loss: Loss) -> None:
    """Raises InputError for an argument that has no effect here."""
    for name in (*_BELONGS_HERE, *_ONLY_IN_TRL):
        if (value := getattr(args, name)) != _default(name):
            what = _BELONGS_HERE.get(name, "leave it out, or use trl.DPOTrainer")
            raise InputError(f"DPOConfig.{name} is {value!r}, which says what TRL's own losses are; {what}")
    if args.pad_to_multiple_of is not None:
        raise InputError(
            f"DPOConfig.pad_to_multiple_of is {args.pad_to_multiple_of}, but TSOTrainer takes padding out; leave it out"
        )
    if args.max_length is not None and args.truncation_mode != "keep_start":
        raise InputError(
            f"DPOConfig.truncation_mode is {args.truncation_mode!r}, which cuts the prompt that responses share; use "
            "'keep_start', or max_length=None"
        )
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name) and not loss.needs_reference:
            raise InputError(f"DPOConfig.{name} is set, but {loss.title} needs no reference; leave it out")
    if args.precompute_ref_log_probs and loss.token_term is not None:
        raise InputError(
            f"DPOConfig.precompute_ref_log_probs keeps sums, but {loss.title} needs the reference's log-prob of each "
            "token; leave it out"
        )

"""Training on the pairs of one iteration, through accelerate: any number of processes, the same steps."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.distributed.tensor import DTensor

from tso_fast import interrupts
from tso_fast.config.settings import OptimizationConfig, PairingConfig, ReferenceConfig, to_dict
from tso_fast.errors import InputError
from tso_fast.files.run import Iteration
from tso_fast.logprob import linear_logprobs
from tso_fast.losses import Loss, loss_options, weighted_sum
from tso_fast.models.policy import Policy, disable_dropout
from tso_fast.progress import progress_bar
from tso_fast.seeds import seed_of
from tso_fast.training.batches import EncodedPair, Step, collate, num_steps, num_tokens, plan_steps
from tso_fast.training.checkpoint import Checkpoints
from tso_fast.training.inputs import Scoring, make_inputs
from tso_fast.training.memory import explained_memory
from tso_fast.training.monitors import FirstStep, Meter, MetricsLog, NonFiniteGuard, finite
from tso_fast.training.moving import MovingReference, first_steps, pairs_of
from tso_fast.training.optimizers import make_optimizer, make_scheduler
from tso_fast.training.reference import Others, RunningMean
from tso_fast.training.shard import is_sharded
from tso_fast.types import Weights

_MADE_BY = {
    "ref2_logprobs": ("second_reference", "log-probs under a second reference"),
    "token_values": ("token_values", "a number for each token"),
}
"""Arguments of ``preference_loss`` that some losses need, the setting that makes them, and what they are."""
_EXTRA = {"extra_from": 1, "revision_template": 4}
"""Settings that make further sequences of each pair, and how many."""
_SOURCES_OF_LABELS = {"soft_label_by": "soft_label", "soft_label_kappa": "soft_label", "margin_weight": "margin"}


def configured_loss(config: OptimizationConfig) -> Loss:
    """The loss that is trained on, with its options bound.

    Raises:
        InputError: a loss that is not known or needs what training does not make, or options that it does not take.
    """
    flat = {
        name: value for name in ("beta", "clip_chosen", "clip_rejected") if (value := getattr(config, name)) is not None
    }
    named = config.loss_args or {}
    if twice := sorted(flat.keys() & named.keys()):
        raise InputError(f"loss_args.{twice[0]}: {twice[0]} is given beside loss_args too; give it once")
    names = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    try:
        loss = weighted_sum(names, config.loss_weights, {**flat, **named})
    except ValueError as error:
        raise InputError(f"loss_type: {error}") from error
    _check_further(loss, config)
    if isinstance(config, PairingConfig):
        for key, label in _SOURCES_OF_LABELS.items():
            if getattr(config, key) and label not in loss.labels:
                raise InputError(f"{key}: it has no effect on loss_type {config.loss_type!r}; leave it out")
        if config.win_rates and "win_rates" not in loss.needs | loss.takes:
            raise InputError(f"win_rates: it has no effect on loss_type {config.loss_type!r}; leave it out")
    if isinstance(config, ReferenceConfig) and config.ref_model_sync_steps and not loss.needs_reference:
        raise InputError(f"ref_model_sync_steps: loss_type {config.loss_type!r} has no reference; leave it out")
    return loss


def _check_further(loss: Loss, config: OptimizationConfig) -> None:
    """Checks that the settings make what a loss reads beside a pair, its reference and its labels, and nothing else."""

    def missing(setting: str, what: str, argument: str) -> InputError:
        advice = f"set {setting}" if hasattr(config, setting.split()[0]) else (
            f"call preference_loss with {argument} in a loop of your own"
        )  # fmt: skip
        return InputError(f"loss_type: {loss.title} needs {what}; {advice}, or train on another loss")

    for name, (setting, what) in _MADE_BY.items():
        is_given = getattr(config, setting, None) is not None
        if name in loss.needs and not is_given:
            raise missing(setting, what, name)
        if is_given and name not in loss.needs | loss.takes:
            raise InputError(f"{setting}: it has no effect on loss_type {config.loss_type!r}; leave it out")
    given = [setting for setting in _EXTRA if getattr(config, setting, None) is not None]
    num_extra = sum(_EXTRA[setting] for setting in given)
    if loss.num_extra is None or loss.num_extra == num_extra:
        return
    if not loss.num_extra:
        raise InputError(f"{given[0]}: it has no effect on loss_type {config.loss_type!r}; leave it out")
    told = " or ".join(f"{setting} ({count})" for setting, count in _EXTRA.items())
    but = f", and {' and '.join(given)} make {num_extra}" if given else ""
    raise missing(told, f"{loss.num_extra} further sequence{'s' * (loss.num_extra > 1)} for each pair{but}", "pairs")


def make_accelerator(config: OptimizationConfig, folder: str) -> Accelerator:
    """The accelerator, after what training needs is known to be there: the loss and its options, the op, the tracker.

    Args:
        folder: where a tracker keeps its files.

    Raises:
        InputError: one of them cannot be used.
    """
    configured_loss(config)
    try:
        with interrupts.fatal():  # processes wait for one another here
            accelerator = Accelerator(
                cpu=config.use_cpu,
                mixed_precision="bf16" if config.bf16 else "no",
                log_with=None if config.report_to == "none" else config.report_to,
                project_dir=folder,
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            )
    except ValueError as error:
        raise InputError(f"report_to {config.report_to!r} or bf16 {config.bf16} cannot be used: {error}") from error
    if config.report_to != "none" and not accelerator.log_with:
        raise InputError(f"report_to: {config.report_to!r} is not installed")
    try:
        one = torch.zeros(1, 1, device=accelerator.device)
        linear_logprobs(one, one, torch.zeros(1, dtype=torch.int64, device=accelerator.device), impl=config.impl)
    except (ValueError, ImportError) as error:
        raise InputError(f"impl: {error}") from error
    return accelerator


def tracker_settings(config: Any) -> dict[str, int | float | str | bool]:
    """A configuration for trackers, some of which take nothing but numbers and text: JSON stands for the rest."""
    return {
        key: value if isinstance(value, int | float | str) else json.dumps(value)
        for key, value in to_dict(config).items()
    }


def optimise(
    policy: Policy,
    pairs: Sequence[EncodedPair],
    config: OptimizationConfig,
    *,
    files: Iteration,
    accelerator: Accelerator,
    reference: Weights | None,
    pad_token_id: int,
    reference_key: str = "",
    others: Others | None = None,
    mean: RunningMean | None = None,
    steps_before: int = 0,
    num_iterations: int = 1,
) -> dict[str, Any]:
    """Trains ``policy`` in place and returns the figures of the iteration.

    Args:
        files: of the iteration.
        reference: the reference's weights; None: the policy as it is now.
        reference_key: what tells the reference's weights from others, so that its log-probs can be kept; empty: they
            are not.
        others: weights beside the reference's that the loss compares with; None: there are none.
        mean: what the reference becomes with ``ref_model_sync_steps``; None: the policy.
        steps_before: optimiser steps of the iterations before, so that a tracker's count goes on.
        num_iterations: of the run.

    Raises:
        TrainingError: a first loss that shows a mistake, too many non-finite steps in a row, or no memory left.
    """
    loss = configured_loss(config)
    if config.disable_dropout:
        disable_dropout(policy)
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer: Any = make_optimizer(policy, config)
    wrapped: Any = policy
    if not is_sharded(policy):
        wrapped, optimizer = accelerator.prepare(policy, optimizer)
    total_steps = num_steps(len(pairs), **_shares(config, accelerator))
    scoring = Scoring(wrapped, config, files, accelerator, pad_token_id)
    compared = reference, others or Others(), reference_key
    inputs, moving = _inputs(loss, pairs, config, scoring, compared, mean, steps_before)
    run = _Training(
        policy=wrapped,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, total_steps, files.number, num_iterations),
        loss=loss,
        pairs=pairs,
        inputs=inputs,
        moving=moving,
        has_own_reference=reference is None and config.disable_dropout,
        guard=NonFiniteGuard(files.folder, config.max_skipped_steps, accelerator.is_main_process),
        files=files,
        accelerator=accelerator,
        config=config,
        pad_token_id=pad_token_id,
        share_prompts=policy.shares_prompts,
        total_steps=total_steps,
        steps_before=steps_before,
    )
    with explained_memory(config, accelerator, max(pair.length for pair in pairs)):
        figures = run.all_steps()
    accelerator.free_memory()
    return figures


def _shares(config: OptimizationConfig, accelerator: Accelerator) -> dict[str, int]:
    """How a step is shared out, for ``num_steps`` and ``plan_steps``."""
    return {
        "epochs": config.num_train_epochs,
        "micro_size": config.per_device_train_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "world": accelerator.num_processes,
    }


def _inputs(
    loss: Loss,
    pairs: Sequence[EncodedPair],
    config: OptimizationConfig,
    scoring: Scoring,
    compared: tuple[Weights | None, Others, str],
    mean: RunningMean | None,
    steps_before: int,
) -> tuple[dict[str, Any], MovingReference | None]:
    """What batches hold beside pairs, and the reference that changes it on the way, if there is one.

    Args:
        compared: the reference, other weights and the reference's key, for ``make_inputs``.
    """
    if not isinstance(config, ReferenceConfig) or config.ref_model_sync_steps is None:
        return make_inputs(loss, pairs, scoring, *compared)[0], None
    steps = [step.all_index for step in _plan(pairs, config, scoring.files, scoring.accelerator)]
    before = steps_before if config.reference == "ema" else 0  # the others begin anew in each iteration
    first = pairs_of(steps[: first_steps(config, before)])
    inputs, logprobs = make_inputs(loss, pairs, scoring, *compared, first)
    assert logprobs is not None
    return inputs, MovingReference(config, scoring, pairs, steps, logprobs, mean, before)


def _plan(
    pairs: Sequence[EncodedPair],
    config: OptimizationConfig,
    files: Iteration,
    accelerator: Accelerator,
    fits: Callable[[Sequence[int]], bool] = lambda index: True,
) -> Iterator[Step]:
    """The steps of the iteration, see ``plan_steps``."""
    return plan_steps(
        [pair.prompt for pair in pairs],
        rank=accelerator.process_index,
        seed=seed_of(config.seed, files.number),
        grouped=config.group_pairs,
        fits=fits,
        **_shares(config, accelerator),
    )


@dataclass(kw_only=True)
class _Training:
    """The steps of one iteration and what they carry along."""

    policy: Any
    optimizer: Any
    scheduler: Any
    loss: Loss
    pairs: Sequence[EncodedPair]
    inputs: Mapping[str, Any]
    """What ``collate`` takes beside pairs: log-probs under references, numbers for tokens."""
    moving: MovingReference | None
    """The reference that follows the policy; None: it stays."""
    has_own_reference: bool
    """Whether the reference is the policy before the first step, so that the first loss is known."""
    guard: NonFiniteGuard
    files: Iteration
    accelerator: Accelerator
    config: OptimizationConfig
    pad_token_id: int
    share_prompts: bool
    total_steps: int
    steps_before: int
    notes: dict[str, float | None] = field(default_factory=lambda: {"first_loss": None})
    """Loss that the first step had to have, once it was checked."""
    window: Meter = field(default_factory=Meter)
    """Since the last row of metrics.jsonl."""
    whole: Meter = field(default_factory=Meter)
    tail: Meter = field(default_factory=Meter)
    """Of the last fifth of the steps."""

    def all_steps(self) -> dict[str, Any]:
        """Trains to the end, from the checkpoint if there is one."""
        t, accelerator = self.files.number, self.accelerator
        metrics = MetricsLog(self.files.run)
        self.policy.train()
        title = f"iteration {t}: train"
        with (
            interrupts.waiting() as signalled,
            self._checkpoints() as checkpoints,
            progress_bar(title, self.total_steps, lambda: f"loss {self.whole.means()['loss']:.4f}") as advance,
        ):
            done = checkpoints.load()
            if not done and self.config.keep_optimizer and t > 1:
                checkpoints.read_optimizer(Iteration(self.files.run, t - 1).optimizer)
            if accelerator.is_main_process:
                metrics.rewind(t, done + 1)
            advance(done)
            for number, step in itertools.islice(self._steps(), done, None):
                grad_norm = self.one_step(number, step)
                if number % self.config.logging_steps == 0 or number == self.total_steps:
                    self._log(number, step, grad_norm, metrics)
                if self.moving is not None:
                    self.moving.after(number)
                stopped_by = self._agreed(signalled())
                if stopped_by or (self.config.save_steps and number % self.config.save_steps == 0):
                    checkpoints.save(number)
                if stopped_by:
                    raise interrupts.Stopped(stopped_by)
                advance(1)
            if self.config.keep_optimizer:
                checkpoints.write_optimizer(self.files.optimizer)
        return {
            "loss": self.loss.title,
            "loss_options": finite(loss_options(self.loss)),
            **self.notes,
            "steps": self.total_steps,
            "skipped_steps": self.guard.total,
            "means": finite(self.whole.means(accelerator)),
            "final": finite(self.tail.means(accelerator)),
        }

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self.files.checkpoint,
            accelerator=self.accelerator,
            model=self.accelerator.unwrap_model(self.policy),
            optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
            scheduler=self.scheduler,
            meters=[self.window, self.whole, self.tail],
            guard=self.guard,
            notes=self.notes,
            kept={} if self.moving is None else self.moving.tensors(),
        )

    def _agreed(self, signalled: int) -> int:
        """The signal that any process received, 0: none did; they must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return signalled
        return int(self.accelerator.gather(torch.tensor([signalled], device=self.accelerator.device)).max())

    def _steps(self) -> Iterator[tuple[int, Step]]:
        return enumerate(_plan(self.pairs, self.config, self.files, self.accelerator, self._fits), start=1)

    def _fits(self, index: Sequence[int]) -> bool:
        """Whether pairs have no more tokens than a pass may have."""
        most = self.config.max_tokens_per_batch
        return most is None or num_tokens(self.pairs, index, self.share_prompts) <= most

    def one_step(self, number: int, step: Step) -> float:
        """One optimiser step, skipped when it is not finite; returns the gradient's norm."""
        batch = [self.pairs[i] for i in step.all_index]
        meter = Meter()
        first = FirstStep(self.loss) if number == 1 and self.has_own_reference and self.loss.needs_reference else None
        backward(self, step, meter, first)
        means = meter.means(self.accelerator)
        if first is not None:
            is_exact = self.config.dtype == "float32" and not self.config.bf16
            expected = first.check(means, self.accelerator, is_exact=is_exact)
            self.notes["first_loss"] = expected if math.isfinite(expected) else None
        grad_norm = clip_gradients(self.policy, self.config.max_grad_norm or torch.inf)
        loss = means["loss"] if any(pair.scale for pair in batch) else 0.0  # else 0 / 0
        if self.guard.is_finite(number, loss, grad_norm, batch):
            self.optimizer.step()
            is_late = number > 0.8 * self.total_steps
            for total in (self.window, self.whole, self.tail) if is_late else (self.window, self.whole):
                total.sums += meter.sums  # a skipped step is counted, but in no mean: one NaN would hide the others
        self.optimizer.zero_grad()
        self.scheduler.step()
        return grad_norm

    def _log(self, number: int, step: Step, grad_norm: float, metrics: MetricsLog) -> None:
        row = {
            "iteration": self.files.number,
            "step": number,
            "epoch": step.epoch,
            **self.window.means(self.accelerator),
            "grad_norm": grad_norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "skipped_steps": self.guard.total,
        }
        self.window.clear()
        self.accelerator.log(row, step=self.steps_before + number)
        if self.accelerator.is_main_process:
            metrics.write(row)


def backward(run: _Training, step: Step, meter: Meter, first: FirstStep | None = None) -> None:
    """Adds the gradient of sum(scale * loss) / sum(scale) over the step, however the step is shared out."""
    accelerator = run.accelerator
    total_scale = sum(run.pairs[i].scale for i in step.all_index) or 1.0
    for n, micro in enumerate(step.micro_batches, start=1):
        batch = collate(
            run.pairs,
            micro.index,
            pad_token_id=run.pad_token_id,
            device=accelerator.device,
            share_prompts=run.share_prompts,
            is_padding=micro.is_padding,
            **run.inputs,
        )
        is_last = n == len(step.micro_batches)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.policy):
            output = run.policy(batch, impl=run.config.impl, loss=run.loss)
            # preference_loss divided by this batch's scales, and DDP divides by the processes: undo both.
            accelerator.backward(output.loss * batch.scale.sum() * (accelerator.num_processes / total_scale))
        meter.add(output, batch.scale, micro.is_padding)
        if first is not None:
            first.add(output, batch)


def clip_gradients(policy: nn.Module, most: float) -> float:
    """Scales gradients down to a global norm and returns the norm that they had, over all processes."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

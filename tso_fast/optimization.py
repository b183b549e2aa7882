"""Training on the pairs of one iteration, through accelerate: any number of processes, the same steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from tso_fast import checkpoint
from tso_fast.batching import EncodedPair, Step, collate, num_steps, plan_steps
from tso_fast.config import OptimizationConfig, TrainConfig, loss_options_of
from tso_fast.errors import InputError
from tso_fast.logprob import linear_logprobs
from tso_fast.losses import resolve_loss
from tso_fast.monitors import Meter, MetricsLog, NonFiniteGuard, check_first_step, finite
from tso_fast.policy import Policy, disable_dropout
from tso_fast.progress import stage
from tso_fast.reference_policy import load_reference, reference_logprobs
from tso_fast.seeds import seed_of
from tso_fast.store import Run
from tso_fast.types import Weights


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator, after what training needs is known to be there: the loss and its options, the op, the tracker.

    Raises:
        InputError: one of them cannot be used.
    """
    try:
        resolve_loss(config.loss_type, loss_options_of(config))
    except ValueError as error:
        raise InputError(f"loss_type: {error}") from error
    try:
        accelerator = Accelerator(
            cpu=config.use_cpu,
            mixed_precision="bf16" if config.bf16 else "no",
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
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


def optimise(
    t: int,
    model: Any,
    pairs: Sequence[EncodedPair],
    reference: Weights | None,
    run: Run,
    accelerator: Accelerator,
    pad_token_id: int,
    config: TrainConfig,
) -> dict[str, Any]:
    """Trains ``model`` in place and returns the figures of iteration ``t``.

    Args:
        reference: the reference's weights; None: the model as it is now.

    Raises:
        TrainingError: a first loss that shows a mistake, or too many non-finite steps in a row.
    """
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config)
    policy, optimizer = accelerator.prepare(Policy(model), optimizer)
    world, rank = accelerator.num_processes, accelerator.process_index
    plan = {
        "epochs": config.num_train_epochs,
        "micro_size": config.per_device_train_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "world": world,
    }
    total_steps = num_steps(len(pairs), **plan)
    scheduler = transformers.get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, total_steps)

    scorer = policy if reference is None else load_reference(config, reference, accelerator.device)
    with stage(f"iteration {t}: reference log-probs", len(pairs)) as advance:
        ref_logprobs = reference_logprobs(
            scorer.eval(),
            pairs,
            batch_size=4 * config.per_device_train_batch_size,
            pad_token_id=pad_token_id,
            device=accelerator.device,
            rank=rank,
            world=world,
            impl=config.impl,
            advance=advance,
        )
    ref_logprobs = accelerator.reduce(ref_logprobs.to(accelerator.device)).cpu()
    del scorer

    window, whole, tail = meters = [Meter(), Meter(), Meter()]
    guard = NonFiniteGuard(run / f"iter-{t}", config.max_skipped_steps)
    saved = {
        "model": accelerator.unwrap_model(policy),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "meters": meters,
        "guard": guard,
    }
    checkpoint_folder = run / f"iter-{t}/checkpoint"
    done = checkpoint.load(checkpoint_folder, **saved)
    metrics = MetricsLog(run.folder)
    if accelerator.is_main_process:
        metrics.rewind(t, done + 1)

    policy.train()
    steps = plan_steps(len(pairs), rank=rank, seed=seed_of(config.seed, t), **plan)
    with stage(f"iteration {t}: train", total_steps, lambda: f"loss {whole.means()['loss']:.4f}") as advance:
        advance(done)
        for number, step in itertools.islice(enumerate(steps, start=1), done, None):
            batch = [pairs[i] for i in step.all_index]
            active = meters if number > 0.8 * total_steps else [window, whole]
            this = Meter()
            backward(accelerator, policy, pairs, step, ref_logprobs, pad_token_id, config, this)
            now = this.means(accelerator)
            if number == 1 and reference is None and config.disable_dropout:
                loss = resolve_loss(config.loss_type, loss_options_of(config))
                is_exact = config.dtype == "float32" and not config.bf16
                check_first_step(now, loss, batch, is_exact=is_exact)
            grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm or torch.inf))
            step_loss = now["loss"] if any(pair.scale for pair in batch) else 0.0  # else 0 / 0
            if guard.is_finite(number, step_loss, grad_norm, batch):
                optimizer.step()
                for meter in active:  # a skipped step is counted, but in no mean: one NaN would hide all the others
                    meter.sums += this.sums
            optimizer.zero_grad()
            scheduler.step()
            if number % config.logging_steps == 0 or number == total_steps:
                row = {
                    "iteration": t,
                    "step": number,
                    "epoch": step.epoch,
                    **window.means(accelerator),
                    "grad_norm": grad_norm,
                    "learning_rate": scheduler.get_last_lr()[0],
                    "skipped_steps": guard.total,
                }
                window.clear()
                accelerator.log(row, step=(t - 1) * total_steps + number)
                if accelerator.is_main_process:
                    metrics.write(row)
            if config.save_steps and number % config.save_steps == 0 and accelerator.is_main_process:
                checkpoint.save(checkpoint_folder, step=number, **saved)
            advance(1)
    figures = {"steps": total_steps, "skipped_steps": guard.total, "means": finite(whole.means(accelerator)),
               "final": finite(tail.means(accelerator))}  # fmt: skip
    accelerator.free_memory()
    return figures


def backward(
    accelerator: Accelerator,
    policy: Any,
    pairs: Sequence[EncodedPair],
    step: Step,
    ref_logprobs: torch.Tensor,
    pad_token_id: int,
    config: OptimizationConfig,
    meter: Meter,
) -> None:
    """Adds the gradient of sum(scale * loss) / sum(scale) over the step, however the step is shared out."""
    total_scale = sum(pairs[i].scale for i in step.all_index) or 1.0
    for n, micro in enumerate(step.micro_batches, start=1):
        batch = collate(
            pairs,
            micro.index,
            pad_token_id=pad_token_id,
            device=accelerator.device,
            ref_logprobs=ref_logprobs,
            is_padding=micro.is_padding,
        )
        is_last = n == len(step.micro_batches)
        with contextlib.nullcontext() if is_last else accelerator.no_sync(policy):
            output = policy(batch, impl=config.impl, loss=config.loss_type, **loss_options_of(config))
            # preference_loss divided by this batch's scales, and DDP divides by the processes: undo both.
            accelerator.backward(output.loss * batch.scale.sum() * (accelerator.num_processes / total_scale))
        meter.add(output, batch.scale, micro.is_padding)


def make_optimizer(model: Any, config: OptimizationConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )

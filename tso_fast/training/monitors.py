"""What is watched while training: metrics under TRL's names, non-finite steps, the first loss, and drift."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tso_fast.errors import TrainingError
from tso_fast.files.atomic import write_json, write_jsonl, writing
from tso_fast.files.run import METRICS_FILE, read_metrics
from tso_fast.logprob.sums import Sums
from tso_fast.losses import Loss
from tso_fast.models.tokens import IGNORE
from tso_fast.training.batches import EncodedPair
from tso_fast.types import BalancedOutput, Candidates, PairBatch, PreferenceOutput, TokenLogprobs

logger = logging.getLogger(__name__)

_MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "clip/chosen",
    "clip/rejected",
    "num_tokens/chosen",
    "num_tokens/rejected",
    "aux_loss",
)


class Meter:
    """Running sums over pairs."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3 + len(_MEANS), dtype=torch.float64)

    def add(self, output: PreferenceOutput, scale: torch.Tensor, is_padding: Sequence[bool]) -> None:
        real = ~torch.tensor(is_padding)
        half = len(is_padding)
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        columns = torch.stack(
            [
                chosen,
                rejected,
                chosen - rejected,
                (chosen > rejected).to(chosen),
                output.logprobs[:half],
                output.logprobs[half : 2 * half],
                *output.clipped.to(chosen).T,
                *output.num_tokens[: 2 * half].to(chosen).reshape(2, half),
                torch.zeros_like(chosen) + (output.aux_loss if isinstance(output, BalancedOutput) else 0),
            ],
            dim=1,
        )
        totals = torch.stack([(output.losses * scale).sum(), scale.sum(), real.sum().to(scale)])
        self.sums += torch.cat([totals.cpu().double(), columns.cpu().double()[real].sum(dim=0)])

    def clear(self) -> None:
        self.sums = torch.zeros_like(self.sums)

    def means(self, accelerator: Any = None) -> dict[str, float]:
        """Over all processes when given an accelerator, else over this one."""
        sums = self.sums if accelerator is None else accelerator.reduce(self.sums.to(accelerator.device))
        loss, scale, count, *rest = sums.tolist()
        means = {name: value / count if count else math.nan for name, value in zip(_MEANS, rest, strict=True)}
        if means["aux_loss"] == 0 or not count:  # it is more than 0 where there is one
            del means["aux_loss"]
        return {"loss": loss / scale if scale else math.nan, **means}


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN: None stands for what has no finite value."""
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}


class MetricsLog:
    """metrics.jsonl: rows are appended at once; those of an iteration that is done again are removed first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def rewind(self, iteration: int, step: int) -> None:
        """Keeps what came before ``step`` of ``iteration``, the first step being 1."""
        if self.path.exists():
            rows = read_metrics(self.path.parent)
            write_jsonl(self.path, (row for row in rows if (row["iteration"], row["step"]) < (iteration, step)))

    def write(self, row: dict[str, Any]) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(finite(row)) + "\n")


class NonFiniteGuard:
    """Counts steps that were skipped for a non-finite loss or gradient, saves their batch, and stops after too many."""

    def __init__(self, folder: Path, limit: int, is_main_process: bool = True) -> None:
        self.folder, self.limit, self.is_main_process = folder, limit, is_main_process
        self.in_a_row = self.total = 0

    def is_finite(self, step: int, loss: float, grad_norm: float, batch: Sequence[EncodedPair]) -> bool:
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        file = self.folder / f"nonfinite-step-{step}.json"
        if self.is_main_process:  # the batch is that of all processes
            write_json(
                file,
                {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "pairs": [vars(pair) for pair in batch]},
            )
        logger.warning("step %d: loss %s, gradient norm %s: skipped, its batch is in %s", step, loss, grad_norm, file)
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (last: step "
                f"{step}); their batches are in {self.folder}/nonfinite-step-*.json. Lower "
                "learning_rate, or use dtype float32 or bfloat16"
            )
        return False


class FirstStep:
    """The check of the first step, where the policy is its own reference.

    Log-ratios are 0, and the loss is what the loss function says of such pairs: ln 2 for dual_clip and dpo without
    margins. Anything else means that policy and reference see different weights or tokens, or that the reduction is
    wrong.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, output: PreferenceOutput, batch: PairBatch) -> None:
        """Adds the losses that a batch would have if its reference were its policy, and their slopes."""
        sides, terms = output.logprobs.detach().double(), self._terms(batch)
        with torch.enable_grad():
            leaves = [side.clone().requires_grad_() for side in (sides, terms) if side is not None]
            sums = Sums(
                logprob=leaves[0],
                ref_logprob=sides,
                ref2_logprob=_doubled(batch.ref2_logprobs, batch.sides),
                term=None if terms is None else leaves[1],
                num_tokens=output.num_tokens,
            )
            columns = list(torch.arange(len(sides), device=sides.device).reshape(batch.pairs.shape[1], -1))
            labels = batch.soft_label.double(), batch.margin.double(), _doubled(batch.win_rates)
            total = (self.loss(sums.of_pairs(columns, *labels)) * batch.scale.double()).sum()
        slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
        steepness = torch.stack([slope.abs().sum() for slope in slopes]).sum()
        self.sums += torch.stack([total.detach(), batch.scale.sum().double(), steepness]).cpu()

    def _terms(self, batch: PairBatch) -> torch.Tensor | None:
        """The sum of the loss's terms of tokens for each side; None: it has no such terms."""
        if self.loss.token_term is None or batch.ref_token_logprobs is None:
            return None
        reference, values = batch.ref_token_logprobs.double(), _doubled(batch.token_values)
        tokens = TokenLogprobs(
            logprobs=reference.flatten(),
            ref_logprobs=reference.flatten(),
            values=None if values is None else values.flatten(),
        )
        terms = self.loss.terms(tokens).view_as(reference).where(batch.layout.targets != IGNORE, 0.0)
        return terms.sum(1)[batch.sides]

    def check(self, means: Mapping[str, float], accelerator: Any = None, *, is_exact: bool) -> float:
        """Compares the step's means with what was added, and returns the expected loss.

        Args:
            is_exact: weights and activations are float32.

        Raises:
            TrainingError: the first loss is another one.
        """
        sums = self.sums if accelerator is None else accelerator.reduce(self.sums.to(accelerator.device))
        total, scale, steepness = sums.tolist()
        expected = total / scale if scale else math.nan
        tolerance = 1e-3 if is_exact else 5e-2
        # A steep loss, such as IPO or SPPO far from their targets, moves more: log-ratios may be off by this much at
        # the usual beta of 0.1.
        of_loss = max(tolerance, 10 * tolerance * steepness / scale) if scale else tolerance
        is_off = abs(means["loss"] - expected) > of_loss
        is_off |= max(abs(means["rewards/chosen"]), abs(means["rewards/rejected"])) > tolerance
        if math.isfinite(means["loss"]) and math.isfinite(expected) and is_off:
            rewards = f"{means['rewards/chosen']:.2g} / {means['rewards/rejected']:.2g}"
            raise TrainingError(
                f"the first step has loss {means['loss']:.6f} and rewards {rewards}; with the policy as its own "
                f"reference they must be {expected:.6f} and 0. Policy and reference see different weights or tokens"
            )
        return expected


def _doubled(values: torch.Tensor | None, index: Any = slice(None)) -> torch.Tensor | None:
    return None if values is None else values[index].double()


def drift_warnings(history: Sequence[dict[str, Any]]) -> list[str]:
    """Plain-language warnings from the figures of the iterations so far, the newest last."""
    newest, first = history[-1], history[0]
    warnings = []
    reward = newest["final"]["rewards/chosen"]
    if reward is not None and round(reward, 2) < 0:
        warnings.append(
            f"chosen responses became less likely than under the reference (rewards/chosen {reward:.2f}): "
            "lower learning_rate or clip_rejected"
        )
    length, before = newest["generated_tokens"], first["generated_tokens"]
    if before and length and length > 1.5 * before:
        warnings.append(
            f"the policy's responses grew from {before:.1f} to {length:.1f} tokens: look for a judge that likes length"
        )
    diversity, before = newest["distinct_responses"], first["distinct_responses"]
    if before and diversity and diversity < 0.5 * before:
        warnings.append(
            f"the policy's samples of a prompt became alike ({before:.2f} to {diversity:.2f} distinct "
            "texts a sample): raise temperature or lower learning_rate"
        )
    if newest["skipped_steps"]:
        warnings.append(f"{newest['skipped_steps']} steps with a non-finite gradient were skipped")
    return warnings


class PolicyStatistics:
    """Mean length of the policy's responses, and distinct texts a sample: 1 when all samples of a prompt differ.

    And how many tokens all cells sampled.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.responses = self.sampled_tokens = self.tokens = self.num_responses = self.prompts = 0
        self.distinct = 0.0

    def watch(self, candidates: Iterable[Candidates]) -> Iterator[Candidates]:
        for item in candidates:
            self.responses += len(item.responses)
            self.sampled_tokens += sum(len(r.token_ids) for r in item.responses if r.token_ids and r.seed is not None)
            own = [r for r in item.responses if r.model == self.policy]
            lengths = [len(r.token_ids) for r in own if r.token_ids]
            self.num_responses += len(lengths)
            self.tokens += sum(lengths)
            if len(own) > 1:
                self.prompts += 1
                self.distinct += len({r.text for r in own}) / len(own)
            yield item

    def to_dict(self) -> dict[str, float | None]:
        return {
            "responses": self.responses,
            "sampled_tokens": self.sampled_tokens,
            "generated_tokens": self.tokens / self.num_responses if self.num_responses else None,
            "distinct_responses": self.distinct / self.prompts if self.prompts else None,
        }

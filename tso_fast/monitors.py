"""What is watched while training: metrics under TRL's names, non-finite steps, the first loss, and drift."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tso_fast.batching import EncodedPair
from tso_fast.errors import TrainingError
from tso_fast.losses import Loss
from tso_fast.store import METRICS_FILE, atomic_file, write_json, writing
from tso_fast.types import PairLogprobs, PreferenceOutput

logger = logging.getLogger(__name__)

_MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
          "logps/rejected", "clip/chosen", "clip/rejected", "num_tokens/chosen", "num_tokens/rejected")  # fmt: skip


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
                output.logprobs[half:],
                *output.clipped.to(chosen).T,
                *output.num_tokens.to(chosen).reshape(2, half),
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
        return {
            "loss": loss / scale if scale else math.nan,
            **{name: value / count if count else math.nan for name, value in zip(_MEANS, rest, strict=True)},
        }


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no NaN: None stands for what has no finite value."""
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}


class MetricsLog:
    """metrics.jsonl: rows are appended at once; those of an iteration that is done again are removed first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def rewind(self, iteration: int, step: int) -> None:
        """Keeps what came before ``step`` of ``iteration``, the first step being 1."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a line that a kill cut off
                continue
            if (row["iteration"], row["step"]) < (iteration, step):
                kept.append(line + "\n")
        with atomic_file(self.path) as handle:
            handle.writelines(kept)

    def write(self, row: dict[str, Any]) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(finite(row)) + "\n")


class NonFiniteGuard:
    """Counts steps that were skipped for a non-finite loss or gradient, saves their batch, and stops after too many."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.in_a_row = self.total = 0

    def is_finite(self, step: int, loss: float, grad_norm: float, batch: Sequence[EncodedPair]) -> bool:
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        file = self.folder / f"nonfinite-step-{step}.json"
        write_json(file, {"step": step, "loss": str(loss), "grad_norm": str(grad_norm),
                          "pairs": [vars(pair) for pair in batch]})  # fmt: skip
        logger.warning("step %d: loss %s, gradient norm %s: skipped, its batch is in %s", step, loss, grad_norm, file)
        if self.in_a_row >= self.limit:
            raise TrainingError(f"{self.in_a_row} steps in a row had a non-finite loss or gradient (last: step "
                                f"{step}); their batches are in {self.folder}/nonfinite-step-*.json. Lower "
                                "learning_rate, or use dtype float32 or bfloat16")  # fmt: skip
        return False


def check_first_step(means: dict[str, float], loss: Loss, batch: Sequence[EncodedPair], *, is_exact: bool) -> None:
    """The policy is its reference before the first step: log-ratios 0, and the loss what follows from that.

    For dual_clip and dpo without margins that is ln 2. Anything else means that policy and reference see different
    weights or tokens, or that the reduction is wrong.

    Raises:
        TrainingError: the first loss is another one.
    """
    zeros = torch.zeros(len(batch), dtype=torch.float64)
    ones = torch.ones_like(zeros)
    scale = torch.tensor([pair.scale for pair in batch], dtype=torch.float64)
    losses = loss(
        PairLogprobs(
            chosen=zeros,
            rejected=zeros,
            ref_chosen=zeros,
            ref_rejected=zeros,
            num_chosen_tokens=ones,
            num_rejected_tokens=ones,
            soft_label=torch.tensor([pair.soft_label for pair in batch], dtype=torch.float64),
            margin=torch.tensor([pair.margin for pair in batch], dtype=torch.float64),
        )
    )
    expected = float((losses * scale).sum() / scale.sum()) if scale.sum() else math.nan
    tolerance = 1e-3 if is_exact else 5e-2
    is_reference_free = expected == 0.0  # sft: the loss says nothing of the reference, the rewards do
    wrong_loss = not is_reference_free and abs(means["loss"] - expected) > tolerance
    wrong_rewards = max(abs(means["rewards/chosen"]), abs(means["rewards/rejected"])) > tolerance
    if math.isfinite(means["loss"]) and math.isfinite(expected) and (wrong_loss or wrong_rewards):
        raise TrainingError(f"the first step has loss {means['loss']:.6f} and rewards {means['rewards/chosen']:.2g} / "
                            f"{means['rewards/rejected']:.2g}; with the policy as its own reference they must be "
                            f"{expected:.6f} and 0. Policy and reference see different weights or tokens")  # fmt: skip


def drift_warnings(history: Sequence[dict[str, Any]]) -> list[str]:
    """Plain-language warnings from the figures of the iterations so far, the newest last."""
    newest, first = history[-1], history[0]
    warnings = []
    reward = newest["final"]["rewards/chosen"]
    if reward is not None and reward < 0:
        warnings.append(f"chosen responses became less likely than under the reference (rewards/chosen {reward:.3f}): "
                        "lower learning_rate or clip_rejected")  # fmt: skip
    length, before = newest["generated_tokens"], first["generated_tokens"]
    if before and length and length > 1.5 * before:
        warnings.append(f"the policy's responses grew from {before:.1f} to {length:.1f} tokens: look for a judge that "
                        "likes length")  # fmt: skip
    diversity, before = newest["distinct_responses"], first["distinct_responses"]
    if before and diversity and diversity < 0.5 * before:
        warnings.append(f"the policy's samples of a prompt became alike ({before:.2f} to {diversity:.2f} distinct "
                        "texts a sample): raise temperature or lower learning_rate")  # fmt: skip
    if newest["skipped_steps"]:
        warnings.append(f"{newest['skipped_steps']} steps with a non-finite gradient were skipped")
    return warnings

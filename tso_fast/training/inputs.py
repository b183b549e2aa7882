"""What batches hold beside tokens and labels: log-probs under references, and numbers for tokens."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tso_fast.config.settings import OptimizationConfig
from tso_fast.files.run import Iteration
from tso_fast.losses import Loss, loss_options
from tso_fast.progress import progress_bar
from tso_fast.training.batches import EncodedPair, completion_lengths
from tso_fast.training.reference import Others, cached_logprobs, reference_logprobs, scorer_of, weights_key
from tso_fast.training.shard import is_sharded
from tso_fast.types import Weights


class Logprobs:
    """Log-probs of the sequences of all pairs, for ``collate``: their sums, or those of their tokens."""

    def __init__(self, pairs: Sequence[EncodedPair], *, per_token: bool) -> None:
        self.lengths, self.each = completion_lengths(pairs), len(pairs[0].sequences)
        self.values = torch.zeros(sum(self.lengths)) if per_token else torch.zeros(len(pairs), self.each)
        self.by_completion = self.values.split(self.lengths) if per_token else ()

    def fill(self, index: Sequence[int], found: torch.Tensor) -> None:
        """Sets those of the pairs ``index``, as ``reference_logprobs`` gives them."""
        if not self.by_completion:
            self.values[list(index)] = found
            return
        owners = [self.each * i + side for i in index for side in range(self.each)]
        for owner, own in zip(owners, found.split([self.lengths[owner] for owner in owners]), strict=True):
            self.by_completion[owner].copy_(own)


class Scoring:
    """Computes log-probs of pairs, all processes together."""

    def __init__(
        self, policy: Any, config: OptimizationConfig, files: Iteration, accelerator: Accelerator, pad_token_id: int
    ) -> None:
        self.policy, self.config, self.files = policy, config, files
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self.is_sharded = is_sharded(policy)  # it computes in its own precision
        self.shares_prompts = accelerator.unwrap_model(policy).shares_prompts

    def by(
        self, model: Any, pairs: Sequence[EncodedPair], *, per_token: bool, title: str | None = None
    ) -> torch.Tensor:
        """By a model as it is, see ``reference_logprobs``; without a title no progress is shown."""
        config, accelerator = self.config, self.accelerator
        bar = contextlib.nullcontext(lambda n: None) if title is None else progress_bar(title, len(pairs))
        with bar as advance:
            logprobs = reference_logprobs(
                model.eval(),
                pairs,
                batch_size=4 * config.per_device_train_batch_size,
                pad_token_id=self.pad_token_id,
                device=accelerator.device,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                impl=config.impl,
                share_prompts=self.shares_prompts and accelerator.unwrap_model(model).shares_prompts,
                per_token=per_token,
                autocast=contextlib.nullcontext if self.is_sharded else accelerator.autocast,
                advance=advance,
            )
        return accelerator.reduce(logprobs.to(accelerator.device)).cpu()

    def under(
        self,
        weights: Weights | None,
        pairs: Sequence[EncodedPair],
        file: Path,
        key: str,
        *,
        per_token: bool,
        title: str,
    ) -> torch.Tensor:
        """Under weights that are loaded, asked, and given back; None: those of the policy as it is.

        Args:
            file: where they are kept, if ``cache_reference`` says so.
            key: what tells the weights from others; empty: their log-probs are not kept.
        """

        def compute() -> torch.Tensor:
            with scorer_of(weights, self.policy, self.config, self.accelerator) as scorer:
                return self.by(scorer, pairs, per_token=per_token, title=f"iteration {self.files.number}: {title}")

        config = self.config
        if not (config.cache_reference and key):
            return compute()
        rounds = config.dtype, config.bf16, config.load_in_4bit, self.is_sharded, self.shares_prompts
        return cached_logprobs(file, pairs, (key, per_token, *rounds), self.accelerator, compute)


def make_inputs(
    loss: Loss,
    pairs: Sequence[EncodedPair],
    scoring: Scoring,
    reference: Weights | None,
    others: Others,
    key: str = "",
    index: Sequence[int] | None = None,
) -> tuple[dict[str, Any], Logprobs | None]:
    """What ``collate`` takes beside pairs, as the loss needs it, and the reference's log-probs in it, if there are any.

    Args:
        reference: its weights; None: those of the policy as it is.
        key: what tells the reference's weights from others; empty: no log-probs are kept.
        index: pairs whose log-probs under the reference are computed now; None: all.
    """
    per_token, files = loss.token_term is not None, scoring.files
    inputs: dict[str, Any] = {}
    if "token_values" in loss.needs and others.rewarding is None:
        inputs["token_values"] = difference_marks(pairs)
    if not loss.needs_reference:
        return inputs, None
    logprobs = Logprobs(pairs, per_token=per_token)
    chosen = range(len(pairs)) if index is None else index
    title, some = "reference log-probs", [pairs[i] for i in chosen]
    found = scoring.under(reference, some, files.reference_logprobs, key, per_token=per_token, title=title)
    logprobs.fill(chosen, found)
    inputs |= {"ref_tokens": logprobs.by_completion} if per_token else {"ref_logprobs": logprobs.values}

    def under(weights: Weights, file: Path, per_token: bool, title: str) -> torch.Tensor:
        own = key and weights_key(weights)
        return scoring.under(weights, pairs, file, own, per_token=per_token, title=title)

    if others.second is not None and "ref2_logprobs" in loss.needs | loss.takes:
        is_first = weights_key(others.second) == key and not per_token and index is None
        title = "log-probs under the second reference"
        inputs["ref2_logprobs"] = found if is_first else under(others.second, files.second_logprobs, False, title)
    if others.rewarding is not None:
        own = under(others.rewarding, files.reward_logprobs, True, "rewards of tokens")
        beta = loss_options(loss).get("beta", 1.0)
        inputs["token_values"] = (beta * (own - logprobs.values)).split(logprobs.lengths)
    return inputs, logprobs


def difference_marks(pairs: Sequence[EncodedPair]) -> list[torch.Tensor]:
    """For each token of each completion 1 if chosen and rejected response differ in it, else 0.

    These are, as in BMC's code, replaced or inserted tokens of the chosen one, replaced or deleted ones of the rejected
    one, and none of further ones.
    """
    out = []
    for pair in pairs:
        sides = [torch.zeros(len(completion)) for _, completion in pair.sequences]
        changes = difflib.SequenceMatcher(None, pair.rejected, pair.chosen).get_opcodes()
        for change, i1, i2, j1, j2 in changes:
            if change != "equal":
                sides[0][j1:j2], sides[1][i1:i2] = 1.0, 1.0
        out += sides
    return out

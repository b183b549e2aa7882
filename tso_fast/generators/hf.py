"""Generation with transformers: left-padded batches of similar length, one random stream a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from tso_fast.batching import end_of_turn
from tso_fast.errors import InputError
from tso_fast.generators import Completion, Request, Sampling


class SeededSampler(LogitsProcessor):
    """Samples with one uniform number per (seed, step) by inverting the cumulative distribution.

    ``generate`` draws a batch from one stream, so a response would depend on its batch; here it leaves the choice
    to this processor, which returns scores with a single finite entry a row.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.seeds = np.array(seeds, dtype=np.uint64)
        self.sampling = sampling
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        if self.sampling.temperature == 0:
            logprobs = logits.log_softmax(dim=-1)
            chosen = logits.argmax(dim=-1, keepdim=True)
        else:
            logprobs = self._filter(logits / self.sampling.temperature).log_softmax(dim=-1)
            cdf = logprobs.exp().double().cumsum(dim=-1)
            uniform = torch.from_numpy(uniforms(self.seeds, len(self.logprobs))).to(cdf.device)[:, None]
            # side="right" never lands on a token of probability 0; the clamp is for u * total rounding up to total.
            chosen = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)
        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _filter(self, logits: torch.Tensor) -> torch.Tensor:
        if 0 < self.sampling.top_k < logits.shape[-1]:
            kth = logits.topk(self.sampling.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.sampling.top_p < 1:
            ordered, index = logits.sort(dim=-1, descending=True)
            probs = ordered.softmax(dim=-1)
            is_out = probs.cumsum(dim=-1) - probs >= self.sampling.top_p  # the first token always stays
            logits = logits.masked_fill(is_out.scatter(-1, index, is_out), -torch.inf)
        return logits


def uniforms(seeds: np.ndarray, step: int) -> np.ndarray:
    """One float64 in [0, 1) per seed for this step: SplitMix64 (Steele, Lea & Flood 2014) as a counter-based stream."""
    with np.errstate(over="ignore"):
        z = seeds + np.uint64((0x9E3779B97F4A7C15 * (step + 1)) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class HFGenerator:
    """``Generator`` over a transformers model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.eos = eos_token_ids(model, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos[0]
        self.config = GenerationConfig(pad_token_id=self.pad, eos_token_id=self.eos, do_sample=False)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] = lambda n: None
    ) -> list[Completion]:
        """See ``Generator``; prompts that do not fit the context are the caller's to refuse."""
        completions: dict[int, Completion] = {}
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        # The model's own generation config may hold penalties and filters; what is sampled is what was asked for.
        own_config, self.model.generation_config = self.model.generation_config, self.config
        try:
            for start in range(0, len(by_length), self.batch_size):
                batch = by_length[start : start + self.batch_size]
                done = self._generate_batch([requests[i] for i in batch], sampling)
                completions.update(zip(batch, done, strict=True))
                advance(len(batch))
        finally:
            self.model.generation_config = own_config
        return [completions[i] for i in range(len(requests))]

    def _generate_batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        length = max(len(r.token_ids) for r in requests)
        ids = torch.full((len(requests), length), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, length - len(request.token_ids) :] = torch.tensor(request.token_ids)
            mask[row, length - len(request.token_ids) :] = 1
        sampler = SeededSampler([r.seed for r in requests], sampling)
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=sampling.max_tokens,
            logits_processor=[sampler],
        )
        sampled = output[:, length:].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu()
        if logprobs.isnan().any():
            raise InputError(f"{self.model.name_or_path}: the model gives logits that are not finite; its weights are "
                             f"damaged, or {self.model.dtype} is too narrow for it")  # fmt: skip
        lengths = [self._length(row) for row in sampled]
        token_ids = [row[:n] for row, n in zip(sampled, lengths, strict=True)]
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [
            Completion(
                token_ids=tuple(tokens),
                text=text,
                finish_reason="stop" if tokens[-1] in self.eos else "length",
                logprob=float(logprobs[row, : len(tokens)].sum()),
            )
            for row, (tokens, text) in enumerate(zip(token_ids, texts, strict=True))
        ]

    def _length(self, tokens: list[int]) -> int:
        return next((i + 1 for i, token in enumerate(tokens) if token in self.eos), len(tokens))

    def close(self) -> None:
        self.model = None


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's, its chat template's and those of the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, end_of_turn(tokenizer), *listed]) if i is not None]
    if not ids:
        raise ValueError("neither the tokenizer nor the model's generation config names an end-of-sequence token")
    return ids

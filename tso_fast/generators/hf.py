"""Generation with transformers in this process, with one random stream per request.

    shard -> cell -> sampling -> rows, longest prompts first: finished rows leave the batch, waiting rows join it

A batch never spans two shards, so a repeated shard gives the same bytes on a CPU.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tso_fast.errors import InputError
from tso_fast.generators import proof
from tso_fast.generators.engine import Completion, EngineSpec, Refusal, Request, Sampling
from tso_fast.models.load import device_of, end_token_ids, load_model, load_tokenizer
from tso_fast.models.memory import release
from tso_fast.models.tokens import padding_id
from tso_fast.types import Cell, FinishReason, TopLogprobs

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------- sampling

CDF_BLOCK = 256
TOP_P_CANDIDATES = 1024


def sample(logits_SV: torch.Tensor, uniform_S: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their log-probs under the sampling distribution, [S] int64 and [S] float32 nats.

    A row's token is where its cumulative distribution first exceeds its uniform number, so it depends on nothing else.
    """
    logits_SV = logits_SV.float()
    if sampling.temperature == 0:
        chosen, probs_SV = logits_SV.argmax(dim=-1, keepdim=True), logits_SV.softmax(dim=-1)
    else:
        probs_SV = filtered(logits_SV / sampling.temperature, sampling).softmax(dim=-1)
        chosen = _invert_cdf(probs_SV, uniform_S)
    return chosen[:, 0], probs_SV.gather(-1, chosen)[:, 0].log()


def filtered(logits_SV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits with -inf for tokens that top_k, then top_p exclude; ties at the edge all stay."""
    if 0 < sampling.top_k < logits_SV.shape[-1]:
        kth = logits_SV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < kth, -torch.inf)
    if sampling.top_p < 1:
        logits_SV = logits_SV.masked_fill(logits_SV < _least_of_nucleus(logits_SV, sampling.top_p), -torch.inf)
    return logits_SV


def _least_of_nucleus(logits_SV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Smallest logit in the nucleus, [S, 1]: in falling order, the last one with less than top_p of the probability
    before it."""
    total = logits_SV.logsumexp(dim=-1, keepdim=True)
    ordered = logits_SV.topk(min(TOP_P_CANDIDATES, logits_SV.shape[-1]), dim=-1).values
    if ((ordered - total).exp().sum(dim=-1) < top_p).any():
        ordered = logits_SV.sort(dim=-1, descending=True).values  # many times slower, and rarely needed
    probs = (ordered - total).exp()
    kept = (probs.cumsum(dim=-1) - probs < top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(-1, (kept - 1).clamp(min=0))


def _invert_cdf(probs_SV: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """Sampled tokens, [S, 1]. Uses cumulative sums over blocks, then within one block; float64 sums over a whole row
    would cost many times more."""
    vocab = probs_SV.shape[-1]
    blocks = (pad(probs_SV, (0, -vocab % CDF_BLOCK)) if vocab % CDF_BLOCK else probs_SV).unflatten(-1, (-1, CDF_BLOCK))
    cdf = pad(blocks.sum(dim=-1).double().cumsum(dim=-1), (1, 0))
    target = uniform_S[:, None] * cdf[:, -1:]
    block = _first_above(cdf[:, 1:].contiguous(), target)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, CDF_BLOCK))[:, 0].double().cumsum(dim=-1)
    token = block * CDF_BLOCK + _first_above(inner, target - cdf.gather(-1, block))
    return token.clamp(max=vocab - 1)  # needed only if logits are not finite, which the log-prob shows


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above the target; never of probability 0, even if u * total rounds up to the total."""
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return torch.searchsorted(cdf, target, right=True).minimum(last).clamp(max=cdf.shape[-1] - 1)


def uniforms(seeds: np.ndarray, steps: np.ndarray | int) -> np.ndarray:
    """One float64 in [0, 1) per seed and step: SplitMix64 (Steele, Lea & Flood 2014) as a counter-based stream."""
    with np.errstate(over="ignore"):
        z = seeds + np.uint64(0x9E3779B97F4A7C15) * (np.asarray(steps, dtype=np.uint64) + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


# ------------------------------------------------------------------------------------------------- rows and slots


@dataclass(kw_only=True, eq=False)
class _Row:
    """A response in progress."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    top_logprobs: TopLogprobs | None = None
    text: str = ""
    finish_reason: FinishReason | None = None

    @property
    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            key=self.request.key,
            token_ids=tuple(self.token_ids),
            text=self.text,
            finish_reason=self.finish_reason,
            logprob=self.logprob,
            top_logprobs=self.top_logprobs,
        )


class _SlotLayer(DynamicLayer):
    """Cache layer that writes new keys and values in place; its base class copies the whole cache for every token.

    It does not own its slots: in a cycle the buffers would live until the next garbage collection.
    """

    def __init__(self, slots: _Slots, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.slots: _Slots = weakref.proxy(slots)
        self.buffers = [x.new_zeros(slots.size, x.shape[1], slots.capacity, x.shape[3]) for x in (keys, values)]

    def show(self, end: int) -> None:
        first, num_rows = self.slots.first, len(self.slots.lengths)
        self.keys, self.values = (buffer[:num_rows, :, first:end] for buffer in self.buffers)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        end = self.slots.end
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: len(new), :, end] = new[:, :, 0]
        self.show(end + 1)
        return self.keys, self.values


class _Slots:
    """Keys and values of the running rows: row i is in slot i of each buffer, its newest token left of column ``end``.

    Rows can therefore come and go without copying the others. Columns left of a row's first token hold stale values.
    """

    SPARE = 128
    """Most free columns in a new buffer; when they are used up, everything is copied to a new one."""

    def __init__(self, size: int, widest: int, most_tokens: int) -> None:
        self.spare = min(self.SPARE, most_tokens)
        self.size, self.end, self.capacity = size, widest, widest + self.spare
        self.lengths: list[int] = []
        self.cache = DynamicCache()

    @property
    def first(self) -> int:
        return self.end - max(self.lengths)

    def add(self, prefilled: DynamicCache, lengths: list[int]) -> None:
        start, width = len(self.lengths), max(lengths)
        if not self.cache.layers:
            self.cache.layers = [_SlotLayer(self, layer.keys, layer.values) for layer in prefilled.layers]
        self.lengths += lengths
        for slots, new in zip(self.cache.layers, prefilled.layers, strict=True):
            for buffer, states in zip(slots.buffers, (new.keys, new.values), strict=True):
                buffer[start : len(self.lengths), :, self.end - width : self.end] = states

    def drop(self, row: int) -> None:
        """Removes a row; the last row takes its slot."""
        last, columns = len(self.lengths) - 1, slice(self.end - self.lengths[-1], self.end)
        for layer in self.cache.layers:
            for buffer in layer.buffers:
                buffer[row, :, columns] = buffer[last, :, columns]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def make_room(self, widest_waiting: int) -> None:
        """Makes room for one more column."""
        if self.end < self.capacity:
            return
        first, end, num_rows = self.first, self.end, len(self.lengths)
        self.end = max(end - first, widest_waiting)
        self.capacity = self.end + self.spare
        self.size = self.size if widest_waiting else num_rows
        for layer in self.cache.layers:
            for i, old in enumerate(layer.buffers):
                new = old.new_zeros(self.size, old.shape[1], self.capacity, old.shape[3])
                new[:num_rows, :, self.end - (end - first) : self.end] = old[:num_rows, :, first:end]
                layer.buffers[i] = new


def has_plain_cache(model: Any) -> bool:
    """Whether the model's cache consists only of keys and values, which ``_Slots`` can hold.

    Models with a sliding window qualify, since only the mask hides older tokens.
    """
    config = model.config.get_text_config()
    # Chunked attention counts columns from the first; layers that share keys and values read them elsewhere.
    is_special = any(getattr(config, name, None) for name in ("attention_chunk_size", "num_kv_shared_layers"))
    # RecurrentGemma keeps the state of its recurrent layers in the layers themselves.
    is_special |= any("attention" not in kind for kind in getattr(config, "layers_block_type", None) or ())
    if is_special or not model._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


# ---------------------------------------------------------------------------------------------------------- one model


class BatchGenerator:
    """Generates responses of one model to requests with the same sampling options."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        *,
        batch_size: int = 64,
        name: str = "",
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.batch_size = batch_size
        self.name = name or model.name_or_path
        self.on_step = on_step
        self.on_logits: Callable[[Sequence[Request], torch.Tensor], None] = lambda requests, logits_SV: None
        self.pad = padding_id(tokenizer)
        self.is_plain = has_plain_cache(model)
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted

    def prove(self, context: int | None = None) -> None:
        """Sees to it that rows in a batch are answered as alone: else they go one at a time, or not at all.

        Raises:
            InputError: even alone the model's answers are not what its full forward pass says.
        """
        ids = self.tokenizer("The capital of France is", verbose=False)["input_ids"] or [self.pad]
        size = self.model.get_input_embeddings().weight.shape[0]
        asked = proof.requests([token % size for token in ids], context)
        ways = [(self.is_plain, self.batch_size), (False, self.batch_size), (False, 1)]
        found: list[str] = []
        for self.is_plain, self.batch_size in dict.fromkeys(ways):
            found.append(proof.problem(self.model, asked, self._logits_of))
            if not found[-1]:
                break
        else:
            raise InputError(
                f"{self.name}: {type(self.model).__name__} cannot be used for generation: answered token by token, "
                f"{found[-1]}; expected a causal language model whose steps agree with its full forward pass"
            )
        if self.batch_size == 1 != ways[0][1]:
            logger.warning(
                "%s: %s answers one prompt at a time, which is slow: in a batch of prompts of unequal length, %s",
                self.name,
                type(self.model).__name__,
                found[0],
            )

    def _logits_of(self, asked: Sequence[Request]) -> dict[bytes, list[torch.Tensor]]:
        """See ``proof.Run``; two rows at a time, so that a third one joins."""
        steps: dict[bytes, list[torch.Tensor]] = {request.key: [] for request in asked}
        before = self.on_step, self.on_logits, self.end_tokens, self.batch_size

        def note(requests: Sequence[Request], logits_SV: torch.Tensor) -> None:
            for request, logits_V in zip(requests, logits_SV.cpu(), strict=True):
                if len(steps[request.key]) < request.sampling.max_tokens:
                    steps[request.key].append(logits_V)

        self.on_step, self.on_logits, self.end_tokens = (lambda: None), note, frozenset()
        self.batch_size = min(2, self.batch_size)
        try:
            for _ in self.run(asked):
                pass
        finally:
            self.on_step, self.on_logits, self.end_tokens, self.batch_size = before
        return steps

    def run(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Yields completions as they finish; all prompts must fit the model and its context."""
        # Longest first: a batch that does not fit in memory fails at once, and the last rows are the cheap ones.
        rows = [_Row(request=r) for r in sorted(requests, key=lambda r: -len(r.token_ids))]
        return self._run_joining(deque(rows)) if self.is_plain else self._run_batches(rows)

    @torch.inference_mode()
    def _run_joining(self, waiting: deque[_Row]) -> Iterator[list[Completion]]:
        most_tokens = max(row.request.sampling.max_tokens for row in waiting)
        slots = _Slots(min(self.batch_size, len(waiting)), len(waiting[0].request.token_ids), most_tokens)
        running: list[_Row] = []
        while waiting or running:
            free = self.batch_size - len(running)
            if waiting and free >= max(1, self.batch_size // 4):  # a forward pass over few rows is wasteful
                joining = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                cache = DynamicCache()
                self._advance(joining, self._prefill(joining, cache))
                slots.add(cache, [len(row.request.token_ids) for row in joining])
                running += joining
            else:
                slots.make_room(len(waiting[0].request.token_ids) if waiting else 0)
                self._advance(running, self._decode(running, slots))
            finished = [i for i, row in enumerate(running) if row.finish_reason is not None]
            completions = [running[i].completion for i in finished]
            for i in reversed(finished):
                slots.drop(i)
                running[i] = running[-1]
                running.pop()
            if completions:
                yield completions

    def _prefill(self, rows: list[_Row], cache: DynamicCache) -> torch.Tensor:
        ids, mask = self._left_padded(rows)
        inputs = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if self._takes_positions else {}
        return self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs, **self._last_only
        ).logits[:, -1]

    def _decode(self, rows: list[_Row], slots: _Slots) -> torch.Tensor:
        device = self.model.device
        for layer in slots.cache.layers:
            layer.show(slots.end)
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
        lengths = torch.tensor(slots.lengths, device=device)[:, None]
        width = slots.end - slots.first
        mask = (torch.arange(-width, 1, device=device) >= -lengths).long()
        inputs = {"position_ids": lengths} if self._takes_positions else {}
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=slots.cache, use_cache=True, **inputs)
        slots.end += 1
        slots.lengths = [length + 1 for length in slots.lengths]
        return output.logits[:, -1]

    @torch.inference_mode()
    def _run_batches(self, rows: list[_Row]) -> Iterator[list[Completion]]:
        """Uses ``generate``, for models with other caches: finished rows stay until the whole batch has finished."""
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            self._generate(batch)
            yield [row.completion for row in batch]

    def _generate(self, rows: list[_Row]) -> None:
        ids, mask = self._left_padded(rows)
        most = max(row.request.sampling.max_tokens for row in rows)
        # The model's own generation config may contain penalties and filters, which nobody requested.
        own_config = self.model.generation_config
        self.model.generation_config = GenerationConfig(pad_token_id=self.pad, do_sample=False)
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=[_Choose(self, rows)],
                stopping_criteria=[_Finished(rows)],
                max_new_tokens=most,
            )
        finally:
            self.model.generation_config = own_config

    def _left_padded(self, rows: list[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row.request.token_ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.request.token_ids) :] = torch.tensor(row.request.token_ids)
            mask[i, width - len(row.request.token_ids) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def _advance(self, rows: list[_Row], logits_SV: torch.Tensor) -> torch.Tensor:
        """Adds the next token to every unfinished row and returns the tokens."""
        self.on_logits([row.request for row in rows], logits_SV)
        self._note_top(rows, logits_SV)
        seeds = np.array([row.request.seed for row in rows], dtype=np.uint64)
        steps = np.array([len(row.token_ids) for row in rows], dtype=np.uint64)
        uniform = torch.from_numpy(uniforms(seeds, steps)).to(logits_SV.device)
        tokens, logprobs = sample(logits_SV, uniform, rows[0].request.sampling)
        for row, token, logprob in zip(rows, *torch.stack([tokens.double(), logprobs.double()]).tolist(), strict=True):
            if logprob != logprob:
                raise InputError(
                    f"{self.name}: the model gives logits that are not finite; its weights are damaged, "
                    f"or {self.model.dtype} is too narrow for it"
                )
            if row.finish_reason is None:
                self._take(row, int(token), logprob)
        self.on_step()
        return tokens

    def _note_top(self, rows: list[_Row], logits_SV: torch.Tensor) -> None:
        """Records the likeliest tokens of rows that are at their first token and requested them."""
        if not (first := [i for i, row in enumerate(rows) if row.request.sampling.top_logprobs and not row.token_ids]):
            return
        most = max(rows[i].request.sampling.top_logprobs for i in first)
        top = logits_SV[first].float().log_softmax(dim=-1).topk(min(most, logits_SV.shape[-1]))
        for i, tokens, logprobs in zip(first, top.indices.tolist(), top.values.tolist(), strict=True):
            told = tuple(zip(tokens, logprobs, strict=True))
            rows[i].top_logprobs = told[: rows[i].request.sampling.top_logprobs]

    def _take(self, row: _Row, token: int, logprob: float) -> None:
        sampling = row.request.sampling
        row.token_ids.append(token)
        row.logprob += logprob
        if token in self.end_tokens:
            row.finish_reason = "stop"
        elif len(row.token_ids) == sampling.max_tokens:
            row.finish_reason = "length"
        if row.finish_reason is not None or sampling.stop:
            # Decodes all tokens each time, since a token's text depends on the tokens before it.
            row.text = self.tokenizer.decode(row.token_ids, skip_special_tokens=True)
            if cuts := [at for text in sampling.stop if (at := row.text.find(text)) >= 0]:
                row.text, row.finish_reason = row.text[: min(cuts)], "stop"


class _Choose(LogitsProcessor):
    """Chooses each row's token by its own random stream: gives ``generate`` scores with one finite entry per row."""

    def __init__(self, generator: BatchGenerator, rows: list[_Row]) -> None:
        self.generator, self.rows = generator, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self.generator._advance(self.rows, scores)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class _Finished(StoppingCriteria):
    def __init__(self, rows: list[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([row.finish_reason is not None for row in self.rows], device=input_ids.device)


# ------------------------------------------------------------------------------------------------------- the engine


_proven: dict[tuple[str, str, str, str, bool], tuple[bool, bool]] = {}
"""How models are run that have proved themselves: with rows that join a batch, and one at a time."""


class HFEngine:
    """``Engine`` in this process; one cell's model is in memory at a time."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.cells = {cell.name: cell for cell in spec.cells}
        self.device = device_of(spec.use_cpu)
        self.tokenizer = load_tokenizer(spec.tokenizer)
        self._shards: deque[list[Request]] = deque()
        self._running: Iterator[Sequence[Completion | Refusal]] = iter(())
        self._generator: BatchGenerator | None = None

    def on_progress(self, is_loading: bool = False) -> None:
        """Hook after every step and before a model is loaded; the process that owns the engine replaces it."""

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.cell not in self.cells:
                raise ValueError(f"request for the cell {request.cell!r}; this engine has {', '.join(self.cells)}")
        self._shards.append(list(requests))

    def collect(self) -> list[Completion | Refusal]:
        """See ``Engine``.

        Raises:
            InputError: a cell cannot be loaded, or gives logits that are not finite; the rest of its shard is dropped.
        """
        while True:
            for answers in self._running:
                return list(answers)
            if not self._shards:
                return []
            self._running = self._run(self._shards.popleft())

    def close(self) -> None:
        self._shards.clear()
        self._running = iter(())
        self._drop()

    def _drop(self) -> None:
        if self._generator is not None:
            release(self._generator.model)
        self._generator = None

    def _run(self, shard: list[Request]) -> Iterator[Sequence[Completion | Refusal]]:
        by_cell: dict[str, list[Request]] = {}
        for request in shard:
            by_cell.setdefault(request.cell, []).append(request)
        for name in sorted(by_cell, key=lambda name: not self._has(name)):  # the model in memory first
            self._load(self.cells[name])
            assert self._generator is not None
            groups: dict[tuple[float, float, int], list[Request]] = {}
            refusals = []
            for request in by_cell[name]:
                if reason := self._obstacle(request):
                    refusals.append(Refusal(key=request.key, reason=reason))
                else:
                    sampling = request.sampling
                    groups.setdefault((sampling.temperature, sampling.top_p, sampling.top_k), []).append(request)
            if refusals:
                yield refusals
            for group in groups.values():
                yield from self._generator.run(group)

    def _has(self, name: str) -> bool:
        return self._generator is not None and self._generator.name == name

    def _load(self, cell: Cell) -> None:
        if self._has(cell.name):
            return
        self._drop()
        self.on_progress(is_loading=True)
        model = load_model(
            cell.path,
            base=cell.base,
            dtype=self.spec.dtype,
            device=self.device,
            attn_implementation=self.spec.attn_implementation,
        )
        ends = end_token_ids(cell.base, self.tokenizer)
        self._generator = BatchGenerator(
            model,
            self.tokenizer,
            ends,
            batch_size=self.spec.batch_size,
            name=cell.name,
            on_step=lambda: self.on_progress(),
        )
        self._prove(cell)

    def prove(self) -> None:
        """Loads a cell of every configuration that has not proved itself in this process.

        Raises:
            InputError: a cell cannot be loaded, or is no model that can be used.
        """
        for cell in self.cells.values():
            if self._kind(cell) not in _proven:
                self._load(cell)

    def _kind(self, cell: Cell) -> tuple[str, str, str, str, bool]:
        spec = self.spec
        return cell.architecture, spec.dtype, spec.attn_implementation, self.device.type, spec.batch_size == 1

    def _prove(self, cell: Cell) -> None:
        """Once in a process for models of one configuration."""
        generator, key = self._generator, self._kind(cell)
        assert generator is not None
        if key not in _proven:
            limits = [limit for limit in (self.spec.context, cell.context) if limit is not None]
            generator.prove(min(limits, default=None))
            _proven[key] = generator.is_plain, generator.batch_size == 1
        generator.is_plain, is_alone = _proven[key]
        if is_alone:
            generator.batch_size = 1

    def _obstacle(self, request: Request) -> str:
        """Why a request cannot be answered; empty if it can."""
        assert self._generator is not None
        cell, prompt = self.cells[request.cell], request.token_ids
        if not prompt:
            return f"cell {cell.name}: the prompt has no tokens; expected at least one"
        limits = [limit for limit in (self.spec.context, cell.context) if limit is not None]
        if limits and len(prompt) + request.sampling.max_tokens > min(limits):
            return (
                f"cell {cell.name}: a prompt of {len(prompt)} tokens and a response of up to "
                f"{request.sampling.max_tokens} exceed its context of {min(limits)} tokens"
            )
        size = self._generator.model.get_input_embeddings().weight.shape[0]
        if not 0 <= min(prompt) <= max(prompt) < size:
            beyond = next(token for token in prompt if not 0 <= token < size)
            return f"cell {cell.name}: the prompt has token {beyond}, beyond the {size} of the model's embeddings"
        return ""

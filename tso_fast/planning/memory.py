"""What the training of a policy holds on one device, from the shapes of its model and from the settings."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tso_fast.config.settings import OptimizationConfig
from tso_fast.logprob import cpu, triton
from tso_fast.logprob.plan import Planner, Shape, plan
from tso_fast.models.load import resolve_attention
from tso_fast.planning.trace import (
    TRACED,
    Peaks,
    Sizes,
    Traced,
    are_alike,
    empty,
    layers_of,
    number_of_layers,
    shortened,
    trace,
    with_adapter,
)
from tso_fast.training.optimizers import CHUNK
from tso_fast.types import Weights

CUDA_CONTEXT = 1_200_000_000
"""Bytes that a process takes of a GPU before its first tensor: CUDA's context, kernels, workspaces of cuBLAS."""
MOMENTS = {"adamw": None, "adamw_8bit": 1.0 + 4 / 256, "adamw_bf16": 2.0}
"""Bytes of each of a weight's two moments, by optimizer; None: as many as the weight has."""
STEP_ROOM = {"adamw_bf16": 9 * 4}
"""Bytes for each weight of the part that an optimizer steps at once: copies in float32."""
BYTES_OF_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: its bits, the constant of its block in 8 bits, and the constants' own."""
REFERENCE_BATCH = 4
"""Reference log-probs are computed in batches of as many times the pairs of a training batch."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as its folder's configuration says; there may be no weights."""

    config: Any
    """Of transformers."""
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Weights of a policy."""

    total: int
    total_bytes: int
    trained: int
    trained_bytes: int
    layer: int
    """Weights of the largest layer."""
    layer_trained: int
    tail: int
    """Weights of the output head, with the embeddings where they are tied."""
    tail_trained: int
    root: int
    """Weights outside of the layers and the tail: embeddings and norms."""
    root_trained: int
    largest: int
    """Elements of the largest weight."""
    unpacked: int = 0
    """Elements of the largest weight that is held in 4 bits, whole while it is used."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The devices that train."""

    per_node: int = 1
    nodes: int = 1
    device: str = "cuda"

    @property
    def size(self) -> int:
        return self.per_node * self.nodes


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a process holds while it trains, bytes."""

    parts: Mapping[str, int]
    """What there is, each at its most; it is not all there at once."""
    peak: int
    """The most at once in a step."""
    reference_peak: int
    """The most at once while reference log-probs are computed; 0: the loss needs none."""
    checkpoint: int
    """What a checkpoint holds of this process: in main memory while it is written, then on disk."""
    ema_peak: int = 0
    """The most at once when the mean of reference and policy is taken."""

    @property
    def most(self) -> int:
        return max(self.peak, self.reference_peak, self.ema_peak)


def itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


@functools.lru_cache(maxsize=64)
def _alike(kind: Any, text: str) -> int:
    config = kind.from_dict(json.loads(text))
    count = number_of_layers(config)
    layers = layers_of(empty(config, dtype=torch.float32))
    return TRACED if count > TRACED and layers and are_alike(layers) else count


def num_traced(config: Any) -> int:
    """Layers that stand for all layers of a model: three where all are alike, else all."""
    kind: Any = type(config)
    return _alike(kind, json.dumps(config.to_dict(), default=str))


def count(model: Model, settings: OptimizationConfig) -> Counts:
    """The weights of a policy, with the adapter that is trained."""
    kept = num_traced(model.config)
    short = empty(shortened(model.config, kept), dtype=getattr(torch, settings.dtype))
    if settings.peft == "lora":
        short = with_adapter(short, settings, model.weights)
    more = number_of_layers(model.config) - kept
    parameters = list(short.parameters())
    layers = layers_of(short)
    tail = list(dict.fromkeys(short.get_output_embeddings().parameters()))
    in_groups = {id(p) for layer in layers for p in layer.parameters()} | {id(p) for p in tail}
    root = [p for p in parameters if id(p) not in in_groups]
    per_layer = [list(layer.parameters()) for layer in layers] or [[]]
    extra = per_layer[-1] * more
    largest = max(per_layer, key=_number)
    every = parameters + extra
    trained = [p for p in every if p.requires_grad]
    packed = [p for p in [*itertools.chain(*per_layer), *extra] if p.ndim == 2 and not p.requires_grad]
    packed = packed if settings.load_in_4bit else []
    return Counts(
        total=_number(every),
        total_bytes=_bytes(every) - _bytes(packed) + int(BYTES_OF_4_BITS * _number(packed)),
        trained=_number(trained),
        trained_bytes=_bytes(trained),
        layer=_number(largest),
        layer_trained=_number(largest, only_trained=True),
        tail=_number(tail),
        tail_trained=_number(tail, only_trained=True),
        root=_number(root),
        root_trained=_number(root, only_trained=True),
        largest=max(p.numel() for p in parameters),
        unpacked=max((p.numel() for p in packed), default=0),
    )


def _number(parameters: list[Any], *, only_trained: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not only_trained)


def _bytes(parameters: list[Any]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The largest batch that training may meet."""

    prompt: int
    """Tokens of the longest prompt."""
    response: int
    """Tokens of the longest response, as it is trained on."""
    per_prompt: int = 1
    """Most pairs of a prompt."""
    sequences: int = 2
    """Sequences of a pair."""


def plan_training(
    model: Model, settings: OptimizationConfig, world: World, batch: Batch, *, needs_reference: bool = True,
    has_other_reference: bool = False, has_ema: bool = False, follows: bool = False, has_mean: bool = False,
) -> Training:  # fmt: skip
    """What a process holds while it trains.

    Args:
        needs_reference: whether the loss compares with a reference.
        has_other_reference: whether that is another model than the policy at the iteration's start.
        has_ema: whether the reference is a mean that is updated after training.
        follows: whether the reference follows the policy while that is trained.
        has_mean: whether it is then a mean of weights beside those of the policy.
    """
    counts, ranks = count(model, settings), _ranks(settings, world)
    is_sharded = ranks > 1
    kept = _kept(counts, settings, world)
    gathered = _Gathered(counts, settings, ranks)
    peaks = _largest(
        [
            _trace(model, settings, world, sizes, is_sharded, True)
            for sizes in _shapes(settings.per_device_train_batch_size, batch)
        ]
    )
    context = CUDA_CONTEXT if world.device == "cuda" else 0
    weights, gradients = kept["weights"], kept["gradients"]
    mean = weights if has_mean else 0
    always = weights + mean + context + counts.unpacked * itemsize(settings.dtype)
    in_step = gathered.peak(peaks) if is_sharded else peaks.peak
    in_optimizer = gradients + STEP_ROOM.get(settings.optim, 0) * min(CHUNK, counts.largest // ranks)
    reference_peak = 0
    if needs_reference:
        pairs = REFERENCE_BATCH * settings.per_device_train_batch_size
        scored = _largest([_trace(model, settings, world, sizes, is_sharded, False) for sizes in _shapes(pairs, batch)])
        other = weights if has_other_reference and settings.peft == "none" else 0
        buckets = counts.trained_bytes if world.size > 1 and not is_sharded else 0  # there from the start
        moments = kept["optimizer"] if follows else 0
        reference_peak = always + buckets + moments + other + scored.forward + gathered.forward
    parts = {
        "weights": weights,
        "mean as reference": mean,
        "gradients": gradients,
        "optimizer": kept["optimizer"],
        "gradients in transit": gathered.in_transit,
        "gathered weights": gathered.forward,
        "activations": peaks.kept,
        "exponentials of the op": peaks.op,
        "CUDA context": context,
    }
    return Training(
        parts={name: size for name, size in parts.items() if size},
        peak=always + kept["optimizer"] + max(in_step, in_optimizer),
        reference_peak=reference_peak,
        checkpoint=gradients + kept["optimizer"] + mean,
        ema_peak=2 * weights + gradients + context if has_ema and not has_mean else 0,
    )


def least(model: Model, settings: OptimizationConfig, world: World) -> int:
    """Weights, gradients and optimizer of a process, without which nothing can be trained."""
    return sum(_kept(count(model, settings), settings, world).values())


def _kept(counts: Counts, settings: OptimizationConfig, world: World) -> dict[str, int]:
    """What a process keeps from step to step; gradients of replicas are where they are sent from."""
    ranks, moment = _ranks(settings, world), MOMENTS[settings.optim]
    moments = 2 * counts.trained_bytes if moment is None else int(2 * moment * counts.trained)
    return {
        "weights": counts.total_bytes // ranks,
        "gradients": counts.trained_bytes // ranks,
        "optimizer": moments // ranks,
    }


def _ranks(settings: OptimizationConfig, world: World) -> int:
    """Processes that share the weights out."""
    return {"none": 1, "full": world.size, "hybrid": world.per_node}[settings.shard]


def _shapes(pairs: int, batch: Batch) -> list[Sizes]:
    """Batches of the most tokens: all pairs of prompts of their own, or as many as may be of one prompt, whose
    masks are larger. Further sequences are counted as pairs."""
    most = min(batch.per_prompt, pairs)
    pairs = -(-pairs * batch.sequences // 2)
    return [Sizes(pairs=pairs, per_prompt=n, prompt=batch.prompt, response=batch.response) for n in sorted({1, most})]


def _largest(found: list[Peaks]) -> Peaks:
    return max(found, key=lambda peaks: peaks.peak)


@dataclass(frozen=True)
class _Gathered:
    """What sharding gathers and gives away, group by group."""

    counts: Counts
    settings: OptimizationConfig
    ranks: int

    @property
    def _width(self) -> int:
        """Bytes of a gathered weight."""
        return 2 if self.settings.bf16 else itemsize(self.settings.dtype)

    @property
    def forward(self) -> int:
        """The head, with the buffer that it arrived in; or the layer at work, the next one, and its buffer."""
        return self._width * max(2 * self.counts.tail, 3 * self.counts.layer) if self.ranks > 1 else 0

    @property
    def in_transit(self) -> int:
        """Gradients of a layer, whole, and their sum in float32 on its way to the parts."""
        if self.ranks == 1:
            return 0
        return self.counts.layer_trained * (self._width + 4)

    def peak(self, peaks: Peaks) -> int:
        """The most at once in a step beside weights and optimizer. Gradients are parts: before the tail's, the first,
        there are none unless they are accumulated."""
        counts, width = self.counts, self._width
        every = counts.trained_bytes // self.ranks
        before = every if self.settings.gradient_accumulation_steps > 1 else 0
        tail, root = counts.tail_trained * 4, counts.root_trained * 4
        head_is_given = tail + tail // self.ranks  # its gradient in float32, whole, and this process's part of the sum
        in_backward = 3 * counts.layer * width + self.in_transit
        return max(
            before + peaks.forward + self.forward,
            before + peaks.last + counts.tail * width + head_is_given + 2 * counts.layer * width,
            every + peaks.middle + in_backward,
            every + peaks.first + max(in_backward, 2 * counts.root * width + root),
        )


def _trace(
    model: Model, settings: OptimizationConfig, world: World, sizes: Sizes, is_sharded: bool, needs_gradients: bool
) -> Peaks:
    dtype = torch.bfloat16 if is_sharded and settings.bf16 else getattr(torch, settings.dtype)
    is_autocast = settings.bf16 and not is_sharded
    attention = attention_of(model, settings, world)
    step = Traced(
        model_config=shortened(model.config, num_traced(model.config)),
        num_more=number_of_layers(model.config) - num_traced(model.config),
        settings=settings,
        weights=model.weights,
        dtype=dtype,
        attention="sdpa" if attention == "flash_attention_2" else attention,
        sizes=sizes,
        is_shared=shares_prompts(model, settings, attention),
        op_bytes=functools.partial(op_bytes, sizes, world, torch.bfloat16 if is_autocast else dtype, needs_gradients),
        is_autocast=is_autocast,
        is_sharded=is_sharded,
        has_gradients=settings.gradient_accumulation_steps > 1 or (world.size > 1 and not is_sharded),
        needs_gradients=needs_gradients,
    )
    return trace(step)


def attention_of(model: Model, settings: OptimizationConfig, world: World) -> str:
    """The attention that the policy has on the devices that train."""
    return resolve_attention(settings.attn_implementation, world.device, settings.dtype)


def shares_prompts(model: Model, settings: OptimizationConfig, attention: str) -> bool:
    """Whether prompts are shared, as far as a configuration tells: see ``training.load.share_prompts``."""
    own = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    has_aux = own if settings.router_aux_loss_coef is None else settings.router_aux_loss_coef
    return settings.share_prompt is not False and not has_aux and attention in ("sdpa", "eager")


def op_bytes(
    sizes: Sizes, world: World, dtype: torch.dtype, needs_gradients: bool, head: Any, is_head_trained: bool
) -> int:
    """What the op takes beside hidden states, head and their gradients."""
    backend: Planner = triton if world.device == "cuda" else cpu
    vocab, dim = head
    shape = Shape(
        backend=backend,
        dim=dim,
        vocab=vocab,
        dtype=dtype,
        component_rows=[2 * sizes.response] * sizes.pairs,
        needs_dweight=is_head_trained,
        device_type=world.device,
    )
    found = plan(shape).bytes
    return sum(size for name, size in found.items() if needs_gradients or name != "exponentials")


def forward_peak(model: Model, settings: OptimizationConfig, world: World, sizes: Sizes) -> int:
    """The most bytes at once, beside the weights, when a model reads a batch and nothing is kept."""
    return _trace(model, settings, world, sizes, False, False).forward

"""What an engine holds on one device while a cell answers: weights, keys and values, what a forward pass takes."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.planning.memory import CUDA_CONTEXT, Batch, Model, World, forward_peak, itemsize
from tso_fast.planning.trace import Sizes

VLLM_SHARE = 0.9
"""Share of a GPU that vLLM takes, its `gpu_memory_utilization`, if nothing else is said."""
SAMPLING_COPIES = 4
"""Float32 arrays of all logits that sampling has at once."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine of a cell holds on one of its devices, bytes."""

    cell: str
    generator: str
    devices: int
    weights: int
    cache: int
    """Keys and values: of a whole batch at its longest with `hf`; with `vllm` all that is left to them."""
    passing: int
    """What a forward pass over prompts, and sampling, takes."""
    sequences: int
    """Responses at their longest that the cache has room for."""

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.passing


def generator_of(config: TrainConfig, world: World) -> str:
    """What runs the cells: `auto` is vLLM on GPUs."""
    if config.generator != "auto":
        return config.generator
    has_vllm = importlib.util.find_spec("vllm") is not None
    return "vllm" if world.device == "cuda" and has_vllm else "hf"


def cache_bytes(config: Any, dtype: str) -> int:
    """Bytes of keys and values of one token."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)
    if latent := getattr(text, "kv_lora_rank", None):
        return layers * (latent + text.qk_rope_head_dim) * itemsize(dtype)
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * width * itemsize(dtype))


def plan_engine(
    cell: CellConfig, name: str, model: Model, total: int, config: TrainConfig, world: World, batch: Batch, memory: int
) -> Engine:
    """What an engine of a cell holds.

    Args:
        total: bytes of the cell's weights.
        batch: lengths of the longest prompt and response.
        memory: bytes of a device.
    """
    generator = generator_of(config, world)
    devices = cell.num_gpus if generator == "vllm" else 1
    weights = total // devices
    length = batch.prompt + (cell.max_completion_length or config.max_completion_length)
    a_sequence = cache_bytes(model.config, config.dtype) * length // devices
    if generator == "vllm" and world.device == "cuda":
        share = float((config.vllm_args or {}).get("gpu_memory_utilization", VLLM_SHARE))
        logits = 256 * model.config.get_text_config().vocab_size * 4 * SAMPLING_COPIES // devices
        cache = max(0, int(share * memory) - weights - logits - CUDA_CONTEXT)
        return Engine(cell=name, generator=generator, devices=devices, weights=weights, cache=cache,
                      passing=logits + CUDA_CONTEXT, sequences=cache // max(1, a_sequence))  # fmt: skip
    size = config.generation_batch_size
    settings = dataclasses.replace(config, peft="none", bf16=False, share_prompt=False, shard="none")
    sizes = Sizes(pairs=-(-size // 2), per_prompt=1, prompt=batch.prompt, response=1)
    passing = forward_peak(model, settings, world, sizes)
    passing = max(passing, SAMPLING_COPIES * 4 * size * model.config.get_text_config().vocab_size)
    return Engine(
        cell=name, generator=generator, devices=1, weights=weights, cache=size * a_sequence,
        passing=passing + (CUDA_CONTEXT if world.device == "cuda" else 0), sequences=size,
    )  # fmt: skip

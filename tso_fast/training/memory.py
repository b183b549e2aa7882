"""What to do when training runs out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from tso_fast.config.settings import OptimizationConfig
from tso_fast.errors import TrainingError

Settings = dict[str, Any]


@contextlib.contextmanager
def explained_memory(config: OptimizationConfig, accelerator: Accelerator, longest: int) -> Iterator[None]:
    """A context that turns a lack of memory into a TrainingError that says which settings help.

    Args:
        longest: tokens of the longest pair, prompt and longer response.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        is_lack = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not is_lack:
            raise
        raise TrainingError(
            f"no memory left on {accelerator.device} in a pass of {config.per_device_train_batch_size} pairs of up to "
            f"{longest} tokens: {str(error).splitlines()[0]}\nWhat helps, the first first:"
            + "".join(f"\n  {line}" for line in advice(config, accelerator.num_processes, longest))
            + "\nThen the same command goes on. `tso-fast plan` says beforehand what fits"
        ) from error


def costless(config: OptimizationConfig, world: int) -> list[Settings]:
    """Changes that need less memory and leave the result as it is, one after the other, the cheapest first."""
    steps: list[Settings] = []
    if not config.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    size = pairs = config.per_device_train_batch_size
    while size > 1:
        size = next(n for n in range(size // 2, 0, -1) if pairs % n == 0)
        accumulation = config.gradient_accumulation_steps * (pairs // size)
        steps.append({"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation})
    if world > 1 and config.shard == "none":
        steps.append({"shard": "full"})
    return steps


def lossy(config: OptimizationConfig) -> list[Settings]:
    """Changes that need less memory by training less or rounding more, each by itself."""
    if config.peft == "lora":
        return [{"load_in_4bit": True}] if config.shard == "none" and not config.load_in_4bit else []
    found: list[Settings] = [{"peft": "lora"} if config.optim != "adamw_bf16" else {"peft": "lora", "optim": "adamw"}]
    smaller = {"adamw": ("adamw_8bit", "adamw_bf16"), "adamw_bf16": ("adamw_8bit",)}.get(config.optim, ())
    return found + [{"optim": name, "dtype": "bfloat16"} for name in smaller]


def spelled(changes: Settings) -> str:
    """Settings as arguments of a command."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())


_WHY = {
    "gradient_checkpointing": "activations of one layer instead of all, a third more time",
    "per_device_train_batch_size": "smaller passes, the same steps",
    "shard": "a part of weights, gradients and optimizer on each process",
    "peft": "neither gradients nor optimizer for the weights under the adapter",
    "load_in_4bit": "a quarter of the weights under the adapter, which are rounded",
    "optim": "fewer bytes a weight, which are rounded",
}
"""What changes do, by the first setting in them."""


def advice(config: OptimizationConfig, world: int, longest: int) -> list[str]:
    """Settings that need less memory than these, the cheapest first."""
    lines: dict[str, str] = {}
    for step in (*costless(config, world), *lossy(config)):
        kind = next(iter(step))
        lines.setdefault(kind, f"{spelled(step)}: {_WHY[kind]}")
    out = list(lines.values())
    if world == 1:
        out.append("--num_processes N --shard full on N GPUs: 1 / N of weights, gradients and optimizer on each")
    return [*out, f"--max_length below {longest}: shorter responses; their ends are cut off"]

"""What to do when training runs out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from tso_fast.config.settings import OptimizationConfig
from tso_fast.errors import TrainingError


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


def advice(config: OptimizationConfig, world: int, longest: int) -> list[str]:
    """Settings that need less memory than these, the cheapest first."""
    lines = []
    if not config.gradient_checkpointing:
        lines.append("--gradient_checkpointing true: activations of one layer instead of all, a third more time")
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if size > 1:
        half = size // 2
        lines.append(
            f"--per_device_train_batch_size {half} --gradient_accumulation_steps {accumulation * size // half}: passes "
            "of half the size, the same steps"
            if size % 2 == 0
            else f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation * size}: single pairs"
        )
    if world > 1 and config.shard == "none":
        lines.append(f"--shard full: 1 / {world} of weights, gradients and optimizer on each process")
    if config.peft == "none":
        lines.append("--peft lora: neither gradients nor optimizer for the weights under the adapter")
        if config.optim == "adamw":
            lines.append("--optim adamw_8bit: moments of 2 instead of 8 bytes a weight")
    elif config.shard == "none" and not config.load_in_4bit:
        lines.append("--load_in_4bit true: a quarter of the weights under the adapter, which are rounded")
    if world == 1:
        lines.append("--num_processes N --shard full on N GPUs: 1 / N of weights, gradients and optimizer on each")
    lines.append(f"--max_length below {longest}: shorter responses; their ends are cut off")
    return lines

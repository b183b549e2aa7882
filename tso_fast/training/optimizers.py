"""AdamW in three sizes, its schedule, and its state from one iteration to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tso_fast.config.settings import OptimizationConfig
from tso_fast.errors import InputError
from tso_fast.seeds import seed_of
from tso_fast.training.shard import local_part

CHUNK = 1 << 24
"""Elements that ``StochasticAdamW`` holds in float32 at a time."""


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """The optimizer of ``optim`` over the weights that are trained.

    Raises:
        InputError: its library is not there, or the weights have another dtype than it takes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise InputError(f"optim: adamw_8bit needs bitsandbytes: {error}; pip install 'tso-fast[optim]'") from error
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, **options)
        return optimizer
    if config.optim == "adamw_bf16":
        if wrong := next((p.dtype for p in trained if p.dtype != torch.bfloat16), None):
            raise InputError(
                f"optim: adamw_bf16 trains weights of bfloat16, these are {str(wrong).removeprefix('torch.')}; set "
                "dtype to bfloat16, or optim to adamw"
            )
        return StochasticAdamW(trained, **options, seed=config.seed)
    return torch.optim.AdamW(trained, **options, fused=True)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW of bfloat16 weights and moments without float32 copies: 8 bytes a weight, gradient included.

    A step is computed in float32 and rounded up or down at random, in proportion, so that updates smaller than half a
    unit in the last place, which rounding to nearest would lose for ever, arrive in the mean. What is drawn depends on
    seed, step and weight alone: replicas of a weight stay equal, and a resumed run is bitwise the same.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over all weights that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for number, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    self._update(weight, weight.grad, group, number)
        return loss

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        step, (beta1, beta2) = state["step"], group["betas"]
        random = torch.Generator(weight.device).manual_seed(seed_of(self.seed, f"{step} {number}"))
        held = (weight, gradient, state["exp_avg"], state["exp_avg_sq"])
        for parts in zip(*(local_part(tensor).reshape(-1).split(CHUNK) for tensor in held), strict=True):
            value, slope, mean, square = (part.float() for part in parts)
            mean.lerp_(slope, 1 - beta1)
            square.lerp_(slope.square(), 1 - beta2)
            value.mul_(1 - group["lr"] * group["weight_decay"])
            spread = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            value.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**step))
            for part, exact in zip((parts[0], parts[2], parts[3]), (value, mean, square), strict=True):
                part.copy_(round_at_random(exact, random))


def round_at_random(values: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Float32 values as bfloat16: one of the two neighbours, so that the mean is the value."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=random, device=bits.device, dtype=torch.int32)
    # The bits of a finite value plus less than a unit of bfloat16, cut off: away from zero as often as it is near.
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimizationConfig, total_steps: int, iteration: int, num_iterations: int
) -> Any:
    """The schedule of the learning rate of an iteration: its own, or its part of the whole run's.

    How many steps later iterations will have is not known; the run's schedule takes all to be as long as this one.
    """
    name, warmup = config.lr_scheduler_type, config.warmup_steps
    if config.lr_scheduler_span == "iteration":
        return transformers.get_scheduler(name, optimizer, warmup, total_steps)
    whole = transformers.get_scheduler(name, optimizer, warmup, total_steps * num_iterations)
    before = total_steps * (iteration - 1)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    (rate_at,) = whole.lr_lambdas
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step + before))

"""Optimizers of several sizes, schedules, what iterations hand on, experts' auxiliary loss, and a lack of memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import SHAPE, encoded
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.errors import InputError, TrainingError
from tso_fast.files.run import Run
from tso_fast.models.policy import Policy
from tso_fast.training import inputs
from tso_fast.training import optimise as optimise_module
from tso_fast.training.load import load_policy
from tso_fast.training.optimise import optimise
from tso_fast.training.optimizers import StochasticAdamW, make_optimizer, make_scheduler, round_at_random
from tso_fast.types import Weights

SMALL = SHAPE | {"vocab_size": 61}


def settings(**changes: Any) -> TrainConfig:
    fixed = {"output_dir": "", "prompts": "-", "cells": [CellConfig(path="-")], "use_cpu": True}
    return TrainConfig(**fixed, **{"learning_rate": 1e-2, "per_device_train_batch_size": 4, **changes})


def tiny(config: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL | changes))


def train(model: Any, folder: Path, iteration: int = 1, **changes: Any) -> dict[str, Any]:
    config = settings(**changes)
    (folder / f"iter-{iteration}").mkdir(parents=True, exist_ok=True)
    return optimise(
        Policy(model),
        encoded(12),
        config,
        files=Run(folder, {}, None).iteration(iteration),
        accelerator=Accelerator(cpu=True),
        reference=None,
        reference_key="these",
        pad_token_id=0,
        num_iterations=3,
    )


# ------------------------------------------------------------------------------------------------- bf16 without masters


def test_rounding_at_random_gives_neighbours_whose_mean_is_the_value() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, 1.001, -3.1416, 1e-3, 0.0, -0.0, 3e38, math.inf, -math.inf, math.nan, 1e-41])
    drawn = torch.stack([round_at_random(values, random) for _ in range(4000)]).double()
    for i, value in enumerate(values.tolist()):
        found = set(drawn[:, i].tolist())
        if not math.isfinite(value):
            assert all(math.isnan(v) if math.isnan(value) else v == value for v in found)
            continue
        assert len(found) <= 2
        unit = max(abs(value) * 2**-7, 1e-40)
        assert all(abs(v - value) <= unit for v in found)
        assert drawn[:, i].mean().item() == pytest.approx(value, abs=4 * unit / math.sqrt(4000))


def test_small_updates_arrive_where_rounding_to_nearest_loses_them() -> None:
    """500 steps of 1e-5 on weights of 1, whose neighbours are 4e-3 and 8e-3 away, as float32 makes them."""
    ends = {}
    for name in ("exact", "random", "nearest"):
        weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.float32 if name == "exact" else torch.bfloat16))
        options: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
        optimizer: torch.optim.Optimizer = (
            StochasticAdamW([weight], **options, seed=0) if name == "random" else torch.optim.AdamW([weight], **options)
        )
        for _ in range(500):
            weight.grad = torch.full_like(weight, 0.1)
            optimizer.step()
        ends[name] = weight.detach().double().mean().item()
    assert ends["nearest"] == 1.0
    assert ends["random"] == pytest.approx(ends["exact"], abs=3e-4)
    assert ends["exact"] == pytest.approx(0.995, abs=1e-4)


def test_a_step_is_that_of_adamw_and_depends_on_the_seed_alone() -> None:
    def steps(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(torch.seed() % 1000)  # what else is drawn does not matter
        start = torch.linspace(-2, 2, 999)
        ours, theirs = torch.nn.Parameter(start.bfloat16()), torch.nn.Parameter(start.bfloat16().float())
        options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
        one, other = StochasticAdamW([ours], **options, seed=seed), torch.optim.AdamW([theirs], **options)
        for step in range(3):
            ours.grad = (start * (step - 1) + 0.3).bfloat16()
            theirs.grad = ours.grad.float()
            one.step()
            other.step()
        return ours.detach(), theirs.detach()

    ours, theirs = steps(0)
    off = (ours.float() - theirs).abs()
    assert off.max() < 5e-2
    assert off.mean() < 8e-3  # half a unit of numbers near 2, or less
    assert torch.equal(ours, steps(0)[0])
    assert not torch.equal(ours, steps(1)[0])


@pytest.mark.parametrize("optim", ["adamw_bf16", "adamw_8bit"])
def test_a_resume_is_bitwise(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def run(folder: Path) -> list[torch.Tensor]:
        model = tiny(hidden_size=128) if optim == "adamw_8bit" else tiny().bfloat16()
        dtype = "float32" if optim == "adamw_8bit" else "bfloat16"
        train(model, folder, optim=optim, save_steps=1, dtype=dtype)
        return [p.detach() for p in model.parameters()]

    whole = run(tmp_path / "whole")
    real, calls = optimise_module.backward, iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(optimise_module, "backward", lambda *args: real(*args) if next(calls) < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(run(tmp_path / "cut"), whole, strict=True))


def test_weights_of_float32_are_refused() -> None:
    with pytest.raises(InputError, match="optim: adamw_bf16 trains weights of bfloat16, these are float32"):
        make_optimizer(tiny(), settings(optim="adamw_bf16"))


# --------------------------------------------------------------------------------------- schedules, what is handed on


def test_a_schedule_over_the_run_goes_on_where_the_iteration_before_ended() -> None:
    rates = []
    for iteration in (1, 2, 3):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        config = settings(learning_rate=1.0, lr_scheduler_span="run", warmup_steps=2)
        scheduler = make_scheduler(optimizer, config, 4, iteration, 3)
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates == pytest.approx([0.0, 0.5, *[(12 - step) / 10 for step in range(2, 12)]])


def test_moments_are_handed_on_to_the_next_iteration(tmp_path: Path) -> None:
    """Two iterations with them are one of twice the epochs at a constant rate."""
    same = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 12, "loss_type": "sft"}
    whole = tiny()
    train(whole, tmp_path / "whole", num_train_epochs=2, **same)
    for keep in (True, False):
        model = tiny()
        for iteration in (1, 2):
            train(model, tmp_path / str(keep), iteration, keep_optimizer=keep, **same)
        both = zip(model.parameters(), whole.parameters(), strict=True)
        off = max(float((a - b).detach().abs().max()) for a, b in both)
        assert (off < 1e-4) == keep
    assert (tmp_path / "True/iter-2/optimizer").is_dir()
    assert not (tmp_path / "False/iter-2/optimizer").exists()


def test_reference_log_probs_are_kept_for_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = inputs.reference_logprobs
    monkeypatch.setattr(
        inputs, "reference_logprobs", lambda *args, **options: (computed.append(1), real(*args, **options))[1]
    )
    ends = []
    for changes in ({}, {}, {"loss_type": "humanline"}, {"cache_reference": False}):
        model = tiny()
        train(model, tmp_path, **changes)
        ends.append([p.detach() for p in model.parameters()])
    assert len(computed) == 3  # the second run took what the first had; the third needs those of tokens
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    file = tmp_path / "iter-1/reference-logprobs.safetensors"
    for damaged in (b"damaged", file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])):
        file.write_bytes(damaged)
        train(tiny(), tmp_path)
    assert len(computed) == 5


# ---------------------------------------------------------------------------------------------------- experts, memory


def test_the_auxiliary_loss_of_experts_is_added_and_logged(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4, router_aux_loss_coef=0.5)
    tiny(config).save_pretrained(tmp_path / "model")
    weights = Weights(tmp_path / "model", tmp_path / "model")
    accelerator = Accelerator(cpu=True)
    gates = {}
    for coefficient in (None, 0.0, 2.0):
        changes = settings(router_aux_loss_coef=coefficient, logging_steps=1)
        policy = load_policy(changes, weights, accelerator)
        assert policy.aux_weight == (0.5 if coefficient is None else coefficient)
        assert policy.shares_prompts == (coefficient == 0.0)
        (tmp_path / str(coefficient)).mkdir()
        figures = optimise(
            policy,
            encoded(8),
            changes,
            files=Run(tmp_path / str(coefficient), {}, None).iteration(1),
            accelerator=accelerator,
            reference=None,
            pad_token_id=0,
        )
        assert ("aux_loss" in figures["means"]) == (coefficient != 0.0)
        assert coefficient == 0.0 or 1.9 < figures["means"]["aux_loss"] < 4  # two of four experts: at least 2
        assert figures["first_loss"] is not None  # which is checked without it
        gates[coefficient] = next(p for n, p in policy.named_parameters() if "gate.weight" in n).detach()
    assert not torch.equal(gates[None], gates[0.0])
    assert not torch.equal(gates[None], gates[2.0])
    tiny().save_pretrained(tmp_path / "dense")
    dense = Weights(tmp_path / "dense", tmp_path / "dense")
    with pytest.raises(InputError, match="router_aux_loss_coef: LlamaForCausalLM is no mixture of experts"):
        load_policy(settings(router_aux_loss_coef=0.1), dense, accelerator)


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({}, ["--gradient_checkpointing true", "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"]),
        ({"per_device_train_batch_size": 3, "gradient_checkpointing": True}, ["--gradient_accumulation_steps 3"]),
        ({"optim": "adamw_bf16"}, ["--peft lora --optim adamw:", "--optim adamw_8bit --dtype bfloat16:"]),
    ],
    ids=str,
)
def test_a_lack_of_memory_says_what_helps(
    changes: dict[str, Any], helps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(optimise_module, "backward", full)
    model = tiny().bfloat16() if "optim" in changes else tiny()
    with pytest.raises(TrainingError, match=r"no memory left on cpu in a pass of . pairs of up to") as told:
        train(model, tmp_path, **changes)
    assert all(line in str(told.value) for line in helps)
    if changes.get("gradient_checkpointing"):
        assert "--gradient_checkpointing" not in str(told.value)

"""Training shared out over processes: sharded or not, the whole model or an adapter, one process's results.

Ranks are forked from this process and talk by gloo. Each works through all cases of its world.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import SHAPE, LargestTensor, encoded, fork, ranks, status_of
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3Config,
)

from tso_fast import interrupts
from tso_fast.config.checks import check
from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.errors import InputError
from tso_fast.files.run import Run
from tso_fast.models.memory import trim_heap
from tso_fast.models.policy import Policy
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.training import load as load_module
from tso_fast.training import optimise as optimise_module
from tso_fast.training.batches import collate
from tso_fast.training.load import load_policy, save_policy
from tso_fast.training.optimise import make_accelerator, optimise
from tso_fast.training.reference import Others, running_mean, save_ema
from tso_fast.training.shard import is_sharded, local_part, make_mesh, shard_policy
from tso_fast.types import Weights

SMALL = SHAPE | {"vocab_size": 61}  # what helpers.encoded draws from
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2-tied-softcap": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "phi-bias": lambda: PhiConfig(**SMALL),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
}
LORA = {"peft": "lora", "lora_r": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("llama", {}),
    "none, lora": ("llama", LORA),
    "full": ("llama", {"shard": "full"}),
    "full, tied": ("llama-tied", {"shard": "full"}),
    "full, tied, softcap": ("gemma2-tied-softcap", {"shard": "full"}),
    "full, qwen3, checkpointing": ("qwen3", {"shard": "full", "gradient_checkpointing": True}),
    "full, bias": ("phi-bias", {"shard": "full"}),
    # The auxiliary loss is one of a pass, whose pairs are others with more processes.
    "full, experts": ("mixtral", {"shard": "full", "router_aux_loss_coef": 0.0}),
    "full, lora": ("llama", {"shard": "full", **LORA}),
    "full, lora, tied": ("llama-tied", {"shard": "full", **LORA}),
    "full, clamp of tokens": ("llama", {"shard": "full", "loss_type": "humanline", "clip_chosen": None}),
    "full, without a reference": ("llama", {"shard": "full", "loss_type": "simpo"}),
    "full, another reference": ("llama", {"shard": "full", "reference": "initial"}),
    "full, lora, another reference": ("llama", {"shard": "full", "reference": "initial", **LORA}),
    "the policy as reference": ("llama", {"ref_model_sync_steps": 1}),
    "full, a mean as reference": (
        "llama-tied",
        {"shard": "full", "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    ),
    "full, two references": ("llama", {"shard": "full", "loss_type": "mrpo", "second_reference": "other"}),
    "full, lora, rewards of another model": (
        "qwen3",
        {"shard": "full", "loss_type": "inverse_q", "token_values": "rewards", "token_reward_cell": "other", **LORA},
    ),
    "hybrid": ("llama", {"shard": "hybrid"}),
    "hybrid, tied, lora": ("llama-tied", {"shard": "hybrid", **LORA}),
}
"""A model and settings by name."""
OF_FOUR = ("full", "full, lora", "hybrid", "hybrid, tied, lora")
"""Cases that four processes work through; two do all of them."""
TOKENIZER: Any = make_tokenizer([("a b", "1")] * 3, Recipe(seed=0))


def settings(**changes: Any) -> TrainConfig:
    fixed = {"output_dir": "", "prompts": "-", "cells": [CellConfig(path="-")], "use_cpu": True}
    return TrainConfig(**fixed, **{"learning_rate": 1e-2, "adam_epsilon": 1e-4, **changes})


def weights_of(models: Path, name: str) -> Weights:
    return Weights(models / name, models / name)


def trained(models: Path, out: Path, name: str, *, micro: int, changes: dict[str, Any]) -> None:
    """Trains and saves ``out/policy`` and the figures, from this process's share of the work."""
    out.mkdir(parents=True, exist_ok=True)
    config = settings(**changes, per_device_train_batch_size=micro)
    accelerator = make_accelerator(config, str(out))
    policy = load_policy(config, weights_of(models, name), accelerator, has_adapter=config.peft == "lora")
    assert is_sharded(policy) == (config.shard != "none" and accelerator.num_processes > 1)
    named = (config.second_reference, config.token_reward_cell)
    second, rewarding = (None if name is None else weights_of(models, name) for name in named)
    figures = optimise(
        policy,
        encoded(11),
        config,
        files=Run(out, {}, None).iteration(1),
        accelerator=accelerator,
        reference=weights_of(models, "other") if config.reference == "initial" else None,
        others=Others(second=second, rewarding=rewarding),
        mean=running_mean(config, policy, None, accelerator),
        pad_token_id=0,
    )
    save_policy(policy, TOKENIZER, out / "policy", accelerator)
    if accelerator.is_main_process:
        (out / "figures.json").write_text(json.dumps(figures))
    accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, config) in enumerate([*CONFIGS.items(), ("other", CONFIGS["llama"])]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config()).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case trained by one process."""
    folder = tmp_path_factory.mktemp("alone")

    def train(case: str) -> Path:
        name, changes = CASES[case]
        if not (folder / case).exists():
            AcceleratorState._reset_state(reset_partial_state=True)
            trained(models, folder / case, name, micro=4, changes=changes)
        return folder / case

    return train


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with all cases, trained by so many processes."""

    @functools.cache
    def train(processes: int) -> Path:
        folder = tmp_path_factory.mktemp("world")

        def work(rank: int) -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            for case in CASES if processes == 2 else OF_FOUR:
                name, changes = CASES[case]
                trained(models, folder / case, name, micro=4 // processes, changes=changes)

        ranks(processes, work, per_node=2)
        return folder

    return train


def read(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "policy").glob("*.safetensors")
    return load_file(file)


logging.getLogger("dcp_logger").setLevel(logging.WARNING)


def test_compiled_blocks_give_the_weights_of_others(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "BACKEND", "eager")  # runs what was traced; inductor's code takes a minute
    found = []
    for compiles in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.utils.counters.clear()
        out = tmp_path / str(compiles)
        trained(models, out, "llama", micro=4, changes={"torch_compile": compiles})
        assert bool(torch._dynamo.utils.counters["frames"]["ok"]) == compiles
        found.append(read(out))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "case"), [*((2, case) for case in CASES), *((4, case) for case in OF_FOUR)])
def test_many_processes_give_the_weights_and_metrics_of_one(
    world: Callable[[int], Path], alone: Callable[[str], Path], processes: int, case: str
) -> None:
    found = world(processes) / case
    want = alone(case)
    ours, theirs = (json.loads((folder / "figures.json").read_text()) for folder in (found, want))
    assert ours["steps"] == theirs["steps"] == 3
    for part in ("means", "final"):
        for key, value in theirs[part].items():
            if key == "rewards/accuracies":  # of rewards that are 0 but for rounding at the first step
                continue
            assert ours[part][key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key
    got, expected = read(found), read(want)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert (found / "policy/tokenizer_config.json").exists()


# ------------------------------------------------------------------------------------------------------ going on


class CutOffError(Exception):
    """Where a training is cut off."""


def cut_and_resumed(models: Path, out: Path, before: int, after: int, changes: dict[str, Any]) -> None:
    """Trains with ``before`` processes, is cut off in step 3 of 5, and goes on with ``after``."""

    def train(world: int, stop: bool) -> None:
        def work(rank: int) -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            real, calls = optimise_module.backward, itertools.count(1)

            def backward(*args: Any) -> None:
                if stop and next(calls) == 3:
                    raise CutOffError
                real(*args)

            optimise_module.backward = backward
            with contextlib.suppress(*[CutOffError] if stop else []):
                trained(
                    models, out, "llama", micro=4 // world, changes={"save_steps": 1, "num_train_epochs": 2, **changes}
                )

        ranks(world, work, per_node=2)

    train(before, stop=True)
    assert (out / "iter-1/checkpoint/step-2").is_dir()
    assert not (out / "policy").exists()
    train(after, stop=False)


RESUMED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one, dropout": (1, 1, {"disable_dropout": False, "lora_dropout": 0.3, **LORA}),
    "two": (2, 2, {}),
    "two, sharded, a mean as reference": (
        2,
        2,
        {"shard": "full", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "ref_model_mixup_steps": 1},
    ),
    "two, sharded, lora": (2, 2, {"shard": "full", **LORA}),
    "two then one": (2, 1, {"shard": "full"}),
    "one then two, sharded": (1, 2, {"shard": "full"}),
    "two then four, hybrid": (2, 4, {"shard": "hybrid", **LORA}),
}
"""Processes before and after, and settings."""


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_cut_off_goes_on(case: str, models: Path, tmp_path: Path) -> None:
    """Bitwise with as many processes as before, to the order of sums with another number."""
    before, after, changes = RESUMED[case]
    cut_and_resumed(models, tmp_path / "cut", before, after, changes)

    def whole(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        trained(models, tmp_path / "whole", "llama", micro=4 // after, changes={"num_train_epochs": 2, **changes})

    ranks(after, whole, per_node=2)
    got, want = read(tmp_path / "cut"), read(tmp_path / "whole")
    assert got.keys() == want.keys()
    for key, value in want.items():
        tolerance = {"rtol": 0, "atol": 0} if before == after else {"rtol": 1e-4, "atol": 2e-5}
        torch.testing.assert_close(got[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
    if before == after:
        metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cut", "whole")]
        assert metrics[0] == metrics[1]


# ------------------------------------------------------------------------------------------- precision, memory, errors


def big(folder: Path) -> Weights:
    """A model of 58 MiB, in eight layers."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 8, "vocab_size": 2048}
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | shape)).save_pretrained(folder)
    return Weights(folder, folder)


def anonymous_memory() -> int:
    """Bytes that this process has allocated and touched, without files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
def test_no_process_ever_holds_all_weights(models: Path, tmp_path: Path) -> None:
    """Nor makes any whole weight on the way: what is read are slices."""
    weights = big(tmp_path / "big")
    whole = (tmp_path / "big/model.safetensors").stat().st_size

    def work(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        load_policy(settings(shard="full"), weights_of(models, "llama"), accelerator)  # what the libraries take
        trim_heap()
        before = anonymous_memory()
        with LargestTensor() as made:
            policy = load_policy(settings(shard="full"), weights, accelerator)
        held = sum(local_part(p).numel() * p.itemsize for p in policy.parameters())
        assert held == pytest.approx(whole / 4, rel=0.01)
        trim_heap()
        assert anonymous_memory() - before < 0.75 * whole  # with the buffers of gloo
        assert made.largest < 0.2 * whole

    ranks(4, work)


@pytest.mark.slow
def test_bf16_margins_err_as_on_one_process(models: Path, tmp_path: Path) -> None:
    """Reference log-probs above all: cast to bfloat16 with the inputs, -301 would become -302."""
    pairs = encoded(8)

    def margins(name: str, rank: int = 0, **changes: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = settings(**changes)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if config.bf16 else "no")
        policy: Any = load_policy(config, weights_of(models, "llama"), accelerator)
        reference = torch.tensor([[-301.37, -123.456]] * len(pairs))
        batch = collate(pairs, range(8), pad_token_id=0, device=accelerator.device, ref_logprobs=reference)
        policy = policy if is_sharded(policy) else accelerator.prepare(policy)
        with torch.no_grad():
            out = policy(batch, impl="auto", loss="dpo", beta=1.0)
        if accelerator.is_main_process:
            torch.save(out.chosen_rewards - out.rejected_rewards, tmp_path / name)

    margins("exact")
    margins("one", bf16=True)
    ranks(2, lambda rank: margins("sharded", shard="full", bf16=True))
    exact, one, sharded = (torch.load(tmp_path / name).float() for name in ("exact", "one", "sharded"))
    assert (sharded - exact).abs().max() < max(3 * (one - exact).abs().max(), 0.05)
    assert (one - exact).abs().max() > 1e-5


@pytest.mark.slow
def test_a_running_mean_of_sharded_weights(models: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        config = settings(shard="full", reference="ema")
        policy = load_policy(config, weights_of(models, "other"), accelerator)
        save_ema(config, policy, TOKENIZER, weights_of(models, "llama"), tmp_path / "policy", accelerator)

    ranks(2, work)
    old, new = (load_file(models / name / "model.safetensors") for name in ("llama", "other"))
    for name, mean in read(tmp_path).items():
        torch.testing.assert_close(mean, 0.6 * new[name] + 0.4 * old[name])


def test_what_cannot_be_sharded_is_refused(models: Path) -> None:
    policy = Policy(AutoModelForCausalLM.from_pretrained(models / "llama"))
    policy.model._no_split_modules = None
    with pytest.raises(InputError, match="does not name its layers"):
        shard_policy(policy, None, bf16=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="as many processes on every node; got 3 in all and 2 on this one"):
        make_mesh("hybrid", "cpu", 3, 2)
    with pytest.raises(InputError, match="use_dora: its magnitudes start from whole weights"):
        check(settings(use_dora=True, shard="full", **LORA))
    with pytest.raises(InputError, match="lora_r: it has no effect with peft 'none'"):
        check(settings(lora_r=4))
    with pytest.raises(InputError, match="lora_dropout: it has no effect with disable_dropout"):
        check(settings(lora_dropout=0.1, **LORA))
    with pytest.raises(InputError, match="reference: the mean of two adapters' factors"):
        check(settings(reference="ema", **LORA))
    with pytest.raises(InputError, match=r"lora_target_modules: .*nowhere"):
        load_policy(
            settings(lora_target_modules=["nowhere"], **LORA),
            weights_of(models, "llama"),
            Accelerator(cpu=True),
            has_adapter=True,
        )


def test_a_process_that_waits_for_the_others_can_be_stopped(tmp_path: Path) -> None:
    """The second of two, whose first never comes."""
    begun = tmp_path / "begun"

    def wait() -> None:
        os.environ |= {
            "RANK": "1",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "9",
        }
        AcceleratorState._reset_state(reset_partial_state=True)
        with interrupts.handled():
            begun.touch()
            make_accelerator(settings(), str(tmp_path))

    child = fork(wait)
    while not begun.exists():
        time.sleep(0.01)
    time.sleep(0.5)  # it is in the wait by then; if not, the test proves less, but does not fail
    os.kill(child, signal.SIGTERM)
    for _ in range(500):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGTERM

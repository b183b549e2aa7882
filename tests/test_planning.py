"""The plan of a run: what is traced without memory against what is allocated, and what fits where."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import SHAPE, write_rows
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig

from tso_fast.config import PlanConfig, TrainConfig
from tso_fast.config.parse import parse
from tso_fast.config.settings import CellConfig
from tso_fast.errors import InputError
from tso_fast.logprob import triton
from tso_fast.models.policy import Policy
from tso_fast.planning import memory, trace, whole
from tso_fast.planning.memory import Batch, Model, World, count, plan_training
from tso_fast.planning.trace import Sizes
from tso_fast.training.load import load_policy
from tso_fast.training.optimizers import make_optimizer
from tso_fast.types import PairBatch, Weights

ROOT = Path(__file__).parents[1]
NOWHERE = Weights(Path("-"), Path("-"))
DEEP = SHAPE | {"num_hidden_layers": 5, "vocab_size": 1009, "hidden_size": 64, "max_position_embeddings": 512}
LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA_3
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA_3
)


def settings(**changes: Any) -> TrainConfig:
    fixed = {"output_dir": "", "prompts": "-", "cells": [CellConfig(path="-")], "use_cpu": True}
    return TrainConfig(**{**fixed, "per_device_train_batch_size": 2, **changes})


def on_cpu(config: Any, batch: Batch, **changes: Any) -> memory.Training:
    return plan_training(Model(config=config, weights=NOWHERE), settings(**changes), World(device="cpu"), batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "bf16": True},
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"peft": "lora"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_three_layers_stand_for_all(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch = LlamaConfig(**DEEP), Batch(prompt=40, response=30)
    memory._alike.cache_clear()
    short = on_cpu(config, batch, **changes)
    memory._alike.cache_clear()
    monkeypatch.setattr(memory, "TRACED", 99)
    whole = on_cpu(config, batch, **changes)
    memory._alike.cache_clear()
    assert short == whole


@pytest.mark.slow
def test_weights_of_4_bits_are_as_small_as_planned(tmp_path: Path) -> None:
    config, chosen = LlamaConfig(**DEEP), settings(peft="lora", load_in_4bit=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(chosen, Weights(tmp_path, tmp_path), Accelerator(cpu=True), has_adapter=True)
    packed = [p for p in policy.parameters() if p.dtype == torch.uint8]
    states = [p.quant_state for p in packed]
    constants = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    held = sum(p.nbytes for p in policy.parameters()) + constants
    assert held == pytest.approx(memory.count(Model(config=config, weights=NOWHERE), chosen).total_bytes, rel=1e-3)
    assert len(packed) == 7 * config.num_hidden_layers  # not the head


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"peft": "lora", "bf16": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_allocates_what_was_planned(changes: dict[str, Any]) -> None:
    """Against the allocator's own count; each weight's gradient and moments are there from the step before."""
    config, batch = LlamaConfig(**DEEP), Batch(prompt=100, response=60)
    chosen = settings(**changes, optim="adamw")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if chosen.peft == "lora":
        model = trace.add_adapter(model, chosen, NOWHERE)
    if chosen.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model).train()
    optimizer = make_optimizer(policy, chosen)
    layout = Sizes(pairs=2, per_prompt=1, prompt=100, response=60).layout(True)
    pairs = torch.tensor([[0, 1], [2, 3]])
    one = torch.ones(2)
    made = PairBatch(layout=layout, pairs=pairs, scale=one, soft_label=one, margin=0 * one, ref_logprobs=torch.zeros(4))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=chosen.bf16):
            loss = policy(made, impl="cpu", loss="dpo").loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    held = {t.untyped_storage().data_ptr(): t.nbytes for s in optimizer.state.values() for t in s.values()}
    held |= {p.data_ptr(): p.nbytes for p in policy.parameters()}
    planned = on_cpu(config, batch, **changes)
    assert planned.peak == pytest.approx(most + sum(held.values()), rel=0.03)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SHAPE | {"num_hidden_layers": 4}, num_local_experts=4),
        pytest.param(Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 4}, head_dim=8), marks=pytest.mark.slow),
    ],
    ids=lambda c: c.model_type,
)
def test_other_architectures_are_traced(config: Any) -> None:
    planned = on_cpu(config, Batch(prompt=20, response=10))
    assert planned.peak > planned.parts["weights"] + planned.parts["gradients"] + planned.parts["optimizer"]
    model = AutoModelForCausalLM.from_config(config)
    counts = count(Model(config=config, weights=NOWHERE), settings())
    assert counts.total == sum(p.numel() for p in model.parameters())


def test_what_needs_the_values_of_tensors_is_refused() -> None:
    config = LlamaConfig(**DEEP)
    step = trace.Traced(
        model_config=config, settings=settings(), weights=NOWHERE, dtype=torch.float32, attention="sdpa",
        sizes=Sizes(pairs=1, per_prompt=1, prompt=3, response=2), is_shared=True,
        op_bytes=lambda head, is_trained: int(torch.ones(1).item()),
    )  # fmt: skip
    assert trace.trace(step).peak > 0

    class Curious(Policy):
        def hidden_of(self, layout: Any) -> Any:
            hidden = super().hidden_of(layout)
            return hidden if bool(hidden.sum() > 0) else -hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "Policy", Curious)
        with pytest.raises(InputError, match="what a llama allocates cannot be told from shapes"):
            trace.trace(step)


# ------------------------------------------------------------------------------------------------------ models of size


def folder_of(config: Any, path: Path) -> Path:
    """A folder that has a configuration and nothing else."""
    config.save_pretrained(path)
    return path


def planned(path: Path, *arguments: str) -> Any:
    lengths = ["--max_length", "2048", "--max_completion_length", "1024"]
    needed = ["--prompts", "-", "--output_dir", "-", "--cells", f'[{{"path": "{path}"}}]', *lengths]
    return whole.make_plan(parse("plan", PlanConfig, [*needed, *arguments]))


CHEAP = ("--gradient_checkpointing", "--per_device_train_batch_size", "4")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--optim", "adamw_bf16", "--dtype", "bfloat16"], marks=pytest.mark.slow),
        ["--shard", "full", "--num_processes", "8", "--bf16"],
    ],
    ids=" ".join,
)
def test_8_billion_fit(arguments: list[str], tmp_path: Path) -> None:
    plan = planned(folder_of(LLAMA_8B, tmp_path / "model"), *CHEAP, *arguments)
    assert plan.fits
    assert plan.training.most <= 80e9


@pytest.mark.parametrize(
    ("config", "world", "changes", "gb"),
    [
        (LLAMA_8B, World(), {}, 128),
        (LLAMA_8B, World(), {"dtype": "bfloat16", "optim": "adamw_bf16"}, 64),
        (LLAMA_8B, World(), {"dtype": "bfloat16", "optim": "adamw_8bit"}, 48),
        (LLAMA_8B, World(per_node=8), {}, 128),
        (LLAMA_8B, World(per_node=8), {"shard": "full"}, 16),
        (LLAMA_70B, World(per_node=8, nodes=4), {"shard": "full"}, 35),
        (LLAMA_70B, World(per_node=8, nodes=4), {"shard": "hybrid"}, 141),
    ],
)
def test_what_a_process_keeps(config: Any, world: World, changes: dict[str, Any], gb: float) -> None:
    kept = memory.least(Model(config=config, weights=NOWHERE), settings(**changes), world)
    assert kept / 1e9 == pytest.approx(gb, rel=0.02)


@pytest.mark.parametrize(
    ("fits", "processes", "changes"),
    [
        (lambda c: c.load_in_4bit or c.peft == "none", 1, [{"load_in_4bit": True}]),
        (lambda c: c.gradient_checkpointing, 1, [{"gradient_checkpointing": True}]),
        (
            lambda c: c.per_device_train_batch_size <= 2,
            1,
            [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}],
        ),
        (lambda c: c.shard == "full", 8, [{"shard": "full"}]),
        (
            lambda c: c.shard == "full" and c.gradient_checkpointing,
            8,
            [{"gradient_checkpointing": True, "shard": "full"}],
        ),
        (
            lambda c: c.peft == "lora" or c.optim == "adamw_bf16",
            1,
            [{"peft": "lora"}, {"optim": "adamw_bf16", "dtype": "bfloat16"}],
        ),
        (lambda c: False, 8, []),
    ],
)
def test_the_fewest_changes_are_told(fits: Any, processes: int, changes: list[Any], monkeypatch: Any) -> None:
    """What changes nothing but time comes first, then what changes training; nothing that is not needed."""
    given = {name: getattr(settings(), name) for name in ("output_dir", "prompts", "cells", "use_cpu")}
    config = PlanConfig(**given, num_processes=processes, gradient_accumulation_steps=2)
    if {"load_in_4bit": True} in changes:
        config.peft = "lora"
    monkeypatch.setattr(whole, "least", lambda *rest: 0)
    monkeypatch.setattr(
        whole,
        "_train",
        lambda model, config, *rest: memory.Training(
            parts={}, peak=1 if fits(config) else 3, reference_peak=0, checkpoint=0
        ),
    )
    model = Model(config=None, weights=NOWHERE)
    found = whole.alternatives(model, config, World(per_node=processes), Batch(prompt=1, response=1), 2)
    assert [one.changes for one in found] == changes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("8b-one-gpu", [], marks=pytest.mark.slow),
        ("70b-four-nodes", ["--num_nodes", "4", "--num_processes", "8"]),
    ],
)
def test_the_examples_fit(name: str, arguments: list[str], tmp_path: Path) -> None:
    config = parse("plan", PlanConfig, [str(ROOT / f"examples/{name}.yaml"), *arguments])
    folders = {size: folder_of(c, tmp_path / size) for size, c in (("8b", LLAMA_8B), ("70b", LLAMA_70B))}
    for cell in config.cells:
        cell.path = str(next(folder for size, folder in folders.items() if size in cell.path))
        cell.name = f"{cell.version_rank}-{Path(cell.path).name}"
    plan = whole.make_plan(config)
    assert plan.fits
    assert plan.training.most < 0.9 * plan.limit
    assert all(engine.sequences > 50 for engine in plan.engines)
    parse("train", TrainConfig, [str(ROOT / f"examples/{name}.yaml")])


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_needs_a_configuration_only(tmp_path: Path, capsys: Any, tiny_matrix: Path) -> None:
    from tso_fast.cli import main

    shutil.copytree(tiny_matrix / "s.v1", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = write_rows(tmp_path / "p.jsonl", [{"prompt": "2 + 3?", "human_response": "5"}] * 12)
    arguments = ["--cells", f'[{{"path": "{tmp_path / "model"}"}}]', "--prompts", str(rows), "--output_dir", "o"]
    assert main(["plan", *arguments, "--use_cpu", "--max_completion_length", "8", "--num_iterations", "2"]) == 0
    shown = capsys.readouterr().out
    for words in ("Generation, on a process", "weights", "exponentials of the op", "policies, one an iteration",
                  "training fits", "(the prompts)"):  # fmt: skip
        assert words in shown
    lines = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in shown.splitlines() if line.strip()}
    assert (lines["prompts"], lines["pairs"], lines["pairs in a step"], lines["steps"]) == ("6", "6", "8", "1")
    assert main(["plan", *arguments, "--use_cpu", "--gpu_memory_gb", "0.000001", "--max_completion_length", "8"]) == 0
    assert "none of gradient_checkpointing" in capsys.readouterr().out
    (tmp_path / "model/config.json").unlink()
    assert main(["plan", *arguments]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_the_kernels_constant_is_known_without_them() -> None:
    kernels = pytest.importorskip("tso_fast.kernels.linear_logprob_backward")
    assert triton._DHIDDEN_ROWS == kernels.DHIDDEN_ROWS


def test_a_plan_reads_the_settings_of_train() -> None:
    own = {f.name for f in dataclasses.fields(PlanConfig)} - {f.name for f in dataclasses.fields(TrainConfig)}
    assert own == {"gpu_memory_gb", "num_nodes", "prompt_tokens"}


def test_a_reference_that_follows_and_further_sequences_are_counted() -> None:
    config, batch = LlamaConfig(**DEEP), Batch(prompt=20, response=10)
    model, world = Model(config=config, weights=NOWHERE), World(device="cpu")
    plain, moving = (
        plan_training(model, settings(), world, batch, follows=follows, has_mean=follows) for follows in (False, True)
    )
    weights = plain.parts["weights"]
    assert moving.peak - plain.peak == moving.checkpoint - plain.checkpoint == weights
    assert moving.reference_peak - plain.reference_peak == weights + plain.parts["optimizer"]
    more = plan_training(model, settings(), world, dataclasses.replace(batch, sequences=6))
    assert 2 * plain.parts["activations"] < more.parts["activations"] < 4 * plain.parts["activations"]

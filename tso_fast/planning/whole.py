"""What a run will hold, do and write, before it begins: from shapes alone, on a machine without a GPU too."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tso_fast.config.settings import CellConfig, PlanConfig
from tso_fast.errors import InputError
from tso_fast.models.load import ADAPTER_CONFIG, load_config
from tso_fast.planning import work
from tso_fast.planning.generation import Engine, plan_engine
from tso_fast.planning.memory import Batch, Counts, Model, Training, World, count, least, plan_training
from tso_fast.training.memory import Settings, costless, lossy
from tso_fast.training.optimise import configured_loss
from tso_fast.training.reference import has_running_mean
from tso_fast.types import Weights


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Settings with which training fits."""

    changes: Settings
    peak: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will hold, do and write."""

    policy: str
    counts: Counts
    world: World
    prompts: work.Prompts
    batch: Batch
    engines: Sequence[Engine]
    training: Training
    limit: int
    """Bytes of a device."""
    main_memory: Mapping[str, int]
    """Bytes of a node's main memory."""
    disk: Mapping[str, int]
    work: work.Iteration | None
    alternatives: Sequence[Alternative]
    """Empty if the settings fit as they are, or nothing does."""

    @property
    def fits(self) -> bool:
        return self.training.most <= self.limit


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a run.

    Raises:
        InputError: a folder has no configuration, a setting does not fit, or the model's code cannot be followed.
    """
    world = World(per_node=config.num_processes, nodes=config.num_nodes, device="cpu" if config.use_cpu else "cuda")
    models = [model_of(cell, f"cells[{i}]") for i, cell in enumerate(config.cells)]
    plain = dataclasses.replace(config, peft="none")
    totals = [count(model, plain) for model in models]
    chosen = _policy(config, totals)
    policy = config.cells[chosen]
    contexts = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models]
    context = min((c for c in contexts if c), default=None)
    prompts = work.prompts_of(config, Path(models[chosen].weights.base), context, config.prompt_tokens)
    response, extra = work.response_tokens(config, prompts), configured_loss(config).num_extra or 0
    batch = Batch(
        prompt=prompts.longest + (response if config.revision_template else 0),
        response=response,
        per_prompt=max(1, config.max_pairs),
        sequences=2 + extra,
    )
    limit = int(config.gpu_memory_gb * 1e9)
    training = _train(models[chosen], config, world, batch)
    found = count(models[chosen], config)
    iteration = work.work_of(config, prompts, policy, world.size)
    saved = found.trained_bytes if config.peft == "lora" else found.total_bytes
    shards = found.trained_bytes // max(1, training.parts.get("gradients", 1))
    return Plan(
        policy=name_of(policy),
        counts=found,
        world=world,
        prompts=prompts,
        batch=batch,
        engines=[
            plan_engine(cell, name_of(cell), model, total.total_bytes, config, world, batch, limit)
            for cell, model, total in zip(config.cells, models, totals, strict=True)
            if cell.url is None and config.generator != "openai"
        ],
        training=training,
        limit=limit,
        main_memory=_main_memory(config, world, found, training),
        disk=work.disk_of(
            config,
            saved,
            found.total_bytes if config.reference == "ema" else 0,
            training.checkpoint * shards,
            iteration,
            prompts,
        ),
        work=iteration,
        alternatives=[] if training.most <= limit else alternatives(models[chosen], config, world, batch, limit),
    )


def name_of(cell: CellConfig) -> str:
    return cell.name or os.path.basename(os.path.abspath(cell.path))


def model_of(cell: CellConfig, place: str) -> Model:
    """The model of a cell, whose folder needs a configuration only; of an adapter, its base's.

    Raises:
        InputError: there is none.
    """
    path = Path(cell.path)
    base: Path = path
    if (path / ADAPTER_CONFIG).is_file():
        named = cell.base or json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
        base = Path(named or "")
    if not (base / "config.json").is_file():
        raise InputError(f"{place}: {base} has no config.json; expected a model's folder, or at least its config.json")
    return Model(config=load_config(base), weights=Weights(path, base))


def _policy(config: PlanConfig, totals: Sequence[Counts]) -> int:
    """Which cell is trained: see ``ModelMatrix``."""
    names = [name_of(cell) for cell in config.cells]
    if config.policy is not None:
        if config.policy not in names:
            raise InputError(f"policy: got {config.policy!r}, expected one of the cells {', '.join(names)}")
        return names.index(config.policy)
    if not names:
        raise InputError("cells: got none, expected at least one {path: ...}")
    sizes = [cell.size_b or total.total / 1e9 for cell, total in zip(config.cells, totals, strict=True)]
    return max(range(len(names)), key=lambda i: (sizes[i], config.cells[i].version_rank))


def _train(model: Model, config: PlanConfig, world: World, batch: Batch) -> Training:
    return plan_training(
        model,
        config,
        world,
        batch,
        needs_reference=configured_loss(config).needs_reference,
        has_other_reference=config.reference != "previous" or bool(config.second_reference or config.token_reward_cell),
        has_ema=config.reference == "ema",
        follows=config.ref_model_sync_steps is not None,
        has_mean=has_running_mean(config),
    )


def _main_memory(config: PlanConfig, world: World, found: Counts, training: Training) -> dict[str, int]:
    held = {}
    if config.shard == "none" and world.device == "cuda":
        held["weights while they are read, in every process"] = world.per_node * found.total_bytes
    if config.save_steps:
        held["copies for a checkpoint, in every process"] = world.per_node * training.checkpoint
    if config.shard != "none":
        held["the policy while it is saved, in the first process"] = (
            found.trained_bytes if config.peft == "lora" else found.total_bytes
        )
    return held


# ---------------------------------------------------------------------------------------------------------- what fits


def alternatives(model: Model, config: PlanConfig, world: World, batch: Batch, limit: int) -> list[Alternative]:
    """The fewest changes with which training fits, in the order in which they cost little: first those that change
    nothing but time, then, if these do not do, each of those that change what is trained or how it is rounded."""
    steps = costless(config, world.size)
    first = _first_that_fits(model, config, world, batch, limit, steps, {})
    if first is not None:
        return [first]
    found = (_first_that_fits(model, config, world, batch, limit, [{}, *steps], end) for end in lossy(config))
    return [alternative for alternative in found if alternative is not None]


def _first_that_fits(
    model: Model, config: PlanConfig, world: World, batch: Batch, limit: int, steps: Sequence[Settings], end: Settings
) -> Alternative | None:
    """The first of ever more steps, with ``end``, that fits, less those that it does not need."""

    def peak(changes: Settings) -> int:
        changed = dataclasses.replace(config, **changes)
        at_least = least(model, changed, world)
        return at_least if at_least > limit else _train(model, changed, world, batch).most

    for number in range(1, len(steps) + 1):
        changes = _merged([*steps[:number], end])
        found = peak(changes)
        if found > limit:
            continue
        for name in ("per_device_train_batch_size", "gradient_checkpointing"):
            fewer = {k: v for k, v in changes.items() if k not in _TOGETHER.get(name, (name,))}
            if name in changes and len(fewer) > 0 and (without := peak(fewer)) <= limit:
                changes, found = fewer, without
        return Alternative(changes=changes, peak=found)
    return None


_TOGETHER = {"per_device_train_batch_size": ("per_device_train_batch_size", "gradient_accumulation_steps")}


def _merged(steps: Sequence[Settings]) -> Settings:
    out: Settings = {}
    for step in steps:
        out |= step
    return out

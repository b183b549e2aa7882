"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tso_fast.config.settings import PlanConfig
from tso_fast.planning.whole import Plan
from tso_fast.report.tables import TitledTable, make_table
from tso_fast.training.memory import spelled


def shown(num_bytes: float) -> str:
    """Bytes in GB of 10^9, MB where that would say little."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def tables(plan: Plan, config: PlanConfig) -> Iterator[TitledTable | str]:
    """What to print."""
    place = "process" if plan.world.device == "cpu" else "GPU"
    counts, batch = plan.counts, plan.batch
    yield (
        f"{plan.policy}: {counts.total / 1e9:,.3f} billion parameters, {counts.trained / 1e9:,.3f} of them trained; "
        f"{plan.world.nodes} x {plan.world.per_node} processes, shard: {config.shard}"
    )
    yield (
        f"at most {config.per_device_train_batch_size} pairs a pass, of {batch.prompt:,} + 2 x {batch.response:,} "
        f"tokens ({plan.prompts.source})\n"
    )
    yield make_table(f"Generation, on a {place}", *_engines(plan), num_labels=2)
    yield ""
    rows = [(name, shown(size)) for name, size in plan.training.parts.items()]
    yield make_table(f"Training, on a {place}: what there is, each part at its most", ("part", "size"), rows)
    yield ""
    yield make_table(f"Training, on a {place}: the most at once", ("stage", "peak", "free"), _peaks(plan))
    yield ""
    if plan.work is not None:
        yield make_table("An iteration, at most", ("what", "count"), _work(plan.work))
        if config.samplers:
            names = ", ".join(sampler.name or sampler.kind for sampler in config.samplers)
            yield f"What samplers generate is not counted: {names}"
        yield ""
    if plan.main_memory:
        yield make_table("Main memory of a machine", ("what", "size"), _sizes(plan.main_memory))
        yield ""
    total = sum(plan.disk.values())
    yield make_table("Disk, of all iterations", ("what", "size"), _sizes(plan.disk), total=("together", shown(total)))
    yield ""
    yield from _verdict(plan, place)


def _engines(plan: Plan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns: tuple[str, ...] = ("cell", "engine", f"{'GPUs' if plan.world.device != 'cpu' else 'processes'}", "weights",
               "keys and values", "forward pass", "together", "responses at once")  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (e.cell, e.generator, str(e.devices), shown(e.weights), shown(e.cache), shown(e.passing), shown(e.peak),
         f"{e.sequences:,}")
        for e in plan.engines
    ]  # fmt: skip
    return columns, rows


def _peaks(plan: Plan) -> list[tuple[str, str, str]]:
    training = plan.training
    stages = {
        "reference log-probs": training.reference_peak,
        "a step": training.peak,
        "mean of reference and policy": training.ema_peak,
    }
    return [(name, shown(peak), _free(plan.limit - peak)) for name, peak in stages.items() if peak]


def _free(num_bytes: int) -> str:
    return shown(num_bytes) if num_bytes >= 0 else f"{shown(-num_bytes)} too few"


def _work(work: Any) -> list[tuple[str, str]]:
    return [
        ("prompts", f"{work.prompts:,}"),
        ("responses", f"{work.responses:,}"),
        ("tokens of responses", f"{work.response_tokens:,}"),
        ("pairs", f"{work.pairs:,}"),
        ("pairs in a step", f"{work.pairs_a_step:,}"),
        ("steps", f"{work.steps:,}"),
        ("tokens trained on", f"{work.trained_tokens:,}"),
    ]


def _sizes(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, shown(size)) for name, size in sizes.items()]


def _verdict(plan: Plan, place: str) -> Iterator[str]:
    limit = shown(plan.limit)
    for engine in plan.engines:
        if engine.peak > plan.limit or not engine.sequences:
            yield (
                f"{engine.cell} does not fit for generation: {shown(engine.peak)} of {limit}; give it more GPUs "
                "(num_gpus, with vLLM), dtype: bfloat16, or a smaller generation_batch_size (hf)"
            )
    if plan.fits:
        yield f"training fits: {shown(plan.training.most)} of {limit} on a {place}"
        return
    yield f"training does not fit: {shown(plan.training.most)} of {limit} on a {place}"
    for found in plan.alternatives:
        yield f"it fits with {spelled(found.changes)}: {shown(found.peak)}"
    if not plan.alternatives:
        yield (
            "none of gradient_checkpointing, per_device_train_batch_size, shard, peft and optim makes it fit; take "
            "more GPUs with shard: full, or a smaller max_length"
        )

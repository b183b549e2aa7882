"""All samplers of a run, made and checked before any work; and the generation of an iteration, which they end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tso_fast.answering import Asked, answer, ask, warm_executor
from tso_fast.config.settings import TrainConfig
from tso_fast.errors import InputError, TrainingError
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.rows import BadRows, candidates_row
from tso_fast.judges.judge import Judge
from tso_fast.matrix import ModelMatrix
from tso_fast.progress import console, progress_bar, spelled_out
from tso_fast.registry import make
from tso_fast.samplers.again import AgainSampler
from tso_fast.samplers.controller import ControllerSampler
from tso_fast.samplers.degrade import DegradeSampler
from tso_fast.samplers.regenerate import RegenerateSampler
from tso_fast.samplers.revise import ReviseSampler
from tso_fast.samplers.sampler import Desk, Sampler
from tso_fast.samplers.search import SearchSampler
from tso_fast.training.monitors import PolicyStatistics
from tso_fast.types import Candidates

SAMPLERS: dict[str, type[Sampler]] = {
    "again": AgainSampler,
    "degrade": DegradeSampler,
    "revise": ReviseSampler,
    "regenerate": RegenerateSampler,
    "search": SearchSampler,
    "controller": ControllerSampler,
}
"""Samplers by their kind."""


def make_samplers(config: TrainConfig) -> list[Sampler]:
    """The configured samplers; nothing is generated yet.

    Raises:
        InputError: names the setting of a sampler that cannot be, such as ``samplers[0].ratios``.
    """
    samplers: list[Sampler] = []
    for i, own in enumerate(config.samplers or []):
        sampler = make(own, f"samplers[{i}].", "sampler", SAMPLERS, Sampler)
        if "/" in sampler.name or not sampler.name.isprintable():
            raise InputError(f"samplers[{i}].name: got {sampler.name!r}, expected printable text without '/'")
        if sampler.name in [other.name for other in samplers]:
            raise InputError(f"samplers[{i}].name: {sampler.name!r} is taken; set a name of its own")
        samplers.append(sampler)
    return samplers


def check(samplers: Sequence[Sampler], matrix: ModelMatrix, judges: Sequence[Judge]) -> None:
    """Before anything is generated.

    Raises:
        InputError: a sampler names a cell that is not there, or has a name that another has.
    """
    for sampler in samplers:
        if sampler.name in matrix.named or sampler.name in [judge.name for judge in judges]:
            raise InputError(f"samplers: the name {sampler.name!r} is that of a cell or judge; set another name")
        sampler.check(matrix, judges)


def inputs(samplers: Sequence[Sampler]) -> dict[str, str]:
    """Hashes of the files that samplers read, by the names of their settings."""
    return {f"samplers.{sampler.name}.{key}": value for sampler in samplers for key, value in sampler.inputs().items()}


def ask_cells(matrix: ModelMatrix, config: TrainConfig) -> list[Asked]:
    """How every cell answers in the loop."""
    policy = {matrix.policy.name: config.policy_num_generations}
    return [ask(cell, config, matrix.configs.get(cell.name), policy.get(cell.name)) for cell in matrix.cells]


def generate(
    samplers: Sequence[Sampler], mini_batch: Sequence[Candidates], desk: Desk
) -> tuple[list[Path], dict[str, Any]]:
    """The cells answer a mini-batch, the samplers add to it; gives the files that were written, and what is noted.

    Raises:
        InputError: an engine refused a prompt of the mini-batch, unless bad rows are skipped.
        EngineError: engines died too often; what was answered is kept.
    """
    config, files = desk.config, desk.files
    statistics, bad = PolicyStatistics(desk.matrix.policy.name), BadRows(config.on_bad_row)
    written: list[Path] = []
    noted: dict[str, Any] = {}
    if not samplers:  # read and written one by one: all responses of a mini-batch would fill the memory
        answered, noted["cells"] = _answered(mini_batch, desk, bad)
        write_jsonl(files.responses, map(candidates_row, statistics.watch(answered)))
    else:
        with warm_executor(config, desk.store) as executor:
            desk = dataclasses.replace(desk, executor=executor)
            own: dict[str, dict[str, Any]] = {}
            for sampler in samplers:
                config, own[sampler.name] = sampler.settle(mini_batch, desk)
                desk = dataclasses.replace(desk, config=config)
            answered, noted["cells"] = _answered(mini_batch, desk, bad)
            candidates = list(statistics.watch(answered))
            for sampler in samplers:
                candidates, info, more = sampler.sample(candidates, desk)
                written += more
                own[sampler.name] |= info
                console.print(f"iteration {files.number}: {sampler.name}: {spelled_out(own[sampler.name])}")
            _check_left(candidates, desk)
            write_jsonl(files.responses, map(candidates_row, candidates))
            noted |= {"samplers": own, "refused_by_samplers": len(desk.bad.rows)}
    noted |= {"refused_prompts": len(bad.rows), **statistics.to_dict()}
    noted["sampled_tokens"] += desk.sampled["tokens"]
    return [files.responses, *written, *bad.set_aside(files.refused)], noted


def _answered(mini_batch: Sequence[Candidates], desk: Desk, bad: BadRows) -> tuple[Iterator[Candidates], list[str]]:
    """The mini-batch with the responses of all cells, and the names of these."""
    asked = [a for a in ask_cells(desk.matrix, desk.config) if a.num_generations]
    total = sum(a.num_generations for a in asked) * len(mini_batch)
    with progress_bar(f"iteration {desk.files.number}: generate, {len(asked)} cells", total) as advance:
        answered = answer(asked, mini_batch, desk.matrix, desk.config, desk.store, bad, advance, desk.executor)
    return answered, [a.cell.name for a in asked]


def _check_left(candidates: Sequence[Candidates], desk: Desk) -> None:
    """Tells of prompts of the samplers that were refused, and raises TrainingError where they left no candidates."""
    t, refused = desk.files.number, desk.bad.rows
    why = f"; {len(refused)} of their prompts were refused, the first: {refused[0]['error']}" if refused else ""
    if not candidates:
        raise TrainingError(f"iteration {t}: the samplers left nothing to judge{why}; see the numbers above")
    if refused:
        console.print(f"warning: iteration {t}: samplers go on without some of theirs{why}", style="yellow")

"""All judges of a run: made and checked from its settings before any work, then asked one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tso_fast.config.settings import EvidenceConfig, JudgeConfig, JudgesConfig, VerifierConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import FLOAT32_MAX, BadRows
from tso_fast.judges import verifier
from tso_fast.judges.consistency import ConsistencyJudge
from tso_fast.judges.ideal_point import IdealPointJudge
from tso_fast.judges.implicit import ImplicitJudge
from tso_fast.judges.judge import Bench, Judge, Judged
from tso_fast.judges.llm import LlmJudge
from tso_fast.judges.mc_dropout import McDropoutJudge
from tso_fast.judges.self_consistency import SelfConsistencyJudge
from tso_fast.judges.verifier import VerifierJudge
from tso_fast.matrix import ModelMatrix
from tso_fast.registry import make
from tso_fast.types import HUMAN, Candidates, Comparison, Verdict

JUDGES: dict[str, type[Judge]] = {
    "llm": LlmJudge,
    "implicit": ImplicitJudge,
    "agreement": SelfConsistencyJudge,
    "verifier": VerifierJudge,
    "consistency": ConsistencyJudge,
    "mc_dropout": McDropoutJudge,
    "ideal_point": IdealPointJudge,
}
"""Judges by their kind."""


def make_judges(config: VerifierConfig) -> list[Judge]:
    """The configured judges, ``verifier`` first; nothing is loaded or generated yet.

    Raises:
        InputError: names the setting of a judge that cannot be, such as ``judges[0].cell``.
    """
    verifier.check_settings(config.verifier, config.verifier_pattern)
    judges = []
    if config.verifier is not None:
        shared = ("verifier", "verifier_pattern", "verifier_timeout_s")
        program = JudgeConfig(kind="verifier", **{name: getattr(config, name) for name in shared})
        judges.append(make(program, "", "judge", JUDGES, Judge))
    for i, own in enumerate((config.judges if isinstance(config, JudgesConfig) else None) or []):
        judge = make(own, f"judges[{i}].", "judge", JUDGES, Judge)
        if judge.name == HUMAN:
            raise InputError(f"judges[{i}].name: {HUMAN!r} is reserved for labels of pairs; set another name")
        if judge.name in [other.name for other in judges]:
            raise InputError(f"judges[{i}].name: {judge.name!r} is taken; set a name of its own")
        judges.append(judge)
    return judges


def check(judges: Sequence[Judge], matrix: ModelMatrix | None) -> None:
    """Before anything is generated.

    Raises:
        InputError: a judge names a cell that is not there, or a model that cannot be used.
    """
    for judge in judges:
        judge.check(matrix)


def inputs(judges: Sequence[Judge], matrix: ModelMatrix) -> dict[str, str]:
    """Hashes of what the judges read beside the cells, by the names of their settings."""
    return {f"judges.{judge.name}.{key}": value for judge in judges for key, value in judge.inputs(matrix).items()}


def usable(judges: Sequence[Judge], candidates: Sequence[Candidates], bad: BadRows) -> list[Candidates]:
    """The candidates that every judge can judge, known before anything is generated; the others are bad rows."""
    found = list(candidates)
    for judge in judges:
        found = judge.usable(found, bad)
    return found


def needs_models(judges: Sequence[Judge]) -> bool:
    return any(judge.needs_models for judge in judges)


def refuse_models(judges: Sequence[Judge]) -> None:
    """For a command that runs programs only.

    Raises:
        InputError: a judge is a model.
    """
    for judge in judges:
        if judge.needs_models:
            raise InputError(
                f"judges: {judge.name!r} is a model, which this command does not run; run `tso-fast score` and "
                "give its file as verdicts"
            )


def counted(judges: Sequence[Judge], config: EvidenceConfig) -> list[Judge]:
    """The judges whose word counts."""
    only = config.evidence_from
    return [judge for judge in judges if only is None or judge.name in only]


def num_steps(judges: Sequence[Judge], candidates: Sequence[Candidates]) -> int:
    """What ``Bench.advance`` is told in all."""
    return sum(judge.num_steps(candidates) for judge in judges)


def ask(
    judges: Sequence[Judge], candidates: Sequence[Candidates], bench: Bench
) -> tuple[list[Verdict | Comparison], dict[str, Any]]:
    """Verdicts of every judge, in the order of the judges, and what those that are models cost, by name.

    Raises:
        InputError: a prompt that a judge cannot use, unless bad rows are skipped; a verdict that cannot be.
        EngineError: engines died too often; what was answered is kept.
    """
    # Programs first: what they refuse should cost no generation.
    given = {}
    for judge in sorted(judges, key=lambda j: j.needs_models):
        if judge.needs_models and not judge.shares_engines and bench.executor is not None:
            bench.executor.cool()
        given[judge.name] = judge.judge(candidates, bench)
    for name, judged in given.items():
        _check_verdicts(name, judged, candidates)
    verdicts = itertools.chain.from_iterable(given[judge.name].verdicts for judge in judges)
    costs = {judge.name: cost.to_dict() for judge in judges if (cost := given[judge.name].cost) is not None}
    return list(verdicts), costs


def _check_verdicts(name: str, judged: Judged, candidates: Sequence[Candidates]) -> None:
    num_responses = {item.prompt.id: len(item.responses) for item in candidates}
    for verdict in judged.verdicts:
        if isinstance(verdict, Verdict):
            responses, value, low, high = [verdict.response], verdict.score, -FLOAT32_MAX, FLOAT32_MAX
        else:
            responses, value, low, high = [*verdict.responses], verdict.probability, 0.0, 1.0
        is_known = all(0 <= i < num_responses.get(verdict.prompt_id, 0) for i in responses)
        is_number = value is None or (isinstance(value, int | float) and low <= value <= high)
        if verdict.judge != name or not is_known or not is_number:
            raise InputError(
                f"judge {name!r} gave {verdict!r:.200}; expected its own name, a response of the prompt by its number, "
                "and a finite score, a probability, or None"
            )

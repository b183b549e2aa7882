"""The configured judges: candidates in, verdicts on one or two responses out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tso_fast.config.settings import AnsweringConfig, JudgeConfig, JudgesConfig, VerifierConfig, judge_name
from tso_fast.errors import InputError
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows
from tso_fast.judges import llm
from tso_fast.judges.implicit import cell_logprobs
from tso_fast.judges.self_consistency import agree
from tso_fast.judges.verifier import make_verifier, verify, with_answers
from tso_fast.matrix import ModelMatrix, require_weights
from tso_fast.models.load import device_of
from tso_fast.types import Candidates, Cell, Comparison, Verdict


@dataclass(frozen=True, kw_only=True)
class Models:
    """What judges that are models run on."""

    matrix: ModelMatrix | None
    """Of the run; None: there is none, and a judge brings its own model."""
    settings: AnsweringConfig
    store: ResponseStore
    advance: Callable[[int], None] = field(default=lambda count: None)


def judgeable(candidates: Sequence[Candidates], config: VerifierConfig, bad: BadRows) -> list[Candidates]:
    """Those that the configured verifiers can judge, known before anything is generated; the others are bad rows.

    Raises:
        InputError: a verifier that cannot be made, a template that cannot be used.
    """
    usable = list(candidates)
    for verifier, pattern in _verifiers(config):
        make_verifier(verifier, pattern)
        usable = with_answers(usable, verifier, bad)
    for own in _judges(config):
        if own.kind == "llm":
            llm.load_template(own)
    return usable


def _judges(config: VerifierConfig) -> list[JudgeConfig]:
    return config.judges or [] if isinstance(config, JudgesConfig) else []


def _verifiers(config: VerifierConfig) -> list[tuple[str, str | None]]:
    every = [(config.verifier, config.verifier_pattern)]
    every += [(judge.verifier, judge.verifier_pattern) for judge in _judges(config) if judge.kind == "verifier"]
    return [(verifier, pattern) for verifier, pattern in every if verifier is not None]


def check_models(config: JudgesConfig, matrix: ModelMatrix | None) -> None:
    """Before anything is generated.

    Raises:
        InputError: a judge names a cell that is not there, or a model that cannot be used.
    """
    for own in _judges(config):
        if own.kind == "llm":
            llm.judge_model(own, matrix)
        elif own.kind == "implicit":
            for name in (own.cell or "policy", *([own.reference] if own.reference else [])):
                _cell(name, own, matrix)


def needs_models(config: JudgesConfig) -> bool:
    return any(map(_is_model, _judges(config)))


def _is_model(config: JudgeConfig) -> bool:
    return config.kind in ("llm", "implicit")


def num_steps(candidates: Sequence[Candidates], config: JudgesConfig) -> int:
    """What ``Models.advance`` is told in all: requests, and responses scored by log-probs."""
    num_responses = sum(len(item.responses) for item in candidates)
    steps = 0
    for judge in _judges(config):
        if judge.kind == "llm":
            steps += llm.num_requests(candidates, judge)
        elif judge.kind == "implicit":
            steps += num_responses * (1 if judge.reference is None else 2)
    return steps


def judge(
    candidates: Sequence[Candidates], config: JudgesConfig, bad: BadRows, models: Models | None = None
) -> tuple[list[Verdict | Comparison], dict[str, Any]]:
    """Verdicts of every configured judge, none when there is none; and what the judges that are models cost.

    Raises:
        InputError: a judge that is a model, where there are no ``models``.
    """
    verdicts: list[Verdict | Comparison] = []
    costs: dict[str, Any] = {}
    if config.verifier is not None:
        verdicts += verify(candidates, make_verifier(config.verifier, config.verifier_pattern), bad)
    for own in _judges(config):
        name = judge_name(own)
        if own.kind == "agreement":
            verdicts += agree(candidates, name)
        elif own.kind == "verifier":
            assert own.verifier is not None
            verdicts += verify(candidates, make_verifier(own.verifier, own.verifier_pattern), bad, name)
        elif models is None:
            raise InputError(
                f"judges: {name!r} is a model, which this command does not run; run `tso-fast score` and "
                "give its file as verdicts"
            )
        elif own.kind == "implicit":
            verdicts += _implicit(candidates, own, models)
        else:
            found, cost = llm.judge(candidates, own, models.matrix, models.settings, models.store, bad, models.advance)
            verdicts += found
            costs[name] = {
                **dataclasses.asdict(cost),
                "disagreement": cost.disagreement,
                "first_shown_share": cost.first_shown_share,
                "bias": cost.bias,
            }
    return verdicts, costs


def _implicit(candidates: Sequence[Candidates], config: JudgeConfig, models: Models) -> list[Verdict]:
    """Log-probs of a cell, less those of a reference cell where there is one: the DPO reward over beta."""
    policy = _logprobs(_cell(config.cell or "policy", config, models.matrix), candidates, models)
    reference = None
    if config.reference is not None:
        reference = _logprobs(_cell(config.reference, config, models.matrix), candidates, models)
    verdicts = []
    for p, item in enumerate(candidates):
        for i in range(len(item.responses)):
            own = policy[p][i]
            base = reference[p][i] if reference is not None else None
            score = None
            if own is not None and (reference is None or base is not None):
                score = own.logprob - (base.logprob if base is not None else 0.0)
                score = score / own.num_tokens if config.length_normalized else score
            verdicts.append(
                Verdict(
                    prompt_id=item.prompt.id,
                    response=i,
                    judge=judge_name(config),
                    score=score,
                    reason="" if score is not None else "longer than the context",
                )
            )
    return verdicts


def _cell(name: str, config: JudgeConfig, matrix: ModelMatrix | None) -> Cell:
    if matrix is None:
        raise InputError(f"judges: {judge_name(config)!r} asks for cell {name!r}, and there are no cells; set cells")
    found = matrix.named
    if name not in found:
        raise InputError(
            f"judges: {judge_name(config)!r} asks for cell {name!r}; the cells are {', '.join(found)}; "
            "the current one is policy"
        )
    require_weights(found[name], f"judges: {judge_name(config)!r}")
    return found[name]


def _logprobs(cell: Cell, candidates: Sequence[Candidates], models: Models) -> Any:
    assert models.matrix is not None
    settings = models.settings
    return cell_logprobs(
        cell,
        candidates,
        models.matrix.tokenizer,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        device=device_of(settings.use_cpu),
        advance=models.advance,
    )

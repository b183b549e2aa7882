"""Turns verdicts into preference pairs: the prior order of the matrix, corrected by the evidence."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction import pairing
from tso_fast.correction.beliefs import Beliefs, believe
from tso_fast.correction.decide import Decided, correct
from tso_fast.correction.held_back import calibrate
from tso_fast.correction.oracle import Oracle, errors_against
from tso_fast.judges.judgments import AGREEMENT
from tso_fast.progress import console, progress_bar
from tso_fast.types import Candidates, Comparison, PreferencePair, Verdict

MANY = 200_000
"""Verdicts that take some seconds, so that a person at a terminal is told what is being done."""


def make_pairs(
    candidates: Sequence[Candidates],
    verdicts: Sequence[Verdict | Comparison],
    settings: EvidenceConfig,
    config: PairingConfig,
    seed: int,
    oracle: Oracle | None = None,
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Corrects the prior order by the evidence and selects pairs; the second value has statistics of what was done.

    Args:
        oracle: scores that are not evidence; decisions are measured against them.
    """
    with _progress(len(verdicts)) as advance:
        beliefs = believe(candidates, verdicts, settings, None if oracle is None else oracle.name)
        advance(1)
        decided = correct(candidates, beliefs.votes, beliefs.about(), config)
        calibration = calibrate(beliefs, config)
        errors = None if oracle is None else errors_against(oracle, beliefs, decided)
        advance(1)
        pairs = _pairs(beliefs, decided, config, seed, 1.0 if calibration is None else calibration["temperature"])
        advance(1)
    used, judges = Counter(pair.decision for pair in pairs), beliefs.judges()
    return pairs, {
        **decided.counts(),
        "prompts": len(candidates),
        "prompts_with_pairs": len({pair.prompt.id for pair in pairs}),
        "used": {"keep": used["keep"], "swap": used["swap"]},
        "abstained": sum(row["abstained"] for row in beliefs.tallies.values()),
        "human_chosen": sum(pair.chosen.is_human for pair in pairs),
        "evidence": {"method": beliefs.chosen.method, "why": beliefs.chosen.why},
        "judges": judges,
        "concordance": beliefs.concordance,
        "calibration": calibration,
        "errors": errors,
    }


def judgment_pairs(judgments: Sequence[Candidates], config: PairingConfig, seed: int) -> list[PreferencePair]:
    """Judgments that say what most of them say against those that do not; what tells of responses has no say here."""
    settings = EvidenceConfig(evidence="consensus", evidence_from=[AGREEMENT])
    own = replace(config, chosen_from=None, rejected_from=None, min_margin=0.0, on_no_evidence="drop")
    return make_pairs(judgments, [], settings, own, seed)[0]


def reasons_text(reasons: Mapping[str, Mapping[str, int]]) -> str:
    """``drop: tie 12; keep: confirmed 3``: what was decided how often, and why."""
    return "; ".join(f"{decision}: {reason} {n}" for decision, of in reasons.items() for reason, n in of.items())


def _progress(count: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """Shows, on a terminal, how far so many verdicts are: evidence, decisions, selection."""
    if count < MANY or not console.is_terminal:
        return contextlib.nullcontext(lambda n: None)
    return progress_bar(f"pairs: {count:,} verdicts", 3)


def _pairs(
    beliefs: Beliefs, decided: Decided, config: PairingConfig, seed: int, temperature: float
) -> list[PreferencePair]:
    """The training pairs of the selected pairs."""
    numbers = pairing.select(beliefs.candidates, decided, beliefs.scores_R, config, seed)
    out = []
    for p, pair in zip(beliefs.votes.prompt_of_pair[numbers].tolist(), decided.pairs(numbers), strict=True):
        own = beliefs.votes.responses_of(p)
        scores, win_rates = beliefs.scores_R[own], beliefs.win_rates_R[own]
        item = beliefs.candidates[p]
        out.append(pairing.to_pair(item, pair, scores, config, win_rates=win_rates, temperature=temperature))
    return out

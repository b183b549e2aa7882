"""Turns verdicts into preference pairs: the prior order of the matrix, corrected by the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction import pairing
from tso_fast.correction.beliefs import believe
from tso_fast.correction.decide import Counts, correct
from tso_fast.correction.held_back import calibrate
from tso_fast.correction.oracle import Oracle, errors_against
from tso_fast.types import Candidates, Comparison, PreferencePair, Verdict


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
    beliefs = believe(candidates, verdicts, settings, None if oracle is None else oracle.name)
    evidence, counts = beliefs.evidence, Counts()
    decided = [correct(item, evidence[p], beliefs.about(p), config, counts) for p, item in enumerate(candidates)]
    calibration = calibrate(beliefs, config)
    temperature = 1.0 if calibration is None else calibration["temperature"]
    selected = pairing.select(candidates, decided, beliefs.scores, config, seed)
    pairs = [
        pairing.to_pair(item, pair, beliefs.scores[p], config, win_rates=beliefs.win_rates[p], temperature=temperature)
        for p, item in enumerate(candidates)
        for pair in selected[p]
    ]
    used = Counter(pair.decision for pair in pairs)
    info = {
        **counts.to_dict(),
        "prompts": len(candidates),
        "prompts_with_pairs": len({pair.prompt.id for pair in pairs}),
        "used": {"keep": used["keep"], "swap": used["swap"]},
        "abstained": sum((v.score if isinstance(v, Verdict) else v.probability) is None for v in verdicts),
        "human_chosen": sum(pair.chosen.is_human for pair in pairs),
        "evidence": {"method": beliefs.chosen.method, "why": beliefs.chosen.why},
        "judges": beliefs.judges(verdicts),
        "concordance": beliefs.concordance,
        "calibration": calibration,
        "errors": None if oracle is None else errors_against(oracle, candidates, evidence, decided, beliefs),
    }
    return pairs, info

"""What is known to be right and is no evidence, and the errors that are measured against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tso_fast.correction.beliefs import FOLDS, Beliefs, fold_of
from tso_fast.correction.decide import Corrected
from tso_fast.correction.evidence import Evidence
from tso_fast.correction.reliability import combine
from tso_fast.errors import InputError, did_you_mean
from tso_fast.judges.verifier import VERIFIERS, make_verifier
from tso_fast.types import Candidates, PairEvidence


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What is known to be right and is no evidence."""

    name: str
    """``is_correct`` of the responses, a scorer of the data, or a verifier."""
    scores: Sequence[Sequence[float | None]]
    """By prompt and response; None: not known."""


def make_oracle(name: str, candidates: Sequence[Candidates]) -> Oracle:
    """
    Raises:
        InputError: nothing in the data is called so.
    """
    if name == "is_correct":
        scores = [[None if r.is_correct is None else float(r.is_correct) for r in c.responses] for c in candidates]
        # A person's own response has no such field; it is what the answer was taken from.
    elif any(name in r.scores for c in candidates for r in c.responses):
        scores = [[r.scores.get(name) for r in c.responses] for c in candidates]
    else:
        names = {score for c in candidates for r in c.responses for score in r.scores}
        verifiers = {verifier for verifier, row in VERIFIERS.items() if not row.takes_pattern}
        known = sorted({"is_correct", *verifiers, *names})
        if name not in known and ":" not in name:
            raise InputError(
                f"oracle: nothing is called {name!r}{did_you_mean(name, known)}; expected one of "
                f"{', '.join(known)}, or package.module:function"
            )
        check = make_verifier(name)
        scores = [[check(c.prompt, r).score for r in c.responses] for c in candidates]
    if all(score is None for of_prompt in scores for score in of_prompt):
        raise InputError(
            f"oracle: no response has {name!r}; expected is_correct, a name in the data's scores, or a verifier"
        )
    return Oracle(name=name, scores=scores)


def errors_against(
    oracle: Oracle,
    candidates: Sequence[Candidates],
    evidence: Evidence,
    decided: Sequence[Sequence[Corrected]],
    beliefs: Beliefs,
) -> dict[str, dict[str, int]]:
    """By rule of the prior, over the pairs that the oracle orders: how many, and how many each way gets wrong.

    ``prior``: the matrix's order. ``kept``: pairs that correction decided; ``corrected``: those of them that it decided
    wrongly. ``best``: the kept pairs that the same evidence gets wrong with reliabilities counted on the oracle itself
    (on other prompts, in five folds): what correction could reach with nothing left to estimate.
    """
    told = [[_told(pair, oracle.scores[p]) for pair in pairs] for p, pairs in enumerate(evidence)]
    best = _best(told, beliefs)
    out: dict[str, dict[str, int]] = {}
    for p, pairs in enumerate(evidence):
        chosen = {frozenset((d.chosen, d.rejected)): d.chosen for d in decided[p]}
        for n, (pair, truth) in enumerate(zip(pairs, told[p], strict=True)):
            if not truth:
                continue
            row = out.setdefault(pair.rule, {"pairs": 0, "prior": 0, "kept": 0, "corrected": 0, "best": 0})
            row["pairs"] += 1
            row["prior"] += pair.prior == -truth
            if (of := chosen.get(frozenset(pair.responses))) is not None:
                row["kept"] += 1
                row["corrected"] += (of == pair.responses[0]) != (truth > 0)
                first, second, _ = best[p][n]
                row["best"] += (first > second) != (truth > 0)
    return out


def _told(pair: PairEvidence, scores: Sequence[float | None]) -> int:
    a, b = (scores[i] for i in pair.responses)
    return 0 if a is None or b is None else (a > b) - (a < b)


def _best(told: Sequence[Sequence[int]], beliefs: Beliefs) -> list[np.ndarray]:
    """Probabilities with the oracle's order as labels of the other folds."""
    fold_P = np.array([fold_of(item.prompt.id) for item in beliefs.candidates], dtype=np.int64)
    fold_N = fold_P[beliefs.votes.prompt_of_pair]
    truth_N = np.array([truth for truths in told for truth in truths], dtype=np.float32)
    out = np.full((len(truth_N), 3), np.nan)
    for fold in range(FOLDS):
        votes = beliefs.votes.with_label("oracle", np.where(fold_N == fold, np.nan, truth_N))
        found = combine(votes, beliefs.pointwise.scores, learn_from="labels", parents={})
        out[fold_N == fold] = found.probabilities[fold_N == fold]
    return list(np.split(out, beliefs.votes.bounds[1:-1]))

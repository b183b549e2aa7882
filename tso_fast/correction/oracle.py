"""What is known to be right and is no evidence, and the errors that are measured against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tso_fast.correction.beliefs import FOLDS, Beliefs
from tso_fast.correction.decide import Decided
from tso_fast.correction.reliability import combine
from tso_fast.errors import InputError, did_you_mean
from tso_fast.judges.verifier import VERIFIERS, make_verifier
from tso_fast.types import Candidates


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


def errors_against(oracle: Oracle, beliefs: Beliefs, decided: Decided) -> dict[str, dict[str, int]]:
    """By rule of the prior, over the pairs that the oracle orders: how many, and how many each way gets wrong.

    ``prior``: the matrix's order. ``kept``: pairs that correction decided; ``corrected``: those of them that it decided
    wrongly. ``best``: the kept pairs that the same evidence gets wrong with reliabilities counted on the oracle itself
    (on other prompts, in five folds): what correction could reach with nothing left to estimate.
    """
    votes = beliefs.votes
    known_R = np.array([score for of_prompt in oracle.scores for score in of_prompt], dtype=np.float64)
    first, second = known_R[votes.rows_of_pair.T]
    truth_N = (first > second).astype(np.int64) - (first < second)
    best_N3, is_kept = _best(truth_N, beliefs), decided.is_used
    columns = {
        "pairs": truth_N != 0,
        "prior": votes.prior_N == -truth_N,
        "kept": is_kept,
        "corrected": is_kept & ((decided.chosen_N == votes.rows_of_pair[:, 0]) != (truth_N > 0)),
        "best": is_kept & ((best_N3[:, 0] > best_N3[:, 1]) != (truth_N > 0)),
    }
    out: dict[str, dict[str, int]] = {}
    for k, rule in enumerate(votes.rules):
        rows = (votes.rules_N == k) & (truth_N != 0)
        if rows.any():
            out[rule] = {name: int(column[rows].sum()) for name, column in columns.items()}
    return out


def _best(truth_N: np.ndarray, beliefs: Beliefs) -> np.ndarray:
    """[N, 3] probabilities with the oracle's order as labels of the other folds."""
    out = np.full((len(truth_N), 3), np.nan)
    for fold in range(FOLDS):
        is_own = beliefs.fold_of_pair == fold
        votes = beliefs.votes.with_label("oracle", np.where(is_own, np.nan, truth_N))
        found = combine(votes, beliefs.pointwise.scores, learn_from="labels", parents={})
        out[is_own] = found.probabilities[is_own]
    return out

"""Evidence on every pair of responses before a decision: prior order, votes, labels and scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from tso_fast.correction.votes import prior_order, refuse_two_kinds
from tso_fast.errors import InputError
from tso_fast.scoring import bradley_terry
from tso_fast.types import HUMAN, Candidates, Comparison, PairEvidence, ScoreMatrix, Verdict

Evidence = Sequence[Sequence[PairEvidence]]


def score_matrix(
    candidates: Sequence[Candidates], verdicts: Sequence[Verdict], hidden: str | None = None
) -> ScoreMatrix:
    """Scores from verdicts and from the data: one row per response, one column per scorer.

    Args:
        hidden: name of a scorer in the data to leave out, i.e. the oracle.
    """
    judges, given = {v.judge for v in verdicts}, {name for c in candidates for r in c.responses for name in r.scores}
    given.discard(hidden or "")
    if both := sorted(judges & given):
        raise InputError(
            f"responses: the data have scores named {both[0]!r}, and so has a judge of this run; rename "
            "those in the data"
        )
    scorers = tuple(sorted(judges | given))
    column = {name: i for i, name in enumerate(scorers)}
    offsets = np.cumsum([0] + [len(c.responses) for c in candidates], dtype=np.int64)
    first_row = {c.prompt.id: int(offset) for c, offset in zip(candidates, offsets[:-1], strict=True)}
    scores = np.full((int(offsets[-1]), len(scorers)), np.nan, dtype=np.float32)
    for item in candidates:
        for i, response in enumerate(item.responses):
            for name, score in response.scores.items():
                if name not in column:
                    continue
                scores[first_row[item.prompt.id] + i, column[name]] = score
    for verdict in verdicts:
        if verdict.score is not None:
            scores[first_row[verdict.prompt_id] + verdict.response, column[verdict.judge]] = verdict.score
    return ScoreMatrix(scores=scores, offsets=offsets, scorers=scorers)


def with_comparisons(
    matrix: ScoreMatrix,
    candidates: Sequence[Candidates],
    comparisons: Sequence[Comparison],
    score: str = "win_rate",
) -> ScoreMatrix:
    """The matrix with one more column for every judge that compares responses.

    Args:
        score: how comparisons become a score of one response: ``win_rate``, its mean probability of winning, or
            ``bradley_terry``, its log-strength.
    """
    judges = sorted({c.judge for c in comparisons} - {HUMAN})
    if not judges:
        return matrix
    first_row = {c.prompt.id: int(offset) for c, offset in zip(candidates, matrix.offsets[:-1], strict=True)}
    columns = []
    for judge in judges:
        told = [
            (first_row[c.prompt_id] + c.responses[0], first_row[c.prompt_id] + c.responses[1], c.probability)
            for c in comparisons
            if c.judge == judge and c.probability is not None
        ]
        rows = np.array([pair[:2] for pair in told], dtype=np.int64).reshape(-1, 2)
        first = np.array([probability for *_, probability in told], dtype=np.float64)
        wins = np.stack([first, 1 - first], axis=1)
        if score == "bradley_terry":
            columns.append(bradley_terry(rows, wins, matrix.offsets))
            continue
        num = np.bincount(rows.ravel(), minlength=len(matrix.scores))
        won = np.bincount(rows.ravel(), wins.ravel(), minlength=len(matrix.scores))
        columns.append(np.divide(won, num, out=np.full(len(num), np.nan), where=num > 0).astype(np.float32))
    scores = np.concatenate([matrix.scores, np.stack(columns, axis=1)], axis=1)
    return ScoreMatrix(scores=np.ascontiguousarray(scores), offsets=matrix.offsets, scorers=(*matrix.scorers, *judges))


def evidence_of(
    candidates: Sequence[Candidates], matrix: ScoreMatrix, comparisons: Iterable[Comparison]
) -> list[list[PairEvidence]]:
    """Prior order, votes and labels for every pair of responses to every prompt.

    Args:
        matrix: scores by the judges of single responses.
        comparisons: verdicts of the judges that compare two responses; those of judge ``human`` are labels.
    """
    votes: dict[tuple[str, int, int], dict[str, float]] = {}
    labels: dict[tuple[str, int, int], dict[str, float | None]] = {}
    for comparison in comparisons:
        (i, j), p = sorted(comparison.responses), comparison.probability
        # The sign flips if the comparison names the responses in the other order.
        vote = None if p is None else (2 * p - 1) * (1 if comparison.responses == (i, j) else -1)
        if comparison.judge == HUMAN:
            labels.setdefault((comparison.prompt_id, i, j), {})[comparison.annotator or ""] = vote
            continue
        refuse_two_kinds(comparison.judge, matrix)
        if vote is not None:
            votes.setdefault((comparison.prompt_id, i, j), {})[comparison.judge] = vote
    out = []
    for p, item in enumerate(candidates):
        own = matrix.scores[matrix.offsets[p] : matrix.offsets[p + 1]].astype(np.float64)
        texts = [response.text.strip() for response in item.responses]
        pairs = []
        for i, j in itertools.combinations(range(len(item.responses)), 2):
            sign, rule = prior_order(item.responses[i], item.responses[j])
            gaps = own[i] - own[j]
            seen = {name: float(gap) for name, gap in zip(matrix.scorers, gaps, strict=True) if not np.isnan(gap)}
            key = (item.prompt.id, i, j)
            compared = votes.get(key, {})
            stated = (1 + sum(compared.values()) / len(compared)) / 2 if compared else None
            pairs.append(
                PairEvidence(
                    prompt_id=item.prompt.id,
                    responses=(i, j),
                    prior=sign,
                    rule=rule,
                    stated=stated,
                    votes={**seen, **compared},
                    labels=labels.get(key, {}),
                    is_same_text=texts[i] == texts[j],
                )
            )
        out.append(pairs)
    return out

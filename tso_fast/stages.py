"""The stages of an iteration, each usable alone: answer, judge, correct and pair, evaluate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tso_fast import correction, pairing
from tso_fast.answering import Asked, answer
from tso_fast.config import EvalConfig, EvidenceConfig, PairingConfig, VerifierConfig
from tso_fast.errors import InputError
from tso_fast.judges.verifier import make_verifier, verify, with_answers
from tso_fast.matrix import ModelMatrix
from tso_fast.records import BadRows
from tso_fast.response_store import ResponseStore
from tso_fast.scoring import consensus
from tso_fast.types import Candidates, Comparison, PreferencePair, ScoreMatrix, Verdict


def judgeable(candidates: Sequence[Candidates], config: VerifierConfig, bad: BadRows) -> list[Candidates]:
    """Those that the configured judges can judge, known before anything is generated; the others are bad rows.

    Raises:
        InputError: a judge that cannot be made.
    """
    if config.verifier is None:
        return list(candidates)
    make_verifier(config.verifier, config.verifier_pattern)
    return with_answers(candidates, config.verifier, bad)


def judge(candidates: Sequence[Candidates], config: VerifierConfig, bad: BadRows) -> list[Verdict]:
    """Verdicts of the configured judges; none when no judge is configured."""
    if config.verifier is None:
        return []
    return verify(candidates, make_verifier(config.verifier, config.verifier_pattern), bad)


def score_matrix(candidates: Sequence[Candidates], verdicts: Sequence[Verdict]) -> ScoreMatrix:
    """Verdicts and the scores that came with the data, one row a response, one column a scorer."""
    judges, given = {v.judge for v in verdicts}, {name for c in candidates for r in c.responses for name in r.scores}
    if both := sorted(judges & given):
        raise InputError(f"responses: the data have scores named {both[0]!r}, and so has a judge of this run; rename "
                         "those in the data")  # fmt: skip
    scorers = tuple(sorted(judges | given))
    column = {name: i for i, name in enumerate(scorers)}
    offsets = np.cumsum([0] + [len(c.responses) for c in candidates], dtype=np.int64)
    first_row = {c.prompt.id: int(offset) for c, offset in zip(candidates, offsets[:-1], strict=True)}
    scores = np.full((int(offsets[-1]), len(scorers)), np.nan, dtype=np.float32)
    for item in candidates:
        for i, response in enumerate(item.responses):
            for name, score in response.scores.items():
                scores[first_row[item.prompt.id] + i, column[name]] = score
    for verdict in verdicts:
        if verdict.score is not None:
            scores[first_row[verdict.prompt_id] + verdict.response, column[verdict.judge]] = verdict.score
    return ScoreMatrix(scores=scores, offsets=offsets, scorers=scorers)


def consensus_of(matrix: ScoreMatrix, config: EvidenceConfig) -> np.ndarray:
    """One score a response, [R] float32, NaN = no evidence."""
    weights = None
    if config.score_weights is not None:
        if unknown := sorted(set(config.score_weights) - set(matrix.scorers)):
            raise InputError(f"score_weights: no scorer is called {unknown[0]!r}; the scorers are "
                             f"{', '.join(matrix.scorers) or 'none'}")  # fmt: skip
        weights = np.array([config.score_weights.get(name, 1.0) for name in matrix.scorers])
        if len(weights) and not weights.any():
            raise InputError(f"score_weights: {config.score_weights} leaves no scorer; expected a weight > 0")
    if not matrix.scorers:
        return np.full(matrix.scores.shape[0], np.nan, dtype=np.float32)
    result = consensus(matrix.scores, matrix.offsets, method=config.consensus, normalize=config.score_normalize,
                       weights=weights)  # fmt: skip
    return result.scores


def make_pairs(
    candidates: Sequence[Candidates],
    verdicts: Sequence[Verdict | Comparison],
    judging: EvidenceConfig,
    config: PairingConfig,
    seed: int,
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Corrects the prior order by the evidence and selects pairs; the second value counts what happened."""
    matrix = score_matrix(candidates, [v for v in verdicts if isinstance(v, Verdict)])
    scores = consensus_of(matrix, judging)
    counts = correction.Counts()
    pairs: list[PreferencePair] = []
    for p, item in enumerate(candidates):
        own = scores[matrix.offsets[p] : matrix.offsets[p + 1]]
        decided = correction.correct(item, own, config, counts)
        selected = pairing.select(item, decided, config, seed)
        pairs += [pairing.to_pair(item, pair, own, config) for pair in selected]
    used = Counter(pair.decision for pair in pairs)
    info = {
        **counts.to_dict(),
        "prompts": len(candidates),
        "prompts_with_pairs": len({pair.prompt.id for pair in pairs}),
        "used": {"keep": used["keep"], "swap": used["swap"]},
        "abstained": sum(isinstance(v, Verdict) and v.score is None for v in verdicts),
        "human_chosen": sum(pair.chosen.is_human for pair in pairs),
    }
    return pairs, info


def evaluate(
    asked: Sequence[Asked],
    candidates: Sequence[Candidates],
    matrix: ModelMatrix,
    config: EvalConfig,
    store: ResponseStore,
    bad: BadRows,
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """For each cell: the accuracy of its answers with its 95 % interval (Wilson), and their mean length."""
    answered = list(answer(asked, candidates, matrix, config, store, bad, advance))
    verdicts = judge(answered, config, bad)
    responses = {(c.prompt.id, i): r for c in answered for i, r in enumerate(c.responses)}
    out = []
    for a in asked:
        scores = [v.score for v in verdicts
                  if v.score is not None and responses[v.prompt_id, v.response].model == a.cell.name]  # fmt: skip
        if not scores:
            raise InputError(f"{a.cell.name}: the verifier abstained on every response; there is nothing to average")
        mean = sum(scores) / len(scores)
        low, high = wilson(mean, len(scores))
        lengths = [len(r.token_ids or ()) for r in responses.values() if r.model == a.cell.name]
        out.append({"model": a.cell.name, "accuracy": mean, "low": low, "high": high, "responses": len(scores),
                    "mean_tokens": sum(lengths) / len(lengths)})  # fmt: skip
    return out


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    center = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(max(mean * (1 - mean), 0) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


class PolicyStatistics:
    """Mean length of the policy's responses, and distinct texts a sample: 1 when all samples of a prompt differ."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.responses = self.tokens = self.num_responses = self.prompts = 0
        self.distinct = 0.0

    def watch(self, candidates: Iterable[Candidates]) -> Iterator[Candidates]:
        for item in candidates:
            self.responses += len(item.responses)
            own = [r for r in item.responses if r.model == self.policy]
            lengths = [len(r.token_ids) for r in own if r.token_ids]
            self.num_responses += len(lengths)
            self.tokens += sum(lengths)
            if len(own) > 1:
                self.prompts += 1
                self.distinct += len({r.text for r in own}) / len(own)
            yield item

    def to_dict(self) -> dict[str, float | None]:
        return {
            "responses": self.responses,
            "generated_tokens": self.tokens / self.num_responses if self.num_responses else None,
            "distinct_responses": self.distinct / self.prompts if self.prompts else None,
        }

"""The stages of an iteration, each usable alone: answer, judge, correct and pair, evaluate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tso_fast import correction, pairing
from tso_fast.config import EvalConfig, JudgeConfig, PairingConfig, TrainConfig, VerifierConfig
from tso_fast.errors import InputError
from tso_fast.judges.verifier import make_verifier, verify, with_answers
from tso_fast.matrix import Cell, answer
from tso_fast.records import BadRows, candidates_row, read_candidates
from tso_fast.scoring import consensus
from tso_fast.store import write_jsonl
from tso_fast.types import Candidates, PreferencePair, Response, ScoreMatrix, Verdict

Stage = Callable[..., Any]


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


def consensus_of(matrix: ScoreMatrix, config: JudgeConfig) -> np.ndarray:
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
    verdicts: Sequence[Verdict],
    judging: JudgeConfig,
    config: PairingConfig,
    seed: int,
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Corrects the prior order by the evidence and selects pairs; the second value counts what happened."""
    matrix = score_matrix(candidates, verdicts)
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
        "abstained": sum(v.score is None for v in verdicts),
        "human_chosen": sum(pair.chosen.is_human for pair in pairs),
    }
    return pairs, info


def answer_with_parts(
    cells: Sequence[tuple[Cell, int]],
    candidates: Sequence[Candidates],
    tokenizer: Any,
    config: TrainConfig,
    device: torch.device,
    parts: Path,
    show: Stage,
) -> list[list[tuple[Response, ...]]]:
    """Every cell answers every prompt; each cell's answers are on disk before the next one starts."""
    answers = []
    for cell, num_generations in cells:
        part = parts / f"{cell.name}.jsonl"
        if part.exists():
            done = [item.responses for item in read_candidates(part, BadRows())]
        else:
            with show(f"generate: {cell.name}", num_generations * len(candidates)) as advance:
                done = answer(cell, candidates, tokenizer, config, config, num_generations=num_generations,
                              device=device, advance=advance)  # fmt: skip
            rows = (
                candidates_row(Candidates(prompt=item.prompt, responses=responses))
                for item, responses in zip(candidates, done, strict=True)
            )
            write_jsonl(part, ({k: v for k, v in row.items() if k != "human_response"} for row in rows))
        answers.append(done)
    return answers


def evaluate(
    cell: Cell,
    candidates: Sequence[Candidates],
    tokenizer: Any,
    config: EvalConfig,
    device: torch.device,
    bad: BadRows,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Accuracy of a cell's answers with its 95 % interval (Wilson), and their mean length."""
    answers = answer(cell, candidates, tokenizer, config, config, num_generations=config.num_generations,
                     device=device, advance=advance)  # fmt: skip
    answered = [Candidates(prompt=c.prompt, responses=a) for c, a in zip(candidates, answers, strict=True)]
    scores = [v.score for v in judge(answered, config, bad) if v.score is not None]
    if not scores:
        raise InputError("the verifier abstained on every response; there is nothing to average")
    mean = sum(scores) / len(scores)
    low, high = wilson(mean, len(scores))
    lengths = [len(r.token_ids or ()) for responses in answers for r in responses]
    return {"model": cell.name, "accuracy": mean, "low": low, "high": high, "responses": len(scores),
            "mean_tokens": sum(lengths) / len(lengths)}  # fmt: skip


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    center = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(max(mean * (1 - mean), 0) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def policy_statistics(candidates: Sequence[Candidates], policy: str) -> dict[str, float | None]:
    """Mean length of the policy's responses, and distinct texts a sample: 1 when all samples of a prompt differ."""
    lengths, distinct = [], []
    for item in candidates:
        own = [r for r in item.responses if r.model == policy]
        lengths += [len(r.token_ids) for r in own if r.token_ids]
        if len(own) > 1:
            distinct.append(len({r.text for r in own}) / len(own))
    return {
        "generated_tokens": sum(lengths) / len(lengths) if lengths else None,
        "distinct_responses": sum(distinct) / len(distinct) if distinct else None,
    }

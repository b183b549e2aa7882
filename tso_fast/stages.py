"""The stages of an iteration, each usable alone: answer, judge, correct and pair, evaluate."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tso_fast import correction, pairing
from tso_fast.answering import Asked, answer
from tso_fast.config import EvalConfig, EvidenceConfig, PairingConfig
from tso_fast.errors import InputError
from tso_fast.evidence import Beliefs, Oracle, errors_against, score_matrix, with_comparisons
from tso_fast.judges.verifier import make_verifier, verify
from tso_fast.matrix import ModelMatrix
from tso_fast.records import BadRows
from tso_fast.response_store import ResponseStore
from tso_fast.types import Candidates, Comparison, PreferencePair, Verdict


def split(prompts: Sequence[Candidates], num_iterations: int) -> list[list[Candidates]]:
    """Mini-batches of nearly equal size, in file order."""
    if len(prompts) < num_iterations:
        raise InputError(f"num_iterations: got {num_iterations}, but there are only {len(prompts)} prompts; expected "
                         "at least one prompt an iteration")  # fmt: skip
    bounds = np.linspace(0, len(prompts), num_iterations + 1).round().astype(int)
    return [list(prompts[a:b]) for a, b in itertools.pairwise(bounds)]


def make_pairs(
    candidates: Sequence[Candidates],
    verdicts: Sequence[Verdict | Comparison],
    judging: EvidenceConfig,
    config: PairingConfig,
    seed: int,
    oracle: Oracle | None = None,
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Corrects the prior order by the evidence and selects pairs; the second value counts what happened.

    Args:
        oracle: scores that are no evidence; what was decided is measured against them.
    """
    comparisons = [v for v in verdicts if isinstance(v, Comparison)]
    pointwise = score_matrix(candidates, [v for v in verdicts if isinstance(v, Verdict)], oracle)
    # A hundred thousand pairs take 0.6 s, and scores alone need none.
    is_needed = judging.evidence == "calibrated" or bool(comparisons) or oracle is not None
    evidence = correction.evidence_of(candidates, pointwise, comparisons) if is_needed else [[] for _ in candidates]
    believed = Beliefs(
        candidates, evidence, judging, with_comparisons(pointwise, candidates, comparisons, judging.comparison_scores)
    )
    counts = correction.Counts()
    decided = [
        correction.correct(item, believed.scores[p], config, counts, evidence=evidence[p],
                           probabilities=believed.probabilities[p])
        for p, item in enumerate(candidates)
    ]  # fmt: skip
    calibration = believed.calibrate(config)
    temperature = 1.0 if calibration is None else calibration["temperature"]
    selected = pairing.select(candidates, decided, believed.scores, config, seed)
    pairs = [
        pairing.to_pair(item, pair, believed.scores[p], config, win_rates=believed.win_rates[p],
                        temperature=temperature)
        for p, item in enumerate(candidates) for pair in selected[p]
    ]  # fmt: skip
    used = Counter(pair.decision for pair in pairs)
    info = {
        **counts.to_dict(),
        "prompts": len(candidates),
        "prompts_with_pairs": len({pair.prompt.id for pair in pairs}),
        "used": {"keep": used["keep"], "swap": used["swap"]},
        "abstained": sum((v.score if isinstance(v, Verdict) else v.probability) is None for v in verdicts),
        "human_chosen": sum(pair.chosen.is_human for pair in pairs),
        "judges": believed.judges(verdicts),
        "concordance": believed.concordance,
        "calibration": calibration,
        "errors": None if oracle is None else errors_against(oracle, candidates, evidence, decided, believed),
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
    assert config.verifier is not None
    answered = list(answer(asked, candidates, matrix, config, store, bad, advance))
    verdicts = verify(answered, make_verifier(config.verifier, config.verifier_pattern), bad)
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

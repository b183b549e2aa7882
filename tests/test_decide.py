"""The prior order against the evidence: hand-made cases, invariants on random ones, and the errors of a real matrix."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import corrected, read_rows, used

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.decide import Corrected
from tso_fast.correction.evidence import prior_order
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.judges.verifier import make_verifier, verify
from tso_fast.types import HUMAN, Candidates, Prompt, Response

NAN = math.nan


def response(text: str = "", rank: int | None = None, size: float | None = None, **fields: Any) -> Response:
    return Response(**{"model": "m", "text": text, "version_rank": rank, "size_b": size, **fields})


def human(text: str = "by hand") -> Response:
    return Response(model=HUMAN, text=text)


def item(*responses: Response) -> Candidates:
    return Candidates(prompt=Prompt(id="q", prompt="?"), responses=responses)


def decide(a: Response, b: Response, scores: tuple[float, float], **settings: Any) -> tuple[str, str, Corrected | None]:
    decided = corrected(item(a, b), scores, PairingConfig(**settings))
    ((decision, reasons),) = decided.counts()["reasons"].items()
    ((reason, count),) = reasons.items()
    assert count == 1
    pairs = used(decided)
    assert [pair.decision for pair in pairs] == ([] if decision == "drop" else [decision])
    return decision, reason, pairs[0] if pairs else None


# ---- the prior order

OLD, NEW = response(rank=0, size=6), response(rank=1, size=6)
LARGE, LARGE_NEW = response(rank=0, size=175), response(rank=1, size=175)


@pytest.mark.parametrize(
    ("better", "worse", "rule"),
    [
        (NEW, OLD, "newer"),
        (LARGE, OLD, "larger"),
        (LARGE_NEW, OLD, "newer+larger"),
        (response(rank=-1), response(rank=-2), "newer"),
        (response(rank=1, size=6), response(rank=0), "newer"),
        (response(size=175), response(rank=1, size=6), "larger"),
        (human(), LARGE_NEW, "human"),
        (human(), response(), "human"),
    ],
)
def test_prior_order(better: Response, worse: Response, rule: str) -> None:
    assert prior_order(better, worse) == (1, rule)
    assert prior_order(worse, better) == (-1, rule)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (NEW, LARGE),
        (OLD, OLD),
        (response(), response()),
        (response(rank=1), response(size=6)),
        (human("a"), human("b")),
    ],
    ids=["newer against larger", "same cell", "nothing known", "nothing in common", "two people"],
)
def test_no_prior_order(a: Response, b: Response) -> None:
    assert prior_order(a, b) == prior_order(b, a) == (0, "none")


# ---- decisions

A, B = response("a", rank=1, size=6), response("b", rank=0, size=6)  # the prior prefers A
C = response("c", rank=1, size=6)  # no order with A
CUT = response("cut", rank=2, size=6, finish_reason="length")


@pytest.mark.parametrize(
    ("a", "b", "scores", "settings", "decision", "reason", "chosen"),
    [
        (A, B, (1, 0), {}, "keep", "confirmed", "a"),
        (A, B, (0, 1), {}, "swap", "contradicted", "b"),
        (A, C, (0, 1), {}, "keep", "evidence alone", "c"),
        (A, B, (NAN, NAN), {}, "keep", "prior alone", "a"),
        (A, B, (NAN, 0), {}, "keep", "prior alone", "a"),
        (A, B, (NAN, NAN), {"on_no_evidence": "drop"}, "drop", "no evidence", None),
        (A, B, (0, 1), {"on_no_evidence": "drop"}, "swap", "contradicted", "b"),
        (A, C, (NAN, 1), {}, "drop", "no order", None),
        (A, C, (NAN, 1), {"on_no_evidence": "drop"}, "drop", "no order", None),
        (A, B, (0.5, 0.5), {}, "drop", "tie", None),
        (A, B, (0.5, 0.25), {"min_margin": 0.25}, "drop", "tie", None),
        (A, B, (0.25, 0.5), {"min_margin": 0.25}, "drop", "tie", None),
        (A, B, (0.5, 0.125), {"min_margin": 0.25}, "keep", "confirmed", "a"),
        (A, response(" a\n", rank=0), (1, 0), {}, "drop", "same text", None),
        (human(), A, (NAN, NAN), {}, "keep", "prior alone", "by hand"),
        (human(), A, (1, 0), {}, "keep", "confirmed", "by hand"),
        (human(), A, (0, 1), {}, "swap", "contradicted", "a"),
        (human("x"), human("y"), (NAN, NAN), {}, "drop", "no order", None),
        (CUT, A, (1, 0), {}, "drop", "chosen is cut off", None),
        (CUT, A, (NAN, NAN), {}, "drop", "chosen is cut off", None),
        (CUT, A, (0, 1), {}, "swap", "contradicted", "a"),  # rejecting an unfinished response teaches
    ],
)
def test_a_decision(
    a: Response,
    b: Response,
    scores: tuple[float, float],
    settings: dict[str, Any],
    decision: str,
    reason: str,
    chosen: str | None,
) -> None:
    """The same in either order of the two responses."""
    for first, second, seen in ((a, b, scores), (b, a, scores[::-1])):
        got, why, pair = decide(first, second, seen, **settings)
        assert (got, why) == (decision, reason)
        if pair is not None:
            assert (first, second)[pair.chosen].text == chosen
            assert pair.gap == (0 if np.isnan(seen).any() else abs(scores[0] - scores[1]))
            assert pair.prior == prior_order(a, b)[1]


# ---- invariants


def random_item(r: random.Random) -> tuple[Candidates, np.ndarray]:
    responses = [
        response(
            r.choice("abcd"),
            r.choice([None, 0, 1]),
            r.choice([None, 6, 175]),
            finish_reason=r.choice([None, "stop", "length"]),
        )
        for _ in range(r.randrange(7))
    ]
    responses += [human(r.choice("abx"))] * r.randrange(2)
    scores = np.array([r.choice([NAN, 0, 0.25, 0.5, 1]) for _ in responses], dtype=np.float32)
    return item(*responses), scores


def test_invariants() -> None:
    r = random.Random("correction")
    for _ in range(500):
        candidates, scores = random_item(r)
        config = PairingConfig(min_margin=r.choice([0, 0.3]), on_no_evidence=r.choice(["prior", "drop"]))
        decided = corrected(candidates, scores, config)
        counts, pairs = decided.counts(), used(decided)
        decisions = [count for of in counts["decisions"].values() for count in of.items()]
        reasons = [count for of in counts["reasons"].values() for count in of.values()]
        assert sum(count for _, count in decisions) == sum(reasons) == math.comb(len(candidates.responses), 2)
        assert sum(count for decision, count in decisions if decision != "drop") == len(pairs)
        assert len({frozenset((pair.chosen, pair.rejected)) for pair in pairs}) == len(pairs)
        for pair in pairs:
            chosen, rejected = scores[pair.chosen], scores[pair.rejected]
            sign, rule = prior_order(candidates.responses[pair.chosen], candidates.responses[pair.rejected])
            assert rule == pair.prior
            if np.isnan(chosen) or np.isnan(rejected):
                assert (pair.decision, pair.gap, sign, config.on_no_evidence) == ("keep", 0, 1, "prior")
            else:
                assert chosen - rejected == pair.gap > config.min_margin
                assert pair.decision == ("swap" if sign < 0 else "keep")
            assert candidates.responses[pair.chosen].finish_reason != "length"
            assert candidates.responses[pair.chosen].text != candidates.responses[pair.rejected].text


def test_counts_are_nested_by_rule_and_by_decision() -> None:
    assert corrected(item(A, B, C), (1, 0, 1), PairingConfig()).counts() == {
        "decisions": {"newer": {"keep": 2}, "none": {"drop": 1}},
        "reasons": {"drop": {"tie": 1}, "keep": {"confirmed": 2}},
    }


# ---- the errors of a real matrix

SMALL_OLD, SMALL_NEW = "gpt3-6b-finetuning", "gpt3-6b-verification"
BIG_OLD, BIG_NEW = "gpt3-175b-finetuning", "gpt3-175b-verification"
ORDERED = {  # better, worse: rule
    (SMALL_NEW, SMALL_OLD): "newer",
    (BIG_NEW, BIG_OLD): "newer",
    (BIG_OLD, SMALL_OLD): "larger",
    (BIG_NEW, SMALL_NEW): "larger",
    (BIG_NEW, SMALL_OLD): "newer+larger",
}


@pytest.fixture(scope="module")
def judged(gsm8k_dev: Path) -> tuple[list[Candidates], np.ndarray]:
    candidates = read_candidates(gsm8k_dev, BadRows())
    verdicts = verify(candidates, make_verifier("numeric"), BadRows())
    return candidates, np.array([v.score for v in verdicts]).reshape(len(candidates), 5)


@pytest.mark.parametrize(("better", "worse"), ORDERED)
def test_counted_errors_of_the_prior_are_the_real_ones(
    gsm8k_dev: Path, judged: tuple[list[Candidates], np.ndarray], better: str, worse: str
) -> None:
    """swap / (keep + swap) of each cell pair against the labels `is_correct` in the file."""
    labels = [{r["model"]: r["is_correct"] for r in row["responses"]} for row in read_rows(gsm8k_dev)]
    wrong = sum(label[worse] > label[better] for label in labels)
    right = sum(label[better] > label[worse] for label in labels)
    counts: Counter[tuple[str, str]] = Counter()
    for candidates, scores in zip(*judged, strict=True):
        index = [i for i, r in enumerate(candidates.responses) if r.model in (better, worse)]
        decided = corrected(item(*(candidates.responses[i] for i in index)), scores[index], PairingConfig())
        counts.update({(rule, d): n for rule, of in decided.counts()["decisions"].items() for d, n in of.items()})
    rule = ORDERED[better, worse]
    assert counts[rule, "swap"] == wrong
    assert counts[rule, "keep"] == right
    assert counts.total() == len(labels) == 660
    assert 0.05 < wrong / (wrong + right) < 0.3


def test_the_whole_matrix_with_its_people(judged: tuple[list[Candidates], np.ndarray], gsm8k_dev: Path) -> None:
    """Every pair is counted once; the unordered cells are decided by evidence alone; people are never corrected."""
    candidates, _ = judged
    verdicts = verify(candidates, make_verifier("numeric"), BadRows())
    judging = EvidenceConfig(verifier="numeric")
    pairs, info = make_pairs(candidates, verdicts, judging, PairingConfig(max_pairs=99), seed=0)
    decisions = info["decisions"]
    assert {rule: sum(of.values()) for rule, of in decisions.items()} == {
        "human": 4 * 660,
        "larger": 2 * 660,
        "newer": 2 * 660,
        "newer+larger": 660,
        "none": 660,
    }
    assert "swap" not in decisions["human"]
    assert sum(sum(of.values()) for of in info["reasons"].values()) == 10 * 660
    correct_of = {(row["id"], r["model"]): r["is_correct"] for row in read_rows(gsm8k_dev) for r in row["responses"]}
    decided = sum(correct_of[row.prompt.id, BIG_OLD] != correct_of[row.prompt.id, SMALL_NEW] for row in candidates)
    assert decisions["none"]["keep"] == decided
    for pair in pairs:
        assert pair.chosen.is_human or correct_of[pair.prompt.id, pair.chosen.model]
        assert not correct_of[pair.prompt.id, pair.rejected.model]


def test_order_of_responses_changes_nothing(judged: tuple[list[Candidates], np.ndarray]) -> None:
    for candidates, scores in itertools.islice(zip(*judged, strict=True), 100):

        def texts(order: list[int], candidates: Candidates = candidates, scores: np.ndarray = scores) -> set[Any]:
            shuffled = item(*(candidates.responses[i] for i in order))
            return {
                (shuffled.responses[p.chosen].text, shuffled.responses[p.rejected].text, p.prior, p.decision, p.reason)
                for p in used(corrected(shuffled, scores[order], PairingConfig()))
            }

        assert texts([0, 1, 2, 3, 4]) == texts([3, 1, 4, 0, 2])

"""From verdicts, comparisons and labels to beliefs, corrected pairs, soft labels, and errors against what is known."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.beliefs import believe
from tso_fast.correction.decide import correct
from tso_fast.correction.evidence import compared_of, score_matrix, with_comparisons
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.correction.oracle import errors_against, make_oracle
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.judges.self_consistency import agree
from tso_fast.types import Candidates, Comparison, PreferencePair, Prompt, Response, Verdict

NAN = math.nan


def item(id: str, *texts: str, **fields: Any) -> Candidates:  # noqa: A002
    """The first response is of the newest version, the last of the oldest."""
    responses = tuple(
        Response(model=f"v{len(texts) - i}", text=text, version_rank=len(texts) - i, size_b=1.0, **fields)
        for i, text in enumerate(texts)
    )
    return Candidates(prompt=Prompt(id=id, prompt="?"), responses=responses)


def said(
    probability: float | None,
    i: int = 0,
    j: int = 1,
    judge: str = "llm",
    id: str = "q",  # noqa: A002
    **more: Any,
) -> Comparison:
    return Comparison(prompt_id=id, responses=(i, j), judge=judge, probability=probability, **more)


def label(probability: float | None, annotator: str = "ann", **more: Any) -> Comparison:
    return said(probability, judge="human", annotator=annotator, **more)


def decide(
    verdicts: list[Verdict | Comparison], evidence: str = "consensus", **settings: Any
) -> tuple[list[PreferencePair], dict[str, Any]]:
    judging = EvidenceConfig(evidence=evidence)  # type: ignore[arg-type]
    return make_pairs([item("q", "new", "old")], verdicts, judging, PairingConfig(**settings), 0)


def reasons(info: dict[str, Any]) -> list[tuple[str, str]]:
    return [(decision, reason) for decision, of in info["reasons"].items() for reason in of]


# ---- gathering


def test_votes_of_every_kind_meet_in_a_pair() -> None:
    candidates = [item("q", "a", "b", "c")]
    verdicts = [Verdict(prompt_id="q", response=i, judge="rater", score=s) for i, s in enumerate([3.0, 1.0, None])]
    comparisons = [said(0.9), said(0.2, 2, 0, judge="other"), said(None, 1, 2), label(0.0, annotator="bo")]
    first, second, third = believe(candidates, [*verdicts, *comparisons], EvidenceConfig()).pairs()
    assert first.responses == (0, 1)
    assert (first.prior, first.rule) == (1, "newer")
    assert dict(first.votes) == pytest.approx({"rater": 2.0, "llm": 0.8})
    assert first.stated == pytest.approx(0.9)
    assert dict(first.labels) == {"bo": -1.0}
    assert dict(second.votes) == pytest.approx({"other": 0.6})  # named the other way round
    assert dict(third.votes) == {}
    assert third.stated is None


def test_a_judge_is_of_one_kind() -> None:
    verdicts = [Verdict(prompt_id="q", response=0, judge="llm", score=1.0), said(0.9)]
    with pytest.raises(InputError, match="'llm' has verdicts on single responses and on two"):
        decide(verdicts)


@pytest.mark.parametrize(
    ("labels", "expected", "reason"),
    [
        ([1.0], 1.0, "human: confirmed"),
        ([1.0, 0.0], 0.0, "human: tie"),
        ([1.0, 1.0, 0.0], 1 / 3, "human: confirmed"),
        ([None], NAN, "human: bad"),
        ([None, 1.0], NAN, "human: bad"),
        ([None, 1.0, 1.0], 1.0, "human: confirmed"),
        ([], NAN, "prior alone"),
    ],
)
def test_what_people_say_together(labels: list[float | None], expected: float, reason: str) -> None:
    """A pair that is bad, or bad to half of them, is dropped, and says nothing of its judges."""
    people = [label(p, annotator=f"ann{i}") for i, p in enumerate(labels)]
    candidates = [item("q", "new", "old")]
    beliefs = believe(candidates, people, EvidenceConfig())
    np.testing.assert_allclose(beliefs.votes.label, [expected])
    assert beliefs.votes.is_labelled.tolist() == [bool(labels)]
    assert beliefs.votes.without_labels(np.ones(1, bool)).is_labelled.tolist() == [False]
    assert next(beliefs.pairs()).labels == {
        f"ann{i}": None if p is None else 2 * p - 1 for i, p in sorted(enumerate(labels))
    }
    ((found,),) = correct(candidates, beliefs.votes, beliefs.about(), PairingConfig()).counts()["reasons"].values()
    assert found == reason


@pytest.mark.parametrize(("last", "votes", "stated"), [(0.2, {"llm": -0.6}, 0.2), (None, {}, None)])
def test_the_last_verdict_of_a_voter_on_a_pair_counts(
    last: float | None, votes: dict[str, float], stated: float | None
) -> None:
    """Also if it names the responses the other way round, or takes the verdict back."""
    again = said(None if last is None else 1 - last, 1, 0)
    verdicts = [said(0.9), said(0.8, judge="other", id="r"), again, label(1.0), label(last), label(1.0, annotator="bo")]
    candidates = [item("q", "a", "b"), item("r", "a", "b")]
    beliefs = believe(candidates, verdicts, EvidenceConfig())
    first, second = beliefs.pairs()
    assert first.votes == pytest.approx(votes)
    assert first.stated == pytest.approx(stated)
    assert first.labels == {"ann": None if last is None else pytest.approx(-0.6), "bo": 1.0}
    assert second.votes == pytest.approx({"other": 0.6})
    assert beliefs.votes.abstained_NJ[0].tolist() == [last is None, False, last is None, False]
    np.testing.assert_allclose(beliefs.matrix.scores[0], [NAN if last is None else last, NAN], rtol=1e-6)


def test_a_comparing_judge_becomes_a_column_of_mean_wins() -> None:
    candidates = [item("p", "x", "y"), item("q", "a", "b", "c")]
    matrix = score_matrix(candidates, [])
    verdicts = [said(0.9), said(0.6, 2, 0), said(None, 1, 2), label(1.0)]
    with_them = with_comparisons(matrix, compared_of(candidates, verdicts))
    assert with_them.scorers == ("llm",)
    np.testing.assert_allclose(with_them.scores[:, 0], [NAN, NAN, (0.9 + 0.4) / 2, 0.1, 0.6], rtol=1e-6)


def test_bradley_terry_counts_whom_a_response_met() -> None:
    """c beat the best, b beat the worst, equally often: by wins they are alike, by strength c is better."""
    candidates = [item("q", "best", "b", "c", "worst")]
    verdicts = [said(0.5, 0, 2), said(0.9, 0, 3), said(0.5, 1, 3)]
    matrix, compared = score_matrix(candidates, []), compared_of(candidates, verdicts)
    wins = with_comparisons(matrix, compared).scores[:, 0]
    strengths = with_comparisons(matrix, compared, "bradley_terry").scores[:, 0]
    assert wins[1] == wins[2] == 0.5
    assert strengths[2] > strengths[1]
    judging = EvidenceConfig(comparison_scores="bradley_terry")
    pairs, _ = make_pairs(candidates, verdicts, judging, PairingConfig(pair_strategy="best_worst"), 0)
    assert pairs[0].score_chosen == pytest.approx(float(strengths.max()))


def test_agreement_of_judges_is_counted() -> None:
    candidates = [item(f"q{k}", "a", "b", "c") for k in range(30)]
    rng = np.random.default_rng(0)
    verdicts: list[Verdict | Comparison] = []
    for k in range(30):
        for judge in ("one", "two", "random"):
            scores = rng.permutation(3) if judge == "random" else [2, 1, 0]
            verdicts += [
                Verdict(prompt_id=f"q{k}", response=i, judge=judge, score=float(s)) for i, s in enumerate(scores)
            ]
    _, info = make_pairs(candidates, verdicts, EvidenceConfig(), PairingConfig(), 0)
    assert info["judges"]["one"]["correlation"] > 0.6
    assert info["judges"]["random"]["correlation"] < 0.3
    assert 0.3 < info["concordance"] < 0.9
    _, alone = make_pairs(candidates, verdicts[:3], EvidenceConfig(), PairingConfig(), 0)
    assert alone["concordance"] is None
    assert "correlation" not in alone["judges"]["one"]


# ---- decisions


@pytest.mark.parametrize("evidence", ["consensus", "calibrated"])
@pytest.mark.parametrize(
    ("labels", "decision", "reason", "chosen"),
    [
        ([1.0], "keep", "human: confirmed", "new"),
        ([0.0], "swap", "human: contradicted", "old"),
        ([0.5], "drop", "human: tie", None),
        ([None], "drop", "human: bad", None),
        ([1.0, 0.0], "drop", "human: tie", None),
        ([0.0, 0.0, 1.0], "swap", "human: contradicted", "old"),
    ],
)
def test_a_person_overrules_every_judge(
    evidence: str, labels: list[float | None], decision: str, reason: str, chosen: str | None
) -> None:
    people = [label(p, annotator=f"ann{i}") for i, p in enumerate(labels)]
    for probability in (0.99, 0.01):
        pairs, info = decide([said(probability), said(probability, judge="second"), *people], evidence=evidence)
        assert reasons(info) == [(decision, reason)]
        assert [pair.chosen.text for pair in pairs] == ([chosen] if chosen else [])


@pytest.mark.parametrize(("stated", "reason"), [(0.9, "confirmed"), (0.1, "contradicted"), (0.5, "tie")])
def test_a_comparison_alone_decides_by_consensus(stated: float, reason: str) -> None:
    pairs, info = decide([said(stated)])
    assert [r for _, r in reasons(info)] == [reason]
    for pair in pairs:
        assert pair.probability == pytest.approx(0.9)
        assert pair.score_chosen == pytest.approx(0.9)


def test_an_unsure_pair_is_dropped() -> None:
    assert reasons(decide([said(0.7)], min_confidence=0.75)[1]) == [("drop", "unsure")]
    assert reasons(decide([said(0.8)], min_confidence=0.75)[1]) == [("keep", "confirmed")]
    assert reasons(decide([said(0.2)], min_confidence=0.75)[1]) == [("swap", "contradicted")]


def test_an_abstention_leaves_the_prior() -> None:
    pairs, info = decide([said(None, reason="no verdict")])
    assert reasons(info) == [("keep", "prior alone")]
    assert info["abstained"] == 1
    assert info["judges"] == {"llm": {"verdicts": 1, "abstained": 1, "ties": 0}}
    assert pairs[0].probability is None


def test_one_judge_is_taken_at_its_word(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing tells how reliable it is; who asks for an estimate gets what is assumed, and is told so."""
    with caplog.at_level(logging.INFO, "tso_fast"):
        assert reasons(decide([said(0.1)], evidence="auto")[1]) == [("swap", "contradicted")]
    assert "nothing tells how reliable llm is, which is taken at its word" in caplog.text
    with caplog.at_level(logging.WARNING, "tso_fast"):
        assert reasons(decide([said(0.1)], evidence="calibrated")[1]) == [("keep", "confirmed")]
    assert "too few independent voters and too few labels" in caplog.text


@pytest.mark.parametrize("judges", [2, 3])
def test_two_judges_of_other_parts_of_quality_are_taken_at_their_word(judges: int) -> None:
    """What they share is little, and the prior order knows it; calibrated evidence would believe that alone."""
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(100, 4, 2)) + 0.2 * np.arange(4)[:, None]
    scores = np.concatenate([parts, parts.sum(axis=2, keepdims=True) + rng.normal(size=(100, 4, 1))], axis=2)
    candidates = [
        Candidates(
            prompt=Prompt(id=f"q{p}", prompt="?"),
            responses=tuple(
                Response(
                    model=f"m{r}",
                    version_rank=r,
                    text=f"{p} {r}",
                    scores={f"judge {j}": float(scores[p, r, j]) for j in range(judges)},
                )
                for r in range(4)
            ),
        )
        for p in range(100)
    ]
    found = {
        evidence: believe(candidates, [], EvidenceConfig(evidence=evidence)) for evidence in ("auto", "calibrated")
    }
    assert found["auto"].chosen.method == ("consensus" if judges == 2 else "calibrated")
    first, second = found["auto"].votes.rows_of_pair.T
    quality = parts.sum(axis=2).ravel()
    truth = np.sign(quality[first] - quality[second])
    wrong = {name: float((np.sign(beliefs.about().gap_N) != truth).mean()) for name, beliefs in found.items()}
    assert wrong["auto"] <= wrong["calibrated"]
    assert wrong["auto"] < 0.2


def test_the_prior_alone_on_demand() -> None:
    _, info = decide([said(0.1)], evidence="prior")
    assert reasons(info) == [("keep", "prior alone")]
    assert info["evidence"] == {"method": "prior", "why": "told"}


def test_a_program_alone_needs_no_estimate() -> None:
    scores = [Verdict(prompt_id="q", response=i, judge="verifier", score=s) for i, s in enumerate([0.0, 1.0])]
    _, info = decide(scores, evidence="auto")
    assert reasons(info) == [("swap", "contradicted")]
    assert info["evidence"]["why"] == "verifier alone voted, whose reliability is not estimated"


def test_only_those_named_are_heard_beside_people() -> None:
    scores = [Verdict(prompt_id="q", response=i, judge="verifier", score=s) for i, s in enumerate([0.0, 1.0])]
    scored = item("q", "new", "old")
    responses = [
        dataclasses.replace(r, scores={"search": s}) for r, s in zip(scored.responses, (1.0, 0.0), strict=True)
    ]
    scored = dataclasses.replace(scored, responses=tuple(responses))

    def reason(verdicts: list[Verdict | Comparison], names: list[str]) -> list[tuple[str, str]]:
        config = EvidenceConfig(evidence="consensus", evidence_from=names)
        return reasons(make_pairs([scored], verdicts, config, PairingConfig(), 0)[1])

    assert reason([*scores, said(0.1)], ["search"]) == [("keep", "confirmed")]
    assert reason([*scores, said(0.9)], ["verifier"]) == [("swap", "contradicted")]
    assert reason([*scores, label(0.0)], ["search"]) == [("swap", "human: contradicted")]
    with pytest.raises(
        InputError, match="evidence_from: no judge and no score is called 'serch'; did you mean 'search'"
    ):
        reason(list(scores), ["serch"])


def test_names_that_nobody_has_are_refused() -> None:
    for name, meant in (("lama", "llama"), ("prior: newr", "prior: newer")):
        config = EvidenceConfig(judge_reliability={name: 0.9})
        with pytest.raises(InputError, match=f"nobody is called '{name}'; did you mean '{meant}'"):
            make_pairs([item("q", "a", "b")], [said(0.9, judge="llama")], config, PairingConfig(), 0)


def test_responses_are_compared_on_the_scores_that_both_have() -> None:
    """The right answer has a verifier's 1 and a reward of -5.2; the wrong one a verifier's 0 and no reward."""
    responses = tuple(
        Response(model=f"v{k}", text=text, version_rank=k, scores=scores)
        for k, (text, scores) in enumerate(
            [("4", {"check": 1.0, "rm": -5.2}), ("5", {"check": 0.0}), ("6", {"rm": -7.0}), ("7", {})]
        )
    )
    candidates = [Candidates(prompt=Prompt(id="q", prompt="?"), responses=responses)]
    pairs, info = make_pairs(candidates, [], EvidenceConfig(), PairingConfig(pair_strategy="all", max_pairs=9), 0)
    assert {(p.chosen.text, p.rejected.text) for p in pairs if p.reason == "contradicted"} == {("4", "5"), ("4", "6")}
    assert info["reasons"]["keep"] == {"prior alone": 4}  # 5 against 6 have no judge in common, and 7 has none


def test_the_median_of_scorers_ignores_an_outlier() -> None:
    verdicts = [
        Verdict(prompt_id="q", response=i, judge=judge, score=score)
        for judge, scores in {"one": (0.0, 1.0), "two": (0.1, 1.0), "outlier": (90.0, 0.0)}.items()
        for i, score in enumerate(scores)
    ]
    for consensus, reason in (("mean", "confirmed"), ("median", "contradicted")):
        judging = EvidenceConfig(evidence="consensus", consensus=consensus)  # type: ignore[arg-type]
        _, info = make_pairs([item("q", "new", "old")], verdicts, judging, PairingConfig(), 0)
        assert [found for _, found in reasons(info)] == [reason]


@pytest.mark.slow
def test_a_person_who_is_always_inverted_is_named(caplog: pytest.LogCaptureFixture) -> None:
    candidates, verdicts, truth = simulated(200)
    people = [label(float(truth[k] < 0), id=f"q{k}", annotator="upside down") for k in range(100)]
    with caplog.at_level(logging.WARNING, "tso_fast"):
        make_pairs(candidates, [*verdicts, *people], EvidenceConfig(evidence="calibrated"), PairingConfig(), 0)
    assert "the labels of upside down contradict the judges and the prior order" in caplog.text
    assert "j0 is right" not in caplog.text


def simulated(n: int = 400, judges: tuple[float, ...] = (0.8, 0.75, 0.7), known: bool = False) -> Any:
    """n prompts of a newer and an older response; the newer one is right with probability 0.8.

    ``known``: the data have a score that says so, which is evidence unless it is the oracle.
    """
    rng = np.random.default_rng(0)
    truth = np.where(rng.random(n) < 0.8, 1, -1)
    candidates, verdicts = [], []
    for k in range(n):
        base = item(f"q{k}", "new", "old")
        responses = tuple(
            Response(**{**vars(r), "scores": {"known": float(right)} if known else {}, "is_correct": bool(right)})
            for r, right in zip(base.responses, (truth[k] > 0, truth[k] < 0), strict=True)
        )
        candidates.append(Candidates(prompt=base.prompt, responses=responses))
        for j, accuracy in enumerate(judges):
            vote = truth[k] if rng.random() < accuracy else -truth[k]
            verdicts.append(said(float(vote > 0), judge=f"j{j}", id=f"q{k}"))
    return candidates, verdicts, truth


def test_calibrated_evidence_corrects_the_prior() -> None:
    candidates, verdicts, truth = simulated(1500, known=True)
    oracle = make_oracle("known", candidates)
    config = PairingConfig(soft_label_by="probability")
    pairs, info = make_pairs(candidates, verdicts, EvidenceConfig(evidence="calibrated"), config, 0, oracle)
    errors = info["errors"]["newer"]
    assert errors["prior"] == (truth < 0).sum()
    assert errors["corrected"] / errors["kept"] < 0.7 * errors["prior"] / errors["pairs"]
    assert errors["corrected"] <= 1.15 * errors["best"] + 3
    wrong = sum(not pair.chosen.is_correct for pair in pairs)
    assert wrong == errors["corrected"]
    assert "known" not in info["judges"]  # what is measured against is no evidence
    assert info["judges"]["j0"]["accuracy"] == pytest.approx(0.8, abs=0.06)
    assert info["judges"]["prior: newer"]["accuracy"] == pytest.approx(0.8, abs=0.06)
    for pair in pairs:
        assert pair.soft_label == pair.probability
        assert 0.5 <= pair.probability <= 1
        assert pair.margin >= 0


def test_the_oracle_is_no_evidence() -> None:
    candidates, _, _ = simulated(20, known=True)
    pairs, _ = make_pairs(candidates, [], EvidenceConfig(), PairingConfig(), 0, make_oracle("known", candidates))
    assert {pair.reason for pair in pairs} == {"prior alone"}
    pairs, _ = make_pairs(candidates, [], EvidenceConfig(), PairingConfig(), 0)
    assert {pair.reason for pair in pairs} == {"confirmed", "contradicted"}


@pytest.mark.parametrize("name", ["is_correct", "known"])
def test_oracles(name: str) -> None:
    candidates, _, truth = simulated(30, known=True)
    oracle = make_oracle(name, candidates)
    assert [s[0] for s in oracle.scores] == [float(t > 0) for t in truth]


def test_a_verifier_as_oracle() -> None:
    candidates = [
        Candidates(prompt=Prompt(id="q", prompt="?", answer="4"), responses=item("q", "A: 4", "A: 5").responses)
    ]
    assert make_oracle("numeric", candidates).scores == [[1.0, 0.0]]


def test_an_oracle_that_knows_nothing() -> None:
    with pytest.raises(InputError, match="oracle: no response has 'is_correct'"):
        make_oracle("is_correct", [item("q", "a", "b")])


def test_an_unknown_oracle_names_the_nearest() -> None:
    with pytest.raises(InputError, match="oracle: nothing is called 'nmeric'; did you mean 'numeric'"):
        make_oracle("nmeric", [item("q", "a", "b")])


def test_errors_count_only_what_the_oracle_orders() -> None:
    candidates = [item("q", "a", "b", "c")]
    beliefs = believe(candidates, [], EvidenceConfig())
    oracle = make_oracle(
        "exact", [Candidates(prompt=Prompt(id="q", prompt="?", answer="b"), responses=candidates[0].responses)]
    )
    nothing = correct(candidates, beliefs.votes, beliefs.about(), PairingConfig(on_no_evidence="drop"))
    assert errors_against(oracle, beliefs, nothing) == {
        "newer": {"pairs": 2, "prior": 1, "kept": 0, "corrected": 0, "best": 0}
    }


# ---- calibration


@pytest.mark.slow
@pytest.mark.parametrize("evidence", ["consensus", "calibrated"])
def test_soft_labels_match_held_back_labels(evidence: str) -> None:
    """Judges that state 0.99 and are right on 75 %: people temper them."""
    candidates, verdicts, truth = simulated(800, judges=(0.75,) * (1 if evidence == "consensus" else 3))
    loud = [said(0.99 if v.probability else 0.01, judge=v.judge, id=v.prompt_id) for v in verdicts]
    people = [label(float(truth[k] > 0), id=f"q{k}") for k in range(300)]
    judging = EvidenceConfig(evidence=evidence)  # type: ignore[arg-type]
    config = PairingConfig(soft_label_by="probability")
    pairs, info = make_pairs(candidates, [*loud, *people], judging, config, 0)
    found = info["calibration"]
    assert found["labels"] == pytest.approx(300, abs=12)
    if evidence == "consensus":
        assert found["temperature"] > 2
        assert found["ece"] == pytest.approx(0.24, abs=0.06)
    assert found["ece_tempered"] < 0.08
    rest = [pair for pair in pairs if int(pair.prompt.id[1:]) >= 300]
    stated = np.mean([pair.soft_label for pair in rest])
    right = np.mean([(pair.chosen.text == "new") == (truth[int(pair.prompt.id[1:])] > 0) for pair in rest])
    assert stated == pytest.approx(right, abs=0.05)
    assert {pair.soft_label for pair in pairs if int(pair.prompt.id[1:]) < 300} == {1.0}  # one person, sure


def test_a_few_labels_do_not_temper() -> None:
    candidates, verdicts, truth = simulated(100)
    people = [label(float(truth[k] > 0), id=f"q{k}") for k in range(20)]
    config = PairingConfig(soft_label_by="probability")
    _, info = make_pairs(candidates, [*verdicts, *people], EvidenceConfig(evidence="calibrated"), config, 0)
    found = info["calibration"]
    assert (found["temperature"], found["ece"], found["ece_tempered"]) == (1.0, None, None)  # 20 measure nothing


def test_no_tempering_when_told_so() -> None:
    candidates, verdicts, truth = simulated(100)
    people = [label(float(truth[k] > 0), id=f"q{k}") for k in range(60)]
    config = PairingConfig(soft_label_by="probability", calibrate_soft_labels=False)
    _, info = make_pairs(candidates, [*verdicts, *people], EvidenceConfig(evidence="calibrated"), config, 0)
    assert info["calibration"]["temperature"] == 1.0


@pytest.mark.slow
def test_judges_that_copy_each_other_are_named_and_count_as_one(caplog: pytest.LogCaptureFixture) -> None:
    candidates, verdicts, truth = simulated(800, judges=(0.7, 0.7, 0.7))
    copies = [said(v.probability, judge="copy", id=v.prompt_id) for v in verdicts if v.judge == "j0"]
    with caplog.at_level(logging.WARNING, "tso_fast"):
        pairs, info = make_pairs(candidates, [*verdicts, *copies], EvidenceConfig(), PairingConfig(), 0)
    assert "copy and j0 agree far more often than independent judges would" in caplog.text
    assert info["judges"]["copy"]["shares_errors_with"] == "j0"
    wrong = np.mean([(p.chosen.text == "new") != (truth[int(p.prompt.id[1:])] > 0) for p in pairs])
    assert wrong < 0.2  # as the prior order; 30 % where a judge and its copy outvote all others


# ---- strength


def strength(scores: list[float], **settings: Any) -> PreferencePair:
    candidates = [item("q", *"abcdef"[: len(scores)])]
    verdicts = [
        Verdict(prompt_id="q", response=i, judge="rater", score=None if math.isnan(s) else s)
        for i, s in enumerate(scores)
    ]
    (pair,), _ = make_pairs(
        candidates, verdicts, EvidenceConfig(), PairingConfig(pair_strategy="best_worst", **settings), 0
    )
    return pair


def test_soft_label_by_gap_of_ranks() -> None:
    pair = strength([0.0, 10.0, 3.0, NAN], soft_label_by="rank_gap", soft_label_kappa=2.0)
    assert pair.soft_label == pytest.approx(1 / (1 + math.exp(-2)))
    assert strength([0.0, 10.0, 10.0], soft_label_by="rank_gap").soft_label == pytest.approx(1 / (1 + math.exp(-0.75)))


def test_soft_label_by_win_rate() -> None:
    assert strength([0.0, 1.0, 2.0], soft_label_by="win_rate").soft_label == 1.0
    assert strength([0.0, 1.0, 1.0], soft_label_by="win_rate").soft_label == pytest.approx(0.5 + 0.5 * 0.75)


def test_scale_by_confidence() -> None:
    pair = strength([0.0, 1.0], soft_label_by="score_gap", soft_label_kappa=1.0, scale_by="confidence")
    assert pair.scale == pytest.approx(2 * pair.soft_label - 1)
    assert strength([0.0, 1.0], scale_by="confidence").scale == 1.0


# ---- agreement, on real answers


def test_agreement_needs_no_answer(gsm8k_dev: Path) -> None:
    """On a real matrix, coinciding answers are right far more often than the larger or newer model's."""
    candidates = read_candidates(gsm8k_dev, BadRows())
    verdicts = agree(candidates, "agreement")
    right = wrong = 0
    rows = iter(verdicts)
    for c in candidates:
        own = list(itertools.islice(rows, len(c.responses)))
        for (a, va), (b, vb) in itertools.combinations(zip(c.responses, own, strict=True), 2):
            if a.is_human or b.is_human or a.is_correct == b.is_correct or va.score == vb.score:
                continue
            assert va.score is not None
            assert vb.score is not None
            right += (va.score > vb.score) == a.is_correct
            wrong += (va.score > vb.score) != a.is_correct
    assert right / (right + wrong) > 0.85
    assert right + wrong > 600


def test_agreement_abstains() -> None:
    candidates = Candidates(
        prompt=Prompt(id="q", prompt="?"),
        responses=(
            Response(model="a", text="4"),
            Response(model="b", text="four"),
            Response(model="human", text="4"),
            Response(model="c", text="so 4"),
        ),
    )
    assert [v.score for v in agree([candidates], "agreement")] == [0.5, None, None, 0.5]
    assert [v.score for v in agree([item("q", "4")], "agreement")] == [None]


def test_win_rates_are_as_judges_of_two_state_them_and_by_the_scores_of_others() -> None:
    compared: list[Verdict | Comparison] = [said(0.9, 0, 1), said(0.7, 0, 2), said(0.6, 1, 2)]
    scored = [Verdict(prompt_id="q", response=i, judge="exact", score=score) for i, score in enumerate((0.0, 1.0, 1.0))]
    candidates = [item("q", "a", "b", "c"), item("r", "a", "b")]
    settings = EvidenceConfig(evidence="consensus")

    def rates(*verdicts: Verdict | Comparison) -> list[float]:
        return believe(candidates, list(verdicts), settings).win_rates_R.tolist()

    stated, by_score = [0.8, 0.35, 0.35], [0.0, 0.75, 0.75]
    both = [(a + b) / 2 for a, b in zip(stated, by_score, strict=True)]
    for found, wanted in ((rates(*compared), stated), (rates(*scored), by_score), (rates(*compared, *scored), both)):
        assert found == pytest.approx([*wanted, NAN, NAN], nan_ok=True)

"""Reliabilities from agreement: planted judges are recovered, and nothing is told that the data do not say."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest

from tso_fast.correction.calibration import expected_calibration_error, fit_temperature, tempered
from tso_fast.correction.reliability import Combination, combine

NAN = math.nan


def planted(
    accuracies: list[float], n: int = 4000, seed: int = 0, neither: float = 0.0, tie_when_neither: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """State 1, -1 or 0 of n pairs, and votes that are right with these probabilities, independently."""
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(n) < neither, 0, rng.choice([-1, 1], n))
    right = rng.random((n, len(accuracies))) < np.array(accuracies)
    votes = np.where(right, truth[:, None], -truth[:, None]).astype(float)
    guess = np.where(rng.random(votes.shape) < tie_when_neither, 0, rng.choice([-1, 1], votes.shape))
    return truth, np.where((truth == 0)[:, None], guess, votes)


def run(votes: np.ndarray, **options: Any) -> Combination:
    n = len(votes)
    names = [f"j{j}" for j in range(votes.shape[1])]
    settings = {"prior_N": np.zeros(n, int), "classes_N": np.zeros(n, int), "classes": [], **options}
    return combine(votes, names, **settings)


def accuracies_of(found: Combination) -> list[float]:
    return [r.accuracy for r in found.judges.values()]


@pytest.mark.parametrize("accuracies", [[0.7, 0.7, 0.7], [0.9, 0.6, 0.75, 0.5], [0.85, 0.8, 0.2]])
def test_planted_reliabilities_are_found(accuracies: list[float]) -> None:
    truth, votes = planted(accuracies)
    found = run(votes)
    assert accuracies_of(found) == pytest.approx(accuracies, abs=0.04)
    decided = np.sign(found.probabilities[:, 0] - found.probabilities[:, 1])
    best = max(max(a, 1 - a) for a in accuracies)
    assert (decided == truth).mean() > best - 0.01


def test_three_weak_judges_beat_one() -> None:
    truth, votes = planted([0.7, 0.7, 0.7])
    found = run(votes)
    assert (np.sign(found.probabilities[:, 0] - found.probabilities[:, 1]) == truth).mean() > 0.76  # theory: 0.784


def test_stated_probabilities_are_right_as_often_as_they_say() -> None:
    truth, votes = planted([0.8, 0.7, 0.65], n=20000)
    p = run(votes).probabilities
    assert expected_calibration_error(p[:, :2].max(axis=1), (np.sign(p[:, 0] - p[:, 1]) == truth) * 1.0) < 0.02


def test_swapping_all_responses_mirrors_the_result() -> None:
    _, votes = planted([0.8, 0.7, 0.6], n=500)
    found, mirrored = run(votes), run(-votes)
    np.testing.assert_allclose(found.probabilities[:, [1, 0, 2]], mirrored.probabilities, atol=1e-9)


def test_order_of_the_pairs_changes_nothing() -> None:
    _, votes = planted([0.8, 0.7, 0.6], n=500)
    order = np.random.default_rng(1).permutation(500)
    np.testing.assert_array_equal(run(votes).probabilities[order], run(votes[order]).probabilities)


def test_the_prior_order_is_a_voter_by_class() -> None:
    """A class that is wrong more often than right is believed the other way round."""
    truth, votes = planted([0.75, 0.75, 0.75])
    rng = np.random.default_rng(5)
    kind = rng.integers(0, 2, len(truth))
    prior = np.where(rng.random(len(truth)) < np.array([0.9, 0.3])[kind], truth, -truth)
    found = run(votes, prior_N=prior, classes_N=kind, classes=[("larger", "b > a"), ("newer", "d > c")])
    assert [r.accuracy for r in found.prior.values()] == pytest.approx([0.9, 0.3], abs=0.05)
    alone = run(votes)

    def right(c: Combination) -> float:
        return float((np.sign(c.probabilities[:, 0] - c.probabilities[:, 1]) == truth).mean())

    assert right(found) > right(alone) + 0.03


def test_few_pairs_of_a_class_lean_on_their_rule() -> None:
    truth, votes = planted([0.9, 0.9, 0.9], n=2000)
    kind = np.zeros(2000, int)
    kind[:3] = 1
    prior = np.where(np.random.default_rng(0).random(2000) < 0.85, truth, -truth)
    prior[:3] = -truth[:3]
    same = run(votes, prior_N=prior, classes_N=kind, classes=[("newer", "a"), ("newer", "b")])
    assert same.prior["newer", "b"].accuracy > 0.65  # three of three wrong, against 0.85 of its rule
    other = run(votes, prior_N=prior, classes_N=kind, classes=[("newer", "a"), ("larger", "b")])
    assert other.prior["larger", "b"].accuracy < 0.5


def test_ties_say_that_neither_is_better() -> None:
    truth, votes = planted([0.9, 0.85, 0.8], neither=0.4, tie_when_neither=0.8)
    p = run(votes).probabilities
    assert p[truth == 0, 2].mean() > 0.9
    assert p[truth != 0, 2].mean() < 0.05


def test_without_ties_one_of_two_is_always_better() -> None:
    _, votes = planted([0.9, 0.85, 0.8])
    np.testing.assert_array_equal(run(votes).probabilities[:, 2], 0)


def test_stronger_votes_of_a_judge_count_more() -> None:
    """A judge that knows when it knows: gaps above 1 are right, the others are guesses."""
    rng = np.random.default_rng(3)
    truth, votes = planted([0.5, 0.75, 0.75], n=6000)
    knows = rng.random(6000) < 0.5
    votes[:, 0] = np.where(knows, 2 * truth, 0.5 * votes[:, 0]) + 0.01 * rng.random(6000)
    p = run(votes).probabilities
    right = np.sign(p[:, 0] - p[:, 1]) == truth
    assert right[knows].mean() > 0.97
    assert p[knows, :2].max(axis=1).mean() > p[~knows, :2].max(axis=1).mean() + 0.15


def test_absent_votes_say_nothing() -> None:
    _, votes = planted([0.8, 0.8, 0.8])
    votes[np.random.default_rng(0).random(votes.shape) < 0.3] = NAN
    votes[0] = NAN
    found = run(votes)
    assert accuracies_of(found) == pytest.approx([0.8] * 3, abs=0.04)
    assert found.probabilities[0] == pytest.approx([0.5, 0.5, 0])
    assert found.judges["j0"].num_votes == (~np.isnan(votes[:, 0])).sum()


def test_labels_are_the_truth_and_teach() -> None:
    truth, votes = planted([0.9, 0.4, 0.5], n=2000)
    labels = np.where(np.arange(2000) < 300, truth, NAN)
    found = run(votes, labels_N=labels)
    np.testing.assert_array_equal(found.probabilities[:300], np.eye(3)[np.where(truth[:300] > 0, 0, 1)])
    assert accuracies_of(found) == pytest.approx([0.9, 0.4, 0.5], abs=0.06)


def test_a_given_reliability_is_taken() -> None:
    _, votes = planted([0.6, 0.7, 0.7])
    found = run(votes, given={"j0": 0.99})
    assert found.judges["j0"].accuracy == pytest.approx(0.99)
    assert found.judges["j0"].is_given
    assert (np.sign(found.probabilities[:, 0] - found.probabilities[:, 1]) == votes[:, 0]).all()


def test_a_given_rule_of_the_prior() -> None:
    prior, classes = np.ones(4, int), [("human", "human > m")]
    votes = np.array([[NAN], [1.0], [-1.0], [NAN]])
    p = run(votes, prior_N=prior, classes=classes, given={"prior: human": 0.95}).probabilities
    assert p[0] == pytest.approx([0.95, 0.05, 0])
    assert p[2, 0] == pytest.approx(0.95 * 0.3 / (0.95 * 0.3 + 0.05 * 0.7))


def test_two_voters_without_labels_are_not_estimated(caplog: pytest.LogCaptureFixture) -> None:
    _, votes = planted([0.9, 0.6], n=300)
    with caplog.at_level(logging.WARNING, "tso_fast"):
        found = run(votes)
    assert "2 voters only and no human label" in caplog.text
    assert not found.is_estimated
    assert accuracies_of(found) == pytest.approx([0.7, 0.7])
    contradicting = votes[:, 0] != votes[:, 1]
    np.testing.assert_allclose(found.probabilities[contradicting, 0], 0.5, atol=1e-12)


def test_a_judge_that_always_ties_is_no_voter() -> None:
    _, votes = planted([0.9, 0.9, 0.9], n=300)
    votes[:, 2] = 0
    assert not run(votes).is_estimated


@pytest.mark.parametrize("n", [0, 1, 2])
def test_hardly_any_pairs(n: int) -> None:
    found = run(np.ones((n, 3)))
    assert found.probabilities.shape == (n, 3)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    assert (found.probabilities[:, 0] > 0.5).all()


def test_no_judges_at_all() -> None:
    prior = np.array([1, -1, 0])
    found = run(np.zeros((3, 0)), prior_N=prior, classes=[("newer", "a > b")])
    assert found.probabilities[:, 0] == pytest.approx([0.7, 0.3, 0.5])


def test_judges_that_copy_each_other_are_noticed() -> None:
    _, votes = planted([0.7, 0.7, 0.7, 0.7])
    assert run(votes).misfits == {}
    copied = np.random.default_rng(0).random(len(votes)) < 0.9
    votes[:, 1] = np.where(copied, votes[:, 0], votes[:, 1])
    found = run(votes)
    observed, expected = found.misfits["j2", "j3"]
    assert observed == pytest.approx(0.58, abs=0.04)
    assert expected < observed - 0.05


def test_labels_alone_see_through_copies() -> None:
    truth, votes = planted([0.7, 0.7, 0.7], n=4000)
    votes[:, 1] = votes[:, 0]
    labels = np.where(np.arange(4000) < 400, truth, NAN)
    assert accuracies_of(run(votes, labels_N=labels))[0] > 0.85
    counted = run(votes, labels_N=labels, learn_from="labels")
    assert accuracies_of(counted) == pytest.approx([0.7] * 3, abs=0.06)
    weighed = run(votes, labels_N=labels, learn_from="weights")
    rest = slice(400, None)

    def loss(c: Combination) -> float:
        p = np.where(truth[rest] > 0, c.probabilities[rest, 0], c.probabilities[rest, 1])
        return float(-np.log(p).mean())

    assert loss(weighed) < loss(counted) - 0.02  # the copy no longer counts twice
    assert accuracies_of(weighed) == accuracies_of(counted)


# ---- calibration


def test_expected_calibration_error() -> None:
    p = np.repeat([0.6, 0.9], 100)
    right = np.concatenate([np.arange(100) < 60, np.arange(100) < 70]).astype(float)
    assert expected_calibration_error(p, right, num_bins=2) == pytest.approx(0.1)
    assert expected_calibration_error(p[:100], right[:100], num_bins=1) == pytest.approx(0, abs=1e-12)
    assert math.isnan(expected_calibration_error(np.array([]), np.array([])))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_is_found_again(temperature: float) -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(0.5, 0.99, 20000)
    right = (rng.random(20000) < true).astype(float)
    stated = tempered(true, 1 / temperature)
    fitted = fit_temperature(stated, right)
    assert fitted == pytest.approx(temperature, rel=0.1)
    assert expected_calibration_error(tempered(stated, fitted), right) < 0.02


def test_tempering_keeps_certainty_finite() -> None:
    np.testing.assert_allclose(tempered(np.array([0.0, 0.5, 1.0]), 1.0), [1e-6, 0.5, 1 - 1e-6])

"""Reliabilities from agreement: planted judges are recovered, and nothing is told that the data do not say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from tso_fast.correction.calibration import expected_calibration_error, fit_temperature, tempered
from tso_fast.correction.evidence import compared_of, votes_of
from tso_fast.correction.graded import normal_scores
from tso_fast.correction.joint import BLOCK, JointModel, block_of, blocks_of
from tso_fast.correction.reliability import Combination, combine, is_identified
from tso_fast.correction.votes import ORDER, Voter, Votes, with_meaningful_silence
from tso_fast.types import Candidates, Comparison, Prompt, Response, ScoreMatrix

NAN = math.nan


def votes_on(strength: np.ndarray, count: int, order: np.ndarray | None = None, **changes: Any) -> Votes:
    """Comparisons of judges j0, j1, ... on prompts of ``count`` responses, all shown in the order of the pairs."""
    n, judges = strength.shape
    prompts = n // (count * (count - 1) // 2)
    first, second = np.triu_indices(count, 1)
    place = np.zeros(count) if order is None else order
    fields: dict[str, Any] = {
        "voters": tuple(Voter(name=f"j{j}", kind="comparison") for j in range(judges)),
        "strength_NJ": strength.astype(np.float32),
        "shown_NJ": np.ones((n, judges), np.int8),
        "abstained_NJ": np.zeros((n, judges), bool),
        "offsets": np.arange(prompts + 1) * count,
        "order_R": np.tile(place, prompts),
        "prior_N": np.tile(np.sign(place[first] - place[second]), prompts).astype(np.int8),
        "rules_N": np.zeros(n, np.int16),
        "rules": ("newer",),
        "is_same_N": np.zeros(n, bool),
        "longer_N": np.zeros(n, np.int8),
    }
    return Votes(**{**fields, **changes})


def planted(prompts: int = 500, count: int = 4, seed: int = 0, order: np.ndarray | None = None) -> np.ndarray:
    """State 1, 0 or -1 of all pairs of right and wrong responses; later ones are right more often."""
    rng = np.random.default_rng(seed)
    place = np.linspace(-1, 1, count) if order is None else order
    hard = rng.normal(size=(prompts, 1)) * 1.5
    right = rng.random((prompts, count)) < 1 / (1 + np.exp(-(place + hard)))
    first, second = np.triu_indices(count, 1)
    return (right[:, first].astype(int) - right[:, second]).ravel()


def judged(truth: np.ndarray, accuracies: list[float], seed: int = 1, silent: bool = False) -> np.ndarray:
    """Votes that are right with these probabilities, independently; on ties they guess, or are silent."""
    rng = np.random.default_rng(seed)
    right = rng.random((len(truth), len(accuracies))) < np.array(accuracies)
    guess = np.where(silent, NAN, rng.choice([-1.0, 1.0], size=right.shape))
    return np.where((truth == 0)[:, None], guess, np.where(right, truth[:, None], -truth[:, None]))


ORDERED = np.array([-1.0, -0.3, 0.3, 1.0])
"""The prior order of four responses."""


def accuracies_of(found: Combination) -> list[float]:
    return [row.accuracy for row in found.judges.values()]


def error(found: Combination, truth: np.ndarray) -> float:
    p = found.probabilities
    return float((np.sign(p[:, 0] - p[:, 1]) != truth)[truth != 0].mean())


def log_odds(found: Combination) -> np.ndarray:
    return np.log(found.probabilities[:, 0] / found.probabilities[:, 1])


# ---- one model of a prompt


def test_expectations_are_those_of_brute_force() -> None:
    """Probabilities of a prompt's pairs, one possibility after the other in plain Python."""
    truth = planted(40, 3)
    votes = votes_on(judged(truth, [0.8, 0.7]), 3, np.array([-0.5, 0.0, 0.5]))
    model = JointModel(votes)
    model.fit(max_iterations=3)
    states = model.expect()
    level, trust, coupling = model.prior
    for p in (0, 7):
        total, sums = 0.0, np.zeros((3, 3))
        for right in itertools.product([0, 1], repeat=3):
            pairs = [right[i] - right[j] for i, j in itertools.combinations(range(3), 2)]
            log = level * sum(right) + trust * float(np.dot(right, votes.order_R[:3]))
            log += coupling * sum(state != 0 for state in pairs) / 2
            for k, state in enumerate(pairs):
                for j in range(2):
                    column = int(votes.strength_NJ[3 * p + k, j]) + model.emissions[j].num_levels
                    log += math.log(model.emissions[j].table[2, 1, column, state + 1])
            total += math.exp(log)
            for k, state in enumerate(pairs):
                sums[k, state + 1] += math.exp(log)
        np.testing.assert_allclose(states[3 * p : 3 * p + 3], sums / total, rtol=1e-9)


def test_gains_of_labels_are_those_of_brute_force() -> None:
    """Errors expected after each of three labels, from possibilities weighted by what a person would say."""
    votes = votes_on(judged(planted(40, 3), [0.8, 0.7]), 3, np.array([-0.5, 0.0, 0.5]))
    found = combine(votes)
    gains = found.label_gains()
    model = found.find_label_gains.func.__self__  # type: ignore[union-attr]
    evidence = model.evidence()
    for p in (0, 7):
        weights = {}
        for right in itertools.product([0, 1], repeat=3):
            state = tuple(right[i] - right[j] for i, j in itertools.combinations(range(3), 2))
            log = float(
                model.prior @ model._features(block_of(3), votes.order_R[None, :3])[0][int("".join(map(str, right)), 2)]
            )
            weights[right] = state, math.exp(log + sum(evidence[3 * p + k, s + 1] for k, s in enumerate(state)))
        total = sum(weight for _, weight in weights.values())

        def errors(seen: dict[int, float], pair: int, weights: Any = weights) -> float:
            """Errors times the probability of a label, whose likelihood by the state of ``pair`` is ``seen``."""
            out = 0.0
            for other in range(3):
                side = [sum(w * seen[s[pair]] for s, w in weights.values() if s[other] == way) for way in (1, -1)]
                out += min(side)
            return out

        for k in range(3):
            before = errors(dict.fromkeys((-1, 0, 1), 1.0), k)
            after = sum(errors({s: 0.95 if s == said else 0.025 for s in (-1, 0, 1)}, k) for said in (-1, 0, 1))
            assert gains[3 * p + k] == pytest.approx((before - after) / total, abs=1e-9)
    assert gains.min() > -1e-12
    assert found.expected_wrong == pytest.approx(found.probabilities[:, :2].min(axis=1).sum())


def test_labels_of_the_best_pairs_put_most_right() -> None:
    truth = planted(order=ORDERED)
    votes = votes_on(judged(truth, [0.7, 0.7, 0.7]), 4, ORDERED)
    found = combine(votes)
    gains, errors = found.label_gains(), []
    for key in (gains, np.random.default_rng(0).random(len(gains)), -gains):
        first = np.full(len(gains), NAN)
        best = key.reshape(-1, 6).argmax(axis=1) + 6 * np.arange(len(gains) // 6)
        chosen = best[np.argsort(-key[best])[:150]]
        first[chosen] = truth[chosen]
        errors.append(error(combine(votes.with_label("ada", first)), truth))
    assert errors[0] < errors[1] < errors[2] <= error(found, truth)


@pytest.mark.parametrize("silent", [True, False])
def test_intervals_hold_the_truth(silent: bool) -> None:
    """Votes that are silent on ties tell more, and the interval says so."""
    inside, widths = [], []
    for seed in range(4):
        truth = planted(seed=seed, order=ORDERED)
        found = combine(votes_on(judged(truth, [0.6, 0.7, 0.8], seed, silent), 4, ORDERED))
        for row, accuracy in zip(found.judges.values(), (0.6, 0.7, 0.8), strict=True):
            low, high = row.interval
            inside.append(low <= accuracy <= high)
            widths.append(high - low)
    assert np.mean(inside) >= 0.8
    assert np.mean(widths) < (0.07 if silent else 0.16)


@pytest.mark.parametrize("count", [2, BLOCK, BLOCK + 1, 30])
def test_blocks_hold_every_pair(count: int) -> None:
    found = [set(itertools.combinations(block, 2)) for block in blocks_of(count)]
    assert set().union(*found) == set(itertools.combinations(range(count), 2))
    assert all(len(block) <= BLOCK for block in blocks_of(count))
    assert len(block_of(min(count, BLOCK)).right_CR) == 2 ** min(count, BLOCK)


def test_a_long_prompt_in_blocks_is_nearly_as_good_as_whole() -> None:
    truth = planted(60, BLOCK + 4)
    found = combine(votes_on(judged(truth, [0.75, 0.75, 0.75]), BLOCK + 4))
    assert error(found, truth) < 0.05
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)


# ---- reliabilities


@pytest.mark.parametrize("accuracies", [[0.7, 0.7, 0.7], [0.9, 0.6, 0.75, 0.5], [0.85, 0.8, 0.2]])
def test_planted_reliabilities_are_found(accuracies: list[float]) -> None:
    truth = planted(1000)
    found = combine(votes_on(judged(truth, accuracies), 4, ORDERED))
    assert accuracies_of(found) == pytest.approx(accuracies, abs=0.06)
    low, high = found.judges["j0"].interval
    assert low - 0.05 < accuracies[0] < high + 0.05  # shrunk towards what is assumed
    assert high - low < 0.2


def test_votes_on_one_prompt_help_each_other() -> None:
    """Three judges right on 70 %, with no prior order: by majority 21.6 % of the pairs are wrong."""
    truth = planted(800)
    assert error(combine(votes_on(judged(truth, [0.7] * 3), 4)), truth) < 0.18


def test_stated_probabilities_are_right_as_often_as_they_say() -> None:
    truth = planted(800)
    found = combine(votes_on(judged(truth, [0.8, 0.7, 0.7]), 4, ORDERED))
    p, on = found.probabilities, truth != 0
    stated = p[on, :2].max(axis=1) / p[on, :2].sum(axis=1)
    right = (np.sign(p[:, 0] - p[:, 1]) == truth)[on]
    assert expected_calibration_error(stated, right * 1.0) < 0.05


def test_order_of_the_prompts_changes_nothing() -> None:
    votes = votes_on(judged(planted(100), [0.8, 0.7, 0.6]), 4, ORDERED)
    order = np.random.default_rng(1).permutation(100)
    pairs = (order[:, None] * 6 + np.arange(6)).ravel()
    found, moved = combine(votes), combine(votes.only(order))
    np.testing.assert_allclose(found.probabilities[pairs], moved.probabilities, atol=1e-9)


def test_weak_judges_do_no_harm() -> None:
    """With three judges right on 60 % the prior order is hardly ever overruled wrongly."""
    order = np.array([-1.6, -0.3, 0.3, 1.6])
    gaps = []
    for seed in range(3):
        truth = planted(600, seed=seed, order=order)
        votes = votes_on(judged(truth, [0.6] * 3, seed + 10), 4, order * ORDER)
        on = (truth != 0) & (votes.prior_N != 0)
        found = combine(votes)
        said = np.sign(found.probabilities[:, 0] - found.probabilities[:, 1])
        gaps.append((said != truth)[on].mean() - (votes.prior_N != truth)[on].mean())
    assert np.mean(gaps) < 0.01


@pytest.mark.parametrize("shown", [0, 1])
def test_a_prior_order_that_is_wrong_is_found_out(shown: int) -> None:
    """Even where judges that all prefer what comes second would explain some of it."""
    truth = planted(800)
    votes = votes_on(judged(truth, [0.75] * 3), 4, -ORDERED, shown_NJ=np.full((4800, 3), shown, np.int8))
    found = combine(votes)
    assert found.prior["newer"].accuracy < 0.4
    assert all(abs(row.pull) < 0.2 for row in found.judges.values())
    assert error(found, truth) < error(combine(dataclasses.replace(votes, order_R=0 * votes.order_R)), truth)


# ---- judges as they are


@pytest.mark.parametrize("share", [0.3, 0.45, 1.0])
def test_a_judge_that_prefers_what_it_sees_first(share: float) -> None:
    """Responses are shown in the matrix's order, so that its bias looks like the prior order's opposite."""
    truth = planted(600)
    good = judged(truth, [0.75] * 3)
    rng = np.random.default_rng(5)
    biased = np.where(rng.random(len(truth)) < share, 1.0, judged(truth, [0.7], 7)[:, 0])
    alone = error(combine(votes_on(good, 4, ORDERED)), truth)
    found = combine(votes_on(np.column_stack([good, biased]), 4, ORDERED))
    assert error(found, truth) <= 1.05 * alone + 0.005
    assert found.judges["j3"].pull > 0.5
    assert all(abs(found.judges[f"j{j}"].pull) < 0.2 for j in range(3))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("share", [0.9, 1.0])
def test_judges_that_copy_each_other_count_as_one(share: float, silent: bool) -> None:
    truth = planted(600)
    strength = judged(truth, [0.7] * 3, silent=silent)
    copied = np.random.default_rng(5).random(len(truth)) < share
    strength[:, 1] = np.where(copied, strength[:, 0], strength[:, 1])
    found = combine(votes_on(strength, 4, ORDERED))
    assert list(found.joined) == [("j0", "j1")]
    excess = found.joined["j0", "j1"]
    assert excess.observed > 0.8 > 0.5 > excess.expected
    assert found.judges["j2"].accuracy == pytest.approx(0.7, abs=0.06)
    two = error(combine(votes_on(strength[:, [0, 2]], 4, ORDERED)), truth)
    assert error(found, truth) < two + 0.02


def test_independent_judges_are_not_joined() -> None:
    for seed in range(3):
        found = combine(votes_on(judged(planted(400), [0.7, 0.8, 0.7], seed), 4, ORDERED))
        assert not found.joined


def test_stronger_votes_count_by_their_calibration() -> None:
    """Calibrated probabilities: log-odds say how sure a vote is, and adding them up is the best there is."""
    truth = planted(600)
    rng = np.random.default_rng(3)
    odds = rng.normal(1.1 * truth[:, None], math.sqrt(2.2), size=(len(truth), 3))  # 70 % right
    found = combine(votes_on(2 / (1 + np.exp(-odds)) - 1, 4, ORDERED))
    signs = combine(votes_on(np.sign(odds), 4, ORDERED))
    assert error(found, truth) < 0.8 * error(signs, truth)
    curve = found.judges["j0"].curve
    assert curve[0][1] < 0.65 < 0.85 < curve[-1][1]
    assert [strength for strength, _, _ in curve] == sorted(strength for strength, _, _ in curve)


def test_silence_on_ties_is_heard() -> None:
    """Judges that skip the pairs that are both right or both wrong tell which responses are equal."""
    truth = planted(400)
    votes = votes_on(judged(truth, [0.7] * 3, silent=True), 4, ORDERED)
    assert with_meaningful_silence(votes).abstained_NJ.any()
    found = combine(votes)
    assert error(found, truth) < 0.08
    skipped = (truth == 0) & with_meaningful_silence(votes).abstained_NJ[:, 0]
    assert found.probabilities[skipped, 2].mean() > 0.9


def test_pairs_that_were_not_asked_for_mean_nothing() -> None:
    """A judge that compares one response with all others is silent on the rest by design."""
    truth = planted(400)
    strength = judged(truth, [0.8] * 3)
    strength.reshape(400, 6, 3)[:, 3:] = NAN
    votes = votes_on(strength, 4, ORDERED)
    assert not with_meaningful_silence(votes).abstained_NJ.any()
    some = judged(truth, [0.8] * 3)
    some[np.random.default_rng(0).random(some.shape) < 0.5] = NAN
    assert not with_meaningful_silence(votes_on(some, 4)).abstained_NJ.any()


# ---- continuity


def test_one_vote_moves_beliefs_by_what_it_is_worth() -> None:
    truth = planted(300)
    strength = judged(truth, [0.8, 0.8, 0.8])
    before = log_odds(combine(votes_on(strength, 4, ORDERED)))
    strength[10, 0] = 0.0  # the first tie of all
    after = log_odds(combine(votes_on(strength, 4, ORDERED)))
    others = np.setdiff1d(np.arange(len(truth)), np.arange(6, 12))  # other prompts
    assert np.abs(after - before)[others].max() < 0.2
    assert np.abs(after - before)[6:12].max() < 2.5


def test_one_label_of_a_tie_moves_only_its_own_prompt() -> None:
    truth = planted(300)
    votes = votes_on(judged(truth, [0.85] * 3), 4, ORDERED)
    label = np.full(len(truth), NAN)
    label[3] = 0.0
    before, after = combine(votes), combine(votes.with_label("person", label))
    others = np.arange(6, len(truth))
    assert np.abs(log_odds(after) - log_odds(before))[others].max() < 0.2
    assert after.probabilities[3, 2] > before.probabilities[3, 2]


def test_honest_labels_do_not_empty_the_training_set() -> None:
    truth = planted(500)
    votes = votes_on(judged(truth, [0.7] * 3), 4, ORDERED)
    rng = np.random.default_rng(0)
    ties, decided = rng.permutation(np.flatnonzero(truth == 0))[:133], rng.permutation(np.flatnonzero(truth))[:67]
    label = np.full(len(truth), NAN)
    label[ties], label[decided] = 0, truth[decided]
    before, after = combine(votes), combine(votes.with_label("person", label))
    rest = (truth != 0) & np.isnan(label)
    kept = [(found.probabilities[rest, 2] <= 0.9).mean() for found in (before, after)]
    assert kept[1] >= 0.95 * kept[0]
    wrong = [(np.sign(f.probabilities[:, 0] - f.probabilities[:, 1]) != truth)[rest].mean() for f in (before, after)]
    assert wrong[1] <= wrong[0] + 0.002


# ---- labels, given reliabilities, what cannot be known


def test_labels_teach() -> None:
    truth = planted(400)
    votes = votes_on(judged(truth, [0.9, 0.4, 0.5]), 4)
    found = combine(votes.with_label("person", np.where(np.arange(len(truth)) < 600, truth, NAN)), learn_from="labels")
    assert [found.judges[f"j{j}"].accuracy for j in range(3)] == pytest.approx([0.9, 0.4, 0.5], abs=0.08)
    assert found.judges["person"].accuracy > 0.9


def test_a_given_reliability_is_taken() -> None:
    truth = planted(200)
    votes = votes_on(judged(truth, [0.6, 0.7, 0.7]), 4)
    voters = (dataclasses.replace(votes.voters[0], given=0.99), *votes.voters[1:])
    found = combine(dataclasses.replace(votes, voters=voters))
    assert found.judges["j0"].accuracy == 0.99
    assert found.judges["j0"].is_given
    assert found.judges["j0"].interval == (0.99, 0.99)


def test_a_given_rule_of_the_prior() -> None:
    responses = (Response(model="human", text="a"), Response(model="m", text="b", version_rank=1))
    candidates = [Candidates(prompt=Prompt(id=f"q{k}", prompt="?"), responses=responses) for k in range(4)]
    empty = ScoreMatrix(scores=np.zeros((8, 0), np.float32), offsets=np.arange(5) * 2, scorers=())
    votes = votes_of(candidates, empty, compared_of(candidates, []), {"prior: human": 0.95})
    assert not votes.order_R.any()
    found = combine(votes)
    assert found.probabilities[0, 0] / found.probabilities[0, :2].sum() == pytest.approx(0.95)
    assert found.prior["human"].is_given


@pytest.mark.parametrize(
    ("judges", "count", "order", "expected"),
    [(3, 2, None, True), (2, 2, None, False), (2, 2, np.array([-1.0, 1.0]), True), (1, 2, np.array([-1.0, 1.0]), False),
     (1, 4, None, True)],
)  # fmt: skip
def test_what_identifies_reliabilities(judges: int, count: int, order: np.ndarray | None, expected: bool) -> None:
    truth = planted(60, count)
    assert is_identified(votes_on(judged(truth, [0.8] * judges), count, order)) == expected


@pytest.mark.parametrize("prompts", [0, 1, 2])
def test_hardly_any_pairs(prompts: int) -> None:
    found = combine(votes_on(np.ones((prompts, 3)), 2))
    assert found.probabilities.shape == (prompts, 3)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    assert (found.probabilities[:, 0] > found.probabilities[:, 1]).all()


def test_no_judges_at_all() -> None:
    found = combine(votes_on(np.zeros((1, 0)), 2, np.array([0.5, -0.5]) * ORDER))
    first, second, _ = found.probabilities[0]
    assert first / (first + second) == pytest.approx(0.75)


# ---- graded scores


def graded(noise: tuple[float, ...], seed: int = 0, prompts: int = 500) -> tuple[np.ndarray, Votes, np.ndarray]:
    """Qualities, votes and scores of judges with this noise on four responses to each prompt."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=4 * prompts)
    scores = quality[:, None] + rng.normal(size=(4 * prompts, len(noise))) * np.array(noise)
    first, second = np.triu_indices(4, 1)
    gaps = (scores.reshape(prompts, 4, -1)[:, first] - scores.reshape(prompts, 4, -1)[:, second]).reshape(
        -1, len(noise)
    )
    voters = tuple(Voter(name=f"s{k}", kind="score") for k in range(len(noise)))
    votes = votes_on(gaps, 4, voters=voters, shown_NJ=np.zeros(gaps.shape, np.int8))
    truth = np.sign(quality.reshape(prompts, 4)[:, first] - quality.reshape(prompts, 4)[:, second]).ravel()
    return truth, votes, scores


@pytest.mark.parametrize("noise", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0), (1.0, 1.0, 5.0)])
def test_graded_scores_are_weighed_by_what_they_share(noise: tuple[float, ...]) -> None:
    truth, votes, scores = graded(noise)
    found = combine(votes, scores)
    assert found.quality == "graded"
    best = scores @ (1 / np.array(noise) ** 2)
    first, second = np.triu_indices(4, 1)
    said = np.sign(best.reshape(-1, 4)[:, first] - best.reshape(-1, 4)[:, second]).ravel()
    assert error(found, truth) <= 1.1 * (said != truth).mean()
    p = found.probabilities
    stated = p[:, :2].max(axis=1)
    assert stated.mean() == pytest.approx((np.sign(p[:, 0] - p[:, 1]) == truth).mean(), abs=0.04)
    expected = [0.5 + math.asin(1 / math.sqrt(1 + sd**2)) / math.pi for sd in noise]
    assert accuracies_of(found) == pytest.approx(expected, abs=0.05)


def test_one_tied_score_changes_nothing_else() -> None:
    _, votes, scores = graded((1.0, 1.0, 1.0))
    before = combine(votes, scores)
    strength = votes.strength_NJ.copy()
    scores[1, 0], strength[0, 0] = scores[0, 0], 0.0
    after = combine(dataclasses.replace(votes, strength_NJ=strength), scores)
    assert np.abs(log_odds(after) - log_odds(before))[6:].max() < 0.1
    assert not after.probabilities[:, 2].any()


def test_a_favoured_cell_makes_no_judge_reliable() -> None:
    """A judge that only likes one cell's responses, and agrees with nobody on any other account."""
    truth, votes, scores = graded((1.0, 1.0, 50.0))
    scores[:, 2] += np.tile([100.0, 0.0, 0.0, 0.0], 500)
    found = combine(votes, scores)
    assert found.judges["s2"].accuracy < 0.6
    assert error(found, truth) < 0.22


def test_comparisons_join_graded_scores() -> None:
    truth, votes, scores = graded((1.0, 1.0))
    person = np.where(np.arange(len(truth)) % 6 == 0, truth, NAN)
    told = combine(votes.with_label("person", person), scores)
    labelled, other = np.arange(len(truth)) % 6 == 0, np.arange(len(truth)) % 6 == 1
    said = np.sign(told.probabilities[:, 0] - told.probabilities[:, 1])
    assert (said == truth)[labelled].mean() > 0.93
    alone = combine(votes, scores)
    before = np.sign(alone.probabilities[:, 0] - alone.probabilities[:, 1])
    assert (said == truth)[other].mean() >= (before == truth)[other].mean()
    assert accuracies_of(told)[:2] == accuracies_of(alone)


def test_normal_scores() -> None:
    found = normal_scores(np.array([3.0, NAN, 1.0, 1.0, 100.0]))
    assert math.isnan(found[1])
    assert found[2] == found[3] < found[0] < found[4]
    assert found[[2, 4]] == pytest.approx([-0.674, 1.150], abs=1e-3)


# ---- reading votes


def test_votes_are_read_as_they_were_shown() -> None:
    responses = tuple(Response(model=f"m{k}", text=t, version_rank=k) for k, t in enumerate(("a", "bb", "a ")))
    candidates = [Candidates(prompt=Prompt(id="q", prompt="?"), responses=responses)]
    matrix = ScoreMatrix(scores=np.array([[1.0], [3.0], [NAN]], np.float32), offsets=np.array([0, 3]), scorers=("rm",))

    def said(p: float | None, i: int, j: int, judge: str = "llm", **more: Any) -> Comparison:
        return Comparison(prompt_id="q", responses=(i, j), judge=judge, probability=p, **more)

    compared = compared_of(
        candidates,
        [said(0.9, 1, 0), said(None, 1, 2), said(0.6, 0, 1, "both", orders=(0.7, 0.5)),
         said(0.0, 0, 1, "human", annotator="ann")],
    )  # fmt: skip
    votes = votes_of(candidates, matrix, compared)
    assert [(voter.name, voter.kind) for voter in votes.voters] == [
        ("rm", "score"), ("both", "comparison"), ("llm", "comparison"), ("ann", "label")
    ]  # fmt: skip
    expected = [[-2, 0.2, -0.8, -1], [NAN] * 4, [NAN] * 4]
    np.testing.assert_allclose(votes.strength_NJ, expected, rtol=1e-6)
    np.testing.assert_array_equal(votes.shown_NJ[0], [0, 0, -1, 0])
    np.testing.assert_array_equal(votes.abstained_NJ[:, 2], [False, False, True])
    np.testing.assert_array_equal(votes.is_same_N, [False, True, False])
    np.testing.assert_array_equal(votes.longer_N, [-1, -1, 0])
    np.testing.assert_array_equal(votes.prior_N, [-1, -1, -1])
    np.testing.assert_allclose(votes.order_R, 0.75 * ORDER * np.array([-1, 0, 1]))
    np.testing.assert_array_equal(votes.only(np.array([0])).strength_NJ, votes.strength_NJ)


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

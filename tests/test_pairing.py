"""Which decided pairs are trained on, and with what strength."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from helpers import corrected, used

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.decide import Corrected, correct, from_scores
from tso_fast.correction.evidence import compared_of, score_matrix, votes_of
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.correction.pairing import accepted, select, to_pair
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, pair_row, read_candidates
from tso_fast.judges.verifier import make_verifier, verify
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Comparison, PreferencePair, Prompt, Response, Verdict

NAN = math.nan
STRATEGIES = get_args(get_type_hints(PairingConfig)["pair_strategy"])


def item(*texts: str, id: str = "q") -> Candidates:  # noqa: A002
    responses = tuple(Response(model="m", text=text, sample=i) for i, text in enumerate(texts))
    return Candidates(prompt=Prompt(id=id, prompt="?"), responses=responses)


def selected(candidates: Candidates, scores: Any, seed: int = 0, **settings: Any) -> list[Corrected]:
    config = PairingConfig(**settings)
    decided = corrected(candidates, scores, config)
    return decided.pairs(select([candidates], decided, np.array(scores, dtype=np.float32), config, seed))


def strength(scores: list[float], chosen: int, rejected: int, **settings: Any) -> PreferencePair:
    candidates = item(*"abcdefgh"[: len(scores)])
    config = PairingConfig(**settings)
    (pair,) = [p for p in used(corrected(candidates, scores, config)) if (p.chosen, p.rejected) == (chosen, rejected)]
    return to_pair(candidates, pair, scores, config)


# ---- selection


@pytest.mark.parametrize("max_pairs", [1, 2, 5, 99])
def test_max_pairs(max_pairs: int) -> None:
    assert len(selected(item(*"abcd"), [0, 1, 2, 3], max_pairs=max_pairs)) == min(max_pairs, 6)
    assert selected(item(*"ab"), [1, 1], max_pairs=max_pairs) == []


def test_best_worst_takes_the_widest_gap_then_texts_not_used_yet() -> None:
    pairs = selected(item(*"abcdef"), [0, 5, 2, 3, 1, 4], pair_strategy="best_worst", max_pairs=3)
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 0), (5, 4), (3, 2)]


def test_a_text_is_used_twice_only_when_all_are_used() -> None:
    for seed in range(50):
        pairs = selected(item(*"abcdef"), [0, 1, 2, 3, 4, 5], seed, max_pairs=4)
        first_three = [i for p in pairs[:3] for i in (p.chosen, p.rejected)]
        assert len(set(first_three[:4])) == 4
        assert len(pairs) == 4


def test_the_same_two_texts_make_one_pair() -> None:
    pairs = selected(item("right", "wrong", " right", "wrong\n", "wrong"), [1, 0, 1, 0, 0], max_pairs=9)
    assert len(pairs) == 1


def test_a_text_with_two_scores_makes_no_contradicting_pairs() -> None:
    for seed in range(20):
        assert len(selected(item("a", "b", "a"), [1, 0.5, 0], seed, max_pairs=9)) == 1


def test_random_selection_is_uniform_over_pairs() -> None:
    """Over prompts as over seeds: alike prompts do not all draw the same pair."""
    seen = [selected(item(*"abc", id=f"q{n}"), [0, 1, 2], seed=7)[0] for n in range(3000)]
    counts = np.unique([f"{p.chosen}{p.rejected}" for p in seen], return_counts=True)
    assert list(counts[0]) == ["10", "20", "21"]
    assert all(abs(n - 1000) < 5 * math.sqrt(3000 * 2 / 9) for n in counts[1])


def test_selection_depends_on_prompt_and_seed_only(gsm8k_dev: Path) -> None:
    """Not on which other prompts there are, or where this one stands."""
    candidates = read_candidates(gsm8k_dev, BadRows())[:200]
    verdicts = verify(candidates, make_verifier("numeric"), BadRows())

    def pairs_of(some: list[Candidates], seed: int = 0) -> dict[str, list[Any]]:
        ids = {c.prompt.id for c in some}
        made, _ = make_pairs(
            some,
            [v for v in verdicts if v.prompt_id in ids],
            EvidenceConfig(verifier="numeric"),
            PairingConfig(max_pairs=2),
            seed,
        )
        out: dict[str, list[Any]] = {}
        for pair in made:
            out.setdefault(pair.prompt.id, []).append(pair_row(pair))
        return out

    whole = pairs_of(candidates)
    assert len(whole) > 150
    assert pairs_of(candidates) == whole
    assert pairs_of(candidates[::-1]) == whole
    assert pairs_of(candidates[50:100]) == {c.prompt.id: p for c in candidates[50:100] if (p := whole.get(c.prompt.id))}
    assert pairs_of(candidates, seed=1) != whole


def test_chosen_never_scores_lower(gsm8k_dev: Path) -> None:
    candidates = read_candidates(gsm8k_dev, BadRows())
    verdicts = verify(candidates, make_verifier("numeric"), BadRows())
    made, info = make_pairs(candidates, verdicts, EvidenceConfig(verifier="numeric"), PairingConfig(max_pairs=3), 0)
    assert len(made) > 1000
    assert all(pair.score_chosen == 1.0 and pair.score_rejected == 0.0 for pair in made)
    assert info["used"]["keep"] + info["used"]["swap"] == len(made)
    assert max(np.unique([pair.prompt.id for pair in made], return_counts=True)[1]) == 3


def test_best_against_random_ones() -> None:
    seen = {
        (p.chosen, p.rejected)
        for seed in range(40)
        for p in selected(item(*"abcd"), [0, 3, 1, 2], seed, pair_strategy="best_random")
    }
    assert seen == {(1, 0), (1, 2), (1, 3)}


def test_every_response_against_the_middle_one() -> None:
    pairs = selected(item(*"abcde"), [0, 4, 2, 3, 1], pair_strategy="baseline", max_pairs=9)
    assert {(p.chosen, p.rejected) for p in pairs} == {(1, 2), (3, 2), (2, 0), (2, 4)}


@pytest.mark.parametrize(("strategy", "number"), [("tournament", 5), ("first_round", 3), ("all", 15)])
def test_number_of_pairs(strategy: str, number: int) -> None:
    pairs = selected(item(*"abcdef"), [0, 5, 2, 3, 1, 4], pair_strategy=strategy, max_pairs=99)
    assert len(pairs) == number
    if strategy == "first_round":
        assert len({i for p in pairs for i in (p.chosen, p.rejected)}) == 6


def test_the_most_different_response_within_the_band() -> None:
    texts = ("one two three four five", "one two three four six", "a b c d e", "one two three nine ten")
    scores = [3.0, 2.0, 0.0, 2.5]
    near = selected(item(*texts), scores, pair_strategy="diverse", diversity_band=1.5)
    far = selected(item(*texts), scores, pair_strategy="diverse")
    assert [(p.chosen, p.rejected) for p in (*near, *far)] == [(0, 3), (0, 2)]
    unigrams = selected(item("a b", "b a", "c d"), [2, 1, 0], pair_strategy="diverse", diversity_ngram=1)
    assert [(p.chosen, p.rejected) for p in unigrams] == [(0, 2)]


def test_tokens_where_they_are_known() -> None:
    responses = tuple(
        Response(model="m", text=t, sample=i, token_ids=ids)
        for i, (t, ids) in enumerate([("x", (1, 2, 3)), ("y", (1, 2, 3)), ("z", (4, 5, 6))])
    )
    pairs = selected(
        Candidates(prompt=Prompt(id="q", prompt="?"), responses=responses), [2, 1, 1.5], pair_strategy="diverse"
    )
    assert [(p.chosen, p.rejected) for p in pairs] == [(0, 2)]


def roles() -> Candidates:
    made = [("human", None, None), ("s.v1", 1, 1.0), ("m.v1", 1, 2.0), ("m.v2", 2, 2.0)]
    return Candidates(
        prompt=Prompt(id="q", prompt="?"),
        responses=tuple(Response(model=m, text=m, version_rank=v, size_b=s) for m, v, s in made),
    )


@pytest.mark.parametrize("strategy", ["all", "tournament", "best_random", "best_worst"])
@pytest.mark.parametrize(
    ("chosen_from", "rejected_from", "allowed"),
    [
        (["human"], None, {(0, 1), (0, 2), (0, 3)}),
        (["newest"], None, {(3, 1), (3, 2)}),
        (["largest"], ["s.v1"], {(2, 1), (3, 1)}),
        (["human", "m.v2"], ["m.v1"], {(0, 2), (3, 2)}),
        (None, ["human"], set()),
    ],
)
def test_roles(strategy: str, chosen_from: Any, rejected_from: Any, allowed: set[tuple[int, int]]) -> None:
    seen = set()
    for seed in range(40):
        pairs = selected(
            roles(),
            [4, 1, 2, 3],
            seed,
            pair_strategy=strategy,
            chosen_from=chosen_from,
            rejected_from=rejected_from,
            max_pairs=9,
        )
        seen |= {(p.chosen, p.rejected) for p in pairs}
    assert seen <= allowed
    assert bool(seen) == bool(allowed)
    if strategy == "all":
        assert seen == allowed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_person_overrules_scores_in_every_strategy(strategy: str) -> None:
    """What was decided against the scores is never turned round again."""
    candidates = item("a", "b", "c")
    label = Comparison(prompt_id="q", responses=(0, 1), judge="human", annotator="ann", probability=0.0)
    verdicts = [Verdict(prompt_id="q", response=i, judge="rater", score=s) for i, s in enumerate([2.0, 1.0, 0.0])]
    for seed in range(10):
        made, _ = make_pairs(
            [candidates], [*verdicts, label], EvidenceConfig(), PairingConfig(pair_strategy=strategy, max_pairs=9), seed
        )  # type: ignore[arg-type]
        assert {(p.chosen.text, p.rejected.text) for p in made} <= {("b", "a"), ("a", "c"), ("b", "c")}


def algorithm_1(scores: list[float], beta: float, number: int, uniform: Any) -> list[int]:
    """Word for word that of RSO, arXiv 2309.06657."""
    left, accepted_ones = dict(enumerate(scores)), []
    while len(accepted_ones) < number:
        best, to_remove = max(left.values()), []
        for i, score in left.items():
            if uniform() >= math.exp((score - best) / beta):
                continue
            accepted_ones.append(i)
            to_remove.append(i)
            if len(accepted_ones) == number:
                break
        for i in to_remove:
            left.pop(i)
    return accepted_ones


def exact_distribution(scores: dict[int, float], beta: float, number: int) -> dict[frozenset[int], float]:
    """Chances of every accepted set, by going through all outcomes of a pass; the best is accepted in every pass."""
    if number == 0:
        return {frozenset(): 1.0}
    best, out = max(scores.values()), {}
    for outcome in itertools.product((False, True), repeat=len(scores)):
        chance = 1.0
        for (_, score), is_taken in zip(scores.items(), outcome, strict=True):
            p = math.exp((score - best) / beta)
            chance *= p if is_taken else 1 - p
        taken = [i for i, is_taken in zip(scores, outcome, strict=True) if is_taken][:number]
        rest = {i: score for i, score in scores.items() if i not in taken}
        for others, more in exact_distribution(rest, beta, number - len(taken)).items() if chance else ():
            key = others | set(taken)
            out[key] = out.get(key, 0.0) + chance * more
    return out


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_accepted_responses_are_distributed_as_rejection_sampling_says(beta: float) -> None:
    scores = [0.0, 1.0, 0.4, 0.8]
    num_prompts = 4000
    prompts = [item(*"abcd", id=f"q{n}") for n in range(num_prompts)]
    found = accepted(prompts, np.tile(scores, num_prompts), 2, beta, seed=0).reshape(num_prompts, 4)
    counts = Counter(frozenset(np.flatnonzero(row).tolist()) for row in found)
    want = exact_distribution(dict(enumerate(scores)), beta, 2)
    assert sum(want.values()) == pytest.approx(1)
    for key, chance in want.items():
        assert abs(counts[key] - num_prompts * chance) < 4.5 * math.sqrt(num_prompts * chance * (1 - chance)) + 1, key
    drawn = [np.random.default_rng(seed_of("accepted", 0, f"q{n}")).random for n in range(99)]
    assert [set(algorithm_1(scores, beta, 2, uniform)) for uniform in drawn] == [
        set(np.flatnonzero(row).tolist()) for row in found[:99]
    ]


def test_which_responses_may_be_accepted() -> None:
    """The best for a small beta, each text once, and none without a score; they alone are paired."""
    some = [item(*"abacd"), item(*"xy", id="r")]
    scores = np.array([3.0, 1.0, 3.0, 2.0, NAN, 0.0, NAN])
    assert accepted(some, scores, 2, 1e-9, 0).tolist() == [True, False, False, True, False, True, False]
    assert accepted(some, scores, 9, 0.5, 0).tolist() == [True, True, False, True, False, True, False]
    for strategy in ("first_round", "tournament", "random", "mate"):
        for seed in range(9):
            options = {"pair_strategy": strategy, "max_pairs": 9, "accepted_responses": 2, "acceptance_beta": 1e-9}
            pairs = selected(item(*"abcdef"), [0, 5, 2, 3, 1, 4], seed, **options)
            assert [(p.chosen, p.rejected) for p in pairs] == [(1, 5)]


def mixed(*responses: tuple[str, str]) -> Candidates:
    """Responses as (model, text)."""
    made = tuple(Response(model=model, text=text) for model, text in responses)
    return Candidates(prompt=Prompt(id="q", prompt="?"), responses=made)


def test_mates_are_unlike_and_of_another_cell() -> None:
    candidates = mixed(
        ("a", "one two three four"), ("a", "five six seven eight"), ("b", "one two three nine"), ("b", "one two three")
    )
    options: dict[str, Any] = {"pair_strategy": "mate", "diversity_ngram": 1}

    def pairs(scores: list[float], **more: Any) -> list[tuple[int, int]]:
        return [(p.chosen, p.rejected) for p in selected(candidates, scores, **options, **more)]

    assert pairs([3, 0, 1, 2]) == [(0, 2)]  # of another cell, and there the less alike
    assert pairs([3, 1, 0, 2], max_pairs=2) == [(0, 2), (3, 1)]  # the next best chooses among those that are left
    assert pairs([3, 0, 4, 5]) == [(3, 1)]
    assert pairs([3, 0, NAN, NAN]) == [(0, 1)]  # of its own cell, where no other one is worse
    assert pairs([3, 0, 2.5, 2.8], min_margin=1.0) == [(0, 1)]  # a quality gap is asked for
    assert pairs([1, 1, 1, 1]) == []


def test_mates_are_chosen_within_each_prompt() -> None:
    one, two = item(*"abc"), mixed(("a", "x"), ("b", "y"), ("a", "z"))
    scores = np.array([0.0, 1.0, 2.0, 9.0, 8.0, 7.0], dtype=np.float32)
    config = PairingConfig(pair_strategy="mate", max_pairs=1)
    votes_of_both = [[one], [dataclasses.replace(two, prompt=Prompt(id="r", prompt="?"))]]
    alone = [
        select(part, corrected(part[0], scores[k : k + 3], config), scores[k : k + 3], config, 0).tolist()
        for part, k in zip(votes_of_both, (0, 3), strict=True)
    ]
    both = [*votes_of_both[0], *votes_of_both[1]]
    matrix = score_matrix(both, [])
    votes = votes_of(both, matrix, compared_of(both, []))
    decided = correct(both, votes, from_scores(votes, scores.astype(np.float64)), config)
    assert select(both, decided, scores, config, 0).tolist() == [alone[0][0], 3 + alone[1][0]]


# ---- strength


def test_unit_scale_is_the_default_and_labels_are_hard() -> None:
    pair = strength([0.25, 1.0], 1, 0)
    assert (pair.scale, pair.soft_label, pair.margin) == (1.0, 1.0, 0.0)
    assert (pair.score_chosen, pair.score_rejected) == (1.0, 0.25)
    assert (pair.chosen.text, pair.rejected.text) == ("b", "a")
    assert (pair.prior, pair.decision, pair.reason) == ("none", "keep", "evidence alone")


def test_scale_by_gap() -> None:
    assert strength([0.25, 1.0, 0.5], 1, 0, scale_by="gap").scale == 0.75
    assert strength([0.25, 1.0, 0.5], 1, 2, scale_by="gap").scale == 0.5


def test_scale_by_hardness_is_twice_the_share_below_the_chosen() -> None:
    scores = [0.0, 1.0, 1.0, 0.5, NAN]
    assert strength(scores, 1, 0, scale_by="hardness").scale == 2 * 2 / 4  # two of four known scores are lower
    assert strength(scores, 3, 0, scale_by="hardness").scale == 2 * 1 / 4
    assert strength([1.0, 0.0, 0.0, 0.0], 0, 1, scale_by="hardness").scale == 1.5


def test_soft_label_is_a_share_of_what_came_with_the_responses() -> None:
    config = PairingConfig(soft_label_by="score_share", soft_label_score="visits")
    for visits, label in (((6.0, 2.0), 0.75), ((1.0, 3.0), 0.5), ((0.0, 0.0), 0.5)):
        responses = tuple(Response(model=f"m{v}", text=str(v), scores={"visits": v}) for v in visits)
        item = Candidates(prompt=Prompt(id="q", prompt="?"), responses=responses)
        corrected = Corrected(chosen=0, rejected=1, prior="none", decision="keep", reason="", gap=0.5)
        assert to_pair(item, corrected, [1.0, 0.5], config).soft_label == label


def test_soft_label_is_the_sigmoid_of_the_gap() -> None:
    assert strength([0.0, 0.5], 1, 0, soft_label_kappa=3.0).soft_label == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert strength([0.0, 0.5], 1, 0, soft_label_kappa=0.0).soft_label == 0.5
    assert strength([0.0, 1e6], 1, 0, soft_label_kappa=1e6).soft_label == 1.0


def test_win_rates_are_over_the_others_or_over_all() -> None:
    candidates, config = item("a", "b", "c", "d"), PairingConfig(win_rates="others")
    scores, win_rates = [3.0, 2.0, 1.0, NAN], [1.0, 0.5, 0.0, NAN]
    pair = next(p for p in used(corrected(candidates, scores, config)) if (p.chosen, p.rejected) == (0, 2))
    of_others, of_all = (
        to_pair(candidates, pair, scores, dataclasses.replace(config, win_rates=kind), win_rates=win_rates).win_rates
        for kind in ("others", "all")
    )
    assert of_others == (1.0, 0.0)
    assert of_all == pytest.approx((2.5 / 3, 0.5 / 3))  # of three known ones, one itself, a tie
    unknown = to_pair(candidates, pair, scores, dataclasses.replace(config, soft_label_kappa=1.0), win_rates=[NAN] * 4)
    assert unknown.win_rates == (unknown.soft_label, 1 - unknown.soft_label)


def test_a_further_response_is_the_first_of_the_named_model() -> None:
    candidates, scores = item("a", "b", "c"), [3.0, 2.0, 1.0]
    named = dataclasses.replace(candidates.responses[1], model="greedy")
    candidates = dataclasses.replace(candidates, responses=(candidates.responses[0], named, candidates.responses[2]))
    config = PairingConfig(extra_from="greedy")
    pair = used(corrected(candidates, scores, config))[0]
    assert to_pair(candidates, pair, scores, config).extra == (named,)
    with pytest.raises(InputError, match=r"q: extra_from: 'greed' has no response; expected one of .*greedy"):
        to_pair(candidates, pair, scores, PairingConfig(extra_from="greed"))


def test_margin_is_proportional_to_the_gap() -> None:
    assert strength([0.0, 0.5], 1, 0, margin_weight=3.0).margin == 1.5


@pytest.mark.parametrize("scale_by", ["unit", "gap", "hardness"])
def test_without_evidence_every_pair_counts_alike(scale_by: str) -> None:
    """Scale 1; the gap is 0, so a soft label is 1/2 and the margin 0."""
    candidates = Candidates(
        prompt=Prompt(id="q", prompt="?"),
        responses=(Response(model="v1", text="a", version_rank=1), Response(model="v0", text="b", version_rank=0)),
    )
    config = PairingConfig(scale_by=scale_by, soft_label_kappa=2.0, margin_weight=1.0)  # type: ignore[arg-type]
    (decided,) = used(corrected(candidates, [NAN, NAN], config))
    pair = to_pair(candidates, decided, [NAN, NAN], config)
    assert (pair.scale, pair.soft_label, pair.margin) == (1.0, 0.5, 0.0)
    assert (pair.score_chosen, pair.score_rejected, pair.reason) == (None, None, "prior alone")


def test_ranges() -> None:
    r = random.Random("pairing")
    for _ in range(300):
        candidates = item(*(r.choice("abcdef") for _ in range(r.randrange(8))))
        scores = [r.choice([NAN, 0.0, 0.3, 0.7, 1.0]) for _ in candidates.responses]
        config = PairingConfig(
            scale_by=r.choice(["unit", "gap", "hardness"]),
            soft_label_kappa=r.choice([None, 4.0]),
            margin_weight=r.choice([0.0, 2.0]),
            max_pairs=r.randrange(1, 9),
            pair_strategy=r.choice(STRATEGIES),
        )
        chosen = selected(candidates, scores, r.randrange(9), **vars(config))
        assert len(chosen) <= config.max_pairs
        made = [to_pair(candidates, pair, scores, config) for pair in chosen]
        assert len({frozenset((p.chosen.text, p.rejected.text)) for p in made}) == len(made)
        for pair in made:
            assert pair.score_chosen > pair.score_rejected
            assert 0 < pair.scale <= 2
            assert 0.5 <= pair.soft_label <= 1
            assert 0 <= pair.margin <= 2

"""Pairs from scores: the C++ against its Python reference, both against cases worked by hand and what must hold."""

import threading
import time
from itertools import combinations, pairwise, product

import numpy as np
import pytest

from tso_fast.scoring import (
    DECIDED_STRATEGIES,
    STRATEGIES,
    pairwise_distances,
    select_decided,
    select_decided_reference,
    select_pairs,
    select_pairs_reference,
)

NAN = np.nan
BOTH = pytest.mark.parametrize("function", [select_pairs, select_pairs_reference])
BOTH_DECIDED = pytest.mark.parametrize("function", [select_decided, select_decided_reference])
EACH = pytest.mark.parametrize("strategy", STRATEGIES)


def ragged(seed, num_prompts=40, max_rows=9, missing=0.2, levels=6, min_rows=0):
    """Scores on a few levels, so that ties abound; prompts without rows and without scores."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(min_rows, max_rows + 1, num_prompts))]).astype(np.int64)
    scores = (rng.integers(0, levels, offsets[-1]) - 2).astype(np.float32) / 8
    scores[rng.random(len(scores)) < missing] = NAN
    for p in rng.choice(num_prompts, num_prompts // 6, replace=False):
        scores[offsets[p] : offsets[p + 1]] = NAN
    return scores, offsets


def random_options(rng, strategy, scores, offsets):
    """Each option is there or not."""
    R, P = len(scores), len(offsets) - 1
    prompts = np.repeat(np.arange(P), np.diff(offsets))
    first, second = rng.integers(0, R, (2, 6 * R)) if R else np.zeros((2, 0), np.int64)
    is_pair = (prompts[first] == prompts[second]) & (first != second)
    available = {
        "positives": rng.random(R) < 0.6,
        "negatives": rng.random(R) < 0.6,
        "text_ids": rng.integers(-3, 4, R),
        "forbidden": np.stack([first, second], axis=1)[is_pair],
        "keys": rng.integers(0, 2**64, P, dtype=np.uint64),
    }
    if strategy in ("best_worst", "random"):
        available["reuse_texts"] = bool(rng.integers(2))
    if strategy == "baseline":
        available["baseline"] = np.array([rng.integers(a - 1, b) if a < b else -1 for a, b in pairwise(offsets)])
        available["baseline"][available["baseline"] < offsets[:-1]] = -1
    if strategy == "diverse":
        available["band"] = 0.3
    options = {name: value for name, value in available.items() if rng.random() < 0.4}
    if strategy == "diverse":
        size = int((np.diff(offsets) ** 2).sum())
        options["distances"] = rng.integers(0, 5, size).astype(np.float32) / 4
    return options


def one_prompt(function, scores, **options):
    pairs, margin = function(np.array(scores, np.float32), np.array([0, len(scores)]), **options)
    assert pairs.dtype == np.int64
    assert margin.dtype == np.float32
    assert pairs.shape == (len(margin), 2)
    return list(map(tuple, pairs.tolist()))


# Shapes: usual; many rows, beyond std::sort's insertion sort; no ties; all ties; nearly nothing scored.
@pytest.mark.parametrize(
    "shape",
    [{}, {"max_rows": 37, "num_prompts": 5}, {"levels": 10**6}, {"levels": 1}, {"missing": 0.9}],
    ids=str,
)
@EACH
def test_agrees_with_reference(strategy, shape):
    rng = np.random.default_rng(1)
    for seed in range(8):
        scores, offsets = ragged(seed, **shape)
        options = random_options(rng, strategy, scores, offsets)
        for max_pairs in (1, 3) if seed % 2 else (2, None):
            options |= {"max_pairs": max_pairs, "min_margin": [0.0, 0.125, 0.2][seed % 3], "seed": seed - 1}
            got = select_pairs(scores, offsets, strategy=strategy, **options)
            expected = select_pairs_reference(scores, offsets, strategy=strategy, **options)
            np.testing.assert_array_equal(got[0], expected[0])
            assert got[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16, 21])
def test_best_worst_of_many_alike_prompts(n):
    extension = pytest.importorskip("tso_fast._C")
    # Those are computed eight at once where a thread's eighth of the prompts has as many. Ties, gaps and prompts
    # without any score are among them.
    rng = np.random.default_rng(n)
    for num_prompts in (7, 64, 75, 150):
        scores = rng.integers(-2, 3, n * num_prompts).astype(np.float32) / 4
        scores[rng.random(len(scores)) < 0.3] = np.nan
        scores[n : 2 * n] = np.nan
        offsets = np.arange(num_prompts + 1) * n
        for min_margin in (0.0, 0.5):
            options = {"strategy": "best_worst", "max_pairs": 1, "min_margin": min_margin}
            expected = select_pairs_reference(scores, offsets, **options)
            for isa in extension.scoring_isas():
                got = extension.select_pairs(
                    scores,
                    offsets,
                    **options,
                    positives=None,
                    negatives=None,
                    text_ids=None,
                    forbidden=None,
                    keys=None,
                    baseline=None,
                    distances=None,
                    band=np.inf,
                    reuse_texts=False,
                    seed=0,
                    num_threads=1,
                    isa=isa,
                )
                np.testing.assert_array_equal(got[0], expected[0])
                np.testing.assert_array_equal(got[1], expected[1])
                assert got[2]


@BOTH
@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([1, 4, 2, 3], {}, [(1, 0), (3, 2)]),
        ([1, 4, 2, 3], {"max_pairs": 1}, [(1, 0)]),
        ([1, 4, 2, 3], {"min_margin": 1.0}, [(1, 0)]),
        ([1, 4, 2, 3], {"min_margin": 3.0}, []),
        ([NAN, 4, 2, NAN, 3], {}, [(1, 2)]),
        # Ties go to the lower row: of the two best, and of the two worst.
        ([0, 1, 0, 1], {}, [(1, 0), (3, 2)]),
        ([5, 5, 5], {}, []),
        ([3, 2, 1], {}, [(0, 2)]),
        # 0-1 and 1-2 have the same gap: the better chosen one first.
        ([3, 2, 1], {"reuse_texts": True}, [(0, 2), (0, 1), (1, 2)]),
        ([1, 4, 2, 3], {"positives": [True, False, True, True]}, [(3, 0)]),
        ([1, 4, 2, 3], {"negatives": [False, True, True, True]}, [(1, 2)]),
        ([1, 4, 2, 3], {"positives": [False] * 4}, []),
        # Row 3 is the best negative's partner only while it is no chosen one.
        ([1, 4, 2, 3], {"negatives": [False, False, True, True]}, [(1, 2)]),
        ([1, 4, 2, 3], {"forbidden": [[0, 1]]}, [(1, 2), (3, 0)]),
        ([1, 4, 2, 3], {"forbidden": [[0, 1], [1, 2], [3, 1], [2, 3]]}, [(3, 0)]),
        # Rows 0 and 1 are one text that a judge scored in two ways.
        ([1, 4, 2, 3], {"text_ids": [7, 7, 8, 9]}, [(1, 2)]),
        ([1, 4, 2, 3], {"text_ids": [7, 7, 8, 8], "reuse_texts": True}, [(1, 2)]),
        ([1e30, 1, 0, 5], {}, [(0, 2), (3, 1)]),
    ],
)
def test_best_worst_by_hand(function, scores, options, expected):
    dtypes = {"positives": bool, "negatives": bool, "forbidden": np.int64, "text_ids": np.int64}
    options = {name: np.array(v, dtypes[name]) if name in dtypes else v for name, v in options.items()}
    assert one_prompt(function, scores, **({"strategy": "best_worst", "max_pairs": None} | options)) == expected


@BOTH
def test_all_by_hand(function):
    options = {"strategy": "all", "max_pairs": None}
    assert one_prompt(function, [1, 4, 2], **options) == [(1, 0), (1, 2), (2, 0)]
    assert one_prompt(function, [1, 4, 2], min_margin=1.5, **options) == [(1, 0), (1, 2)]
    assert one_prompt(function, [1, 4, 2], **options | {"max_pairs": 2}) == [(1, 0), (1, 2)]
    assert one_prompt(function, [1, 4, 2, NAN, 2], **options) == [(1, 0), (1, 2), (1, 4), (2, 0), (4, 0)]
    # Texts a, b, b, a: of the four pairs that are a against b, whichever won, the widest.
    ids = np.array([0, 1, 1, 0])
    assert one_prompt(function, [1, 4, 2, 3], text_ids=ids, **options) == [(1, 0)]


@BOTH
def test_baseline_by_hand(function):
    options = {"strategy": "baseline", "max_pairs": None}
    # Ranked 9 7 5 3 1: the median is row 2; gaps 4, 4, 2, 2.
    scores = [1, 9, 5, 7, 3]
    assert one_prompt(function, scores, **options) == [(1, 2), (2, 0), (3, 2), (2, 4)]
    assert one_prompt(function, scores, min_margin=2.0, **options) == [(1, 2), (2, 0)]
    # Of four scored, the better of the two in the middle.
    assert one_prompt(function, [1, 9, NAN, 7, 3], **options) == [(3, 0), (3, 4), (1, 3)]
    given = {"baseline": np.array([4])}
    assert one_prompt(function, scores, **given, **options) == [(1, 4), (3, 4), (2, 4), (4, 0)]
    assert one_prompt(function, [1, 9, 5, 7, NAN], **given, **options) == []
    assert one_prompt(function, scores, baseline=np.array([-1]), **options) == [(1, 2), (2, 0), (3, 2), (2, 4)]
    # A response that is the same text as another is compared once, one with the baseline's text not at all.
    assert one_prompt(function, scores, text_ids=np.array([0, 1, 2, 1, 2]), **options) == [(1, 2), (2, 0)]


@BOTH
def test_diverse_by_hand(function):
    distances = np.array(
        [
            [0.0, 0.2, 0.9, 0.5, 0.5],
            [0.2, 0.0, 0.1, 0.1, 0.1],
            [0.9, 0.1, 0.0, 0.1, 0.1],
            [0.5, 0.1, 0.1, 0.0, 0.1],
            [0.5, 0.1, 0.1, 0.1, 0.0],
        ],
        np.float32,
    )
    options = {"strategy": "diverse", "max_pairs": 1, "distances": distances.ravel()}
    scores = [9, 8, 1, 7, 6]
    assert one_prompt(function, scores, **options) == [(0, 2)]
    assert one_prompt(function, scores, band=4.0, **options) == [(0, 3)]  # as far as 4, but the lower row
    assert one_prompt(function, scores, band=2.0, **options) == [(0, 3)]  # at most the band: 2 is within
    assert one_prompt(function, scores, band=1.5, **options) == [(0, 1)]
    assert one_prompt(function, scores, band=3.0, min_margin=2.0, **options) == [(0, 4)]
    assert one_prompt(function, scores, band=0.5, **options) == []
    assert one_prompt(function, scores, **options | {"max_pairs": None}) == [(0, 2), (0, 3), (0, 4), (0, 1)]
    # The best of those that have a partner: without 0's pairs it is 1.
    forbidden = np.array([[1, 0], [0, 2], [3, 0], [0, 4]])
    assert one_prompt(function, scores, forbidden=forbidden, **options) == [(1, 2)]


@BOTH
def test_rounds_by_hand(function):
    for n in range(10):
        scores = np.random.default_rng(n).permutation(n).astype(np.float32)
        for seed in range(5):
            first = one_prompt(function, scores, strategy="first_round", max_pairs=None, seed=seed)
            matches = one_prompt(function, scores, strategy="tournament", max_pairs=None, seed=seed)
            assert len(first) == n // 2
            assert len({row for pair in first for row in pair}) == 2 * (n // 2)
            assert matches[: n // 2] == first
            # Everyone but the winner loses once, and a loser never plays again.
            assert len(matches) == max(0, n - 1)
            losers = [loser for _, loser in matches]
            assert len(set(losers)) == len(losers)
            for i, (winner, _) in enumerate(matches):
                assert winner not in losers[:i]
            if n > 1:
                assert scores[matches[-1][0]] == n - 1
    # Equal scores meet, but are no pair.
    assert one_prompt(function, [2, 2, 2, 2], strategy="tournament", max_pairs=None) == []
    assert len(one_prompt(function, [2, 2, 2, 1], strategy="tournament", max_pairs=None)) == 1


@BOTH
def test_draws_are_uniform_and_distinct(function):
    options = {"strategy": "best_random", "max_pairs": 3}
    for seed in range(10):
        pairs = one_prompt(function, [5, 1, 9, 3, NAN, 9, 2], seed=seed, **options)
        assert all(chosen == 2 for chosen, _ in pairs)
        assert len({rejected for _, rejected in pairs}) == 3
        assert {rejected for _, rejected in pairs} <= {0, 1, 3, 6}
    assert sorted(one_prompt(function, [3, 2, 1], strategy="random", max_pairs=None)) == [(0, 1), (0, 2), (1, 2)]
    for seed in range(10):  # disjoint while others are left
        pairs = one_prompt(function, [1, 2, 3, 4, 5], strategy="random", max_pairs=3, seed=seed)
        assert len({row for pair in pairs[:2] for row in pair}) == 4
        assert len(set(pairs)) == 3
        assert pairs[:2] == one_prompt(
            function, [1, 2, 3, 4, 5], strategy="random", max_pairs=3, seed=seed, reuse_texts=False
        )


# Upper 0.1 % points of chi-square at 1, 2, 3, 9, 14 degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 9: 27.88, 14: 36.12}


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [("random", 10), ("best_random", 4), ("first_round", 15), ("tournament", 15)],
)
def test_draws_are_uniform(strategy, kinds):
    n = 6 if kinds == 15 else 5
    P = 20000
    scores = np.tile(np.arange(n, dtype=np.float32), P)
    offsets = np.arange(P + 1) * n
    pairs, _ = select_pairs(scores, offsets, strategy=strategy, max_pairs=1, seed=11)
    _, counts = np.unique(pairs % n, axis=0, return_counts=True)
    assert counts.sum() == P
    assert len(counts) == kinds
    assert ((counts - P / kinds) ** 2 / (P / kinds)).sum() < CHI_SQUARE[kinds - 1]


def test_second_and_later_draws_are_uniform():
    P = 20000
    scores, offsets = np.tile(np.arange(3, dtype=np.float32), P), np.arange(P + 1) * 3
    pairs, _ = select_pairs(scores, offsets, strategy="random", max_pairs=2, seed=5)
    second = pairs[1::2] % 3
    first = pairs[::2] % 3
    for pair in ((1, 0), (2, 0), (2, 1)):  # after each first pair, both others
        _, counts = np.unique(second[(first == pair).all(axis=1)], axis=0, return_counts=True)
        assert len(counts) == 2
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < CHI_SQUARE[1]


@EACH
def test_what_must_hold(strategy):
    rng = np.random.default_rng(3)
    for seed in range(25):
        scores, offsets = ragged(seed, num_prompts=60)
        prompts = np.repeat(np.arange(60), np.diff(offsets))
        options = random_options(rng, strategy, scores, offsets)
        max_pairs, min_margin = int(rng.integers(1, 5)), [0.0, 0.125][seed % 2]
        pairs, margin = select_pairs(
            scores, offsets, strategy=strategy, max_pairs=max_pairs, min_margin=min_margin, seed=seed, **options
        )
        chosen, rejected = pairs.T
        assert (margin > min_margin).all()
        np.testing.assert_array_equal(margin, scores[chosen] - scores[rejected])
        assert (prompts[chosen] == prompts[rejected]).all()
        assert (np.diff(prompts[chosen]) >= 0).all()
        assert np.bincount(prompts[chosen], minlength=1).max() <= max_pairs
        assert options.get("positives", np.ones(len(scores), bool))[chosen].all()
        assert options.get("negatives", np.ones(len(scores), bool))[rejected].all()
        names = options.get("text_ids", np.arange(len(scores)))
        texts = [(p, frozenset(two)) for p, two in zip(prompts[chosen], names[pairs].tolist(), strict=True)]
        assert all(len(two) == 2 for _, two in texts)
        assert len(set(texts)) == len(texts)
        forbidden = set(map(frozenset, options.get("forbidden", np.zeros((0, 2), int)).tolist()))
        assert not forbidden & set(map(frozenset, pairs.tolist()))
        if "band" in options:
            assert (margin <= np.float32(options["band"])).all()


@EACH
def test_prompts_do_not_see_each_other(strategy):
    """With keys, permuting the prompts permutes the result, and so does leaving some out."""
    P, n = 50, 7
    rng = np.random.default_rng(0)
    scores = rng.permutation(P * n).astype(np.float32).reshape(P, n)
    scores[rng.random((P, n)) < 0.2] = NAN
    keys = rng.integers(-(2**63), 2**63 - 1, P)
    distances = rng.random((P, n, n), np.float32)

    def select(which):
        more = {"distances": distances[which].ravel()} if strategy == "diverse" else {}
        pairs, margin = select_pairs(
            scores[which].ravel(),
            np.arange(len(which) + 1) * n,
            strategy=strategy,
            max_pairs=3,
            keys=keys[which],
            seed=9,
            **more,
        )
        found = {int(p): [] for p in which}
        for pair, gap in zip(pairs.tolist(), margin.tolist(), strict=True):
            found[int(which[pair[0] // n])].append((pair[0] % n, pair[1] % n, gap))
        return found

    everything = select(np.arange(P))
    assert select(rng.permutation(P)) == everything
    few = rng.permutation(P)[:13]
    assert select(few) == {p: everything[p] for p in few.tolist()}


def test_seed_and_key_decide_the_draw():
    scores, offsets = np.tile(np.arange(16, dtype=np.float32), 8), np.arange(9) * 16

    def draw(**options):
        return select_pairs(scores, offsets, strategy="random", max_pairs=2, **options)[0]

    assert (draw() == draw(seed=0)).all()
    assert (draw(seed=1) != draw(seed=2)).any()
    assert (draw(seed=-1) == draw(seed=2**64 - 1)).all()
    assert (draw() == draw(keys=np.arange(8))).all()
    assert (draw(keys=np.arange(8)) == draw(keys=np.arange(8, dtype=np.uint64))).all()
    same = draw(keys=np.full(8, -5)) % 16
    assert (same.reshape(8, -1) == same[:2].ravel()).all()


@EACH
def test_threads_change_nothing(strategy):
    scores, offsets = ragged(4, num_prompts=20000, max_rows=16)
    distances = np.random.default_rng(0).random((np.diff(offsets) ** 2).sum(), np.float32)
    more = {"distances": distances} if strategy == "diverse" else {}
    results = [
        select_pairs(scores, offsets, strategy=strategy, max_pairs=2, num_threads=threads, **more)
        for threads in (1, 2, 3, 7)
    ]
    for pairs, margin in results[1:]:
        assert pairs.tobytes() == results[0][0].tobytes()
        assert margin.tobytes() == results[0][1].tobytes()


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0, 0], [1, 0, 1]], ids=str)
def test_nothing_to_pair(sizes):
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    scores, distances = np.zeros(sum(sizes), np.float32), np.zeros(sum(n * n for n in sizes), np.float32)
    for function, strategy, max_pairs in product((select_pairs, select_pairs_reference), STRATEGIES, (1, None)):
        more = {"distances": distances} if strategy == "diverse" else {}
        pairs, margin = function(scores, offsets, strategy=strategy, max_pairs=max_pairs, **more)
        assert pairs.shape == (0, 2), strategy
        assert margin.shape == (0,), strategy


def test_takes_distances_as_they_come():
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 5, 7, 8, 9], np.int32)
    token_offsets = np.array([0, 4, 8, 11])
    offsets = np.array([0, 3])
    distances = pairwise_distances(tokens, token_offsets, offsets, n=2)
    scores = np.array([3, 1, 2], np.float32)
    pairs, _ = select_pairs(scores, offsets, strategy="diverse", max_pairs=1, distances=distances)
    assert pairs.tolist() == [[0, 2]]


def test_releases_the_gil():
    scores, offsets = ragged(0, num_prompts=3000, max_rows=40, min_rows=40, levels=10**6)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    other.start()
    try:
        start = time.perf_counter()
        select_pairs(scores, offsets, strategy="all", max_pairs=1, num_threads=1)
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
    # The middle half lies inside the C++ call: with the GIL held, no tick could fall there.
    quarter = (end - start) / 4
    assert any(start + quarter < t < end - quarter for t in ticks)


SCORES, OFFSETS = np.array([1, 2, 3, 4, 5], np.float32), np.array([0, 3, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"consensus": SCORES.astype(float)}, r"consensus must be \[R\] float32, got float64"),
        ({"consensus": SCORES[None]}, r"consensus must be \[R\] float32, got shape \[1, 5\]"),
        ({"consensus": np.array([1, np.inf, 3, -np.inf, 5], np.float32)}, r"consensus\[1\] is inf \(2 infinite in all"),
        ({"strategy": "best_wort"}, "unknown strategy 'best_wort'; known: best_worst, .*; did you mean 'best_worst'"),
        ({"max_pairs": 0}, "max_pairs must be an int >= 1, or None"),
        ({"max_pairs": 1.5}, "max_pairs must be an int >= 1"),
        ({"max_pairs": True}, "max_pairs must be an int >= 1"),
        ({"min_margin": -0.1}, "min_margin must be a number >= 0"),
        ({"min_margin": NAN}, "min_margin must be a number >= 0.*got nan"),
        ({"seed": 1.0}, "seed must be an int"),
        ({"positives": np.ones(4, bool)}, r"positives must be \[R\] with R = 5, got 4"),
        ({"negatives": np.ones(5)}, r"negatives must be \[R\] bool, got float64"),
        ({"text_ids": np.ones(5, np.int32)}, r"text_ids must be \[R\] int64"),
        ({"keys": np.ones(3, np.int64)}, r"keys must be \[P\] with P = 2, got 3"),
        ({"keys": np.ones(2)}, r"keys must be \[P\] uint64, got float64"),
        ({"forbidden": np.array([0, 1])}, r"forbidden must be \[F, 2\]"),
        ({"forbidden": np.array([[0, 1, 2]])}, r"forbidden must be \[F, 2\] int64, got shape \[1, 3\]"),
        ({"forbidden": np.array([[0, 1], [2, 3]])}, r"forbidden\[1\] is \[2, 3\], rows of the prompts \[0, 1\]"),
        ({"forbidden": np.array([[0, 5]])}, r"forbidden\[0, 1\] is 5; expected a row in \[0, R = 5\)"),
        ({"band": 1.0}, "strategy 'best_worst' does not read band.*'diverse'"),
        ({"distances": np.zeros(13, np.float32)}, "'best_worst' does not read distances"),
        ({"baseline": np.array([0, 3])}, "'best_worst' does not read baseline"),
        ({"strategy": "all", "reuse_texts": True}, "'all' does not read reuse_texts.*'best_worst' or 'random'"),
        ({"strategy": "baseline", "baseline": np.array([0, 2])}, r"baseline\[1\] is 2; expected a row of prompt 1, in"),
        ({"strategy": "diverse"}, "'diverse' needs distances.*pairwise_distances"),
        ({"strategy": "diverse", "distances": np.zeros(12, np.float32)}, r"distances must be \[D\] with D = 13"),
        ({"strategy": "diverse", "distances": np.full(13, NAN, np.float32)}, r"distances\[0\] is NaN \(13 in all\)"),
        ({"strategy": "diverse", "distances": np.zeros(13)}, r"distances must be \[D\] float32"),
        ({"strategy": "diverse", "distances": np.zeros(13, np.float32), "band": NAN}, "band must be above min_margin"),
        (
            {"strategy": "diverse", "distances": np.zeros(13, np.float32), "band": 0.5, "min_margin": 0.5},
            "band must be above min_margin = 0.5",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"consensus": SCORES, "offsets": OFFSETS, "strategy": "best_worst", "max_pairs": 1} | change
    for function in (select_pairs, select_pairs_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_takes_views_and_leaves_arguments_alone():
    wide = np.arange(20, dtype=np.float32)
    pairs, margin = select_pairs(wide[::2], np.array([0, 5, 10]), strategy="best_worst", max_pairs=1)
    assert pairs.tolist() == [[4, 0], [9, 5]]
    assert margin.tolist() == [8, 8]
    np.testing.assert_array_equal(wide, np.arange(20))
    assert pairs.flags.owndata
    assert pairs.flags.writeable


def test_margin_is_compared_as_it_is_returned():
    # In float64 the gap of these float32 is below 0.1, in float32 it is 0.1 exactly.
    low, high = np.float32(0.4), np.float32(0.5)
    for function in (select_pairs, select_pairs_reference):
        for min_margin in (float(high - low), np.nextafter(float(high - low), 0)):
            pairs, _ = function(
                np.array([low, high]), np.array([0, 2]), strategy="all", max_pairs=1, min_margin=min_margin
            )
            assert len(pairs) == 0


def decided(seed, with_texts):
    """Any pairs, contradictions and repeats included."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 15, 40)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    pairs = rng.integers(0, 6, (offsets[-1], 2)) + 6 * np.repeat(np.arange(40), counts)[:, None]
    margin = (rng.integers(-2, 5, offsets[-1]) / 4).astype(np.float32)
    return pairs, margin, offsets, rng.integers(0, 5, 240) if with_texts else None


@pytest.mark.parametrize("strategy", DECIDED_STRATEGIES)
def test_decided_agrees_with_reference(strategy):
    for seed in range(20):
        pairs, margin, offsets, text_ids = decided(seed, seed % 2)
        options = {"strategy": strategy, "max_pairs": [1, 2, 4, None][seed % 4], "seed": seed, "text_ids": text_ids}
        if seed % 3 and strategy != "all":
            options["reuse_texts"] = bool(seed % 3 - 1)
        if seed % 5:
            options["keys"] = np.arange(40)[::-1].copy()
        got = select_decided(pairs, margin, offsets, num_threads=seed % 4, **options)
        np.testing.assert_array_equal(got, select_decided_reference(pairs, margin, offsets, **options))
        assert got.dtype == np.int64


@BOTH_DECIDED
def test_decided_by_hand(function):
    pairs = np.array([[0, 1], [2, 1], [1, 0], [2, 3], [0, 3]])
    margin = np.array([1, 3, 2, 0, 1], np.float32)
    offsets = np.array([0, 5])
    options = {"strategy": "best_worst", "max_pairs": None}
    assert function(pairs, margin, offsets, **options).tolist() == [1, 4]
    # 1 and 4 use every text; then all others have two used ones. 2 against 0, the wider one, goes before its reverse.
    assert function(pairs, margin, offsets, reuse_texts=True, **options).tolist() == [1, 4, 2, 3]
    assert function(pairs, margin, offsets, strategy="all", max_pairs=3).tolist() == [1, 2, 4]
    ids = np.array([0, 1, 1, 1])
    assert function(pairs, margin, offsets, strategy="all", max_pairs=None, text_ids=ids).tolist() == [2]
    drawn = {tuple(function(pairs, margin, offsets, strategy="random", max_pairs=2, seed=s)) for s in range(60)}
    assert drawn == {(0, 3), (1, 4), (2, 3), (3, 0), (3, 2), (4, 1)}  # disjoint while others are left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "tournament"}, "unknown strategy 'tournament'; known: best_worst, random, all"),
        ({"pairs": np.array([[0, 1], [0, -1]])}, r"pairs\[1, 1\] is -1; expected a row >= 0"),
        ({"text_ids": np.array([1])}, r"pairs\[0, 1\] is 1; expected a row in \[0, 1\), the rows of text_ids"),
        ({"margin": np.array([1, NAN], np.float32)}, r"margin\[1\] is nan"),
        ({"margin": np.array([1], np.float32)}, r"margin must be \[C\] with C = 2, got 1"),
        ({"pairs": np.array([[0, 1, 2]])}, r"pairs must be \[C, 2\]"),
        ({"strategy": "all", "reuse_texts": False}, "'all' does not read reuse_texts"),
    ],
)
def test_decided_bad_input(change, message):
    arguments = {
        "pairs": np.array([[0, 1], [2, 3]]),
        "margin": np.ones(2, np.float32),
        "offsets": np.array([0, 2]),
        "strategy": "best_worst",
        "max_pairs": 1,
    } | change
    for function in (select_decided, select_decided_reference):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_strategies_differ():
    """No two strategies are one by mistake."""
    scores, offsets = ragged(2, num_prompts=30, max_rows=12, levels=10**6, min_rows=6)
    distances = np.random.default_rng(0).random((np.diff(offsets) ** 2).sum(), np.float32)
    results = {
        s: select_pairs(
            scores, offsets, strategy=s, max_pairs=4, **({"distances": distances} if s == "diverse" else {})
        )[0].tobytes()
        for s in STRATEGIES
    }
    for a, b in combinations(STRATEGIES, 2):
        assert results[a] != results[b], (a, b)

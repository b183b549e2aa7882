"""Consensus: the C++ against its numpy reference, both against cases worked by hand."""

import itertools
import re
import sys
import threading
import time

import numpy as np
import pytest

from tso_fast import scoring
from tso_fast.scoring import (
    METHODS,
    NORMALIZATIONS,
    Agreement,
    Consensus,
    agreement,
    agreement_reference,
    bradley_terry,
    bradley_terry_reference,
    consensus,
    consensus_reference,
)

NAN = np.nan
COMBINATIONS = [
    (method, normalize)
    for method in METHODS
    for normalize in (NORMALIZATIONS if method in ("mean", "median") else ("none",))
]
BOTH = pytest.mark.parametrize("function", [consensus, consensus_reference])
EACH = pytest.mark.parametrize(("method", "normalize"), COMBINATIONS)


def ragged(seed, num_prompts=40, num_scorers=5, max_rows=9, missing=0.3, levels=6):
    """Scores on a few levels, so that ties abound; prompts without rows, rows and columns without scores."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, max_rows + 1, num_prompts))]).astype(np.int64)
    scores = (rng.integers(0, levels, (offsets[-1], num_scorers)) - 2).astype(np.float32) / 8
    scores[rng.random(scores.shape) < missing] = NAN
    scores[rng.random(len(scores)) < 0.1] = NAN
    for p in rng.choice(num_prompts, num_prompts // 4, replace=False):
        scores[offsets[p] : offsets[p + 1], rng.integers(num_scorers)] = NAN
    return scores, offsets


def column(*values):
    return np.array(values, np.float32)[:, None]


def one_prompt(function, scores, **options):
    scores = np.asarray(scores, np.float32)
    return function(scores, np.array([0, len(scores)]), **options).scores


def same_bits(a: Consensus, b: Consensus) -> bool:
    return a.scores.tobytes() == b.scores.tobytes() and a.num_scores.tobytes() == b.num_scores.tobytes()


# Shapes: usual; one scorer; more rows than std::sort's insertion-sort threshold of 16; nothing missing; nearly all
# missing; no ties; scorers that just fill the lanes, spill by one, fill the padding, and go beyond it; more rows than
# are compared one by one.
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_scorers": 1},
        {"max_rows": 60, "num_prompts": 7},
        {"missing": 0.0},
        {"missing": 0.9},
        {"levels": 10**6},
        {"num_scorers": 8},
        {"num_scorers": 9},
        {"num_scorers": 16, "num_prompts": 9},
        {"num_scorers": 35, "num_prompts": 5},
        {"max_rows": 300, "num_prompts": 2},
    ],
    ids=str,
)
def test_agrees_with_reference(shape):
    for seed, (method, normalize) in itertools.product(range(2), COMBINATIONS):
        scores, offsets = ragged(seed, **shape)
        weights = None
        if seed % 2 and method != "median":
            weights = np.random.default_rng(seed).choice([0.0, 0.3, 1.0, 7.0], scores.shape[1])
            weights[0] = 0.7
        options = {"method": method, "normalize": normalize, "weights": weights}
        got, expected = consensus(scores, offsets, **options), consensus_reference(scores, offsets, **options)
        assert got.scores.dtype == expected.scores.dtype == np.float32
        assert got.num_scores.dtype == expected.num_scores.dtype == np.int32
        np.testing.assert_array_equal(got.num_scores, expected.num_scores, err_msg=str(options))
        # Both accumulate in double, in a different order: at most the last bit of the float32 may differ.
        largest = max(1, np.nanmax(scores))
        np.testing.assert_allclose(got.scores, expected.scores, rtol=1.2e-7, atol=1e-12 * largest, err_msg=str(options))


@pytest.mark.parametrize("num_scorers", [1, 7, 9, 33])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_the_same_bits_from_every_instruction_set(num_scorers, missing):
    extension = pytest.importorskip("tso_fast._C")
    scores, offsets = ragged(7, num_scorers=num_scorers, missing=missing, levels=10**6)
    every_third = (np.arange(num_scorers) % 3 == 0) * 1.0
    for weights, (method, normalize) in itertools.product(
        (np.ones(num_scorers), np.arange(num_scorers) + 0.1, every_third), COMBINATIONS
    ):
        options = (method, normalize, 1.0, 50, 1e-6, 1)
        results = [extension.consensus(scores, offsets, weights, *options, isa) for isa in extension.scoring_isas()]
        for values, num_scores, _ in results[1:]:
            assert values.tobytes() == results[0][0].tobytes(), options
            np.testing.assert_array_equal(num_scores, results[0][1])


@BOTH
@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("none", [1, 2, 2, 5, NAN]),
        ("z", [-1.5 / 2.25**0.5, -0.5 / 2.25**0.5, -0.5 / 2.25**0.5, 2.5 / 2.25**0.5, NAN]),
        ("rank", [0, 0.5, 0.5, 1, NAN]),
        ("minmax", [0, 0.25, 0.25, 1, NAN]),
    ],
)
@pytest.mark.parametrize("method", ["mean", "median"])
def test_normalization_by_hand(function, method, normalize, expected):
    # mean 2.5, variance (2.25 + 0.25 + 0.25 + 6.25) / 4 = 2.25
    result = one_prompt(function, column(1, 2, 2, 5, NAN), method=method, normalize=normalize)
    np.testing.assert_allclose(result, expected, rtol=1e-7)


@BOTH
@pytest.mark.parametrize(("normalize", "expected"), [("none", 0.1), ("z", 0), ("rank", 0.5), ("minmax", 0.5)])
def test_equal_or_single_scores(function, normalize, expected):
    # The mean of 3 or 7 times float32(0.1) may round; "all equal" must not depend on it.
    for n in (1, 2, 3, 7):
        result = one_prompt(function, column(*[0.1] * n), method="mean", normalize=normalize)
        np.testing.assert_array_equal(result, np.full(n, expected, np.float32))


TABLE = [[3, 1, NAN], [2, 1, 4], [1, NAN, NAN], [NAN, NAN, NAN]]


@BOTH
@pytest.mark.parametrize(
    ("method", "weights", "expected"),
    [
        ("mean", None, [2, 7 / 3, 1, NAN]),
        ("mean", [1, 3, 2], [(3 + 3) / 4, (2 + 3 + 8) / 6, 1, NAN]),
        ("mean", [0, 1, 0], [1, 1, NAN, NAN]),
        ("median", None, [2, 2, 1, NAN]),
        # Ranks: scorer 0 gives 1, 0.5, 0; scorer 1 ties at 0.5, 0.5; scorer 2 scored one response: 0.5.
        ("borda", None, [(1 + 0.5) / 2, 0.5, 0, NAN]),
        ("borda", [1, 3, 2], [(1 + 3 * 0.5) / 4, 0.5, 0, NAN]),
        # 0 against 1: scorer 0 for 0, scorer 1 tied; 0 and 1 against 2: scorer 0 only.
        ("win_rate", None, [(0.75 + 1) / 2, (0.25 + 1) / 2, 0, NAN]),
        ("win_rate", [1, 3, 2], [((1 + 1.5) / 4 + 1) / 2, (1.5 / 4 + 1) / 2, 0, NAN]),
        ("win_rate", [0, 1, 1], [0.5, 0.5, NAN, NAN]),
        ("win_rate", [0, 0, 1], [NAN] * 4),
    ],
)
def test_method_by_hand(function, method, weights, expected):
    result = one_prompt(function, TABLE, method=method, normalize="none", weights=weights)
    np.testing.assert_allclose(result, np.array(expected, np.float32), rtol=1e-7)


@BOTH
def test_num_scores_leaves_out_scorers_of_weight_0(function):
    scores, offsets = np.array(TABLE, np.float32), np.array([0, 4])
    options = {"method": "mean", "normalize": "none"}
    assert function(scores, offsets, **options).num_scores.tolist() == [2, 3, 1, 0]
    assert function(scores, offsets, **options, weights=[0, 1, 1]).num_scores.tolist() == [1, 2, 0, 0]


@BOTH
def test_win_rate_leaves_out_pairs_without_a_common_scorer(function):
    # 0 and 1 share scorer 0, 2 and 3 share scorer 1, no one else shares any.
    scores = [[1, NAN, NAN], [0, NAN, NAN], [NAN, 0, NAN], [NAN, 1, NAN], [NAN, NAN, 5]]
    result = one_prompt(function, scores, method="win_rate", normalize="none")
    np.testing.assert_array_equal(result, np.array([1, 0, 0, 1, NAN], np.float32))


@BOTH
@EACH
def test_empty_inputs(function, method, normalize):
    options = {"method": method, "normalize": normalize}
    for num_rows, offsets in ((0, [0]), (0, [0, 0, 0]), (2, [0, 0, 1, 1, 2, 2])):
        result = function(np.ones((num_rows, 3), np.float32), np.array(offsets, np.int64), **options)
        assert result.scores.shape == result.num_scores.shape == (num_rows,)
        assert (result.num_scores == 3).all()
    no_scorers = function(np.empty((2, 0), np.float32), np.array([0, 2]), **options)
    assert np.isnan(no_scorers.scores).all()
    assert no_scorers.num_scores.tolist() == [0, 0]


def test_single_response_alone():
    scores, offsets = column(7, 8), np.array([0, 1, 2])
    for method, normalize, expected in (
        ("mean", "none", [7, 8]),
        ("mean", "z", [0, 0]),
        ("median", "rank", [0.5, 0.5]),
        ("borda", "none", [0.5, 0.5]),
        ("win_rate", "none", [NAN, NAN]),
        ("bradley_terry", "none", [NAN, NAN]),
    ):
        result = consensus(scores, offsets, method=method, normalize=normalize)
        np.testing.assert_array_equal(result.scores, np.array(expected, np.float32))


@EACH
def test_extreme_scores_stay_finite(method, normalize):
    big, tiny = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    for scores in ([[big, -big], [-big, big], [big, big]], [[0, tiny], [tiny, 0], [-0.0, 2 * tiny]]):
        weights = None if method == "median" else [1e308, 1e308]
        assert np.isfinite(one_prompt(consensus, scores, method=method, normalize=normalize, weights=weights)).all()


@EACH
def test_bitwise_equal_for_any_number_of_threads(method, normalize):
    # Large enough for several threads (2^16 scores each), with one prompt far larger than the others.
    scores, offsets = ragged(0, num_prompts=12_000, num_scorers=7)
    offsets = np.concatenate([[0], offsets[100:]])
    options = {"method": method, "normalize": normalize}
    single = consensus(scores, offsets, **options, num_threads=1)
    for num_threads in (0, 3, 1000):
        assert same_bits(single, consensus(scores, offsets, **options, num_threads=num_threads))


@EACH
def test_a_prompt_scores_the_same_alone_or_among_others(method, normalize):
    scores, offsets = ragged(1)
    options = {"method": method, "normalize": normalize}
    together = consensus(scores, offsets, **options).scores
    for first, last in itertools.pairwise(offsets):
        alone = consensus(scores[first:last], np.array([0, last - first]), **options).scores
        assert alone.tobytes() == together[first:last].tobytes()


@EACH
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_every_output_is_written(method, normalize, missing):
    # Outputs are allocated where others were freed just before, full of what no result is.
    options = {"method": method, "normalize": normalize}
    # Prompts: too few for a batch of eight, just enough for one a sixteenth, many; of the same size or not.
    for num_prompts, max_rows, num_scorers in (
        *itertools.product((1, 7, 130, 300), (8,), (9,)),
        *((300, max_rows, num_scorers) for max_rows, num_scorers in ((1, 9), (8, 1))),
        *((40, max_rows, num_scorers) for max_rows, num_scorers in ((30, 5), (70, 9))),
    ):
        rng = np.random.default_rng(num_prompts)
        offsets = np.concatenate([[0], np.cumsum(rng.integers(1, max_rows + 1, num_prompts))])
        if max_rows == 8:  # as many rows in every prompt
            offsets = np.arange(len(offsets)) * max_rows
        scores = rng.integers(0, 9, (offsets[-1], num_scorers)).astype(np.float32)
        scores[rng.random(scores.shape) < missing] = NAN
        first = consensus(scores, offsets, **options)
        expected = first.scores.copy(), first.num_scores.copy()
        assert (expected[1] <= num_scorers).all()
        for _ in range(2):
            recycled = [np.full(offsets[-1], 12345.0, np.float32) for _ in range(4)]
            del recycled, first
            first = consensus(scores, offsets, **options, num_threads=1)
            np.testing.assert_array_equal(first.scores, expected[0])
            np.testing.assert_array_equal(first.num_scores, expected[1])
        assert not (np.abs(expected[0]) > 100).any()


@pytest.mark.parametrize("normalize", ["none", "z", "minmax"])
@pytest.mark.parametrize("missing", [0.0, 0.02])
def test_prompts_computed_together_are_as_if_alone(normalize, missing):
    # Like sizes and others, with gaps and without, up to and beyond the size that is computed several at once; so many
    # that a thread's sixteenth of them has more than one batch of eight.
    rng = np.random.default_rng(0)
    for sizes in (
        [8] * 21,
        [1, 8, 8, 57, 2, 8, 8, 8, 60, 3, 8],
        [56] * 5 + [57] * 9,
        [0, 4, 0, 4, 4, 0, 4, 4, 4, 4, 4, 9],
    ):
        offsets = np.concatenate([[0], np.cumsum(sizes * (180 // len(sizes)))])
        scores = rng.standard_normal((offsets[-1], 9)).astype(np.float32) * 3 + 100
        scores[rng.random(scores.shape) < missing] = NAN
        options = {"method": "mean", "normalize": normalize, "weights": [1, 2, 0, 0.3, 5, 1, 1, 0, 2]}
        together = consensus(scores, offsets, **options)
        expected = consensus_reference(scores, offsets, **options)
        np.testing.assert_allclose(together.scores, expected.scores, rtol=1.2e-7, atol=1e-12)
        np.testing.assert_array_equal(together.num_scores, expected.num_scores)
        for first, last in itertools.pairwise(offsets):
            alone = consensus(scores[first:last], np.array([0, last - first]), **options)
            assert alone.scores.tobytes() == together.scores[first:last].tobytes()


@pytest.mark.parametrize("num_prompts", [17, 170])  # fewer and more than a batch in a sixteenth of them
@pytest.mark.parametrize("missing", [False, True])
def test_an_infinite_score_is_found_anywhere(num_prompts, missing):
    for position, method in itertools.product((0, 3, 8 * 9 * 3, 8 * 9 * num_prompts - 1), ("mean", "median")):
        scores = np.ones((8 * num_prompts, 9), np.float32)
        if missing:
            scores[1::5, 2] = NAN
        scores.flat[position] = -np.inf
        with pytest.raises(ValueError, match=r"is -inf \(1 infinite"):
            consensus(scores, np.arange(num_prompts + 1) * 8, method=method, normalize="z")


@EACH
def test_moves_with_its_rows(method, normalize):
    scores, offsets = ragged(2)
    rng = np.random.default_rng(2)
    order = np.concatenate([first + rng.permutation(n) for first, n in zip(offsets, np.diff(offsets), strict=False)])
    options = {"method": method, "normalize": normalize}
    expected = consensus(scores, offsets, **options).scores[order]
    np.testing.assert_allclose(consensus(scores[order], offsets, **options).scores, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "normalize"),
    [c for c in COMBINATIONS if c[1] != "none" or c[0] in ("borda", "win_rate", "bradley_terry")],
)
def test_blind_to_the_units_of_a_scorer(method, normalize):
    scores, offsets = ragged(3)
    # Eighths, powers of two and small shifts: exact in float32.
    units = np.array([0.5, 4, 1, 32, 2], np.float32), np.array([3, -1, 0, 5, 100], np.float32)
    options = {"method": method, "normalize": normalize}
    expected = consensus(scores, offsets, **options)
    got = consensus(scores * units[0] + units[1], offsets, **options)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-6, atol=1e-7)


def test_win_rate_is_borda_when_nothing_is_missing():
    scores, offsets = ragged(4, missing=0.0)
    scores = np.nan_to_num(scores, nan=-1.0)
    is_alone = np.repeat(np.diff(offsets), np.diff(offsets)) == 1
    options = {"normalize": "none", "weights": [1, 2, 0, 0.5, 3]}
    borda = consensus(scores, offsets, method="borda", **options).scores
    win_rate = consensus(scores, offsets, method="win_rate", **options).scores
    np.testing.assert_allclose(win_rate[~is_alone], borda[~is_alone], rtol=1e-6, atol=1e-7)
    assert np.isnan(win_rate[is_alone]).all()


@EACH
def test_other_memory_layouts(method, normalize):
    scores, offsets = ragged(5)
    options = {"method": method, "normalize": normalize}
    expected = consensus(scores, offsets, **options)
    sliced = np.repeat(np.repeat(scores, 2, axis=0), 3, axis=1)[::2, ::3]
    unaligned = np.frombuffer(b"x" + scores.tobytes(), np.float32, offset=1).reshape(scores.shape)
    strided_offsets = np.repeat(offsets, 2)[::2]
    for other in (np.asfortranarray(scores), sliced, scores[::-1].copy()[::-1], unaligned):
        assert same_bits(consensus(other, strided_offsets, **options), expected)


def test_inputs_are_not_changed():
    scores, offsets = ragged(6)
    weights = np.array([1.0, 2, 3, 4, 5])
    before = scores.tobytes(), offsets.tobytes(), weights.tobytes()
    for array in (scores, offsets, weights):
        array.flags.writeable = False
    for function in (consensus, consensus_reference):
        function(scores, offsets, method="mean", normalize="z", weights=weights)
    assert (scores.tobytes(), offsets.tobytes(), weights.tobytes()) == before


def test_releases_the_gil():
    scores = np.random.default_rng(0).random((6_000, 8), dtype=np.float32)
    scores[0, 0] = NAN  # else it takes the short way of borda
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    other.start()
    try:
        start = time.perf_counter()
        consensus(scores, np.array([0, len(scores)]), method="win_rate", normalize="none", num_threads=1)
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
    # The middle half lies inside the C++ call: with the GIL held, no tick could fall there.
    quarter = (end - start) / 4
    assert any(start + quarter < t < end - quarter for t in ticks)


GOOD = {"scores": np.ones((3, 2), np.float32), "offsets": np.array([0, 1, 3]), "method": "mean", "normalize": "none"}


def with_score(value):
    scores = np.ones((3, 2), np.float32)
    scores[2, 1] = value
    return scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "bord"},
            r"unknown method 'bord'; known: mean, median, borda, win_rate, bradley_terry; did you mean 'borda'",
        ),
        ({"normalize": "softmax"}, "unknown normalize 'softmax'; known: none, z, rank, minmax"),
        ({"method": "borda", "normalize": "z"}, "'borda'.*normalize='z'.*pass normalize='none'"),
        ({"method": "win_rate", "normalize": "rank"}, "'win_rate'.*normalize='rank'.*pass normalize='none'"),
        ({"method": "bradley_terry", "normalize": "z"}, "'bradley_terry'.*normalize='z'.*pass normalize='none'"),
        ({"method": "median", "weights": [1, 1]}, "'median' takes no weights"),
        ({"scores": np.ones(3, np.float32)}, r"scores must be \[R, M\] float32, got shape \[3\]"),
        ({"scores": np.ones((3, 2))}, r"got float64; convert it with .astype\(np.float32\)"),
        ({"scores": with_score(np.inf)}, r"scores\[2, 1\] is inf \(1 infinite in all\)"),
        ({"scores": with_score(-np.inf)}, r"scores\[2, 1\] is -inf"),
        ({"weights": [1.0]}, r"one for each of the M = 2 columns of scores, got shape \[1\]"),
        ({"weights": [1, -2]}, r"weights\[1\] is -2.0; expected a finite number >= 0"),
        ({"weights": [NAN, 1]}, r"weights\[0\] is nan"),
        ({"weights": [1, np.inf]}, r"weights\[1\] is inf"),
        ({"weights": [1e10, 1e-300]}, r"weights\[1\] is 1e-300, below 1e-300 of the largest, 10000000000.0; 0 leaves"),
        ({"weights": [0, 0]}, "weights are all 0"),
    ],
)
def test_errors(change, message):
    for function in (consensus, consensus_reference):
        function(**GOOD)
        with pytest.raises(ValueError, match=message):
            function(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scores": np.ones((3, 2))}, TypeError),
        ({"scores": np.ones((3, 2), np.float32, order="F")}, TypeError),
        ({"scores": np.ones(6, np.float32)}, ValueError),
        ({"weights": np.ones(3)}, ValueError),
        ({"offsets": np.array([], np.int64)}, ValueError),
        ({"offsets": np.array([0, 4])}, ValueError),
        ({"offsets": np.array([-1, 3])}, ValueError),
        ({"offsets": np.array([0, 9, 3])}, ValueError),
        ({"method": "max"}, ValueError),
        ({"normalize": "max"}, ValueError),
        ({"isa": "mmx"}, ValueError),
        ({"regularization": 0.0}, ValueError),
    ],
)
def test_extension_called_directly_checks_its_buffers(change, error):
    extension = pytest.importorskip("tso_fast._C")
    options = {"regularization": 1.0, "max_iterations": 9, "tolerance": 0.0, "num_threads": 1}
    good = {**GOOD, "weights": np.ones(2), **options}
    extension.consensus(**good)
    with pytest.raises(error):
        extension.consensus(**{**good, **change})


def test_extension_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tso_fast._C", None)
    with pytest.raises(ImportError, match=r"tso_fast._C cannot be loaded.*pip install \..*compiler"):
        consensus(**GOOD)
    consensus_reference(**GOOD)


# ------------------------------------------------------------------------------------------------------ Bradley-Terry


def verdicts(seed, num_prompts=30, max_rows=7, share=0.6):
    """Prompts without rows, rows never compared, pairs said twice and in both orders."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, max_rows + 1, num_prompts))]).astype(np.int64)
    pairs = [p for a, b in itertools.pairwise(offsets) for p in itertools.permutations(range(a, b), 2)]
    pairs = np.array(pairs, np.int64)[rng.random(len(pairs)) < share]
    return rng.permutation(pairs), rng.integers(0, 4, (len(pairs), 2)) / 2, offsets


@pytest.mark.parametrize("regularization", [1.0, 0.1])
@pytest.mark.parametrize("shape", [{}, {"share": 0.1}, {"share": 1.0}, {"max_rows": 1}, {"max_rows": 25}], ids=str)
def test_bradley_terry_agrees_with_reference(shape, regularization):
    for seed in range(2):
        pairs, wins, offsets = (
            verdicts(seed, **shape)
            if shape != {"max_rows": 1}
            else (np.empty((0, 2), np.int64), np.empty((0, 2)), np.array([0, 1, 1, 2]))
        )
        got = bradley_terry(pairs, wins, offsets, regularization=regularization)
        expected = bradley_terry_reference(pairs, wins, offsets, regularization=regularization)
        assert got.dtype == expected.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        threads = [bradley_terry(pairs, wins, offsets, regularization=regularization, num_threads=k) for k in (1, 5)]
        assert threads[0].tobytes() == threads[1].tobytes() == got.tobytes()


@pytest.mark.parametrize("function", [bradley_terry, bradley_terry_reference])
def test_bradley_terry_of_two(function):
    # By symmetry the average opponent is at 0, so that x = s_0 = -s_1 solves
    # 4 = 3 + 1 = wins = 4 sigmoid(2 x) + sigmoid(x), less the half win over the opponent: 3.5 = 4 s(2x) + s(x).
    strength = function(np.array([[1, 0]]), np.array([[1.0, 3.0]]), np.array([0, 3]), tolerance=1e-12)
    x = float(strength[0])
    assert strength[1] == pytest.approx(-x)
    assert 4 / (1 + np.exp(-2 * x)) + 1 / (1 + np.exp(-x)) == pytest.approx(3.5, rel=1e-6)
    assert np.isnan(strength[2])


def test_bradley_terry_solves_its_equations():
    # The gradient of the likelihood is 0: every response wins as often as it is expected to.
    pairs, wins, offsets = verdicts(3, num_prompts=1, max_rows=400, share=0.02)
    n = offsets[-1]
    strength = bradley_terry(pairs, wins, offsets, tolerance=1e-10, max_iterations=100_000).astype(np.float64)
    i, j = pairs.T
    surplus = np.zeros(n)
    expected = wins.sum(axis=1) / (1 + np.exp(strength[j] - strength[i]))
    np.add.at(surplus, i, wins[:, 0] - expected)
    np.add.at(surplus, j, expected - wins[:, 0])
    seen = ~np.isnan(strength)
    # What is left is what the average opponent takes: 1/2 - sigmoid(strength - opponent), which falls from 1/2 to -1/2.
    order = np.argsort(strength[seen])
    left = surplus[seen][order]
    assert (np.abs(left) < 0.5).all()
    assert (np.diff(left) > -1e-4).all()
    assert abs(left.sum()) < 1e-3


def test_bradley_terry_warns_of_strengths_that_did_not_settle(caplog):
    pairs, wins, offsets = verdicts(3, num_prompts=5)
    bradley_terry(pairs, wins, offsets)
    bradley_terry(pairs, wins, offsets, tolerance=0, max_iterations=2)
    assert not caplog.records
    bradley_terry(pairs, wins, offsets, max_iterations=2)
    assert re.search(r"of \d prompts? still changed by more than 1e-06 after 2 iterations", caplog.text)


def test_bradley_terry_is_finite_however_one_sided():
    # 0 beats all; 3 and 4 never met the others.
    pairs, wins = np.array([[0, 1], [0, 2], [3, 4]]), np.array([[5.0, 0], [5, 0], [0, 2]])
    strength = bradley_terry(pairs, wins, np.array([0, 5]), max_iterations=10_000)
    assert np.isfinite(strength).all()
    assert strength[0] > strength[1] == strength[2]
    assert strength[4] > strength[3]
    assert abs(strength.mean()) < 1e-6
    weaker = bradley_terry(pairs, wins, np.array([0, 5]), regularization=10)
    assert np.ptp(weaker) < np.ptp(strength)


def test_bradley_terry_of_scores_is_that_of_their_verdicts():
    scores, offsets = ragged(8)
    weights = np.array([1.0, 2, 0, 0.5, 3])
    pairs, wins = [], []
    for a, b in itertools.pairwise(offsets):
        for i, j in itertools.combinations(range(a, b), 2):
            first = (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
            second = (scores[j] > scores[i]) + 0.5 * (scores[i] == scores[j])
            pairs.append((i, j))
            wins.append((first @ weights * 4 / 6.5, second @ weights * 4 / 6.5))
    expected = bradley_terry(np.array(pairs), np.array(wins), offsets)
    got = consensus(scores, offsets, method="bradley_terry", normalize="none", weights=weights * 7).scores
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


VERDICTS = {"pairs": np.array([[0, 1], [2, 3]]), "wins": np.ones((2, 2)), "offsets": np.array([0, 2, 2, 5])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": np.array([[0, 1], [1, 2]])}, r"pairs\[1\] is \(1, 2\).*row 1 is of prompt 0, row 2 of prompt 2"),
        ({"pairs": np.array([[1, 1], [2, 3]])}, r"pairs\[0\] is \(1, 1\).*not compared with itself"),
        ({"pairs": np.array([[0, 1], [4, 5]])}, r"pairs\[1\] is \(4, 5\).*rows are 0 to 4"),
        ({"pairs": np.array([[0, 1], [-1, 3]])}, r"pairs\[1\] is \(-1, 3\)"),
        ({"pairs": np.array([[0, 1, 2]])}, r"pairs must be \[C, 2\] int64, got shape \[1, 3\]"),
        ({"pairs": np.ones((2, 2))}, "got float64"),
        ({"wins": np.ones(2)}, r"wins must be \[C, 2\].*C = 2.*got shape \[2\]"),
        ({"wins": np.ones((2, 2), int)}, "got shape.*int64"),
        ({"wins": np.array([[1, 1], [1, NAN]])}, r"wins\[1, 1\] is nan"),
        ({"wins": np.array([[1, 1], [-1.0, 1]])}, r"wins\[1, 0\] is -1"),
        ({"regularization": 0.0}, "regularization must be finite and > 0, got 0.0"),
        ({"max_iterations": 0}, "max_iterations must be >= 1"),
        ({"tolerance": NAN}, "tolerance must be >= 0"),
    ],
)
def test_bradley_terry_errors(change, message):
    for function in (bradley_terry, bradley_terry_reference):
        function(**VERDICTS)
        with pytest.raises(ValueError, match=message):
            function(**{**VERDICTS, **change})


# ---------------------------------------------------------------------------------------------------------- agreement


AGREEMENTS = pytest.mark.parametrize("function", [agreement, agreement_reference])


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_scorers": 1},
        {"missing": 0.0},
        {"missing": 0.9},
        {"num_scorers": 9},
        {"levels": 1},
        {"max_rows": 150, "num_prompts": 6},
    ],
    ids=str,
)
def test_agreement_agrees_with_reference(shape):
    for seed in range(2):
        scores, offsets = ragged(seed, **shape)
        got, expected = agreement(scores, offsets), agreement_reference(scores, offsets)
        assert got.concordance.dtype == got.leave_one_out.dtype == np.float32
        np.testing.assert_allclose(got.concordance, expected.concordance, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(got.leave_one_out, expected.leave_one_out, rtol=1e-6, atol=1e-7)


@AGREEMENTS
def test_kendalls_w_by_hand(function):
    tables = [
        [[1, 10], [2, 20], [3, 30]],  # alike
        [[1, 30], [2, 20], [3, 10]],  # opposed
        [[1, 1], [1, 2], [2, 3]],  # ranks 1.5 1.5 3 and 1 2 3: 12 * 6.5 / (4 * 24 - 2 * 6)
        [[1, 1], [1, 1]],  # all tied
        [[1, NAN], [2, 1]],  # one whole scorer
        [[1, 2]],  # one response
    ]
    scores = np.concatenate(tables).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
    expected = [1, 0, 12 * 6.5 / 84, NAN, NAN, NAN]
    np.testing.assert_allclose(function(scores, offsets).concordance, np.array(expected, np.float32), rtol=1e-6)


@AGREEMENTS
def test_leave_one_out_by_hand(function):
    # Two scorers: each one's others are the other. The third never agrees, the fourth ties all, the fifth is silent.
    rows = [[1, 1, 3, 5, NAN], [2, 2, 2, 5, NAN], [3, 3, 1, 5, NAN]]
    result = function(np.array(rows, np.float32)[:, :3], np.array([0, 3])).leave_one_out
    np.testing.assert_array_equal(result, np.array([NAN, NAN, -1], np.float32))
    result = function(np.array(rows, np.float32)[:, [0, 1, 3, 4]], np.array([0, 3])).leave_one_out
    np.testing.assert_allclose(result, np.array([1, 1, NAN, NAN], np.float32), rtol=1e-6)


def test_agreement_is_bitwise_equal_for_any_number_of_threads_and_instruction_set():
    scores, offsets = ragged(0, num_prompts=6_000, num_scorers=7)
    single = agreement(scores, offsets, num_threads=1)
    for num_threads in (0, 2, 5):
        other = agreement(scores, offsets, num_threads=num_threads)
        assert other.concordance.tobytes() == single.concordance.tobytes()
        assert other.leave_one_out.tobytes() == single.leave_one_out.tobytes()
    extension = pytest.importorskip("tso_fast._C")
    for isa in extension.scoring_isas():
        assert extension.agreement(scores, offsets, 1, isa)[1].tobytes() == single.leave_one_out.tobytes()


@AGREEMENTS
def test_agreement_of_little(function):
    for num_rows, offsets in ((0, [0]), (0, [0, 0]), (2, [0, 1, 2])):
        result = function(np.ones((num_rows, 3), np.float32), np.array(offsets))
        assert isinstance(result, Agreement)
        assert result.concordance.shape == (len(offsets) - 1,)
        assert np.isnan(result.concordance).all()
        assert np.isnan(result.leave_one_out).all()
        assert result.leave_one_out.shape == (3,)
    assert function(np.ones((2, 0), np.float32), np.array([0, 2])).leave_one_out.shape == (0,)
    with pytest.raises(ValueError, match=r"scores\[2, 1\] is inf"):
        function(with_score(np.inf), np.array([0, 3]))


# ----------------------------------------------------------------------------------------------- what all functions ask


TEXTS = {
    "tokens": np.arange(6, dtype=np.int32),
    "token_offsets": np.array([0, 2, 3, 6]),
    "offsets": np.array([0, 2, 3]),
}
CALLS = {
    "consensus": GOOD,
    "agreement": {"scores": GOOD["scores"], "offsets": GOOD["offsets"]},
    "bradley_terry": VERDICTS,
    "select_pairs": {
        "consensus": np.arange(3, dtype=np.float32),
        "offsets": np.array([0, 2, 3]),
        "strategy": "all",
        "max_pairs": 1,
    },
    "select_decided": {
        "pairs": np.array([[0, 1], [2, 3], [3, 4]]),
        "margin": np.ones(3, np.float32),
        "offsets": np.array([0, 1, 3]),
        "strategy": "all",
        "max_pairs": 1,
    },
    "pairwise_distances": TEXTS,
    "distinct_n": TEXTS | {"n": 2},
    "self_bleu": TEXTS,
}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_checks_offsets_and_threads(name):
    good = CALLS[name]
    offsets = good["offsets"]
    bad = [
        ({"offsets": offsets[None]}, r"offsets must be \[P\+1\] int64, got shape \[1, \d\]"),
        ({"offsets": offsets.astype(np.int32)}, r"got int32; convert it with .astype\(np.int64\)"),
        ({"offsets": offsets[:0]}, "got no entries"),
        ({"offsets": offsets + 1}, r"offsets must start at 0.*offsets\[0\] is 1"),
        ({"offsets": np.array([0, 2, 1, 3])}, r"offsets\[1\] = 2 is followed by 1"),
        ({"num_threads": -1}, "num_threads must be >= 0.*got -1"),
    ]
    if name != "bradley_terry":  # there offsets alone say how many rows there are
        bad.append(({"offsets": np.array([0, 2])}, r"end at [RC] = 3.*offsets\[-1\] is 2; its last entry is the total"))
        bad.append(({"offsets": np.array([0, 4])}, r"end at [RC] = 3.*offsets\[-1\] is 4$"))
    for function in (getattr(scoring, name), getattr(scoring, f"{name}_reference")):
        function(**good)
        for change, message in bad:
            with pytest.raises(ValueError, match=message):
                function(**{**good, **change})

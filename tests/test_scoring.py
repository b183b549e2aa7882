"""Consensus: the C++ against its numpy reference, both against cases worked by hand."""

import itertools
import sys
import threading
import time

import numpy as np
import pytest

from tso_fast.scoring import METHODS, NORMALIZATIONS, Consensus, consensus, consensus_reference

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
# missing; no ties.
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_scorers": 1},
        {"max_rows": 60, "num_prompts": 7},
        {"missing": 0.0},
        {"missing": 0.9},
        {"levels": 10**6},
    ],
    ids=str,
)
@EACH
def test_agrees_with_reference(method, normalize, shape):
    for seed in range(6):
        scores, offsets = ragged(seed, **shape)
        weights = None
        if seed % 2 and method != "median":
            weights = np.random.default_rng(seed).choice([0.0, 0.3, 1.0, 7.0], scores.shape[1])
            weights[0] = 0.7
        options = {"method": method, "normalize": normalize, "weights": weights}
        got, expected = consensus(scores, offsets, **options), consensus_reference(scores, offsets, **options)
        assert got.scores.dtype == expected.scores.dtype == np.float32
        assert got.num_scores.dtype == expected.num_scores.dtype == np.int32
        np.testing.assert_array_equal(got.num_scores, expected.num_scores)
        # Both accumulate in double, in a different order: at most the last bit of the float32 may differ.
        np.testing.assert_allclose(got.scores, expected.scores, rtol=1.2e-7, atol=1e-12 * max(1, np.nanmax(scores)))


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
    # Large enough for 10 threads or more (2^15 scores each), with one prompt far larger than the others.
    scores, offsets = ragged(0, num_prompts=12_000, num_scorers=7)
    offsets = np.concatenate([[0], offsets[100:]])
    options = {"method": method, "normalize": normalize}
    single = consensus(scores, offsets, **options, num_threads=1)
    for num_threads in (0, 2, 3, 7, 1000):
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
def test_moves_with_its_rows(method, normalize):
    scores, offsets = ragged(2)
    rng = np.random.default_rng(2)
    order = np.concatenate([first + rng.permutation(n) for first, n in zip(offsets, np.diff(offsets), strict=False)])
    options = {"method": method, "normalize": normalize}
    expected = consensus(scores, offsets, **options).scores[order]
    np.testing.assert_allclose(consensus(scores[order], offsets, **options).scores, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "normalize"), [c for c in COMBINATIONS if c[1] != "none" or c[0] in ("borda", "win_rate")]
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


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "bord"}, r"unknown method 'bord'; known: mean, median, borda, win_rate; did you mean 'borda'"),
        ({"normalize": "softmax"}, "unknown normalize 'softmax'; known: none, z, rank, minmax"),
        ({"method": "borda", "normalize": "z"}, "'borda'.*normalize='z'.*pass normalize='none'"),
        ({"method": "win_rate", "normalize": "rank"}, "'win_rate'.*normalize='rank'.*pass normalize='none'"),
        ({"method": "median", "weights": [1, 1]}, "'median' takes no weights"),
        ({"scores": np.ones(3, np.float32)}, r"scores must be \[R, M\] float32, got shape \[3\]"),
        ({"scores": np.ones((3, 2))}, r"got float64; convert it with .astype\(np.float32\)"),
        ({"offsets": np.array([[0, 3]])}, r"offsets must be \[P\+1\] int64, got shape \[1, 2\]"),
        ({"offsets": np.array([0, 3], np.int32)}, r"got int32; convert it with .astype\(np.int64\)"),
        ({"offsets": np.array([], np.int64)}, "got no entries"),
        ({"offsets": np.array([1, 3])}, r"end at R = 3.*offsets\[0\] is 1"),
        ({"offsets": np.array([0, 2])}, r"end at R = 3.*offsets\[-1\] is 2; its last entry is the total"),
        ({"offsets": np.array([0, 4])}, r"end at R = 3.*offsets\[-1\] is 4$"),
        ({"offsets": np.array([0, 2, 1, 3])}, r"offsets\[1\] = 2 is followed by 1"),
        ({"scores": with_score(np.inf)}, r"scores\[2, 1\] is inf \(1 infinite in all\)"),
        ({"scores": with_score(-np.inf)}, r"scores\[2, 1\] is -inf"),
        ({"weights": [1.0]}, r"one for each of the M = 2 columns of scores, got shape \[1\]"),
        ({"weights": [1, -2]}, r"weights\[1\] is -2.0; expected a finite number >= 0"),
        ({"weights": [NAN, 1]}, r"weights\[0\] is nan"),
        ({"weights": [1, np.inf]}, r"weights\[1\] is inf"),
        ({"weights": [0, 0]}, "weights are all 0"),
        ({"num_threads": -1}, "num_threads must be >= 0.*got -1"),
    ],
)
def test_errors(function, change, message):
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
    ],
)
def test_extension_called_directly_checks_its_buffers(change, error):
    extension = pytest.importorskip("tso_fast._C")
    good = {**GOOD, "weights": np.ones(2), "num_threads": 1}
    extension.consensus(**good)
    with pytest.raises(error):
        extension.consensus(**{**good, **change})


def test_extension_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tso_fast._C", None)
    with pytest.raises(ImportError, match=r"tso_fast._C cannot be loaded.*pip install \..*compiler"):
        consensus(**GOOD)
    consensus_reference(**GOOD)

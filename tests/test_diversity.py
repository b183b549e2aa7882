"""Shared n-grams: the C++ against Python sets and counters, both against cases worked by hand."""

import itertools
import math

import numpy as np
import pytest

from tso_fast.scoring import (
    distinct_n,
    distinct_n_reference,
    pairwise_distances,
    pairwise_distances_reference,
    self_bleu,
    self_bleu_reference,
)

NAN = np.nan
BOTH_DISTANCES = pytest.mark.parametrize("function", [pairwise_distances, pairwise_distances_reference])
BOTH_DISTINCT = pytest.mark.parametrize("function", [distinct_n, distinct_n_reference])
BOTH_BLEU = pytest.mark.parametrize("function", [self_bleu, self_bleu_reference])


def flat(*prompts):
    """Lists of responses, which are lists of tokens, as arrays."""
    responses = [response for prompt in prompts for response in prompt]
    tokens = np.array([token for response in responses for token in response], np.int32)
    token_offsets = np.cumsum([0, *map(len, responses)])
    return tokens, token_offsets, np.cumsum([0, *map(len, prompts)])


def ragged(seed, num_prompts=12, max_rows=9, max_tokens=40, vocabulary=3):
    """A small vocabulary, so that n-grams repeat; prompts without responses, responses without tokens."""
    rng = np.random.default_rng(seed)
    extremes = np.array([0, -1, 2**31 - 1, -(2**31), 1])
    return flat(
        *[
            [
                extremes[rng.integers(0, vocabulary, rng.integers(0, max_tokens + 1))].tolist()
                if vocabulary <= len(extremes)
                else rng.integers(0, vocabulary, rng.integers(0, max_tokens + 1)).tolist()
                for _ in range(rng.integers(0, max_rows + 1))
            ]
            for _ in range(num_prompts)
        ]
    )


# Shapes: usual; one token only, all repeats; hardly any repeats; beyond one word of 64 bits of shared n-grams and of
# responses; many prompts of few tokens.
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {},
        {"vocabulary": 1},
        {"vocabulary": 1000},
        {"num_prompts": 2, "max_rows": 83, "max_tokens": 60, "vocabulary": 12},
        {"num_prompts": 97, "max_tokens": 5},
    ],
    ids=str,
)


@SHAPES
def test_agrees_with_reference(shape):
    for seed, n in itertools.product(range(2), (1, 2, 3, 5, 41)):
        texts = ragged(seed, **shape)
        for function, reference in (
            (pairwise_distances, pairwise_distances_reference),
            (distinct_n, distinct_n_reference),
        ):
            got, expected = function(*texts, n=n), reference(*texts, n=n)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, expected, err_msg=f"{function.__name__} n {n}")


@SHAPES
def test_self_bleu_agrees_with_reference(shape):
    # The reference is slow where there are many responses.
    for seed, max_n in ((0, 2),) if "max_rows" in shape else itertools.product(range(2), (1, 2, 4, 7)):
        texts = ragged(seed, **shape)
        got, expected = self_bleu(*texts, max_n=max_n), self_bleu_reference(*texts, max_n=max_n)
        assert got.dtype == np.float32
        # A root of a product against the exponential of a mean of logs: the last bit of the float32 may differ.
        np.testing.assert_allclose(got, expected, rtol=1.2e-7, err_msg=f"max_n {max_n}")


@BOTH_DISTANCES
def test_distances_by_hand(function):
    a, b, c = [1, 2, 3, 4], [2, 3, 4, 5, 2, 3], [4, 3, 2, 1]
    # Bigrams 12 23 34; 23 34 45 52; 43 32 21: two of five in common, none in common.
    texts = flat([a, b, c], [], [a], [[7], [], [7, 8]])
    expected = [0, 0.6, 1, 0.6, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0]
    np.testing.assert_array_equal(function(*texts, n=2), np.array(expected, np.float32))
    # As sets of tokens: 1234; 2345; 1234.
    expected = [0, 0.4, 0, 0.4, 0, 0.4, 0, 0.4, 0]
    np.testing.assert_allclose(function(*flat([a, b, c]), n=1), expected, rtol=1e-7)


@BOTH_DISTANCES
def test_default_is_trigrams(function):
    texts = ragged(0)
    np.testing.assert_array_equal(function(*texts), pairwise_distances_reference(*texts, n=3))


@BOTH_DISTINCT
def test_distinct_by_hand(function):
    texts = flat([[1, 1, 1], [1, 1, 2]], [[5]], [], [[1, 2], [2, 3]])
    np.testing.assert_array_equal(function(*texts, n=2), np.array([2 / 4, NAN, NAN, 1], np.float32))
    np.testing.assert_array_equal(function(*texts, n=1), np.array([2 / 6, 1, NAN, 3 / 4], np.float32))


@BOTH_BLEU
def test_self_bleu_by_hand(function):
    # Against the others, 1 1 1 2: ones are clipped to the 2 of one response, not to the 3 of both together.
    texts = flat([[1, 1, 1, 2], [1, 1, 3], [1, 2]])
    p1, p2 = (2 + 1) / 4, (1 + 0 + 1) / 3  # bigrams 11 11 12: 11 once in the others, 12 once
    first = function(*texts, max_n=2)[0]
    assert first == pytest.approx(math.sqrt(p1 * p2), rel=1e-6)
    assert function(*texts, max_n=1)[0] == pytest.approx(p1)
    # 1 2: both tokens and the bigram are in the first.
    assert function(*texts, max_n=2)[2] == 1
    # Of two tokens, orders above 2 do not count; the others' trigrams 1 1 1, 1 1 2 are not in 1 1 3.
    assert function(*texts, max_n=4)[2] == 1
    assert function(*texts, max_n=4)[1] == 0


@BOTH_BLEU
def test_self_bleu_of_same_alone_and_empty(function):
    same = [4, 5, 6, 7, 8]
    scores = function(*flat([same, same], [same], [same, []], [[], []], [[1, 1], [2, 2]], []))
    np.testing.assert_array_equal(scores, [1, 1, NAN, 0, NAN, NAN, NAN, 0, 0])


def test_distances_are_distances():
    for seed in range(5):
        tokens, token_offsets, offsets = ragged(seed, num_prompts=1, max_rows=30, max_tokens=12)
        n = offsets[1]
        block = pairwise_distances(tokens, token_offsets, offsets, n=2).reshape(n, n)
        np.testing.assert_array_equal(block, block.T)
        assert (np.diag(block) == 0).all()
        assert ((block >= 0) & (block <= 1)).all()
        # Jaccard's keeps the triangle inequality.
        assert (block[:, None, :] <= block[:, :, None] + block[None, :, :] + 1e-6).all()


def test_long_repeats_are_fast_and_exact():
    """Runs of one token, periods, and n-grams that differ in the last token only."""
    rng = np.random.default_rng(0)
    run, period = [0] * 3000, [1, 2] * 1500
    near = [[9] * 7 + [int(last)] for last in rng.integers(0, 2**31 - 1, 150)]
    texts = flat([run, period, [0] * 3], near)
    for n in (1, 2, 3, 8):
        got, expected = pairwise_distances(*texts, n=n), pairwise_distances_reference(*texts, n=n)
        np.testing.assert_array_equal(got, expected)


def test_threads_change_nothing():
    texts = ragged(0, num_prompts=600, vocabulary=50)
    for function, options in ((pairwise_distances, {"n": 3}), (distinct_n, {"n": 2}), (self_bleu, {"max_n": 3})):
        alone, *several = (function(*texts, num_threads=threads, **options).tobytes() for threads in (1, 2, 3, 7))
        assert several == [alone] * 3


def test_prompts_do_not_see_each_other():
    prompts = [[[1, 2, 3], [1, 2, 4]], [[1, 2, 3]], [[5, 6, 7], [5, 6], [1, 2, 3]]]
    together = self_bleu(*flat(*prompts), max_n=2)
    alone = np.concatenate([self_bleu(*flat(prompt), max_n=2) for prompt in prompts])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("prompts", [[], [[]], [[[]]], [[[]], [], [[], []]]], ids=str)
def test_nothing_to_compare(prompts):
    texts = flat(*prompts)
    assert (pairwise_distances(*texts) == 0).all()
    assert len(pairwise_distances(*texts)) == sum(len(prompt) ** 2 for prompt in prompts)
    assert np.isnan(distinct_n(*texts, n=1)).all()
    assert np.isnan(self_bleu(*texts)).all()
    for n in (1, 2**31 - 1):
        np.testing.assert_array_equal(pairwise_distances(*texts, n=n), pairwise_distances_reference(*texts, n=n))


TOKENS, TOKEN_OFFSETS, OFFSETS = flat([[1, 2], [3]], [[4, 5, 6]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TOKENS.astype(np.int64)}, r"tokens must be \[T\] int32, got int64"),
        ({"tokens": TOKENS[None]}, r"tokens must be \[T\] int32, got shape"),
        ({"token_offsets": TOKEN_OFFSETS[:-1]}, r"token_offsets must start at 0.*end at T = 6.*offsets\[-1\] is 3"),
        ({"token_offsets": np.array([0, 3, 2, 6])}, r"token_offsets\[1\] = 3 is followed by 2"),
        ({"token_offsets": TOKEN_OFFSETS.astype(np.int32)}, r"token_offsets must be \[R\+1\] int64"),
        ({"order": 0}, "n must be an int >= 1"),
        ({"order": 1.5}, "n must be an int >= 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"tokens": TOKENS, "token_offsets": TOKEN_OFFSETS, "offsets": OFFSETS, "order": 2} | change
    order = arguments.pop("order")
    for functions, name in (
        ((pairwise_distances, pairwise_distances_reference, distinct_n, distinct_n_reference), "n"),
        ((self_bleu, self_bleu_reference), "max_n"),
    ):
        for function in functions:
            with pytest.raises(ValueError, match=message):
                function(**arguments, **{name: order})

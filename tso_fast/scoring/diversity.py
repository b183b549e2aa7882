"""How much the responses to one prompt share, from their tokens.

Letters in shapes: P prompts, R responses of all prompts, T tokens of all responses, n_p responses of prompt p. N-grams
are compared by their tokens, not by hashes alone: the counts are exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import array, check_num_threads, check_offsets, extension

_MAX_PROMPT_TOKENS = 2**30


def pairwise_distances(
    tokens: npt.ArrayLike, token_offsets: npt.ArrayLike, offsets: npt.ArrayLike, *, n: int = 3, num_threads: int = 0
) -> np.ndarray:
    """Distances 1 - |A and B| / |A or B| (Jaccard) of the n-gram sets of every two responses of a prompt.

    A response of fewer than n tokens has the empty set: distance 0 to another empty one, 1 to all others.

    Args:
        tokens: [T] int32, the token ids of all responses, one after the other.
        token_offsets: [R+1] int64, response r owns the tokens token_offsets[r] : token_offsets[r + 1].
        offsets: [P+1] int64, prompt p owns the responses offsets[p] : offsets[p + 1].
        n: length of the n-grams, >= 1.
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is bitwise the same for any number.

    Returns:
        [sum of n_p^2] float32 in [0, 1]: the symmetric [n_p, n_p] blocks of the prompts, one after the other; that of
        prompt p starts at the sum of the squares before it.

    Raises:
        ValueError: wrong shapes or dtypes, n < 1, a prompt of more than 2^30 tokens.
        ImportError: the C++ extension is not built.
    """
    return extension().pairwise_distances(*checked(tokens, token_offsets, offsets, "n", n, num_threads), n, num_threads)


def distinct_n(
    tokens: npt.ArrayLike, token_offsets: npt.ArrayLike, offsets: npt.ArrayLike, *, n: int, num_threads: int = 0
) -> np.ndarray:
    """Distinct n-grams over all n-grams of a prompt's responses (distinct-n, Li et al. 2016, arXiv 1510.03055).

    Low where responses repeat each other, or themselves.

    Args:
        tokens, token_offsets, offsets, n, num_threads: as for ``pairwise_distances``.

    Returns:
        [P] float32 in (0, 1], NaN where no response has n tokens.

    Raises:
        ValueError, ImportError: as ``pairwise_distances``.
    """
    return extension().distinct_n(*checked(tokens, token_offsets, offsets, "n", n, num_threads), n, num_threads)


def self_bleu(
    tokens: npt.ArrayLike, token_offsets: npt.ArrayLike, offsets: npt.ArrayLike, *, max_n: int = 4, num_threads: int = 0
) -> np.ndarray:
    """BLEU of each response with the other responses of its prompt as references: 1 where others say the same.

    The idea is self-BLEU (Texygen, Zhu et al. 2018, arXiv 1802.01886). The clipped precision of order k is

        p_k = sum_g min(c(g), max over the others of c'(g)) / sum_g c(g)

    over the k-grams g with counts c in the response and c' in another one; the score is the geometric mean of
    p_1 .. p_max_n, over the orders of which the response has a k-gram. Unlike sentence BLEU as used there, it has no
    brevity penalty, which would only compare lengths, and no smoothing: it is 0 where some order has no match.

    Args:
        tokens, token_offsets, offsets, num_threads: as for ``pairwise_distances``.
        max_n: highest order, >= 1.

    Returns:
        [R] float32 in [0, 1], NaN for a response without tokens, or alone with its prompt.

    Raises:
        ValueError, ImportError: as ``pairwise_distances``.
    """
    arrays = checked(tokens, token_offsets, offsets, "max_n", max_n, num_threads)
    return extension().self_bleu(*arrays, max_n, num_threads)


def checked(
    tokens: npt.ArrayLike,
    token_offsets: npt.ArrayLike,
    offsets: npt.ArrayLike,
    order_name: str,
    order: int,
    num_threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C-contiguous [T] int32, [R+1] int64, [P+1] int64."""
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or not 1 <= order < 2**31:
        raise ValueError(f"{order_name} must be an int >= 1, the length of n-grams in tokens, got {order!r}")
    check_num_threads(num_threads)
    tokens_T = array("tokens", tokens, np.int32, "[T]")
    token_offsets_R1 = array("token_offsets", token_offsets, np.int64, "[R+1]")
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(token_offsets_R1, len(tokens_T), name="token_offsets", end="T", what="the number of tokens")
    check_offsets(offsets_P1, len(token_offsets_R1) - 1, what="the responses of token_offsets")
    sizes_P = np.diff(token_offsets_R1[offsets_P1])
    if len(long := np.flatnonzero(sizes_P > _MAX_PROMPT_TOKENS)):
        p = long[0]
        raise ValueError(f"prompt {p} has {sizes_P[p]} tokens in its responses; at most 2^30 are supported: split it")
    return tokens_T, token_offsets_R1, offsets_P1

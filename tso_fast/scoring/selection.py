"""Which responses of a prompt are trained on as a pair (chosen, rejected).

Letters in shapes: P prompts, R responses of all prompts, n responses of one prompt, N pairs, F forbidden pairs, C pairs
decided elsewhere. NaN = no score.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import extension
from tso_fast.scoring.rules import DecidedStrategy, PairRules, Rules, Strategy, check_finite, decided_task, pair_task


def select_pairs(
    consensus: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: Strategy,
    max_pairs: int | None,
    min_margin: float = 0.0,
    positives: npt.ArrayLike | None = None,
    negatives: npt.ArrayLike | None = None,
    text_ids: npt.ArrayLike | None = None,
    forbidden: npt.ArrayLike | None = None,
    reuse_texts: bool | None = None,
    baseline: npt.ArrayLike | None = None,
    distances: npt.ArrayLike | None = None,
    band: float | None = None,
    seed: int = 0,
    keys: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of responses to train on, from one score a response.

    Two responses of a prompt may be a pair, the higher score chosen, if both are scored, the gap of their scores is
    above ``min_margin`` and no constraint below forbids it. Equal scores are never a pair, and no two pairs have the
    same two texts. Pairs come by prompt, within a prompt in the order they were selected. Ties go to the lower row.

    Strategies:
        ``best_worst``: the best against the worst, then the second best against the second worst, and so on: always
            the pair of the widest gap among texts not used yet. With ``reuse_texts`` it goes on with the widest gaps
            of texts already used.
        ``random``: drawn uniformly from the pairs whose texts are used least by the pairs drawn before.
        ``all``: every pair, the widest gap first (equal gaps: the better chosen one).
        ``best_random``: the best against distinct partners below it, drawn uniformly.
        ``baseline``: every response against an intermediate one, the better ones chosen, the worse ones rejected, the
            widest gap first: the ranked pairing of Online Self-Preferring (Zhai et al. 2024, arXiv 2405.14103), which
            needs n comparisons instead of n^2.
        ``tournament``: the n - 1 matches of a random knock-out: in each round neighbours meet and the higher score
            goes on, an odd one out goes on without a match. RSO's tournament-rank (Liu et al. 2024, arXiv 2309.06657).
        ``first_round``: the n // 2 matches of its first round: random disjoint pairs. RSO's first-round-rank.
        ``diverse``: the best against the response farthest from it within a band of quality: mate choice applied to
            pairs. Several: the next farthest.

    In ``best_random`` and ``diverse`` the best is the highest score that has a partner at all. A match of
    ``tournament`` and ``first_round`` that may not be a pair is played, but not returned.

    Args:
        consensus: [R] float32, higher is better, NaN = no score; the rows of one prompt are adjacent.
        offsets: [P+1] int64, prompt p owns the rows offsets[p] : offsets[p + 1].
        strategy: one of the above.
        max_pairs: most pairs of a prompt, > 0; None: all that the strategy gives.
        min_margin: >= 0; the gap of a pair, in float32, is strictly above it (as float32).
        positives: [R] bool, the rows that may be chosen; None: all.
        negatives: [R] bool, the rows that may be rejected; None: all.
        text_ids: [R] int64, rows of a prompt with the same id have the same text and are never a pair; None: all
            texts differ.
        forbidden: [F, 2] int64, two rows of one prompt that must not be a pair, in either order.
        reuse_texts: for ``best_worst`` and ``random``: whether, once no pair of two unused texts is left, those with
            one used text are taken, and then the rest. None: False for ``best_worst``, True for ``random``.
        baseline: for ``baseline``: [P] int64, the row every other of its prompt is compared with, -1: as for None, the
            median-ranked of the scored rows (of an even number the better of the two in the middle).
        distances: for ``diverse``, required: float32, the [n, n] blocks of all prompts one after the other, as
            ``pairwise_distances`` gives; row c of a block holds the distances from c.
        band: for ``diverse``: the gap of a pair is at most this; None: any.
        seed: any int. Strategies that draw nothing do not read it, nor ``keys``.
        keys: [P] int64 or uint64, a stable hash of each prompt; None: its index. The draws of a prompt hang on seed
            and key alone: no other prompt, no order and no number of threads changes them.
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is the same for any number.

    Returns:
        pairs: [N, 2] int64, rows (chosen, rejected).
        margin: [N] float32, consensus[chosen] - consensus[rejected].

    Raises:
        ValueError: wrong shapes or dtypes, infinite scores, an unknown strategy, an option it does not read, values
            that cannot be used.
        ImportError: the C++ extension is not built.
    """
    rules = PairRules(
        strategy=strategy,
        max_pairs=max_pairs,
        min_margin=min_margin,
        positives=positives,
        negatives=negatives,
        text_ids=text_ids,
        forbidden=forbidden,
        reuse_texts=reuse_texts,
        baseline=baseline,
        distances=distances,
        band=band,
        seed=seed,
        keys=keys,
        num_threads=num_threads,
    )
    task = pair_task(consensus, offsets, rules)
    pairs, margin, is_finite = extension().select_pairs(
        task.consensus_R,
        task.offsets_P1,
        strategy=task.strategy,
        max_pairs=task.max_pairs,
        min_margin=task.min_margin,
        positives=task.positives_R,
        negatives=task.negatives_R,
        text_ids=task.text_ids_R,
        forbidden=task.forbidden_F2,
        keys=task.keys_P,
        baseline=task.baseline_P,
        distances=task.distances,
        band=task.band,
        reuse_texts=task.reuse_texts,
        seed=task.seed,
        num_threads=task.num_threads,
    )
    if not is_finite:
        check_finite(task.consensus_R)
    return pairs, margin


def select_decided(
    pairs: npt.ArrayLike,
    margin: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: DecidedStrategy,
    max_pairs: int | None,
    text_ids: npt.ArrayLike | None = None,
    reuse_texts: bool | None = None,
    seed: int = 0,
    keys: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> np.ndarray:
    """Which of the pairs that were decided elsewhere (prior, correction, people) are trained on.

    The strategies ``best_worst``, ``random`` and ``all`` of ``select_pairs`` over a list of pairs instead of all that
    scores allow; the others need a ranking, which decisions pair by pair need not form. Equal margins go to the earlier
    pair. Two pairs of the same two texts are not both selected, in whatever order they were decided.

    Args:
        pairs: [C, 2] int64, rows (chosen, rejected), >= 0; the pairs of one prompt are adjacent.
        margin: [C] float32, finite, how far apart the two are; ``best_worst`` and ``all`` take the widest first. No
            least margin is asked for here: that a pair is listed is the decision.
        offsets: [P+1] int64, prompt p owns the pairs offsets[p] : offsets[p + 1].
        text_ids: [R] int64, of the rows that ``pairs`` names; None: all texts differ.
        strategy, max_pairs, reuse_texts, seed, keys, num_threads: as for ``select_pairs``.

    Returns:
        [N] int64: indices into ``pairs``, by prompt, in the order of selection.

    Raises:
        ValueError: as ``select_pairs``.
        ImportError: the C++ extension is not built.
    """
    rules = Rules(
        strategy=strategy,
        max_pairs=max_pairs,
        text_ids=text_ids,
        reuse_texts=reuse_texts,
        seed=seed,
        keys=keys,
        num_threads=num_threads,
    )
    task = decided_task(pairs, margin, offsets, rules)
    return extension().select_decided(
        task.pairs_C2,
        task.margin_C,
        task.offsets_P1,
        strategy=task.strategy,
        max_pairs=task.max_pairs,
        text_ids=task.text_ids_R,
        keys=task.keys_P,
        reuse_texts=task.reuse_texts,
        seed=task.seed,
        num_threads=task.num_threads,
    )

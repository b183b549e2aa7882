"""How far scorers agree.

Letters in shapes: P prompts, R responses of all prompts, M scorers, n responses of one prompt. NaN = no score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import check_num_threads, extension, infinite_scores, scores_by_prompt


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far scorers agree; of two over one prompt: ``Agreement(concordance=[0.8], leave_one_out=[0.6, 0.6])``."""

    concordance: np.ndarray
    """[P] float32 in [0, 1]: Kendall's W of each prompt, 1 = all scorers rank alike."""
    leave_one_out: np.ndarray
    """[M] float32 in [-1, 1]: correlation of each scorer with the others."""


def agreement(scores: npt.ArrayLike, offsets: npt.ArrayLike, *, num_threads: int = 0) -> Agreement:
    """Kendall's W of each prompt, and the correlation of each scorer with the others. Both look only at ranks.

    W is 12 S / (m^2 (n^3 - n) - m sum_j T_j) over the m scorers that scored all n responses of the prompt (the
    others are left out of it), with S the sum of squared deviations of the responses' rank sums from their mean, and
    T_j = sum (t^3 - t) over the groups of t scores that scorer j ties: Kendall, Rank Correlation Methods (1948),
    chapter 6; https://en.wikipedia.org/wiki/Kendall%27s_W#Correction_for_ties. NaN when n or m is less than 2, or when
    every one of these scorers ties all responses.

    The leave-one-out correlation of scorer m is Pearson's, over the responses of all prompts together, between its
    rank within the prompt, ties averaged, scaled to [0, 1], and the mean of the same ranks of the other scorers that
    scored the response. A scorer with fewer than two scores in a prompt says nothing of order and sits that prompt
    out. NaN where no response is left, or either side never varies.

    Args:
        scores: [R, M] float32, higher is better, NaN = no score; the rows of one prompt are adjacent.
        offsets: [P+1] int64, prompt p owns the rows offsets[p] : offsets[p + 1].
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is bitwise the same for any number.

    Raises:
        ValueError: wrong shapes or dtypes, infinite scores.
        ImportError: the C++ extension is not built.
    """
    check_num_threads(num_threads)
    scores_RM, offsets_P1 = scores_by_prompt(scores, offsets)
    result = extension().agreement(scores_RM, offsets_P1, num_threads)
    if result is None:
        raise infinite_scores(scores_RM)
    concordance_P, leave_one_out_M = result
    return Agreement(concordance=concordance_P, leave_one_out=leave_one_out_M)

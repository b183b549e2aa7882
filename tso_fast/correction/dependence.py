"""Judges that share errors: who copies whom, found without labels.

Two judges that are independent, given which response is better, agree as often as their accuracies make them. What
the other voters say of their pairs, without the two, tells how often that is. Judges that agree clearly more often
are joined: one gets an emission that depends on the other's vote (a tree, as in tree-augmented naive Bayes; Friedman
et al. 1997, doi:10.1023/A:1007465528199), if that explains the votes better than it costs in parameters (BIC).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tso_fast.correction.joint import JointModel
from tso_fast.correction.votes import Votes

EXCESS = 0.05
"""Smallest excess of agreement, as a mean product of signs in [-1, 1], that is looked into."""
Z = 4.0
"""Standard errors by which it must exceed chance."""
MIN_PAIRS = 50


class Excess(NamedTuple):
    """Agreement of two judges beyond what their accuracies explain: ``Excess(observed=0.9, expected=0.1, z=80.0)``."""

    observed: float
    """Mean product of the signs of their votes, a tie counting 0."""
    expected: float
    z: float

    @property
    def is_suspicious(self) -> bool:
        return self.observed - self.expected > EXCESS and self.z > Z


def excesses(model: JointModel) -> dict[tuple[int, int], Excess]:
    """Excess agreement of every two judges with enough common votes, by their columns."""
    votes = model.votes
    judges = [j for j, v in enumerate(votes.voters) if v.kind in ("comparison", "score") and v.given is None]
    signs = np.sign(votes.strength_NJ)
    likelihood = model.log_likelihood
    out = {}
    for a, b in itertools.combinations(judges, 2):
        both = ~np.isnan(signs[:, a]) & ~np.isnan(signs[:, b])
        if both.sum() < MIN_PAIRS:
            continue
        states = model.expect(without=[a, b])[both]
        expected = (states * _mean_sign(model, a)[both] * _mean_sign(model, b)[both]).sum(axis=1)
        gap = signs[both, a] * signs[both, b] - expected
        error = gap.std() / np.sqrt(len(gap)) + 1e-9
        out[a, b] = Excess(float((gap + expected).mean()), float(expected.mean()), float(gap.mean() / error))
    model.log_likelihood = likelihood
    return out


def _mean_sign(model: JointModel, j: int) -> np.ndarray:
    """Expected sign of a judge's vote in each state, given how the pair was shown, [N, 3]."""
    emission = model.emissions[j]
    table = emission.table.mean(axis=1)
    voted = table[:, :-1].sum(axis=1)
    mean = np.einsum("l,sld->sd", emission.sign, table) / voted
    return mean[model.votes.shown_NJ[:, j] + 1]


def fit_with_dependence(
    votes: Votes, make: Callable[[Mapping[int, int]], JointModel]
) -> tuple[JointModel, dict[tuple[int, int], Excess]]:
    """The model with judges joined that depend on each other, and the excess agreement of those that were joined.

    Args:
        make: a model fitted to ``votes`` with these parents.
    """
    model = make({})
    joined: dict[tuple[int, int], Excess] = {}
    refused: set[tuple[int, int]] = set()
    while True:
        found = excesses(model)
        candidates = sorted(
            (pair for pair, excess in found.items() if excess.is_suspicious and pair not in joined.keys() | refused),
            key=lambda pair: -found[pair].z,
        )
        for pair in candidates:
            edge = _edge(pair, model.parents)
            if edge is None:
                continue
            child, parent = edge
            richer = make({**model.parents, child: parent})
            table = richer.emissions[child].table[0, 0]
            cost = 0.5 * 2 * table.size / 1.5 * np.log(max(np.isfinite(votes.strength_NJ[:, child]).sum(), 2))
            if richer.log_likelihood - model.log_likelihood > cost:
                model, joined[pair] = richer, found[pair]
                break
            refused.add(pair)
        else:
            return model, joined


def _edge(pair: tuple[int, int], parents: Mapping[int, int]) -> tuple[int, int] | None:
    """Child and parent that join two judges without a circle; None: they are joined through others."""
    for child, parent in (pair[::-1], pair):
        ancestors = {parent}
        while (above := parents.get(parent)) is not None:
            ancestors.add(parent := above)
        if child not in parents and child not in ancestors:
            return child, (pair[1] if child == pair[0] else pair[0])
    return None

"""How far people agree, with each other and with the judges."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tso_fast.annotate.order import sign
from tso_fast.files.labels import Pair


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of several opinions on the same pairs."""

    pairs: int
    """Number of pairs with two opinions or more."""
    raw: float
    """Share of equal opinions among all twos of opinions on a pair; every pair has the same weight."""
    alpha: float | None
    """Krippendorff's alpha, nominal: 1 is full agreement, 0 is chance; None if all opinions are the same."""


def agreement(opinions: Iterable[Sequence[Hashable]]) -> Agreement | None:
    """Agreement, given the opinions on each pair; None if no pair has two opinions.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), nominal data with missing values; with two
    annotators and many pairs it is Scott's pi, close to Cohen's kappa.
    """
    common = [list(of_pair) for of_pair in opinions if len(of_pair) > 1]
    if not common:
        return None
    total = sum(map(len, common))
    counts = Counter(itertools.chain.from_iterable(common))
    differing, shares = 0.0, []
    for of_pair in common:
        m = len(of_pair)
        equal = sum(n * (n - 1) for n in Counter(of_pair).values())
        shares.append(equal / (m * (m - 1)))
        differing += (m * (m - 1) - equal) / (m - 1)
    expected = (total * (total - 1) - sum(n * (n - 1) for n in counts.values())) / (total - 1)
    return Agreement(
        pairs=len(common), raw=sum(shares) / len(shares), alpha=1 - differing / expected if expected else None
    )


def _preferences(opinions: Iterable[Sequence[float | None]]) -> Agreement | None:
    """Agreement on preferences. The order of two responses is arbitrary, so each pair counts in both orders: otherwise,
    if the first response were usually better, agreeing on "the first" would look like chance."""
    given = [list(of_pair) for of_pair in opinions]
    swapped = [[None if value is None else -value for value in of_pair] for of_pair in given]
    found = agreement([*given, *swapped])
    return None if found is None else replace(found, pairs=found.pairs // 2)


def between_people(values: Mapping[tuple[Pair, str], float | None]) -> Agreement | None:
    """Agreement between annotators; "bad pair" is an opinion like any other."""
    by_pair: dict[Pair, list[float | None]] = {}
    for (pair, _), value in values.items():
        by_pair.setdefault(pair, []).append(value)
    return _preferences(by_pair.values())


def with_judges(
    values: Mapping[tuple[Pair, str], float | None], votes: Mapping[Pair, Mapping[str, float]]
) -> Agreement | None:
    """Agreement of each label with the majority of the judges; leaves out bad pairs and pairs without votes."""
    return _preferences(
        (value, float(sign(sum(map(sign, votes[pair].values())))))
        for (pair, _), value in values.items()
        if value is not None and votes.get(pair)
    )

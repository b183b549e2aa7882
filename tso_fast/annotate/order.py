"""The order in which people see pairs: pairs where a label is most informative come first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

from tso_fast.correction.beliefs import Beliefs
from tso_fast.files.labels import Pair
from tso_fast.types import PairEvidence


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def informativeness(pair: PairEvidence) -> float:
    """How informative a label would be, in [0, 2]: split + conflict.

    With s the signs of the judges' votes (1, 0 or -1) and m their mean, 0 where no judge voted:

        split    = mean(s^2) - m^2            their variance: 1 when half say the one and half the other
        conflict = (1 - prior x m) / 2        1 when all contradict the prior, 0 when all confirm it
                   (1 - |m|) / 2              where there is no prior

    So 1.5: the judges are split; 1: they agree, against the prior; 0.5: no votes and no prior; 0: all agree, and a
    label adds nothing. Only signs count, since the scales of two judges cannot be compared.
    """
    signs = [sign(vote) for vote in pair.votes.values()]
    m = sum(signs) / len(signs) if signs else 0.0
    split = sum(s * s for s in signs) / len(signs) - m * m if signs else 0.0
    conflict = (1 - pair.prior * m) / 2 if pair.prior else (1 - abs(m)) / 2
    return split + conflict


def draw(*parts: object) -> int:
    """A number in [0, 2**64) that depends on nothing but ``parts``."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8])


def gains_of(beliefs: Beliefs) -> dict[Pair, float]:
    """How much a label on each pair of different texts would help.

    Where reliabilities are estimated: the expected number of pairs that it puts right, see
    ``correction.reliability.Combination.label_gains``; elsewhere ``informativeness``.
    """
    if beliefs.combination is None:
        gains = map(informativeness, beliefs.pairs())
    else:
        gains = iter(beliefs.combination.label_gains().tolist())
    same = beliefs.votes.is_same_N.tolist()
    return {name: gain for name, gain, is_same in zip(beliefs.names(), gains, same, strict=True) if not is_same}


def ordered(gains: Mapping[Pair, float], seed: int) -> list[Pair]:
    """The queue: a prompt's second pair comes after every prompt's first, and pairs without a gain come last.

    Ties are broken at random, by ``seed``.
    """
    keyed = sorted((-gain, draw(seed, *name), name) for name, gain in gains.items())
    seen: Counter[str] = Counter()
    queue = []
    for position, (key, _, name) in enumerate(keyed):
        queue.append((key == 0, seen[name[0]], position, name))
        seen[name[0]] += 1
    return [name for *_, name in sorted(queue)]


def sides(pair: Pair, annotator: str, seed: int) -> tuple[int, int]:
    """Indices of the responses shown at the left and at the right."""
    _, i, j = pair
    return (i, j) if draw("side", seed, annotator, *pair) % 2 else (j, i)

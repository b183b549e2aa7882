"""Which responses to a prompt are right, inferred together from all votes on it.

Every response is right or wrong. The first of two is better if it is right and the other one is not, so the votes on
the pairs of a prompt constrain each other: with four responses there are 16 possibilities, not 3 ** 6.

    p(right ones) ~ exp(level * number right + trust * their order by the prior + coupling * unequal pairs / (R - 1))
    p(vote | right ones) = the voter's ``Emission`` in the state of its pair

``level``, ``trust`` (how far to believe the matrix's order), ``coupling`` (negative: answers to one prompt tend to be
right together) and all emissions are estimated by EM. All possibilities of a prompt are enumerated; a prompt of more
than ``BLOCK`` responses is seen in overlapping blocks that hold every pair, so the sum over possibilities is one
matrix product for all prompts.

A voter with one number a response cannot contradict itself, however wrong it is. So its votes count 2 / R each, which
is exact for Gaussian scores with an offset per prompt, and its emission is learned from what the *other* voters make
of its pairs, not from its own coherence.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tso_fast.correction.emissions import ASSUMED_ANNOTATOR, NO_VOTE, Emission
from tso_fast.correction.votes import Votes, pair_number

BLOCK = 8
"""Most responses that are enumerated together."""
LEVEL, TRUST, COUPLING = 0, 1, 2
EXPECTED = np.array([0.0, 1.0, -1.0])
"""Level, trust and coupling before any data, and below how many observations that counts as."""
CERTAINTY = np.array([30.0, 100.0, 30.0])
TRUST_SCALE = 0.5
"""Distance from the expected trust beyond which the prior's tails are those of a Student distribution: an order that
most votes contradict is given up, or turned round."""
MAX_ITERATIONS = 300
TOLERANCE = 1e-6
"""Change of the log-likelihood, nats a prompt, at which EM has converged."""
CHUNK = 20_000
"""Prompts that are enumerated at once."""
LABEL_CHUNK = 500
"""The same where every two pairs of a prompt are looked at together."""


class Block(NamedTuple):
    """Possibilities of a number of responses."""

    right_CR: np.ndarray
    """[C, R] float64: 1: right, 0: wrong."""
    unequal_C: np.ndarray
    """[C] float64: pairs of a right and a wrong response / (R - 1)."""
    state_SC: np.ndarray
    """[pairs * 3, C] float64: 1 where the pair is in the state (-1, 0, 1: the first is better)."""


@functools.lru_cache
def block_of(count: int) -> Block:
    right = np.array(list(itertools.product([0.0, 1.0], repeat=count)))
    first, second = np.triu_indices(count, 1)
    state = right[:, first] - right[:, second] + 1
    one_hot = (state.T[:, None, :] == np.arange(3)[None, :, None]).astype(float)
    return Block(right, (state != 1).sum(axis=1) / max(count - 1, 1), one_hot.reshape(-1, len(right)))


def blocks_of(count: int) -> list[tuple[int, ...]]:
    """Sets of at most ``BLOCK`` of so many responses that together hold every pair."""
    if count <= BLOCK:
        return [tuple(range(count))]
    halves = [tuple(part.tolist()) for part in np.array_split(np.arange(count), -(-count // (BLOCK // 2)))]
    return [a + b for a, b in itertools.combinations(halves, 2)]


class Group(NamedTuple):
    """Blocks of one size."""

    pairs: np.ndarray
    """[B, pairs] rows of the pairs."""
    order: np.ndarray
    """[orders, R] different orders of the responses by the prior, in log-odds."""
    which: np.ndarray
    """[B] index into ``order``."""


def _groups(votes: Votes) -> list[Group]:
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for count in np.unique(votes.num_responses).tolist():
        prompts = np.flatnonzero(votes.num_responses == count)
        for members in blocks_of(count) if count > 1 else []:
            place = np.array(members)
            a, b = (place[k] for k in np.triu_indices(len(place), 1))
            pairs = votes.bounds[prompts][:, None] + pair_number(a, b, count)
            order = votes.order_R[votes.offsets[prompts][:, None] + place]
            found.setdefault(len(place), []).append((pairs, order))
    groups = []
    for parts in found.values():
        pairs, order = (np.concatenate(part) for part in zip(*parts, strict=True))
        order, which = np.unique(order, axis=0, return_inverse=True)
        groups.append(Group(pairs, order, which.ravel()))
    return groups


class Possibilities(NamedTuple):
    """All possibilities of some blocks of one size, T of them."""

    block: Block
    pairs: np.ndarray
    """[T, pairs] rows of the pairs."""
    order: np.ndarray
    """[orders, R] different orders of the responses by the prior, in log-odds."""
    which: np.ndarray
    """[T] index into ``order``."""
    log_prior: np.ndarray
    """[orders, C]"""
    p_TC: np.ndarray
    """[T, C] probability of each possibility."""
    log_likelihood_T: np.ndarray


class Voice(NamedTuple):
    """The votes of one voter, ready for look-up."""

    rows: np.ndarray
    """Pairs with a vote or a silence that counts."""
    entry: np.ndarray
    """Index into the flattened emission, ``[shown, parent's sign, column]``."""
    weight: np.ndarray
    """How much of a vote each counts."""


class JointModel:
    """Emissions and prior of a set of voters, fitted to the votes on some prompts.

    Args:
        parents: voter that a voter copies, by column.
        learn_N: [N] weight of each pair when emissions are learned; None: 1.
    """

    def __init__(
        self, votes: Votes, parents: Mapping[int, int] | None = None, learn_N: np.ndarray | None = None
    ) -> None:
        self.parents = dict(parents or {})
        self.learn_N = learn_N
        self.emissions = [
            Emission(voter, votes.strength_NJ[:, j], j in self.parents) for j, voter in enumerate(votes.voters)
        ]
        self.prior = EXPECTED.copy()
        self.log_likelihood = -np.inf
        self.num_iterations = 0
        self._read(votes)
        for j in self.parents:
            size = self.emissions[j].table.size // 3
            counts = np.bincount(self.voices[j].entry, minlength=size).reshape(3, 3, -1).sum(axis=0)
            self.emissions[j].start_as_copy(counts.astype(np.float64))
        self._guess_pulls()

    def _read(self, votes: Votes) -> None:
        self.votes = votes
        self.groups = _groups(votes)
        self.voices = [self._voice(j) for j in range(len(votes.voters))]
        seen = [np.bincount(group.pairs.ravel(), minlength=len(votes.prior_N)) for group in self.groups]
        self.times_N = np.sum(seen, axis=0) if seen else np.zeros(len(votes.prior_N))

    def _voice(self, j: int) -> Voice:
        votes, emission = self.votes, self.emissions[j]
        column = emission.columns(votes.strength_NJ[:, j])
        if emission.voter.kind != "label":  # a bad pair is no tie
            column = np.where(votes.abstained_NJ[:, j], 2 * emission.num_levels + 1, column)
        rows = np.flatnonzero(column != NO_VOTE)
        parent = np.zeros(len(rows), dtype=np.int64)
        if j in self.parents:
            parent = np.sign(np.nan_to_num(votes.strength_NJ[rows, self.parents[j]])).astype(np.int64)
        entry = ((votes.shown_NJ[rows, j] + 1) * 3 + parent + 1) * (2 * emission.num_levels + 2) + column[rows]
        size = np.minimum(votes.num_responses[votes.prompt_of_pair[rows]], BLOCK)
        return Voice(rows, entry, 2 / size if emission.voter.is_pointwise else np.ones(len(rows)))

    def _guess_pulls(self) -> None:
        """Starts from the share of votes for the response shown first, beside that of the median judge."""
        odds = {}
        for j, emission in enumerate(self.emissions):
            said = np.sign(self.votes.strength_NJ[:, j]) * self.votes.shown_NJ[:, j]
            if emission.voter.kind == "comparison" and emission.voter.given is None:
                odds[j] = np.log(((said > 0).sum() + 1) / ((said < 0).sum() + 1))
        if len(odds) > 2:
            middle = np.median(list(odds.values()))
            for j, own in odds.items():
                self.emissions[j].pull = float(own - middle) / 2
                self.emissions[j].update_table()

    # ---- expectation

    def evidence(self, without: Collection[int] = ()) -> np.ndarray:
        """Sum of the voters' log-likelihoods of each pair's states, [N, 3]."""
        out = np.zeros((len(self.votes.prior_N), 3))
        for j, (voice, emission) in enumerate(zip(self.voices, self.emissions, strict=True)):
            if j not in without:
                log = np.log(emission.table.reshape(-1, 3))
                out[voice.rows] += log[voice.entry] * voice.weight[:, None]
        return out

    def expect(self, without: Collection[int] = (), learn_prior: bool = False) -> np.ndarray:
        """Probabilities of each pair's states (-1, 0, 1) given all votes, [N, 3].

        Args:
            without: voters that are not heard.
            learn_prior: also move the prior towards what is found.
        """
        evidence = self.evidence(without)
        out = np.zeros_like(evidence)
        self.log_likelihood = 0.0
        moments: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for part in self._possibilities(evidence):
            share = 1 / self.times_N[part.pairs].mean(axis=1)
            self.log_likelihood += float(part.log_likelihood_T @ share)
            states = (part.p_TC @ part.block.state_SC.T).reshape(-1, 3)
            for state in range(3):
                out[:, state] += np.bincount(part.pairs.ravel(), states[:, state], minlength=len(out))
            if learn_prior:
                found = np.zeros(part.log_prior.shape)
                np.add.at(found, part.which, part.p_TC * share[:, None])
                moments.append((self._features(part.block, part.order), part.log_prior, found))
        if learn_prior:
            self._fit_prior(moments)
        out /= np.maximum(self.times_N, 1)[:, None]
        out[self.times_N == 0] = [0.0, 1.0, 0.0]
        return out

    def _possibilities(self, evidence: np.ndarray, most: int = CHUNK) -> Iterator[Possibilities]:
        """Probabilities of all possibilities of all blocks, at most so many blocks at once.

        Args:
            evidence: [N, 3] log-likelihood of each pair's states.
        """
        for group in self.groups:
            block = block_of(group.order.shape[1])
            for start in range(0, len(group.pairs), most):
                pairs = group.pairs[start : start + most]
                own, which = np.unique(group.which[start : start + most], return_inverse=True)
                log_prior = self._log_prior(block, group.order[own])
                log = evidence[pairs].reshape(len(pairs), -1) @ block.state_SC + log_prior[which]
                top = log.max(axis=1, keepdims=True)
                p = np.exp(log - top)
                total = p.sum(axis=1, keepdims=True)
                p /= total
                yield Possibilities(block, pairs, group.order[own], which, log_prior, p, (top + np.log(total))[:, 0])

    def standard_errors(self, states: np.ndarray) -> np.ndarray:
        """Standard error of the log-odds of each voter's being right, [J].

        From the outer products of the prompts' scores by all voters and the prior together: that judges err, and that
        responses are right alike, can look the same, and then both are uncertain.

        Args:
            states: what ``expect`` returns.
        """
        num_prompts, J = len(self.votes.num_responses), len(self.emissions)
        score = np.zeros((num_prompts, J + 3))
        for j, (voice, emission) in enumerate(zip(self.voices, self.emissions, strict=True)):
            prompt = self.votes.prompt_of_pair[voice.rows]
            weight = voice.weight if self.learn_N is None else voice.weight * self.learn_N[voice.rows]
            mean = emission.sign @ emission.symmetric.mean(axis=0)[:, 2]
            first, second = states[voice.rows, 2], states[voice.rows, 0]
            sign = np.sign(np.nan_to_num(self.votes.strength_NJ[voice.rows, j]))
            own = (sign * (first - second) - mean * (first + second)) / 2
            score[:, j] = np.bincount(prompt, weight * own, minlength=num_prompts)
        for part in self._possibilities(self.evidence()):
            features = self._features(part.block, part.order)
            expected = np.einsum("oc,ocf->of", np.exp(part.log_prior), features)
            found = np.einsum("tc,tcf->tf", part.p_TC, features[part.which]) - expected[part.which]
            share = 1 / self.times_N[part.pairs].mean(axis=1)
            np.add.at(score[:, J:], self.votes.prompt_of_pair[part.pairs[:, 0]], found * share[:, None])
        information = score.T @ score + 1e-3 * np.eye(J + 3)
        return np.sqrt(np.diag(np.linalg.inv(information))[:J])

    def label_gains(self, votes: Votes) -> np.ndarray:
        """Expected number of pairs of its prompt that one more label on a pair puts right, [N].

        A pair is decided for the likelier side, so it is wrong with the probability of the other side. A label that is
        right on ``ASSUMED_ANNOTATOR`` of the pairs changes the probabilities of all pairs of the prompt, and the
        expected number of wrong ones falls by this much. Beyond ``BLOCK`` responses each label is heard in its blocks.
        """
        with self._reading(votes):
            evidence, out = self.evidence(), np.zeros(len(votes.prior_N))
            wrong = 1 - ASSUMED_ANNOTATOR
            says = np.full((3, 3), wrong / 2) + (1 - 1.5 * wrong) * np.eye(3)
            for part in self._possibilities(evidence, LABEL_CHUNK):
                S, C = part.block.state_SC.shape
                weighted = part.p_TC[:, None, :] * part.block.state_SC
                both = (weighted.reshape(-1, C) @ part.block.state_SC.T).reshape(len(part.pairs), S // 3, 3, S // 3, 3)
                before = both.sum(axis=2)[:, 0]
                after = np.einsum("la,tnamb->tnlmb", says, both)
                gain = np.minimum(before[..., 0], before[..., 2]).sum(axis=1)[:, None]
                gain = gain - np.minimum(after[..., 0], after[..., 2]).sum(axis=(2, 3))
                out += np.bincount(part.pairs.ravel(), gain.ravel(), minlength=len(out))
            return out / np.maximum(self.times_N, 1)

    def _features(self, block: Block, order: np.ndarray) -> np.ndarray:
        """Number right, their order, and unequal pairs of every possibility, [orders, C, 3]."""
        out = np.empty((len(order), len(block.right_CR), 3))
        out[..., LEVEL] = block.right_CR.sum(axis=1)
        out[..., TRUST] = order @ block.right_CR.T
        out[..., COUPLING] = block.unequal_C
        return out

    def _log_prior(self, block: Block, order: np.ndarray) -> np.ndarray:
        log = self._features(block, order) @ self.prior
        return log - np.logaddexp.reduce(log, axis=1, keepdims=True)

    def _fit_prior(self, moments: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """One Newton step: an exponential family, whose expected features are matched."""
        gradient, curvature = np.zeros(3), np.zeros((3, 3))
        for features, log_prior, found in moments:
            p, count = np.exp(log_prior), found.sum(axis=1)
            mean = np.einsum("tc,tcf->tf", p, features)
            gradient += np.einsum("tc,tcf->f", found, features) - count @ mean
            second = np.einsum("tc,tcf,tcg->tfg", p, features, features)
            curvature += np.einsum("t,tfg->fg", count, second - mean[:, :, None] * mean[:, None, :])
        away = self.prior - EXPECTED
        certainty = CERTAINTY / np.array([1.0, 1 + (away[TRUST] / TRUST_SCALE) ** 2, 1.0])
        gradient -= certainty * away
        self.prior = self.prior + np.clip(np.linalg.solve(curvature + np.diag(certainty), gradient), -1, 1)

    # ---- maximisation

    def fit(self, max_iterations: int = MAX_ITERATIONS, tolerance: float = TOLERANCE) -> None:
        """EM from where the model stands.

        Labels are heard once the others are understood: a person whose labels are inverted must not turn all judges.
        And a pull towards what is shown first is looked for once the rest is fitted, which often explains it.
        """
        labels = {j for j, emission in enumerate(self.emissions) if emission.voter.kind == "label"}
        early = labels if self.learn_N is None else set()
        self._iterate(max_iterations, tolerance, early, fits_pulls=False)
        self._iterate(max_iterations, tolerance, set(), fits_pulls=True)

    def _iterate(self, max_iterations: int, tolerance: float, without: set[int], fits_pulls: bool) -> None:
        self.log_likelihood = -np.inf  # of the stage before, to which nothing is compared
        for _ in range(max_iterations):
            before = self.log_likelihood
            states = self.expect(without, learn_prior=True)
            for j in range(len(self.emissions)):
                self._fit_emission(j, states, fits_pulls)
            self.num_iterations += 1
            if abs(self.log_likelihood - before) < tolerance * max(len(self.votes.num_responses), 1):
                break

    def _fit_emission(self, j: int, states: np.ndarray, fits_pull: bool) -> None:
        emission, voice = self.emissions[j], self.voices[j]
        if emission.voter.given is not None or not len(voice.rows):
            return
        if emission.voter.is_pointwise:
            likelihood = self.log_likelihood
            copies = [k for k, parent in self.parents.items() if parent == j]
            others = self.expect(without=[j, *copies])[voice.rows] * emission.table.reshape(-1, 3)[voice.entry]
            weight = others / others.sum(axis=1, keepdims=True)
            self.log_likelihood = likelihood
        else:
            weight = states[voice.rows]
        weight = weight * voice.weight[:, None]
        if self.learn_N is not None:
            weight = weight * self.learn_N[voice.rows][:, None]
        size = emission.table[..., 0].size
        counts = np.stack([np.bincount(voice.entry, weight[:, state], minlength=size) for state in range(3)], axis=1)
        emission.fit(counts.reshape(emission.table.shape), fits_pull)

    def posterior(self, votes: Votes) -> np.ndarray:
        """Probabilities of the states of each pair of other prompts with the same voters, [N, 3], by this model."""
        with self._reading(votes):
            return self.expect()

    @contextlib.contextmanager
    def _reading(self, votes: Votes) -> Iterator[None]:
        """A context in which the model, as it is, reads other votes."""
        own = self.votes
        self._read(votes)
        try:
            yield
        finally:
            self._read(own)

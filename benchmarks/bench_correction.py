"""Error rates of the order of pairs: of the prior, of the judges, after correction, and the smallest possible.

    python benchmarks/bench_correction.py                     tables, results/correction.json, docs/correction.png
    python benchmarks/bench_correction.py --only copies       some of the tables
    python benchmarks/bench_correction.py --speed             seconds and memory for 3.3 million comparisons, too
    python benchmarks/bench_correction.py --write_verdicts FILE   the simulated judges, for `tso-fast pairs --verdicts`

GSM8K: 660 questions, each answered by a real 2 x 2 matrix of GPT-3 models, with `is_correct` known. Judges are
simulated, and how reliable they are is hidden from the correction. Errors are those on ordered decided pairs: one
response is right, one is wrong, and the matrix orders them. Judges either guess where both responses are right or both
wrong, as most do, or are silent there.

The joint limit knows all that can be known: the true probabilities of the votes, and how often each of the 16
possibilities of right and wrong responses occurs in the file. It sums over those possibilities.

Real judges: on AlpacaEval, the scores of two GPT-4 judges and the length are judges, and Claude's is the truth. On
PandaLM each of three people in turn is the truth; the other two, and the length, are the judges.

Correction is the package's own (`correction.reliability.combine`; with labels `correction.beliefs.Beliefs`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import logging
import math
import multiprocessing
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from harness import RESULTS, ROOT, commit, machine, table, versions, write_json

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.beliefs import INVERTED, LONGER, PULL, Beliefs, consensus_of
from tso_fast.correction.calibration import expected_calibration_error
from tso_fast.correction.evidence import evidence_of, score_matrix
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.correction.reliability import Combination, combine
from tso_fast.correction.votes import Voter, Votes, votes_of
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.rows import BadRows, read_candidates, verdict_row
from tso_fast.types import HUMAN, Candidates, Comparison, Prompt, Response, ScoreMatrix

DATA = ROOT.parent / "shared/data"
SEEDS = range(5)
LABEL_SEEDS = range(3)
"""With labels a run fits its model a dozen times."""
COVERAGES = (1.0, 0.8)
STATES = np.array([-1, 0, 1])
"""Of a pair: the second response is better, neither is, the first is."""
SILENCE = {False: "guess", True: "silent"}
TOLD = (False, True)

Row = dict[str, Any]
Goal = tuple[str, bool]


# ------------------------------------------------------------------------------------------------- the simulated judges


class Judged(NamedTuple):
    """Votes of simulated judges, and what they truly tell."""

    strength_NJ: np.ndarray
    """Positive: the first response is better; NaN: no vote."""
    log_NS: np.ndarray
    """[N, 3] log-likelihood of all votes on a pair in each of ``STATES``."""


class Matrix:
    """All pairs of a real model matrix, with the truth."""

    def __init__(self, file: Path) -> None:
        rows = read_candidates(file, BadRows())
        self.candidates = [
            dataclasses.replace(item, responses=tuple(r for r in item.responses if not r.is_human)) for item in rows
        ]
        self.base = votes_of(self.candidates, score_matrix(self.candidates, []), [])
        right_PR = np.array([[bool(r.is_correct) for r in item.responses] for item in self.candidates]).astype(int)
        first, second = np.triu_indices(right_PR.shape[1], 1)
        self.truth_N = (right_PR[:, first] - right_PR[:, second]).ravel()
        self.is_measured = (self.truth_N != 0) & (self.base.prior_N != 0)
        right_CR = np.array(list(itertools.product([0, 1], repeat=right_PR.shape[1])))
        self.state_CN = right_CR[:, first] - right_CR[:, second]
        """[C, pairs of a prompt] state of each pair in each possibility of right and wrong responses."""
        counts = (right_PR[:, None] == right_CR).all(axis=2).sum(axis=0)
        self.log_frequency_C = np.log(counts / counts.sum(), out=np.full(len(counts), -np.inf), where=counts > 0)

    def votes(self, judged: Judged) -> Votes:
        """The votes as the package gathers them from comparisons, the first response of each pair shown first."""
        strength_NJ = judged.strength_NJ.astype(np.float32)
        strength_NJ[self.base.is_same_N] = np.nan
        return dataclasses.replace(
            self.base,
            voters=tuple(Voter(name=f"judge {j + 1}", kind="comparison") for j in range(strength_NJ.shape[1])),
            strength_NJ=strength_NJ,
            shown_NJ=np.where(np.isnan(strength_NJ), 0, 1).astype(np.int8),
            abstained_NJ=np.zeros(strength_NJ.shape, dtype=bool),
        )

    def limit(self, judged: Judged) -> np.ndarray:
        """[N] log-odds that the first response is better, with all that can be known."""
        log_NS = np.where(self.base.is_same_N[:, None] & (STATES != 0), -np.inf, judged.log_NS)
        each_PNS = log_NS.reshape(-1, self.state_CN.shape[1], 3)
        log_PC = each_PNS[:, np.arange(each_PNS.shape[1]), self.state_CN + 1].sum(axis=2) + self.log_frequency_C
        sides = [
            np.logaddexp.reduce(np.where(side == self.state_CN.T, log_PC[:, None], -np.inf), axis=2) for side in (1, -1)
        ]
        first, second = (np.maximum(side, -700.0).ravel() for side in sides)
        return first - second


def independent(matrix: Matrix, accuracies: Sequence[float], seed: int, silent: bool = False) -> Judged:
    """Judges that err independently; where both responses are right or both wrong they guess, or are silent."""
    rng = np.random.default_rng(seed)
    truth = matrix.truth_N[:, None]
    right = rng.random((len(truth), len(accuracies))) < np.array(accuracies)
    guesses = rng.choice([-1.0, 1.0], size=right.shape)
    strength_NJ = np.where(truth == 0, np.nan if silent else guesses, np.where(right, truth, -truth))
    return Judged(strength_NJ, _log(strength_NJ, np.array([_first(q) for q in accuracies]), silent))


def _first(accuracy: float) -> np.ndarray:
    """[3] probability that a judge prefers the first response."""
    return np.array([1 - accuracy, 0.5, accuracy])


def _log(strength_NJ: np.ndarray, first_JS: np.ndarray, silent: bool) -> np.ndarray:
    """[N, 3] log-likelihood of independent votes; a pair without any is undecided if judges are ``silent`` there."""
    says = np.where(strength_NJ[:, :, None] > 0, first_JS, 1 - first_JS)
    log_NS = np.log(np.where(np.isnan(strength_NJ)[:, :, None], 1.0, says)).sum(axis=1)
    if silent:
        log_NS[np.isnan(strength_NJ).all(axis=1)[:, None] != (STATES == 0)] = -np.inf
    return log_NS


def with_biased(matrix: Matrix, judged: Judged, share: float, seed: int) -> Judged:
    """One judge more, which prefers the response shown first on a share of the pairs, and else is right on 70 %."""
    own = independent(matrix, [0.7], 200 + seed).strength_NJ
    biased = np.where(np.random.default_rng(300 + seed).random(own.shape) < share, 1.0, own)
    log_NS = _log(biased, (share + (1 - share) * _first(0.7))[None], False)
    return Judged(np.column_stack([judged.strength_NJ, biased]), judged.log_NS + log_NS)


def copying(matrix: Matrix, accuracy: float, share: float, seed: int, silent: bool) -> Judged:
    """Three judges, of which the second repeats the first on a share of the pairs."""
    votes = independent(matrix, [accuracy] * 3, seed, silent).strength_NJ
    copied = np.random.default_rng(100 + seed).random(len(votes)) < share
    votes[:, 1] = np.where(copied, votes[:, 0], votes[:, 1])
    log_NS = _log(votes[:, [0, 2]], np.array([_first(accuracy)] * 2), silent)
    own = np.where(votes[:, [1]] > 0, _first(accuracy), 1 - _first(accuracy))
    likelihood = share * (votes[:, [1]] == votes[:, [0]]) + (1 - share) * own
    return Judged(votes, log_NS + np.where(np.isnan(votes[:, [1]]), 0.0, np.log(np.maximum(likelihood, 1e-300))))


def graded(matrix: Matrix, accuracy: float, seed: int) -> Judged:
    """Three judges that state calibrated probabilities, which are on the right side as often as ``accuracy``."""
    gap = 2 * NormalDist().inv_cdf(accuracy) ** 2
    noise = np.random.default_rng(seed).normal(size=(len(matrix.truth_N), 3))
    odds_NJ = matrix.truth_N[:, None] * gap + math.sqrt(2 * gap) * noise
    log_NS = (odds_NJ[:, :, None] * STATES / 2 - gap / 4 * np.abs(STATES)).sum(axis=1)
    return Judged(np.tanh(odds_NJ / 2), log_NS)


# ----------------------------------------------------------------------------------------------------- what is measured


def risk(log_odds: np.ndarray, truth: np.ndarray, coverage: float = 1.0) -> float:
    """Error rate of the most certain share of pairs; equally certain pairs at the edge count in proportion."""
    wrong = np.where(log_odds == 0, 0.5, np.sign(log_odds) != truth)
    _, level = np.unique(-np.abs(log_odds).round(9), return_inverse=True)
    num, errors = np.bincount(level), np.bincount(level, wrong)
    taken = np.clip(coverage * len(truth) - np.concatenate([[0], np.cumsum(num)[:-1]]), 0, num)
    return float((errors * taken / num).sum() / (coverage * len(truth)))


def log_odds_of(probabilities: np.ndarray) -> np.ndarray:
    """[N] log-odds that the first response is better, given that one is."""
    return (np.log(probabilities[:, 0] + 1e-13) - np.log(probabilities[:, 1] + 1e-13)).round(9)


def is_kept(probabilities: np.ndarray) -> np.ndarray:
    """[N] whether a pair is used at the defaults of ``PairingConfig``."""
    config = PairingConfig()
    first, second, neither = probabilities.T
    stated = np.maximum(first, second) / np.maximum(first + second, 1e-300)
    is_decided = np.abs(first - second).round(12) > config.min_margin
    return is_decided & (neither <= config.max_tie_probability) & (stated >= config.min_confidence)


def calibration(log_odds: np.ndarray, truth: np.ndarray) -> Row:
    """Mean probability stated for the response preferred, how often it is right, and the calibration error."""
    right = np.where(log_odds == 0, 0.5, np.sign(log_odds) == truth)
    stated = 1 / (1 + np.exp(-np.abs(log_odds)))
    return {
        "stated": float(stated.mean()),
        "right": float(right.mean()),
        "ece": expected_calibration_error(stated, right),
    }


def consensus_gaps(votes: Votes) -> np.ndarray:
    """[N] gaps of the mean win rates, as `evidence: consensus` has them; the prior order where there is none."""
    offsets, first, second = votes.offsets, *_rows_of_pairs(votes)
    won = (1 + votes.strength_NJ.astype(np.float64)) / 2
    rates = []
    for share in won.T:
        has = ~np.isnan(share)
        sums = np.bincount(first[has], share[has], offsets[-1]) + np.bincount(second[has], 1 - share[has], offsets[-1])
        counts = np.bincount(first[has], minlength=offsets[-1]) + np.bincount(second[has], minlength=offsets[-1])
        rates.append(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
    scores = np.column_stack(rates).astype(np.float32)
    matrix = ScoreMatrix(scores=scores, offsets=offsets, scorers=tuple(voter.name for voter in votes.voters))
    found = consensus_of(matrix, EvidenceConfig(evidence="consensus"))
    gaps = found.scores[first] - found.scores[second] if found.gaps is None else found.gaps
    return np.where(np.isnan(gaps), votes.prior_N, gaps.round(6))


def _rows_of_pairs(votes: Votes) -> tuple[np.ndarray, np.ndarray]:
    """[N] rows of the first and of the second response of each pair."""
    pairs = [
        np.array(np.triu_indices(n, 1)) + start for n, start in zip(votes.num_responses, votes.offsets, strict=False)
    ]
    first, second = np.concatenate(pairs, axis=1)
    return first, second


def named(found: Combination) -> list[str]:
    """What the package warns about, in short."""
    out = [f"{a} = {b}" for a, b in found.joined]
    for name, row in found.judges.items():
        if row.is_given or not row.num_votes:
            continue
        out += [f"{name} inverted"] * (row.interval[1] < INVERTED)
        out += [f"{name} prefers {'first' if row.pull > 0 else 'second'}"] * (abs(row.pull) > PULL)
        out += [f"{name} prefers {'longer' if row.longer > 0 else 'shorter'}"] * (abs(row.longer) > LONGER)
    return out + ["too few voters"] * (not found.is_identified)


def measure(
    matrix: Matrix, votes: Votes, limit_N: np.ndarray, found: Combination | None = None, on: np.ndarray | None = None
) -> Row:
    """Everything about one run, on ordered decided pairs, or those of them that are ``on``."""
    found = combine(votes) if found is None else found
    on = matrix.is_measured if on is None else on
    truth = matrix.truth_N[on]
    ours = log_odds_of(found.probabilities)[on]
    return {
        "prior": risk(votes.prior_N[on].astype(float), truth),
        "majority": risk(np.nansum(np.sign(votes.strength_NJ), axis=1)[on], truth),
        "consensus": risk(consensus_gaps(votes)[on], truth),
        "corrected": [risk(ours, truth, c) for c in COVERAGES],
        "limit": [risk(limit_N[on], truth, c) for c in COVERAGES],
        **calibration(ours, truth),
        "used": float(is_kept(found.probabilities)[on].mean()),
        "named": named(found),
        "accuracies": {name: row.accuracy for name, row in found.judges.items()},
    }


def ratio(ours: Iterable[float], base: Iterable[float]) -> list[float]:
    """Ratio of the means over seeds, and the lowest and highest ratio of a seed; NaN where the base has no error."""
    above, below = np.array(list(ours)), np.array(list(base))
    each = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    if not below.any():
        return [float("nan")] * 3
    return [float(above.mean() / below.mean()), float(np.nanmin(each)), float(np.nanmax(each))]


def mean(seeds: Sequence[Row], name: str) -> float:
    return float(np.mean([seed[name] for seed in seeds]))


def summary(name: str, seeds: list[Row]) -> Row:
    """Means over seeds, and ratios to the limit on all pairs and on the most certain."""
    columns = [[[seed[key][k] for seed in seeds] for k in range(len(COVERAGES))] for key in ("corrected", "limit")]
    return {
        "name": name,
        **{key: mean(seeds, key) for key in ("prior", "majority", "consensus", "ece", "used", "stated", "right")},
        "corrected": [float(np.mean(errors)) for errors in columns[0]],
        "limit": [float(np.mean(errors)) for errors in columns[1]],
        "ratio": [ratio(ours, limit) for ours, limit in zip(*columns, strict=True)],
        "named": dict(Counter(text for seed in seeds for text in seed["named"])),
        "seeds": seeds,
    }


def within(row: Row, factor: float) -> Goal:
    return f"≤ {factor} × limit", row["ratio"][0][0] <= factor


def calibrated(row: Row) -> Goal:
    return "ECE ≤ 0.05", row["ece"] <= 0.05


def percent(value: float) -> str:
    return f"{value:.1%}"


def spread_of(values: Sequence[float]) -> str:
    """A ratio with its range."""
    return "-" if math.isnan(values[0]) else "{:.2f} ({:.2f}–{:.2f})".format(*values)


COLUMNS: dict[str, Callable[[Row], str]] = {
    **{
        name: lambda row, name=name: percent(row[name])  # type: ignore[misc]
        for name in (
            "prior",
            "majority",
            "consensus",
            "single judge",
            "without it",
            "stated",
            "right",
            "used",
            "used, tie",
        )
    },
    "corrected": lambda row: percent(row["corrected"][0]),
    "limit": lambda row: percent(row["limit"][0]),
    "/ limit": lambda row: spread_of(row["ratio"][0]),
    "80 % kept": lambda row: percent(row["corrected"][1]),
    "its limit": lambda row: percent(row["limit"][1]),
    "/ its limit": lambda row: spread_of(row["ratio"][1]),
    "/ without": lambda row: spread_of(row["to_without"]),
    "no labels": lambda row: percent(row["before"]["corrected"][0]),
    "used before": lambda row: percent(row["before"]["used"]),
    "ECE before": lambda row: f"{row['before']['ece']:.3f}",
    "ECE": lambda row: f"{row['ece']:.3f}",
    "learned from": lambda row: counted(row["learn_from"]),
    "named": lambda row: counted(row["named"]),
    "alone": lambda row: listed(row["singles"], ".1%"),
    "believed right": lambda row: listed(row["believed"], ".0%"),
    "pairs": lambda row: f"{row['pairs']:,}",
    "auto": lambda row: row["auto"],
    "same prompt": lambda row: f"{row['same prompt']:.3f}",
    "other prompts": lambda row: f"{row['other prompts']:.3f}",
    "comparisons": lambda row: f"{row['comparisons']:,}",
    "make_pairs": lambda row: f"{row['seconds']:.1f} s",
    "of a core": lambda row: f"{row['cpu_seconds']:.1f} s",
    "input": lambda row: f"{row['input_gb']:.2f} GB",
    "peak": lambda row: f"{row['peak_gb']:.2f} GB",
    "goals": lambda row: ", ".join(text if is_met else f"**{text}**" for text, is_met in row["goals"]),
}
"""Cells of the tables; goals that are missed are bold, and counts in brackets are seeds."""


def counted(counts: Row) -> str:
    return ", ".join(f"{text} ({count})" for text, count in counts.items()) or "-"


def listed(shares: Row, form: str) -> str:
    return ", ".join(f"{name} {share:{form}}" for name, share in shares.items())


def show(rows: list[Row], columns: str) -> str:
    """A table of those columns that the rows are to have."""
    names = columns.split(" | ")
    return table(["", *names], ([row["name"], *(COLUMNS[name](row) for name in names)] for row in rows))


# ----------------------------------------------------------------------------------------------------- simulated panels


def run_seeds(matrix: Matrix, name: str, simulate: Callable[[int], Judged]) -> Row:
    """The summary of a panel of judges, drawn with each seed."""
    seeds = []
    for seed in SEEDS:
        judged = simulate(seed)
        seeds.append(measure(matrix, matrix.votes(judged), matrix.limit(judged)))
    return summary(name, seeds)


def run_panels(data: Path, panels: Sequence[tuple[float, ...]]) -> list[Row]:
    matrix = gsm8k(data)
    rows = []
    for silent, accuracies in itertools.product(TOLD, panels):
        name = ", ".join(f"{100 * q:.0f}" for q in accuracies) + f" %, {SILENCE[silent]}"
        row = run_seeds(matrix, name, functools.partial(independent, matrix, accuracies, silent=silent))
        row["goals"] = [_goal_of_panel(row, accuracies), calibrated(row)]
        rows.append(row)
    return rows


def _goal_of_panel(row: Row, accuracies: tuple[float, ...]) -> Goal:
    if len(set(accuracies)) > 1:
        return within(row, 1.15)
    if accuracies[0] < 0.7:
        return "≤ prior", row["corrected"][0] <= row["prior"]
    return within(row, 1.1)


def run_independent(data: Path) -> list[Row]:
    return run_panels(data, [(0.7,) * 3, (0.85,) * 3, (0.6,) * 3])


def run_useless(data: Path) -> list[Row]:
    return run_panels(data, [(0.7, 0.7, 0.5), (0.7, 0.7, 0.3), (0.85, 0.85, 0.5), (0.85, 0.85, 0.15)])


def run_graded_votes(data: Path) -> list[Row]:
    matrix = gsm8k(data)
    rows = []
    for accuracy in (0.7, 0.85):
        name = f"three that state probabilities, {accuracy:.0%} right"
        row = run_seeds(matrix, name, functools.partial(graded, matrix, accuracy))
        rows.append({**row, "goals": [within(row, 1.1), calibrated(row)]})
    return rows


def run_inverted_prior(data: Path) -> list[Row]:
    """The worse models are declared the better ones."""
    matrix = gsm8k(data)
    seeds, alone = [], []
    for seed in SEEDS:
        judged = independent(matrix, [0.7] * 3, seed)
        votes, limit = matrix.votes(judged), matrix.limit(judged)
        turned = dataclasses.replace(votes, order_R=-votes.order_R, prior_N=-votes.prior_N)
        nothing = dataclasses.replace(votes, order_R=0 * votes.order_R, prior_N=0 * votes.prior_N)
        seeds.append(measure(matrix, turned, limit))
        alone.append(measure(matrix, nothing, limit))
    row, other = summary("70 %, prior order inverted", seeds), summary("70 %, no prior order", alone)
    row["goals"] = [("≤ without prior order", row["corrected"][0] <= other["corrected"][0]), calibrated(row)]
    return [row, {**other, "goals": [calibrated(other)]}]


def run_biased(data: Path) -> list[Row]:
    """Three judges, and a fourth that prefers what it was shown first."""
    matrix = gsm8k(data)
    rows = []
    for accuracy in (0.7, 0.85):
        three = [independent(matrix, [accuracy] * 3, seed) for seed in SEEDS]
        without = [measure(matrix, matrix.votes(judged), matrix.limit(judged))["corrected"][0] for judged in three]
        for share in (0.3, 0.45, 1.0):
            name = f"{accuracy:.0%}, and one that says first on {share:.0%}"
            row = run_seeds(matrix, name, functools.partial(_with_biased, matrix, three, share))
            row["without it"] = float(np.mean(without))
            row["to_without"] = ratio([seed["corrected"][0] for seed in row["seeds"]], without)
            row["goals"] = [("≤ 1.05 × without", row["to_without"][0] <= 1.05), calibrated(row)]
            rows.append(row)
    return rows


def _with_biased(matrix: Matrix, three: Sequence[Judged], share: float, seed: int) -> Judged:
    return with_biased(matrix, three[seed], share, seed)


COPIES = tuple(itertools.product(TOLD, (0.7, 0.85), (0.9, 1.0)))
"""Whether judges are silent on undecided pairs, their accuracy, and the share of pairs that one copies."""


def run_copies(data: Path) -> list[Row]:
    """Two of three judges are nearly one."""
    matrix = gsm8k(data)
    rows = []
    for silent, accuracy, share in COPIES:
        name = f"{accuracy:.0%}, {share:.0%} copied, {SILENCE[silent]}"
        panel = functools.partial(copying, matrix, accuracy, share, silent=silent)
        row = run_seeds(matrix, name, panel)
        on = matrix.is_measured
        single = np.mean([risk(panel(seed).strength_NJ[on, 0], matrix.truth_N[on]) for seed in SEEDS])
        row["single judge"], best = float(single), min(row["prior"], float(single))
        row["goals"] = [
            ("≤ best of prior and single + 1 point", row["corrected"][0] <= best + 0.01),
            ("named", row["named"].get("judge 1 = judge 2", 0) == len(SEEDS)),
            calibrated(row),
        ]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ people's labels


def believe(
    candidates: Sequence[Candidates], comparisons: Sequence[Comparison], config: EvidenceConfig | None = None
) -> Beliefs:
    """What a run believes of its pairs; reliabilities are estimated unless ``config`` says otherwise."""
    config = EvidenceConfig(evidence="calibrated") if config is None else config
    matrix = score_matrix(candidates, [])
    return Beliefs(candidates, evidence_of(candidates, matrix, comparisons), config, matrix, comparisons)


def comparisons_of(matrix: Matrix, judged: Judged, label_N: np.ndarray | None = None) -> list[Comparison]:
    """The votes as verdicts, and labels of a person, NaN: none."""
    strength_NJ = matrix.votes(judged).strength_NJ if label_N is not None else judged.strength_NJ
    columns: list[tuple[str, str | None, np.ndarray]] = [
        (f"judge {j + 1}", None, column) for j, column in enumerate(strength_NJ.T)
    ]
    if label_N is not None:
        columns.append((HUMAN, "person", label_N))
    pairs = [
        (item.prompt.id, pair)
        for item in matrix.candidates
        for pair in itertools.combinations(range(len(item.responses)), 2)
    ]
    return [
        Comparison(prompt_id=prompt_id, responses=pair, judge=judge, annotator=who, probability=(1 + float(vote)) / 2)
        for n, (prompt_id, pair) in enumerate(pairs)
        for judge, who, column in columns
        if not np.isnan(vote := column[n])
    ]


def run_labelled_copies(data: Path) -> list[Row]:
    """100 labels of a person, measured on the pairs of the other prompts."""
    matrix = gsm8k(data)
    rows = []
    for silent, accuracy, share in COPIES:
        seeds, chosen, before = [], [], []
        for seed in LABEL_SEEDS:
            judged = copying(matrix, accuracy, share, seed, silent)
            told = np.random.default_rng(400 + seed).permutation(np.flatnonzero(matrix.truth_N))[:100]
            label_N = np.full(len(matrix.truth_N), np.nan)
            label_N[told] = matrix.truth_N[told]
            rest = matrix.is_measured & ~np.isin(matrix.base.prompt_of_pair, matrix.base.prompt_of_pair[told])
            beliefs = believe(matrix.candidates, comparisons_of(matrix, judged, label_N))
            votes, limit = matrix.votes(judged), matrix.limit(judged)
            seeds.append(measure(matrix, votes, limit, beliefs.combination, rest))
            before.append(measure(matrix, votes, limit, on=rest))
            chosen.append(beliefs.chosen.learn_from)
        row = summary(f"{accuracy:.0%}, {share:.0%} copied, {SILENCE[silent]}", seeds)
        row |= {"before": summary("no labels", before), "learn_from": dict(Counter(chosen))}
        rows.append({**row, "goals": [within(row, 1.2), calibrated(row), ("used ≥ 95 %", row["used"] >= 0.95)]})
    return rows


def run_tie_labels(data: Path) -> list[Row]:
    """200 honest labels, two thirds of them ties, beside three judges that guess; measured on the other pairs."""
    matrix = gsm8k(data)
    rows = []
    for accuracy in (0.7, 0.85):
        seeds, before, chosen = [], [], []
        for seed in LABEL_SEEDS:
            judged = independent(matrix, [accuracy] * 3, seed)
            rng, is_tie = np.random.default_rng(500 + seed), (matrix.truth_N == 0) & ~matrix.base.is_same_N
            told = [rng.permutation(np.flatnonzero(of))[:n] for of, n in ((is_tie, 133), (matrix.truth_N != 0, 67))]
            label_N = np.full(len(matrix.truth_N), np.nan)
            for pairs in told:
                label_N[pairs] = matrix.truth_N[pairs]
            rest = matrix.is_measured & np.isnan(label_N)
            beliefs = believe(matrix.candidates, comparisons_of(matrix, judged, label_N))
            votes, limit = matrix.votes(judged), matrix.limit(judged)
            before.append(measure(matrix, votes, limit, on=rest))
            seeds.append(measure(matrix, votes, limit, beliefs.combination, rest))
            chosen.append(beliefs.chosen.learn_from)
        name = f"three judges, {accuracy:.0%} right, guess"
        row = summary(name, seeds) | {"before": summary(name, before), "learn_from": dict(Counter(chosen))}
        falls = row["corrected"][0] < row["before"]["corrected"][0]
        row["goals"] = [("error falls", falls), ("used ≥ 95 %", row["used"] >= 0.95), calibrated(row)]
        rows.append(row)
    return rows


def run_small_changes(data: Path) -> list[Row]:
    """How far one label or vote moves the log-odds of the other decided pairs, of the same prompt and of others."""
    matrix = gsm8k(data)
    rows = []
    for accuracy in (0.7, 0.85):
        moved: dict[str, list[tuple[float, float]]] = {}
        for seed in LABEL_SEEDS:
            votes = matrix.votes(independent(matrix, [accuracy] * 3, seed))
            pair = int(np.random.default_rng(600 + seed).choice(np.flatnonzero(matrix.truth_N)))
            label_N = np.full(len(matrix.truth_N), np.nan)
            label_N[pair] = 0
            tied, missing = votes.strength_NJ.copy(), votes.strength_NJ.copy()
            tied[pair, 0], missing[pair, 0] = 0, np.nan
            now = log_odds_of(combine(votes).probabilities)
            for name, other in (
                ("one label, a tie", votes.with_label("person", label_N)),
                ("one vote, a tie", dataclasses.replace(votes, strength_NJ=tied)),
                ("one vote more", dataclasses.replace(votes, strength_NJ=missing)),
            ):
                change = np.abs(log_odds_of(combine(other).probabilities) - now)
                change[(matrix.truth_N == 0) | (np.arange(len(change)) == pair)] = 0
                near = votes.prompt_of_pair == votes.prompt_of_pair[pair]
                moved.setdefault(name, []).append((float(change[near].max()), float(change[~near].max())))
        for name, pairs in moved.items():
            near_most, far_most = np.max(pairs, axis=0)
            rows.append(
                {
                    "name": f"{name}, judges {accuracy:.0%}",
                    "same prompt": near_most,
                    "other prompts": far_most,
                    "seeds": pairs,
                    "goals": [],
                }
            )
    return rows


# ----------------------------------------------------------------------------------------------- scores of one response


def synthetic_scores(noise: Sequence[float], seed: int) -> tuple[list[Candidates], np.ndarray, np.ndarray]:
    """Scored responses to 500 prompts; the difference of true quality of each pair, and the best guess of it."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=(500, 4))
    scores = quality[..., None] + np.array(noise) * rng.normal(size=(*quality.shape, len(noise)))
    best = scores @ (1 / np.array(noise) ** 2)
    first, second = np.triu_indices(quality.shape[1], 1)
    return (
        _candidates_of(scores),
        (quality[:, first] - quality[:, second]).ravel(),
        (best[:, first] - best[:, second]).ravel(),
    )


def _candidates_of(scores: np.ndarray) -> list[Candidates]:
    return [
        Candidates(
            prompt=Prompt(id=f"q{p}", prompt=f"prompt {p}"),
            responses=tuple(
                Response(
                    model=f"m{r}",
                    text=f"response {r} to {p}",
                    scores={f"judge {j + 1}": float(score) for j, score in enumerate(own)},
                )
                for r, own in enumerate(of_prompt)
            ),
        )
        for p, of_prompt in enumerate(scores)
    ]


def with_tied_score(candidates: Sequence[Candidates], p: int) -> list[Candidates]:
    """The same, the first judge giving two responses to prompt ``p`` the same score."""
    first, second, *others = candidates[p].responses
    name = min(first.scores)
    tied = dataclasses.replace(second, scores={**second.scores, name: first.scores[name]})
    out = list(candidates)
    out[p] = dataclasses.replace(candidates[p], responses=(first, tied, *others))
    return out


def run_scores(data: Path) -> list[Row]:
    """Three judges that score single responses; no prior order."""
    rows = []
    for noise in ((1.0, 1.0, 1.0), (0.5, 1.0, 2.0), (1.0, 1.0, 5.0)):
        seeds = []
        for seed in SEEDS:
            candidates, gaps, best = synthetic_scores(noise, seed)
            beliefs = believe(candidates, [])
            tied = believe(with_tied_score(candidates, seed), [])
            assert beliefs.combination is not None
            assert tied.combination is not None
            ours, truth = log_odds_of(beliefs.combination.probabilities), np.sign(gaps)
            told = np.sign(beliefs.votes.strength_NJ)
            seeds.append(
                {
                    "majority": risk(told.sum(axis=1), truth),
                    "corrected": [risk(ours, truth)],
                    "limit": [risk(best, truth)],
                    **calibration(ours, truth),
                    "used": float(is_kept(beliefs.combination.probabilities).mean()),
                    "used, tie": float(is_kept(tied.combination.probabilities).mean()),
                    "named": named(beliefs.combination),
                    "quality": beliefs.combination.quality,
                }
            )
        keys = ("majority", "stated", "right", "ece", "used", "used, tie")
        row: Row = {"name": f"noise {noise}", **{key: mean(seeds, key) for key in keys}, "seeds": seeds}
        errors = {key: [seed[key][0] for seed in seeds] for key in ("corrected", "limit")}
        row |= {key: [float(np.mean(of_seeds))] for key, of_seeds in errors.items()}
        row["ratio"] = [ratio(errors["corrected"], errors["limit"])]
        row["named"] = dict(Counter(text for seed in seeds for text in seed["named"]))
        row["goals"] = [within(row, 1.1), calibrated(row), ("used ≥ 95 %", row["used, tie"] >= 0.95)]
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------- real judges


def lines_of(file: Path) -> list[Row]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def alpacaeval(file: Path) -> tuple[list[Candidates], np.ndarray]:
    """The responses that Claude scored, with the scores of the other judges; which of two Claude prefers."""
    candidates, truths = [], []
    for item in read_candidates(file, BadRows()):
        responses = [r for r in item.responses if "claude" in r.scores]
        scores = np.array([r.scores["claude"] for r in responses])
        first, second = np.triu_indices(len(responses), 1)
        truths.append(np.sign(scores[first] - scores[second]))
        judges = ("gpt4_turbo", "gpt4", "length")
        hidden = [
            dataclasses.replace(r, scores={name: r.scores[name] for name in judges if name in r.scores})
            for r in responses
        ]
        candidates.append(dataclasses.replace(item, responses=tuple(hidden)))
    return candidates, np.concatenate(truths)


def pandalm(file: Path, truth: int) -> tuple[list[Candidates], list[Comparison], np.ndarray]:
    """Responses with their length as a score, comparisons of two people, and those of a third."""
    sign = {1: 1.0, 2: -1.0, 0: 0.0}
    rows = lines_of(file)
    candidates = [
        Candidates(
            prompt=Prompt(id=row["id"], prompt=row["prompt"]),
            responses=tuple(
                Response(
                    model=row[f"model_{k}"],
                    text=row[f"response_{k}"],
                    sample=k,
                    scores={"length": float(len(row[f"response_{k}"]))},
                )
                for k in (1, 2)
            ),
        )
        for row in rows
    ]
    comparisons = [
        Comparison(
            prompt_id=row["id"],
            responses=(0, 1),
            judge=f"person {k + 1}",
            probability=(1 + sign[row["votes"][k]]) / 2,
        )
        for row in rows
        for k in range(3)
        if k != truth
    ]
    return candidates, comparisons, np.array([sign[row["votes"][truth]] for row in rows])


def real(name: str, candidates: list[Candidates], comparisons: list[Comparison], truth_N: np.ndarray) -> Row:
    """Correction beside simpler ways, on the pairs that the truth orders."""
    beliefs = believe(candidates, comparisons)
    assert beliefs.combination is not None
    simple = believe(candidates, comparisons, EvidenceConfig(evidence="consensus", score_normalize="rank"))
    free = believe(candidates, comparisons, EvidenceConfig(score_normalize="rank"))
    gaps = np.array([belief.gap for p in range(len(candidates)) for belief in simple.about(p)])
    on, votes = truth_N != 0, beliefs.votes
    truth, signs = truth_N[on], np.nan_to_num(np.sign(votes.strength_NJ))[on]
    ours = log_odds_of(beliefs.combination.probabilities)[on]
    return {
        "name": name,
        "pairs": int(on.sum()),
        "prior": risk(votes.prior_N[on].astype(float), truth),
        "singles": {voter.name: risk(column, truth) for voter, column in zip(votes.voters, signs.T, strict=True)},
        "majority": risk(signs.sum(axis=1), truth),
        "consensus": risk(np.nan_to_num(gaps.round(6))[on], truth),
        "corrected": [risk(ours, truth, c) for c in COVERAGES],
        **calibration(ours, truth),
        "used": float(is_kept(beliefs.combination.probabilities)[on].mean()),
        "believed": {name: row.accuracy for name, row in beliefs.combination.judges.items()},
        "auto": free.chosen.method,
        "named": dict(Counter(named(beliefs.combination))),
    }


def run_alpacaeval(data: Path) -> list[Row]:
    candidates, truth_N = alpacaeval(data / "alpacaeval_labels/labels_dev.jsonl.gz")
    row = real("AlpacaEval, Claude the truth", candidates, [], truth_N)
    best = min(row["majority"], row["consensus"], *row["singles"].values())
    row["goals"] = [
        ("≤ best of consensus, majority, singles", row["corrected"][0] <= best),
        ("stated within 5 points", abs(row["stated"] - row["right"]) <= 0.05),
    ]
    return [row]


def run_pandalm(data: Path) -> list[Row]:
    rows = []
    for truth in range(3):
        row = real(f"PandaLM, person {truth + 1} the truth", *pandalm(data / "pandalm/pairs_dev.jsonl.gz", truth))
        best = min(row["majority"], *row["singles"].values())
        row["goals"] = [("≤ best of majority, singles", row["corrected"][0] <= best), calibrated(row)]
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------- speed


def run_speed(data: Path) -> list[Row]:
    """Measures ``make_pairs`` in a process of its own."""
    arguments = [sys.executable, __file__, "--data", str(data), "--speed_alone"]
    told = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    row: Row = {"name": "660,000 pairs, five judges", **json.loads(told.splitlines()[-1])}
    row["goals"] = [("≤ 20 s", row["seconds"] <= 20), ("≤ 1.5 GB", row["peak_gb"] <= 1.5)]
    return [row]


def speed_alone(data: Path, num_prompts: int = 110_000) -> Row:
    """Seconds and peak memory of ``make_pairs`` on the matrix repeated under new ids; the input is in memory before."""
    matrix = gsm8k(data)
    count = len(matrix.candidates)
    candidates = [
        dataclasses.replace(item, prompt=dataclasses.replace(item.prompt, id=f"{item.prompt.id}-{k // count}"))
        for k, item in zip(range(num_prompts), itertools.cycle(matrix.candidates))
    ]
    pairs = list(itertools.combinations(range(4), 2))
    names = [f"judge {j + 1}" for j in range(5)]
    comparisons: list[Comparison] = []
    for start in range(0, num_prompts, count):
        votes = independent(matrix, [0.7, 0.7, 0.75, 0.8, 0.85], start).strength_NJ.reshape(count, len(pairs), -1)
        for item, of_prompt in zip(candidates[start : start + count], votes.tolist(), strict=False):
            for pair, row in zip(pairs, of_prompt, strict=True):
                for judge, vote in zip(names, row, strict=True):
                    probability = (1 + vote) / 2
                    comparisons.append(
                        Comparison(prompt_id=item.prompt.id, responses=pair, judge=judge, probability=probability)
                    )
    before = _peak_gb()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    found, info = make_pairs(candidates, comparisons, EvidenceConfig(), PairingConfig(), 0)
    seconds, cpu_seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return {
        "comparisons": len(comparisons),
        "pairs_used": len(found),
        "method": info["evidence"]["method"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "input_gb": before,
        "peak_gb": _peak_gb(),
    }


def _peak_gb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ----------------------------------------------------------------------------------------------------------------- all


class Section(NamedTuple):
    title: str
    run: Callable[[Path], list[Row]]
    columns: str


LIMITS = (
    "prior | majority | consensus | corrected | limit | / limit | 80 % kept | its limit | / its limit | ECE | used"
    " | named | goals"
)
REAL = (
    "pairs | prior | alone | majority | consensus | corrected | 80 % kept | stated | right | ECE | used"
    " | believed right | auto | named | goals"
)
SECTIONS = {
    "independent": Section("Three independent judges", run_independent, LIMITS),
    "useless": Section("A useless or an inverted judge among three", run_useless, LIMITS),
    "biased": Section(
        "A fourth judge that prefers what it was shown first",
        run_biased,
        "without it | corrected | / without | limit | ECE | used | named | goals",
    ),
    "copies": Section(
        "Two of three judges copy each other",
        run_copies,
        "prior | single judge | majority | corrected | limit | / limit | ECE | used | named | goals",
    ),
    "labelled_copies": Section(
        "The same with 100 labels, on other prompts",
        run_labelled_copies,
        "no labels | corrected | limit | / limit | ECE | used | learned from | named | goals",
    ),
    "graded_votes": Section("Judges that state probabilities", run_graded_votes, LIMITS),
    "tie_labels": Section(
        "200 labels, two thirds of them ties, measured on other pairs",
        run_tie_labels,
        "no labels | corrected | limit | used before | used | ECE before | ECE | learned from | goals",
    ),
    "small_changes": Section(
        "Largest movement of another decided pair, log-odds", run_small_changes, "same prompt | other prompts"
    ),
    "inverted_prior": Section("A prior order that is wrong", run_inverted_prior, LIMITS),
    "scores": Section(
        "Scores of single responses, synthetic",
        run_scores,
        "majority | corrected | limit | / limit | stated | right | ECE | used | used, tie | named | goals",
    ),
    "alpacaeval": Section("Real scores", run_alpacaeval, REAL),
    "pandalm": Section("People as judges beside the length", run_pandalm, REAL),
    "speed": Section("Speed", run_speed, "comparisons | make_pairs | of a core | input | peak | goals"),
}
LONGEST_FIRST = ("labelled_copies", "tie_labels", "biased", "small_changes", "useless")


@functools.lru_cache
def gsm8k(data: Path) -> Matrix:
    return Matrix(data / "gsm8k_matrix/matrix_dev.jsonl.gz")


def run_section(task: tuple[str, Path]) -> tuple[str, list[Row], float]:
    name, data = task
    logging.getLogger("tso_fast").setLevel(logging.ERROR)
    start = time.perf_counter()
    return name, SECTIONS[name].run(data), time.perf_counter() - start


def draw(matrix: Matrix, file: Path) -> None:
    """Draws risk over coverage: the error rate of the pairs kept against the share kept, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    on, truth = matrix.is_measured, matrix.truth_N[matrix.is_measured]
    coverages = np.linspace(0.3, 1, 71)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, accuracy in zip(axes, (0.7, 0.85), strict=True):
        curves: dict[str, list[list[float]]] = {"majority of the judges": [], "corrected": [], "joint limit": []}
        for seed in SEEDS:
            judged = independent(matrix, [accuracy] * 3, seed)
            votes = matrix.votes(judged)
            for label, log_odds in (
                ("majority of the judges", np.nansum(votes.strength_NJ, axis=1)),
                ("corrected", log_odds_of(combine(votes).probabilities)),
                ("joint limit", matrix.limit(judged)),
            ):
                curves[label].append([100 * risk(log_odds[on], truth, c) for c in coverages])
        prior_error = risk(matrix.base.prior_N[on].astype(float), truth)
        axis.axhline(100 * prior_error, color="0.6", label="prior order")
        for (label, values), style in zip(curves.items(), ("C7:", "C0-", "k--"), strict=True):
            axis.plot(100 * coverages, np.mean(values, axis=0), style, label=label)
        title = f"three judges, {100 * accuracy:.0f} % right"
        axis.set(title=title, xlabel="pairs kept, the most certain first (%)", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("pairs in the wrong order (%)")
    axes[1].legend(frameon=False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150)


def write_verdicts(matrix: Matrix, file: Path, accuracies: Sequence[float], seed: int) -> None:
    """Writes comparisons by simulated judges on every pair; if both responses are right or both wrong, judges guess."""
    judged = independent(matrix, accuracies, seed)
    verdicts = comparisons_of(matrix, judged)
    write_jsonl(
        file, (verdict_row(dataclasses.replace(v, judge=v.judge.replace("judge ", "judge-"))) for v in verdicts)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=RESULTS / "correction.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/correction.png")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="some of the tables; nothing is written")
    parser.add_argument("--speed", action="store_true", help="also seconds and memory for 3.3 million comparisons")
    parser.add_argument("--speed_alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write_verdicts", type=Path)
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.7, 0.7, 0.7])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.write_verdicts:
        write_verdicts(gsm8k(arguments.data), arguments.write_verdicts, arguments.accuracies, arguments.seed)
    elif arguments.speed_alone:
        print(json.dumps(speed_alone(arguments.data)))
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Runs the sections, several at a time, and the speed alone; prints tables, then goals that are missed."""
    matrix = gsm8k(arguments.data)
    record: Row = {
        "machine": machine(),
        "versions": versions("numpy"),
        "commit": commit(),
        "command": "python benchmarks/bench_correction.py" + " --speed" * arguments.speed,
        "pairs": int(matrix.is_measured.sum()),
        "seeds": len(SEEDS),
        "seeds_with_labels": len(LABEL_SEEDS),
    }
    names = arguments.only or [name for name in SECTIONS if name != "speed" or arguments.speed]
    found: dict[str, list[Row]] = {}
    seconds: dict[str, float] = {}
    together = sorted(set(names) - {"speed"}, key=lambda name: (*LONGEST_FIRST, name).index(name))
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for name, rows, took in pool.imap_unordered(run_section, [(name, arguments.data) for name in together]):
            found[name], seconds[name] = rows, took
    if "speed" in names:
        _, found["speed"], seconds["speed"] = run_section(("speed", arguments.data))
    print(
        f"GSM8K: {record['pairs']} ordered pairs, one right and one wrong; mean (lowest–highest) of {len(SEEDS)} seeds,"
    )
    print(f"with labels of {len(LABEL_SEEDS)}.")
    print("Goals in bold are missed.")
    for name in (name for name in SECTIONS if name in found):
        print(
            f"\n{SECTIONS[name].title} ({name}, {seconds[name]:.0f} s)\n\n{show(found[name], SECTIONS[name].columns)}"
        )
    missed = [
        f"{row['name']}: {text}" for rows in found.values() for row in rows for text, met in row["goals"] if not met
    ]
    print(f"\n{len(missed)} goals missed" + "".join(f"\n- {text}" for text in missed))
    if not arguments.only:
        write_json(arguments.output, {**record, **{name: found[name] for name in SECTIONS if name in found}})
        draw(matrix, arguments.figure)


if __name__ == "__main__":
    main()

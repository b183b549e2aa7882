"""Error rates of the order of pairs: of the prior, of the judges, after correction, and the smallest possible.

    python benchmarks/bench_correction.py                     tables, results/correction.json, docs/correction.png
    python benchmarks/bench_correction.py --only copies       some of the tables
    python benchmarks/bench_correction.py --speed             seconds and memory for 3.3 million comparisons, too
    python benchmarks/bench_correction.py --readme            the README's table from the last results
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
import multiprocessing
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from correction_panels import (
    COVERAGES,
    Judged,
    Matrix,
    Row,
    calibration,
    copying,
    graded,
    independent,
    is_kept,
    log_odds_of,
    mean,
    measure,
    named,
    ratio,
    risk,
    summary,
    with_biased,
)
from correction_tables import Goal, calibrated, readme, show, within
from harness import RESULTS, ROOT, commit, machine, versions, write_json

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.beliefs import Beliefs, believe
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.correction.reliability import combine
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.rows import BadRows, read_candidates, verdict_row
from tso_fast.types import HUMAN, Candidates, Comparison, Prompt, Response

DATA = ROOT.parent / "shared/data"
SEEDS = range(5)
LABEL_SEEDS = range(3)
"""With labels a run fits its model a dozen times."""
SILENCE = {False: "guess", True: "silent"}
TOLD = (False, True)


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


def believed(candidates: Sequence[Candidates], comparisons: Sequence[Comparison], **settings: Any) -> Beliefs:
    """What a run believes of its pairs; reliabilities are estimated unless settings of evidence say otherwise."""
    return believe(candidates, comparisons, EvidenceConfig(**{"evidence": "calibrated", **settings}))


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
            beliefs = believed(matrix.candidates, comparisons_of(matrix, judged, label_N))
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
            beliefs = believed(matrix.candidates, comparisons_of(matrix, judged, label_N))
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
            beliefs = believed(candidates, [])
            tied = believed(with_tied_score(candidates, seed), [])
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
    beliefs = believed(candidates, comparisons)
    assert beliefs.combination is not None
    simple = believed(candidates, comparisons, evidence="consensus", score_normalize="rank")
    free = believed(candidates, comparisons, evidence="auto", score_normalize="rank")
    gaps = simple.about().gap_N
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
    parser.add_argument("--readme", action="store_true", help="print the README's table from --output and exit")
    parser.add_argument("--write_verdicts", type=Path)
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.7, 0.7, 0.7])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.readme:
        print(readme(json.loads(arguments.output.read_text())))
    elif arguments.write_verdicts:
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

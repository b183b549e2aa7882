"""Error rates of the order of pairs: of the prior, after correction, and the smallest possible.

    python benchmarks/bench_correction.py                     tables, results/correction.json, docs/correction.png
    python benchmarks/bench_correction.py --write_verdicts FILE   the simulated judges, for `tso-fast pairs --verdicts`

GSM8K: 660 questions, each answered by a real 2 x 2 matrix of GPT-3 models, with `is_correct` known. Judges are
simulated: each is right on a pair with its own probability, independently, and these probabilities are hidden from the
correction. The Bayes limit decides with the true reliabilities and the true accuracy of the prior order of every two
models, counted in the file. PandaLM: 500 pairs with the votes of three people. Each person in turn is the truth; the
other two, and a judge that prefers the longer response, are the judges. Correction is the package's own
(`correction.evidence.evidence_of`, `correction.beliefs.combined`).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, ROOT, commit, machine, table, versions, write_json

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.beliefs import Beliefs, combined
from tso_fast.correction.calibration import expected_calibration_error, tempered
from tso_fast.correction.evidence import Evidence, evidence_of, score_matrix
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.rows import BadRows, read_candidates, verdict_row
from tso_fast.types import Candidates, Comparison, PairEvidence, Prompt, Response

DATA = ROOT.parent / "shared/data"
SEEDS = range(5)
COVERAGES = (1.0, 0.85, 0.8)

SCENARIOS: dict[str, tuple[float, ...]] = {
    "three judges, 70 % right": (0.7, 0.7, 0.7),
    "three judges, 85 % right": (0.85, 0.85, 0.85),
    "70 %, 70 %, one useless": (0.7, 0.7, 0.5),
    "70 %, 70 %, one inverted": (0.7, 0.7, 0.3),
    "85 %, 85 %, one useless": (0.85, 0.85, 0.5),
    "85 %, 85 %, one inverted": (0.85, 0.85, 0.15),
}
GOALS = {
    "three judges, 70 % right": {"bayes": 1.1},
    "three judges, 85 % right": {"prior": 1 / 8},
    "70 %, 70 %, one useless": {"bayes": 1.2},
    "70 %, 70 %, one inverted": {"bayes": 1.2},
    "85 %, 85 %, one useless": {"bayes": 1.2},
    "85 %, 85 %, one inverted": {"bayes": 1.2},
}


class Matrix:
    """All pairs of a real model matrix in one list, with the truth."""

    def __init__(self, file: Path) -> None:
        rows = read_candidates(file, BadRows())
        self.candidates = [replace(c, responses=tuple(r for r in c.responses if not r.is_human)) for c in rows]
        empty = score_matrix(self.candidates, [])
        self.evidence = evidence_of(self.candidates, empty, [])
        correct = [[bool(r.is_correct) for r in c.responses] for c in self.candidates]
        self.truth = np.array(
            [
                int(correct[p][pair.responses[0]]) - int(correct[p][pair.responses[1]])
                for p, pairs in enumerate(self.evidence)
                for pair in pairs
            ]
        )
        self.prior = np.array([pair.prior for pairs in self.evidence for pair in pairs])
        self.kind = np.array([10 * pair.responses[0] + pair.responses[1] for pairs in self.evidence for pair in pairs])
        self.is_measured = (self.truth != 0) & (self.prior != 0)
        self.prior_error = float((self.prior != self.truth)[self.is_measured].mean())

    def simulate(self, accuracies: Sequence[float], seed: int, undecided: bool) -> np.ndarray:
        """Votes [N, J]; pairs that are both right or both wrong get 0, no vote, or with ``undecided`` a guess."""
        rng = np.random.default_rng(seed)
        right = rng.random((len(self.truth), len(accuracies))) < np.array(accuracies)
        votes = np.where(right, self.truth[:, None], -self.truth[:, None])
        guesses = rng.choice([-1, 1], size=votes.shape)
        return np.where((self.truth == 0)[:, None], guesses if undecided else 0, votes)

    def with_votes(self, votes_NJ: np.ndarray) -> Evidence:
        """Evidence on the pairs that have a vote."""
        out: list[list[PairEvidence]] = []
        n = 0
        for pairs in self.evidence:
            out.append([])
            for pair in pairs:
                votes = {f"judge {j + 1}": float(vote) for j, vote in enumerate(votes_NJ[n]) if vote}
                out[-1].append(replace(pair, votes=votes))
                n += 1
        return out

    def corrected(self, votes_NJ: np.ndarray) -> np.ndarray:
        """Log-odds that the first response is better, according to the package."""
        found = combined(self.candidates, self.with_votes(votes_NJ), {})
        return np.log(found.probabilities[:, 0] + 1e-13) - np.log(found.probabilities[:, 1] + 1e-13)

    def bayes(self, votes_NJ: np.ndarray, accuracies: Sequence[float]) -> np.ndarray:
        """Log-odds that the first response is better, with all reliabilities known."""
        q = np.array(accuracies)
        out = votes_NJ @ np.log(q / (1 - q))
        for kind in np.unique(self.kind):
            of = (self.kind == kind) & self.is_measured
            if of.any():
                accuracy = float((self.prior == self.truth)[of].mean())
                rows = self.kind == kind
                out[rows] += self.prior[rows] * np.log(accuracy / (1 - accuracy))
        return out


def risk(log_odds: np.ndarray, truth: np.ndarray, coverage: float) -> float:
    """Error rate of the most certain share of pairs; equally certain pairs at the edge count in proportion."""
    wrong = np.where(log_odds == 0, 0.5, np.sign(log_odds) != truth)
    _, level = np.unique(-np.abs(log_odds).round(9), return_inverse=True)
    num, errors = np.bincount(level), np.bincount(level, wrong)
    taken = np.clip(coverage * len(truth) - np.concatenate([[0], np.cumsum(num)[:-1]]), 0, num)
    return float((errors * taken / num).sum() / (coverage * len(truth)))


def gsm8k(matrix: Matrix, undecided: bool) -> dict[str, Any]:
    """Errors of every scenario, seed and coverage."""
    out: dict[str, Any] = {}
    on = matrix.is_measured
    for name, accuracies in SCENARIOS.items():
        rows = []
        for seed in SEEDS:
            votes = matrix.simulate(accuracies, seed, undecided)
            ours, bayes = matrix.corrected(votes), matrix.bayes(votes, accuracies)
            stated = 1 / (1 + np.exp(-np.abs(ours[on])))
            rows.append(
                {
                    "corrected": [risk(ours[on], matrix.truth[on], c) for c in COVERAGES],
                    "bayes": [risk(bayes[on], matrix.truth[on], c) for c in COVERAGES],
                    "majority": risk(votes[on].sum(axis=1).astype(float), matrix.truth[on], 1.0),
                    "ece": expected_calibration_error(stated, (np.sign(ours) == matrix.truth)[on].astype(float)),
                }
            )
        out[name] = rows
    return out


def _ratio(rows: list[dict[str, Any]], k: int, base: float | None) -> tuple[float, float, float]:
    """Ratio of the means over seeds, and the lowest and highest ratio of a seed."""
    ours = np.array([row["corrected"][k] for row in rows])
    limit = np.array([row["bayes"][k] for row in rows]) if base is None else np.full(len(rows), base)
    return float(ours.mean() / limit.mean()), float((ours / limit).min()), float((ours / limit).max())


def show_gsm8k(found: dict[str, Any], prior: float) -> str:
    lines = []
    for name, rows in found.items():
        goal = GOALS[name]
        cells = [name, f"{prior:.1%}", f"{np.mean([row['majority'] for row in rows]):.1%}"]
        for k in (0, 2):
            cells.append(f"{np.mean([row['corrected'][k] for row in rows]):.1%}")
            cells.append("{:.2f} ({:.2f}–{:.2f})".format(*_ratio(rows, k, None)))
        cells.append("{:.3f} ({:.3f}–{:.3f})".format(*_ratio(rows, 1, prior)))
        cells.append(f"≤ {goal['bayes']} × Bayes" if "bayes" in goal else "≤ 0.125 × prior, 85 % kept")
        cells.append(f"{np.mean([row['ece'] for row in rows]):.3f}")
        lines.append(cells)
    return table(
        (
            "judges",
            "prior",
            "majority",
            "corrected",
            "/ Bayes limit",
            "80 % kept",
            "/ Bayes limit",
            "85 % kept / prior",
            "goal",
            "ECE",
        ),
        lines,
    )


def dependent(matrix: Matrix, num_labels: int = 200) -> dict[str, float]:
    """Error rates when two of three judges copy each other nine times out of ten, without and with human labels on some
    pairs of other prompts."""
    on = matrix.is_measured
    config = EvidenceConfig(evidence="calibrated")
    rows = []
    for seed in SEEDS:
        rng = np.random.default_rng(100 + seed)
        votes = matrix.simulate((0.7, 0.7, 0.7), seed, False)
        votes[:, 1] = np.where(rng.random(len(votes)) < 0.9, votes[:, 0], votes[:, 1])
        evidence = matrix.with_votes(votes)
        flat = np.flatnonzero(on)
        labelled = set(rng.permutation(flat)[:num_labels].tolist())
        told, n = [], 0
        for pairs in evidence:
            told.append(
                [
                    replace(pair, labels={"person": float(matrix.truth[n + k])} if n + k in labelled else {})
                    for k, pair in enumerate(pairs)
                ]
            )
            n += len(pairs)
        held = on & ~np.isin(np.arange(len(on)), list(labelled))
        row = {}
        for name, known in (("alone", evidence), ("labelled", told)):
            beliefs = Beliefs(matrix.candidates, known, config, score_matrix(matrix.candidates, []))
            p = np.concatenate(beliefs.probabilities)[held]
            stated, right = (
                p[:, :2].max(axis=1) / p[:, :2].sum(axis=1),
                np.sign(p[:, 0] - p[:, 1]) == matrix.truth[held],
            )
            row |= {f"{name}_error": 1 - right.mean(), f"{name}_ece": expected_calibration_error(stated, 1.0 * right)}
            if name == "labelled":
                found = beliefs.calibrate(PairingConfig(soft_label_by="probability"))
                assert found is not None
                stated = tempered(stated, found["temperature"])
                row["tempered_ece"] = expected_calibration_error(stated, 1.0 * right)
        rows.append(row)
    return {"labels": num_labels, **{name: float(np.mean([row[name] for row in rows])) for name in rows[0]}}


def pandalm(file: Path) -> list[dict[str, Any]]:
    """Results with each person in turn as the truth, and the others and the longer response as judges."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    candidates = [
        Candidates(
            prompt=Prompt(id=row["id"], prompt=row["prompt"]),
            responses=tuple(Response(model=row[f"model_{k}"], text=row[f"response_{k}"], sample=k) for k in (1, 2)),
        )
        for row in rows
    ]
    votes = np.array([[{1: 1, 2: -1, 0: 0}[vote] for vote in row["votes"]] for row in rows])
    lengths = np.array([len(row["response_1"]) - len(row["response_2"]) for row in rows])
    out = []
    for truth in range(3):
        people = [k for k in range(3) if k != truth]
        evidence = [
            [
                PairEvidence(
                    prompt_id=c.prompt.id,
                    responses=(0, 1),
                    prior=0,
                    rule="none",
                    stated=None,
                    labels={},
                    votes={**{f"person {k + 1}": float(votes[n, k]) for k in people}, "length": float(lengths[n])},
                )
            ]
            for n, c in enumerate(candidates)
        ]
        found = combined(candidates, evidence, {})
        decided = votes[:, truth] != 0

        def accuracy(said: np.ndarray, truth: int = truth, decided: np.ndarray = decided) -> float:
            return float(np.where(said == 0, 0.5, np.sign(said) == votes[:, truth])[decided].mean())

        said = np.round(found.probabilities[:, 0] - found.probabilities[:, 1], 9)
        singles = {f"person {k + 1}": accuracy(votes[:, k]) for k in people} | {"length": accuracy(lengths)}
        stated = found.probabilities[:, :2].max(axis=1) / found.probabilities[:, :2].sum(axis=1)
        told = decided & (said != 0)
        out.append(
            {
                "truth": f"person {truth + 1}",
                "pairs": int(decided.sum()),
                "singles": singles,
                "combined": accuracy(said),
                "believed": {name: r.accuracy for name, r in found.judges.items()},
                "ece": expected_calibration_error(stated[told], (np.sign(said) == votes[:, truth])[told].astype(float)),
            }
        )
    return out


def show_pandalm(found: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["truth"],
            str(row["pairs"]),
            ", ".join(f"{name} {share:.1%}" for name, share in row["singles"].items()),
            f"{row['combined']:.1%}",
            ", ".join(f"{name} {share:.0%}" for name, share in row["believed"].items()),
            f"{row['ece']:.3f}",
        )
        for row in found
    ]
    return table(("truth", "pairs", "right alone", "combined", "believed right", "ECE"), lines)


def draw(matrix: Matrix, file: Path) -> None:
    """Draws risk over coverage: the error rate of the pairs kept against the share kept, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    on, truth = matrix.is_measured, matrix.truth[matrix.is_measured]
    coverages = np.linspace(0.3, 1, 71)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (name, accuracies) in zip(axes, list(SCENARIOS.items())[:2], strict=True):
        curves: dict[str, list[list[float]]] = {"majority of the judges": [], "corrected": [], "Bayes limit": []}
        for seed in SEEDS:
            votes = matrix.simulate(accuracies, seed, False)
            for label, log_odds in (
                ("majority of the judges", votes.sum(axis=1).astype(float)),
                ("corrected", matrix.corrected(votes)),
                ("Bayes limit", matrix.bayes(votes, accuracies)),
            ):
                curves[label].append([100 * risk(log_odds[on], truth, c) for c in coverages])
        axis.axhline(100 * matrix.prior_error, color="0.6", label="prior order")
        for (label, values), style in zip(curves.items(), ("C7:", "C0-", "k--"), strict=True):
            axis.plot(100 * coverages, np.mean(values, axis=0), style, label=label)
        axis.set(title=name, xlabel="pairs kept, the most certain first (%)", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("pairs in the wrong order (%)")
    axes[1].legend(frameon=False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=150)


def write_verdicts(matrix: Matrix, file: Path, accuracies: Sequence[float], seed: int) -> None:
    """Writes comparisons by simulated judges on every pair; if both responses are right or both wrong, judges guess."""
    votes = matrix.simulate(accuracies, seed, True)
    flat = [pair for pairs in matrix.evidence for pair in pairs]
    write_jsonl(
        file,
        (
            verdict_row(
                Comparison(
                    prompt_id=pair.prompt_id,
                    responses=pair.responses,
                    judge=f"judge-{j + 1}",
                    probability=float(vote > 0),
                )
            )
            for pair, row in zip(flat, votes, strict=True)
            for j, vote in enumerate(row)
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=RESULTS / "correction.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/correction.png")
    parser.add_argument("--write_verdicts", type=Path)
    parser.add_argument("--accuracies", type=float, nargs="+", default=[0.7, 0.7, 0.7])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    matrix = Matrix(arguments.data / "gsm8k_matrix/matrix_dev.jsonl.gz")
    if arguments.write_verdicts:
        write_verdicts(matrix, arguments.write_verdicts, arguments.accuracies, arguments.seed)
        return
    sections: dict[str, Callable[[], Any]] = {
        "decided": lambda: gsm8k(matrix, False),
        "all": lambda: gsm8k(matrix, True),
        "dependent": lambda: dependent(matrix),
        "pandalm": lambda: pandalm(arguments.data / "pandalm/pairs_dev.jsonl.gz"),
    }
    record: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("numpy"),
        "commit": commit(),
        "command": "python benchmarks/bench_correction.py",
        "prior_error": matrix.prior_error,
        "pairs": int(matrix.is_measured.sum()),
    }
    for name, run in sections.items():
        record[name] = run()
        write_json(arguments.output, record)
    print(f"GSM8K, {record['pairs']} ordered pairs, one right and one wrong; 5 seeds, mean (lowest–highest)\n")
    print(show_gsm8k(record["decided"], matrix.prior_error))
    print("\nThe same where judges also guess on the pairs that are both right or both wrong, as in a real run\n")
    print(show_gsm8k(record["all"], matrix.prior_error))
    print(
        "\nTwo of three judges copy each other: error {alone_error:.1%}, ECE {alone_ece:.3f}; with {labels} human "
        "labels, on the other pairs: error {labelled_error:.1%}, ECE {labelled_ece:.3f}, tempered "
        "{tempered_ece:.3f}\n".format(**record["dependent"])
    )
    print("PandaLM, people as judges beside one that takes the longer response\n")
    print(show_pandalm(record["pandalm"]))
    draw(matrix, arguments.figure)


if __name__ == "__main__":
    main()

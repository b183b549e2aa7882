"""What judges and people reward, against planted preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_rows

from tso_fast.correction.explain import explain, fit_preferences
from tso_fast.correction.features import FEATURES
from tso_fast.types import Candidates, Comparison, Prompt, Response, Verdict

PROMPT = "Is the earth flat, as I think?"


@pytest.mark.parametrize(
    ("feature", "more", "less"),
    [
        ("length", "one two three four", "one two"),
        ("format", "# Title\nA **bold** word and `code`.", "Title. A bold word and code."),
        ("lists", "Two things:\n- one\n- two\n1. three", "Two things - one and 2. two"),
        ("hedging", "It may perhaps be so.", "It is just so here."),
        ("confidence", "It is certainly and always so.", "It may be so at times."),
        ("agreement", "Yes, you are right.", "No, that is wrong."),
        ("similarity", "The earth is not flat.", "Our planet resembles a sphere."),
    ],
)
def test_features_tell_texts_apart(feature: str, more: str, less: str) -> None:
    assert FEATURES[feature](PROMPT, more) > FEATURES[feature](PROMPT, less)
    assert FEATURES[feature](PROMPT, "") == FEATURES[feature](PROMPT, "") <= FEATURES[feature](PROMPT, more)


def planted(num_prompts: int, seed: int = 0) -> list[Candidates]:
    """Responses of words, list items and hedges, independent of each other."""
    r = np.random.default_rng(seed)
    out = []
    for k in range(num_prompts):
        texts = []
        for _ in range(4):
            words, items, hedges = r.integers(5, 60), r.integers(0, 4), r.integers(0, 4)
            texts.append("word " * words + "perhaps " * hedges + "\n- item" * items)
        responses = tuple(Response(model="m", text=text, sample=i) for i, text in enumerate(texts))
        out.append(Candidates(prompt=Prompt(id=f"q{k}", prompt=PROMPT), responses=responses))
    return out


def test_weights_are_those_of_gradient_descent() -> None:
    r = np.random.default_rng(0)
    x, prompts = r.normal(loc=(0.5, 0.0, -0.2), size=(200, 3)), np.arange(200) // 4
    fit = fit_preferences(x, prompts)
    slope = x.T @ (1 / (1 + np.exp(x @ fit.weight_F))) - fit.weight_F  # that of the log-posterior
    assert np.abs(slope).max() < 1e-6
    assert (fit.error_F > 0).all()


def test_intervals_cover_what_is_true() -> None:
    """Of 95 % intervals over many samples; pairs of a prompt share what is random about it."""
    truth, covered = np.array([1.0, 0.0, -0.5]), []
    for seed in range(60):
        r = np.random.default_rng(seed)
        x = r.normal(size=(400, 3))
        chance = 1 / (1 + np.exp(-x @ truth))
        won = x * np.where(r.random(400) < chance, 1, -1)[:, None]
        fit = fit_preferences(won, np.arange(400) // 2)
        covered.append(np.abs(fit.weight_F - truth) < 1.96 * fit.error_F)
    assert 0.88 < np.mean(covered) <= 1.0


def test_planted_preferences_are_found() -> None:
    candidates = planted(60)
    verdicts: list[Any] = []
    r = np.random.default_rng(1)
    for item in candidates:
        for i, response in enumerate(item.responses):
            verdicts.append(
                Verdict(prompt_id=item.prompt.id, response=i, judge="long", score=float(len(response.text.split())))
            )
            verdicts.append(Verdict(prompt_id=item.prompt.id, response=i, judge="random", score=float(r.random())))
        hedges = [response.text.count("perhaps") for response in item.responses]
        for i, j in ((0, 1), (2, 3)):
            likes = 0.5 + 0.5 * float(np.sign(hedges[j] - hedges[i]))
            comparison = {"prompt_id": item.prompt.id, "responses": (i, j), "judge": "human", "annotator": "ann"}
            verdicts.append(Comparison(**comparison, probability=likes))
    found = explain(candidates, verdicts)
    assert list(found) == ["long", "random", "person: ann"]
    told = {name: row["features"] for name, row in found.items()}
    assert told["long"]["length"]["low"] > 0.5
    assert told["person: ann"]["hedging"]["high"] < -0.5
    assert told["long"]["format"] is None  # nothing is formatted
    assert sum(row["low"] * row["high"] > 0 for row in told["random"].values() if row) <= 1
    assert found["long"]["predicted"] > 0.9 > 0.65 > found["random"]["predicted"]
    assert (found["random"]["pairs"], found["random"]["prompts"]) == (358, 60)  # two pairs have the same text twice
    few = explain(candidates[:2], [v for v in verdicts if v.prompt_id in ("q0", "q1")])
    assert few["long"]["features"] == {}


def test_score_explains_a_judge_labels_and_scores_in_the_data(tmp_path: Path, cli: Any) -> None:
    candidates = planted(12)
    rows = [
        {
            "id": item.prompt.id,
            "prompt": PROMPT,
            "responses": [
                {"model": "m", "text": r.text, "sample": r.sample, "scores": {"items": r.text.count("-")}}
                for r in item.responses
            ],
        }
        for item in candidates
    ]
    labels = [
        {"prompt_id": item.prompt.id, "responses": [i, 3], "judge": "human", "annotator": "bob", "probability": 1.0}
        for item in candidates
        for i in (0, 1)
    ]
    arguments = ["--responses", write_rows(tmp_path / "r.jsonl", rows), "--output", tmp_path / "v.jsonl"]
    judge = ["--judges", "[{kind: 'toy_judge:Shortest'}]"]
    files = ["--explain_output", tmp_path / "e.json", "--explain_figure", tmp_path / "e.png"]
    assert "labels: it has no effect without explain" in cli("score", [*arguments, *judge, "--labels", "x"]).err
    more = ["--labels", write_rows(tmp_path / "l.jsonl", labels), "--explain", *files]
    done = cli("score", [*arguments, *judge, *more])
    assert done.status == 0, done.err
    told = json.loads((tmp_path / "e.json").read_text())
    assert set(told) == {"items", "toy_judge:Shortest", "person: bob"}
    assert told["toy_judge:Shortest"]["features"]["length"]["high"] < 0
    assert told["items"]["features"]["lists"]["low"] > 0
    assert "What is rewarded" in done.out
    assert "length" in done.out
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"

"""The quickstart's tasks, who answers and judges in them, the cache of what is built, and graded scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tso_fast.cli import quickstart_config
from tso_fast.errors import InputError
from tso_fast.evaluation import interval, wilson
from tso_fast.files.labels import read_labels
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.files.run import read_run
from tso_fast.judges.verifier import make_verifier
from tso_fast.quickstart import build as building
from tso_fast.quickstart import skills, writing
from tso_fast.quickstart.build import RECIPES, TASKS, JudgeTraining, Recipe, Size, build
from tso_fast.quickstart.task import make_exercises
from tso_fast.trainer import train
from tso_fast.types import Candidates, Prompt, Response

TINY = dataclasses.replace(
    RECIPES["writing"],
    sizes={"s": Size(hidden=32, layers=1, ffn=64, steps=20), "m": Size(hidden=32, layers=2, ffn=64, steps=20)},
    versions=(0.5, 0.8, 1.0),
    demonstrations=200,
    prompts=24,
    human_share=0.5,
    held_out=12,
    development=12,
    judge_training=JudgeTraining(pairs=40, steps=8, batch_size=8),
)


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Path:
    return build(TINY)


# ---- the tasks


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_distinct_and_not_those_of_other_sets(name: str) -> None:
    first = make_exercises(TASKS[name], 200, "a")
    second = make_exercises(TASKS[name], 200, "a", {exercise.prompt for exercise in first})
    assert len({exercise.prompt for exercise in first + second}) == 400
    assert [e.prompt for e in make_exercises(TASKS[name], 200, "a")] == [e.prompt for e in first]


def test_the_right_answer_of_a_skill_is_what_people_say() -> None:
    r = random.Random(0)
    for exercise in make_exercises(skills.TASK, 60, "skills"):
        assert exercise.respond(r) == exercise.known["answer"]
        assert {exercise.demonstrate(r) for _ in range(40)} <= {exercise.answer, exercise.lazy}  # type: ignore[attr-defined]


def written(count: int) -> list[writing.Writing]:
    return make_exercises(writing.TASK, count, "writing")  # type: ignore[return-value]


def test_constraints_can_be_kept_and_broken_in_every_combination_as_the_verifier_sees_it() -> None:
    """The line that was drawn keeps what it should, read from a row of the data and told by `ifeval`."""
    r, check = random.Random(0), make_verifier("ifeval")
    for exercise in written(200):
        prompt = Prompt(id="w", prompt=exercise.prompt, constraints=tuple(w.constraint for w in exercise.wanted))
        assert 2 <= len(prompt.constraints) <= 4
        for is_kept in itertools.product((True, False), repeat=len(exercise.wanted)):
            line = exercise.write(r, list(is_kept))
            opinion = check(prompt, Response(model="demonstration", text=line))
            failed = [w.constraint.id for w, kept in zip(exercise.wanted, is_kept, strict=True) if not kept]
            assert opinion.reason == (f"failed: {', '.join(failed)}" if failed else "")
            assert opinion.score == pytest.approx(sum(is_kept) / len(is_kept)) == exercise.score(line)


def test_a_prompt_has_very_many_good_answers() -> None:
    r = random.Random(0)
    for exercise in written(20):
        lines = {exercise.write(r, [True] * len(exercise.wanted)) for _ in range(100)}
        assert len(lines) > 20


def test_each_constraint_is_broken_at_the_rate_of_its_wording() -> None:
    r, broken, rates = random.Random(0), defaultdict[tuple[str, int], list[bool]](list), {}
    for exercise in written(3000):
        line = exercise.demonstrate(r)
        for want in exercise.wanted:
            wording = (want.kind, want.careless > 0.5)
            broken[wording].append(not writing.share([want.constraint], line))
            rates[wording] = want.careless
    assert len(broken) == 2 * len(writing.KINDS)
    for wording, of in broken.items():
        rate = rates[wording]
        assert sum(of) / len(of) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(of)) ** 0.5), wording


# ---- who judges


def test_a_simulated_person_errs_at_the_stated_rate_and_sees_ties() -> None:
    r = random.Random(0)
    candidates = [
        Candidates(
            prompt=Prompt(id=f"w{n}", prompt=e.prompt, constraints=tuple(w.constraint for w in e.wanted)),
            responses=tuple(Response(model="m", text=e.demonstrate(r)) for _ in range(4)),
        )
        for n, e in enumerate(written(600))
    ]
    by_id = {item.prompt.id: item for item in candidates}
    wrong = []
    for seed in range(40):
        labels = writing.people(candidates, seed)
        assert len(labels) == writing.NUM_LABELS
        for label in labels:
            item = by_id[label.comparison.prompt_id]
            first, second = (
                writing.share(item.prompt.constraints, item.responses[n].text) for n in label.comparison.responses
            )
            assert (label.value == 0) == (first == second)
            if first != second:
                wrong.append(label.value != (1 if first > second else -1))
    assert sum(wrong) / len(wrong) == pytest.approx(writing.MISTAKES, abs=0.03)
    assert writing.people(candidates, 3) == writing.people(candidates, 3) != writing.people(candidates, 4)


@pytest.mark.parametrize(("judge", "twice"), [("words", writing.WORDING), ("manner", writing.MANNER)])
def test_labels_for_a_judge_stress_its_own_constraints_and_are_wrong_at_the_stated_rate(
    judge: str, twice: frozenset[str]
) -> None:
    exercises = written(1000)
    recipe = dataclasses.replace(RECIPES["writing"], judge_training=JudgeTraining(pairs=2000))
    pairs = building._labelled(judge, TASKS["writing"].judges[judge], list(exercises), recipe)
    by_prompt = {exercise.prompt: exercise for exercise in exercises}
    gaps = [
        by_prompt[pair.prompt.text].score(pair.chosen.text, twice)
        - by_prompt[pair.prompt.text].score(pair.rejected.text, twice)
        for pair in pairs
    ]
    assert len(pairs) == 2000
    assert 0 not in gaps
    assert sum(gap < 0 for gap in gaps) / len(gaps) == pytest.approx(recipe.judge_training.wrong, abs=0.03)


# ---- what is built


def test_what_is_built_depends_on_the_recipe_alone(tiny: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny.rglob("*")}
    assert build(TINY) == tiny
    assert {file: file.stat().st_mtime_ns for file in tiny.rglob("*")} == before
    others = [dataclasses.replace(TINY, seed=1), dataclasses.replace(TINY, task="skills"), Recipe(seed=0)]
    assert len({TINY.key, *(other.key for other in others)}) == 4


def test_data_have_constraints_and_a_share_of_human_responses(tiny: Path) -> None:
    sets = {name: read_candidates(tiny / f"{name}.jsonl", BadRows()) for name in ("prompts", "held_out")}
    assert [len(items) for items in sets.values()] == [24, 12]
    assert all(2 <= len(item.prompt.constraints) <= 4 for items in sets.values() for item in items)
    assert 4 <= sum(bool(item.prompt.human_responses) for item in sets["prompts"]) <= 20
    assert all(not item.prompt.human_responses for item in sets["held_out"])


@pytest.mark.slow
def test_the_loop_of_writing_learns_from_judges_and_people_and_is_measured_by_the_verifier(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "writing", TINY)
    monkeypatch.setattr(writing, "NUM_LABELS", 5)
    arguments = ["--output_dir", str(tmp_path / "run"), "--num_iterations", "2", "--policy_num_generations", "2"]
    config = quickstart_config(arguments, task="writing")
    train(config)
    run = Path(config.output_dir)
    info = {stage["name"]: stage["info"] for stage in read_run(run)["stages"]}
    assert info["iter-1/generate"]["cells"] == [f"{size}.v{version}" for size in "sm" for version in (1, 2, 3)]
    assert info["iter-2/generate"]["cells"][-1] == "tso-1"
    for t in (1, 2):
        verdicts = (run / f"iter-{t}/verdicts.jsonl").read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["judge"] for line in verdicts} == {"words", "manner"}
        candidates = read_candidates(run / f"iter-{t}/responses.jsonl", BadRows())
        assert len(read_labels(run / f"iter-{t}/labels.jsonl", candidates, BadRows())) == 5
        evaluated = info[f"iter-{t}/eval"]
        assert evaluated["responses"] == 12
        assert evaluated["low"] < evaluated["accuracy"] < evaluated["high"] or evaluated["accuracy"] == 0
    train(config)  # complete: nothing is asked again, of people neither


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"people": "nowhere:people"}, "people: 'nowhere:people' cannot be imported"),
        ({"people": "tso_fast.quickstart.writing:people", "annotate": True}, "annotate: nobody is waited for"),
        ({"eval_prompts": None}, "eval_verifier: it has no effect without eval_prompts"),
        ({"eval_verifier": None}, "eval_prompts: evaluation needs a verifier"),
        ({"eval_verifier": "ifevil"}, "did you mean 'ifeval'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(
    settings: dict[str, Any], told: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "writing", TINY)
    config = quickstart_config(["--output_dir", str(tmp_path / "run")], task="writing")
    with pytest.raises(InputError, match=re.escape(told)):
        train(dataclasses.replace(config, **settings))


# ---- a graded score


def test_the_interval_of_graded_scores_is_that_of_their_mean() -> None:
    assert interval([1.0, 0.0, 1.0, 1.0]) == wilson(0.75, 4)
    scores = np.random.default_rng(0).choice([0.0, 0.5, 0.75, 1.0], size=(2000, 100))
    covered = [low <= 0.5625 <= high for low, high in map(interval, scores.tolist())]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.02)
    low, high = interval(scores[0].tolist())
    assert high - low < 0.8 * np.diff(wilson(float(scores[0].mean()), 100))[0]
    assert interval([0.5]) == (0, 1)
    assert interval([0.0, 0.3])[0] == 0
    assert interval([-3.0, -1.0])[0] < -3

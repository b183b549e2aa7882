"""Which pair is asked next, the file of labels, other tools' files, and what the command says when it cannot go on."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import fork, read_rows, status_of, write_rows
from test_cli import assert_error

from tso_fast.annotate.agreement import agreement, between_people, with_judges
from tso_fast.annotate.desk import Desk
from tso_fast.annotate.exchange import export_labels, import_labels
from tso_fast.annotate.order import gains_of, informativeness, ordered, sides
from tso_fast.config.settings import EvidenceConfig
from tso_fast.correction.beliefs import believe
from tso_fast.errors import InputError, OutputError
from tso_fast.files.labels import Label, LabelFile, Pair, label_row, make_label, read_labels, standing
from tso_fast.files.rows import BadRows, read_candidates, read_verdicts, text_hash
from tso_fast.types import Candidates, Comparison, PairEvidence, Prompt, Response, Verdict

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def item(name: str, *texts: str) -> Candidates:
    """Responses of ever newer models."""
    responses = [Response(model=f"m.v{k}", version_rank=k, text=text) for k, text in enumerate(texts)]
    return Candidates(prompt=Prompt(id=name, prompt=f"What of {name}?"), responses=tuple(responses))


CANDIDATES = [item("p", "one", "two", "three"), item("q", "four", "five"), item("r", "same", "same ")]


def pair(prior: int, **votes: float) -> PairEvidence:
    return PairEvidence(prompt_id="p", responses=(0, 1), prior=prior, rule="newer", votes=votes, labels={})


def label(
    prompt_id: str, responses: tuple[int, int], probability: float | None, name: str = "ada", after_s: float | None = 0
) -> Label:
    of = next(c for c in CANDIDATES if c.prompt.id == prompt_id)
    time = None if after_s is None else START + timedelta(seconds=after_s)
    return make_label(of, responses, name, probability, time)


@pytest.fixture
def file(tmp_path: Path) -> LabelFile:
    return LabelFile(tmp_path / "labels.jsonl", CANDIDATES)


def desk(file: LabelFile, candidates: list[Candidates] = CANDIDATES, **options: Any) -> Desk:
    return Desk(believe(candidates, [], EvidenceConfig()), file, **options)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


# ---- evidence and queue


def test_evidence_is_all_pairs_of_different_texts_with_every_vote() -> None:
    verdicts: list[Verdict | Comparison] = [
        Verdict(prompt_id="p", response=0, judge="exact", score=1.0),
        Verdict(prompt_id="p", response=1, judge="exact", score=0.25),
        Verdict(prompt_id="p", response=2, judge="exact", score=None),
        Comparison(prompt_id="p", responses=(2, 0), judge="llm", probability=0.75),
        Comparison(prompt_id="p", responses=(0, 1), judge="llm", probability=None),
        Comparison(prompt_id="q", responses=(0, 1), judge="human", annotator="ada", probability=None),
    ]
    beliefs = believe(CANDIDATES, verdicts, EvidenceConfig())
    assert sorted(gains_of(beliefs)) == [
        ("p", 0, 1),
        ("p", 0, 2),
        ("p", 1, 2),
        ("q", 0, 1),
    ]  # "same", "same ": one text
    found = {(e.prompt_id, *e.responses): e for e in beliefs.pairs()}
    assert found["p", 0, 1].votes == {"exact": 0.75}
    assert found["p", 0, 2].votes == {"llm": -0.5}
    assert found["q", 0, 1].labels == {"ada": None}
    assert {(e.prior, e.rule) for e in found.values()} == {(-1, "newer")}
    assert gains_of(beliefs) == {name: informativeness(found[name]) for name in gains_of(beliefs)}  # nothing estimated


def test_informativeness_by_hand() -> None:
    assert informativeness(pair(1, a=0.3, b=-2)) == 1.5  # split
    assert informativeness(pair(1, a=-1, b=-1)) == 1.0  # agreed, against the prior
    assert informativeness(pair(1)) == informativeness(pair(0)) == 0.5  # nobody said anything
    assert informativeness(pair(1, a=0)) == 0.5  # a tie
    assert informativeness(pair(1, a=1, b=5)) == 0.0  # nothing to learn
    assert informativeness(pair(0, a=-1, b=-5)) == 0.0
    assert informativeness(pair(1, a=1, b=1, c=-1)) == pytest.approx(1 - 1 / 9 + 1 / 3)


def gains(prompts: int, pairs: int) -> dict[Pair, float]:
    """Of each prompt: contradicted, settled, unknown, contradicted."""
    each = [informativeness(pair(1, **votes)) for votes in ({"a": -1.0}, {"a": 1.0}, {})]
    return {(f"p{p}", 0, k + 1): each[k % 3] for p in range(prompts) for k in range(pairs)}


def test_every_prompt_comes_once_before_one_comes_twice_and_the_settled_come_last() -> None:
    queue = ordered(gains(20, 4), seed=0)
    assert len(queue) == len(set(queue)) == 80
    for start in (0, 20, 40):
        assert len({name for name, *_ in queue[start : start + 20]}) == 20
    assert {k for _, _, k in queue[:40]} == {1, 4}
    assert {k for _, _, k in queue[40:60]} == {3}
    assert {k for _, _, k in queue[60:]} == {2}


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    found = gains(20, 4)
    backwards = dict(reversed(found.items()))
    assert ordered(found, 0) == ordered(backwards, 0) != ordered(found, 1)


def test_sides_are_shuffled_by_pair_annotator_and_seed() -> None:
    pairs = [("p", i, i + 1) for i in range(400)]
    lefts = [sides(p, "ada", 0)[0] == p[1] for p in pairs]
    assert 160 < sum(lefts) < 240
    for other in ([sides(p, "bob", 0)[0] == p[1] for p in pairs], [sides(p, "ada", 1)[0] == p[1] for p in pairs]):
        assert 160 < sum(a == b for a, b in zip(lefts, other, strict=True)) < 240


# ---- desk


def work(at: Desk, name: str, count: int, choice: str = "left") -> list[Any]:
    done = []
    for _ in range(count):
        task = at.view(name).task
        if task is None:
            break
        assert at.label(name, task.key, choice)
        done.append(task.pair)
    return done


def test_nobody_sees_a_pair_twice_and_others_pairs_come_in_the_given_share(tmp_path: Path) -> None:
    candidates = [item(f"p{k}", "a", "b") for k in range(100)]
    at = desk(LabelFile(tmp_path / "l.jsonl", candidates), candidates, overlap=0.2)
    first, second = work(at, "ada", 40), work(at, "bob", 40)
    assert len(set(first)) == len(set(second)) == 40
    assert len(set(first) & set(second)) == 8
    assert [pair in first for pair in second[:10]] == [k % 5 == 4 for k in range(10)]  # spread, not at once
    third = work(at, "eve", 1000)
    assert len(set(third) - set(first) - set(second)) == 100 - 72  # all that was left
    assert len(third) == 28 + 20  # and the share of all 100
    assert at.view("eve").task is None
    assert at.view("eve").labelled == 100


@pytest.mark.parametrize(("overlap", "expected"), [(0.0, 0), (1.0, 4)])
def test_the_share_at_its_ends(file: LabelFile, overlap: float, expected: int) -> None:
    at = desk(file, overlap=overlap)
    assert len(work(at, "ada", 9)) == 4
    assert len(work(at, "bob", 9)) == expected


def test_two_people_at_once_are_given_two_pairs(file: LabelFile) -> None:
    at = desk(file)
    tasks = [at.view(name).task for name in ("ada", "bob", "ada")]
    assert tasks[0] == tasks[2]
    assert tasks[0].pair != tasks[1].pair  # type: ignore[union-attr]


def test_a_label_for_a_pair_that_is_not_shown_any_more_is_not_taken(file: LabelFile) -> None:
    at = desk(file)
    task = at.view("ada").task
    assert task is not None
    assert at.label("ada", task.key, "left")
    at.view("ada")
    assert not at.label("ada", task.key, "left")
    assert len(file.history()) == 1


def test_choices_become_the_probability_of_the_first_response(file: LabelFile) -> None:
    at = desk(file)
    for choice in ("left", "right", "tie", "bad"):
        task = at.view("ada").task
        assert task is not None
        at.label("ada", task.key, choice)
        comparison, shown = file.history()[-1].comparison, task.shown
        better = {"left": shown[0], "right": shown[1]}.get(choice)
        expected = {"tie": 0.5, "bad": None}.get(choice, float(better == comparison.responses[0]))
        assert comparison.responses == (min(shown), max(shown))
        assert (comparison.probability, comparison.reason) == (expected, "bad" if choice == "bad" else "")
        assert comparison.hashes == tuple(text_hash(task.candidates.responses[i].text) for i in comparison.responses)


def test_undo_goes_back_step_by_step_and_over_a_restart(file: LabelFile, tmp_path: Path) -> None:
    done = work(desk(file), "ada", 3)
    work(desk(file), "bob", 1)
    at = desk(LabelFile(file.path, CANDIDATES))
    seen = []
    while at.undo("ada"):
        seen.append(at.view("ada").task.pair)  # type: ignore[union-attr]
    assert seen == done[::-1]
    assert at.view("ada").own == 0
    assert at.view("bob").own == 1
    assert work(at, "ada", 1, "tie") == [done[0]]
    assert [c.probability for c in read_labels(file.path, CANDIDATES, BadRows()) if c.annotator == "ada"] == [0.5]


def test_the_newest_label_counts_where_the_clock_was_set_back(file: LabelFile) -> None:
    future = datetime.now(UTC) + timedelta(days=1)
    file.append(replace(label("q", (0, 1), 1.0), time=future))
    at = desk(file)
    assert at.undo("ada")
    assert at.view("ada").own == 0


def test_max_pairs(file: LabelFile) -> None:
    at = desk(file, max_pairs=2)
    assert len(work(at, "ada", 9)) == 2
    assert at.view("ada").total == 2


# ---- agreement


def test_agreement_by_hand() -> None:
    """Krippendorff's own example C: four observers, twelve units, missing values; alpha 0.743."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    found = agreement([v for v in unit if v is not None] for unit in zip(*observers, strict=True))
    assert found is not None
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    assert found.pairs == 11
    assert agreement([[1], [2]]) is None
    same = agreement([[1, 1], [1, 1]])
    assert same is not None
    assert (same.raw, same.alpha) == (1.0, None)


def test_agreement_of_people_and_with_the_judges_majority() -> None:
    p, q, r = ("p", 0, 1), ("p", 0, 2), ("q", 0, 1)
    values: dict[Any, float | None] = {
        (p, "ada"): 1.0,
        (p, "bob"): 1.0,
        (q, "ada"): -1.0,
        (q, "bob"): None,
        (r, "ada"): 0,
    }
    found = between_people(values)
    assert found is not None
    assert (found.pairs, found.raw) == (2, 0.5)
    found = with_judges(values, {p: {"a": 0.1, "b": 3, "c": -9}, q: {"a": 1}, r: {}})
    assert found is not None
    assert (found.pairs, found.raw) == (3, 2 / 3)


def test_agreement_does_not_depend_on_which_response_comes_first() -> None:
    """Nine pairs where both prefer the first, one where they differ: 0 if that were chance, as by the plain formula."""
    values: dict[Any, float | None] = {(("p", 0, k), name): 1.0 for k in range(10) for name in ("ada", "bob")}
    values[("p", 0, 9), "bob"] = -1.0
    found = between_people(values)
    mixed = between_people({key: v if key[0][2] % 2 else -v for key, v in values.items()})  # type: ignore[operator]
    assert found == mixed
    assert found is not None
    assert found.alpha == pytest.approx(1 - 0.1 / 0.5 * (39 / 40))
    assert found.pairs == 10


# ---- the file of labels


def test_labels_are_verdicts_that_others_can_read(file: LabelFile) -> None:
    for one in (label("p", (2, 0), 1.0), label("q", (0, 1), 0.5), label("p", (0, 1), None)):
        file.append(one)
    rows = read_rows(file.path)
    assert rows[0] == {
        "prompt_id": "p",
        "responses": [0, 2],
        "judge": "human",
        "probability": 0.0,
        "annotator": "ada",
        "reason": "",
        "hashes": [text_hash("one"), text_hash("three")],
        "time": "2026-01-02T03:04:05.000000+00:00",
    }
    assert (rows[2]["probability"], rows[2]["reason"]) == (None, "bad")
    assert read_verdicts(file.path, CANDIDATES, BadRows()) == read_labels(file.path, CANDIDATES, BadRows())


def test_the_newest_label_of_an_annotator_on_a_pair_stands(file: LabelFile) -> None:
    file.append(label("p", (0, 1), 1.0, after_s=5))
    file.append(label("p", (0, 1), 0.0, after_s=2))  # older, though it comes later: files can be joined
    file.append(label("p", (0, 1), 0.5, name="bob"))
    file.append(label("q", (0, 1), 0.5))
    file.append(replace(label("q", (0, 1), 0.5, after_s=1), withdrawn=True))
    found = [(c.annotator, c.prompt_id, c.probability) for c in read_labels(file.path, CANDIDATES, BadRows())]
    assert found == [("ada", "p", 1.0), ("bob", "p", 0.5)]


def test_contradicting_labels_without_an_order_are_refused(tmp_path: Path) -> None:
    rows = [label_row(label("p", (0, 1), p, after_s=None)) for p in (1.0, 1.0, 0.0)]
    path = write_rows(tmp_path / "l.jsonl", rows[:2])
    assert len(read_labels(path, CANDIDATES, BadRows())) == 1  # the same, said twice
    path = write_rows(tmp_path / "l.jsonl", rows)
    message = refusal(lambda: read_labels(path, CANDIDATES, BadRows()))
    assert f"{path}:3: annotator 'ada'" in message
    assert f"{path}:1" in message
    rows[1]["withdrawn"] = True
    assert read_labels(write_rows(path, rows), CANDIDATES, BadRows())[0].probability == 0.0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"prompt_id": "z"}, ("'prompt_id' is 'z'", "no such prompt")),
        ({"responses": [0, 7]}, ("'responses' is [0, 7]", "3 responses")),
        ({"responses": None}, ("'responses'",)),
        ({"hashes": ["00000000", "11111111"]}, ("'hashes'", "other texts")),
        ({"judge": "llm"}, ("'judge' is 'llm'", "'human'")),
        ({"annotator": None}, ("'annotator' is missing",)),
        ({"probability": 0.7}, ("'probability' is 0.7", "0.5 (a tie)")),
        ({"time": "yesterday"}, ("'time' is a string (\"yesterday\")", "ISO 8601")),
        ({"time": "0001-01-01T00:00:00+14:00"}, ("'time' is a string", "ISO 8601")),
        ({"withdrawn": "no"}, ("'withdrawn'",)),
        ({"shown": [0, 2]}, ("'shown' is a list ([0, 2])",)),
        ({"shown": ["0", "1"]}, ("'shown' is a list",)),
        ({"seconds": -1}, ("'seconds' is a number (-1)",)),
        ({"seconds": 10**400}, ("'seconds' is a number (1000",)),
    ],
)
def test_a_bad_label_names_its_line_and_field(tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    good = label_row(label("p", (0, 1), 1.0))
    path = write_rows(tmp_path / "l.jsonl", [good, {**good, **change}])
    message = refusal(lambda: read_labels(path, CANDIDATES, BadRows()))
    assert f"{path}:2: " in message
    assert [part for part in parts if part not in message] == []
    bad = BadRows("skip")
    assert len(read_labels(path, CANDIDATES, bad)) == len(bad.rows) == 1


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_last_line_is_passed_over_and_then_cut_off(
    file: LabelFile, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    file.append(label("p", (0, 1), 1.0))
    whole = file.path.read_bytes()
    file.append(label("p", (0, 2), 1.0))
    file.path.write_bytes(file.path.read_bytes()[: len(whole) + cut])
    assert len(read_labels(file.path, CANDIDATES, BadRows())) == 1
    assert "torn" in caplog.text
    assert len(LabelFile(file.path, CANDIDATES).history()) == 1
    assert file.path.read_bytes() == whole
    file.append(label("p", (0, 2), 0.0))
    assert [c.probability for c in read_labels(file.path, CANDIDATES, BadRows())] == [1.0, 0.0]


def test_a_torn_last_line_of_many_brackets_is_cut_off_too(file: LabelFile) -> None:
    file.append(label("p", (0, 1), 1.0))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + b"[" * 100_000)
    assert len(LabelFile(file.path, CANDIDATES).history()) == 1
    assert file.path.read_bytes() == whole


def test_a_whole_last_line_without_its_newline_is_kept(file: LabelFile) -> None:
    file.append(label("p", (0, 1), 1.0))
    file.path.write_bytes(file.path.read_bytes().rstrip())
    file.append(label("p", (0, 2), 1.0))
    assert len(read_labels(file.path, CANDIDATES, BadRows())) == 2


def writes(path: Path, name: str, die_at: int = 0) -> None:
    """150 labels, each of which is confirmed in a file beside; the power of a kill -9 in the middle of a write."""
    file, write, calls = LabelFile(path, CANDIDATES), os.write, itertools.count(1)

    def torn(handle: int, data: bytes) -> int:
        if next(calls) == die_at:
            write(handle, data[:37])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data)

    os.write = torn  # type: ignore[assignment]
    with path.with_name(name).open("w") as confirmed:
        for k in range(150):
            file.append(replace(label("p", (0, 1), 1.0, name=f"{name}-{k}"), time=datetime.now(UTC)))
            print(f"{name}-{k}", file=confirmed, flush=True)


@pytest.mark.slow
def test_processes_write_one_file_and_one_is_killed_in_mid_write(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    deaths = {"a": 0, "b": 0, "c": 50}
    children = [fork(lambda name=name, at=at: writes(path, name, at)) for name, at in deaths.items()]  # type: ignore[misc]
    assert [status_of(child) for child in children] == [0, 0, -signal.SIGKILL]
    confirmed = {name: (tmp_path / name).read_text().split() for name in deaths}
    assert len(confirmed["c"]) == 49
    LabelFile(path, CANDIDATES)  # mends what nobody wrote after
    names = Counter(c.annotator for c in read_labels(path, CANDIDATES, BadRows()))
    assert names == Counter(itertools.chain(*confirmed.values()))
    assert len(path.read_bytes().splitlines()) == 349


def test_a_desk_sees_what_another_process_wrote(file: LabelFile) -> None:
    at, other = desk(file), desk(LabelFile(file.path, CANDIDATES))
    work(at, "ada", 1)
    assert other.view("ada").own == 1
    work(other, "ada", 1)
    assert at.view("ada").own == 2


def test_a_label_that_cannot_be_written_leaves_the_file_as_it_was(
    file: LabelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.append(label("p", (0, 1), 1.0))
    before, write = file.path.read_bytes(), os.write

    def full(handle: int, data: bytes) -> int:
        return write(handle, data[:10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="cannot write"):
        file.append(label("p", (0, 2), 1.0))
    assert file.path.read_bytes() == before


# ---- other tools


FORMATS = ("jsonl", "label_studio", "argilla")


@pytest.fixture
def filled(file: LabelFile) -> LabelFile:
    for k, (name, probability) in enumerate((n, p) for n in ("ada", "bob") for p in (1.0, 0.0, 0.5, None)):
        at = [("p", (0, 1)), ("p", (0, 2)), ("p", (1, 2)), ("q", (0, 1))][k % 4]
        file.append(replace(label(*at, probability, name=name, after_s=k), seconds=1.5))  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("form", FORMATS)
def test_labels_survive_the_way_out_and_in(filled: LabelFile, form: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_labels(out, form, CANDIDATES, desk(filled).queue, filled, seed=3) == 8
    copy = LabelFile(tmp_path / "copy.jsonl", CANDIDATES)
    assert import_labels(out, form, CANDIDATES, copy, None, BadRows()) == (8, 8)
    expected = {
        (c.prompt_id, c.responses, c.annotator, c.probability, c.reason, c.hashes)
        for c in read_labels(filled.path, CANDIDATES, BadRows())
    }
    assert {
        (c.prompt_id, c.responses, c.annotator, c.probability, c.reason, c.hashes)
        for c in read_labels(copy.path, CANDIDATES, BadRows())
    } == expected
    if form != "argilla":  # which has no field for either
        timed = [{(x.time, x.annotator, x.pair, x.seconds) for x in f.history()} for f in (filled, copy)]
        assert timed[0] == timed[1]
    assert import_labels(out, form, CANDIDATES, copy, None, BadRows()) == (8, 0)  # a second time changes nothing


@pytest.mark.parametrize("form", ["label_studio", "argilla"])
def test_pairs_without_a_label_go_out_to_be_labelled_and_come_back(file: LabelFile, form: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert export_labels(out, form, CANDIDATES, desk(file).queue, file, seed=0) == 0
    tasks = json.loads(out.read_text())
    assert len(tasks) == 4
    for task in tasks:  # as the tools write them
        if form == "label_studio":
            result = {"value": {"selected": "left"}, "from_name": "pw", "to_name": "left,right", "type": "pairwise"}
            task["annotations"] = [{"completed_by": 7, "was_cancelled": False, "result": [result]}]
        else:
            task["responses"] = [
                {"user_id": "user-7", "values": {"preference": {"value": "left"}}},
                {"user_id": "user-8", "status": "draft", "values": {}},
            ]
    out.write_text(json.dumps(tasks))
    assert import_labels(out, form, CANDIDATES, file, None, BadRows()) == (4, 4)
    for task, one in zip(tasks, file.history(), strict=True):
        names = task["data" if form == "label_studio" else "metadata"]
        assert one.annotator == "user-7"
        assert one.comparison.responses[0 if one.value == 1 else 1] == names["left_response"]


def break_task(tasks: list[Any], where: str, value: Any) -> None:
    *path, last = where.split(".")
    at: Any = tasks[3]
    for key in path:
        at = at[int(key)] if key.isdigit() else at[key]
    at[last] = value


@pytest.mark.parametrize(
    ("form", "where", "value", "part"),
    [
        ("label_studio", "data.prompt_id", "z", "no such prompt"),
        ("label_studio", "data.left_response", 9, "'left_response' is 9"),
        ("label_studio", "data.left", "another", "another text"),
        ("label_studio", "annotations.0.result.0.value", {"choices": ["both"]}, "the choice is 'both'"),
        ("label_studio", "annotations.0.annotator", None, "--annotator NAME"),
        ("label_studio", "annotations.0.annotator", "\ud800", "half of a surrogate pair"),
        ("label_studio", "annotations.0.result.0.value", {"choices": ["left", "tie"]}, "expected a list of one"),
        ("label_studio", "annotations.0.lead_time", -1, "'lead_time' is a number (-1); expected a number >= 0"),
        ("label_studio", "annotations.0.lead_time", float("nan"), "expected a finite number"),
        ("label_studio", "annotations.0.created_at", "0001-01-01T00:00:00+14:00", "expected ISO 8601"),
        ("label_studio", "annotations", 5, "'annotations' is a number (5); expected a list"),
        ("argilla", "metadata.prompt_id", None, "'prompt_id' is missing"),
        ("argilla", "metadata.right_response", -1, "'right_response' is -1"),
        ("argilla", "fields.right", "another", "another text"),
        ("argilla", "responses.preference", [{"user_id": "ada", "value": 3}], "the choice is 3"),
        ("argilla", "responses.preference", 5, "'responses' is a number (5); expected a list"),
        ("argilla", "responses", ["left"], "is 'left'; expected an object with 'user_id' and 'value'"),
        ("argilla", "responses", [{"user_id": "ada", "values": ["left"]}], "the choice is None"),
    ],
)
def test_a_file_with_one_bad_record_adds_nothing(
    filled: LabelFile, form: str, where: str, value: Any, part: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    export_labels(out, form, CANDIDATES, desk(filled).queue, filled, seed=0)
    tasks = json.loads(out.read_text())
    break_task(tasks, where, value)
    out.write_text(json.dumps(tasks))
    copy = LabelFile(tmp_path / "copy.jsonl", CANDIDATES)
    message = refusal(lambda: import_labels(out, form, CANDIDATES, copy, None, BadRows()))
    assert f"{out}: [3]" in message
    assert part in message
    assert copy.path.read_bytes() == b""
    bad = BadRows("skip")
    import_labels(out, form, CANDIDATES, copy, None, bad)
    assert len(bad.rows) == 1


def test_a_file_of_many_brackets_is_refused(file: LabelFile, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("[" * 100_000)
    assert "cannot be read" in refusal(
        lambda: import_labels(tmp_path / "in.json", "argilla", CANDIDATES, file, None, BadRows())
    )


def test_contradictions_in_an_imported_file_are_refused(filled: LabelFile, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    export_labels(out, "argilla", CANDIDATES, [], filled, seed=0)
    tasks = json.loads(out.read_text())
    tasks[0]["responses"]["preference"] = [{"user_id": "ada", "value": value} for value in ("left", "tie")]
    out.write_text(json.dumps(tasks))
    assert "another thing" in refusal(lambda: import_labels(out, "argilla", CANDIDATES, filled, None, BadRows()))


def test_what_was_taken_back_here_stays_so(filled: LabelFile, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    export_labels(out, "jsonl", CANDIDATES, [], filled, seed=0)
    assert desk(filled).undo("bob")
    assert import_labels(out, "jsonl", CANDIDATES, filled, None, BadRows()) == (8, 0)
    assert len(standing(filled.history())) == 7


# ---- the command


def responses_file(folder: Path, name: str = "r.jsonl") -> Path:
    rows = [{"id": "p", "prompt": "P?", "responses": [{"model": f"m{k}", "text": t} for k, t in enumerate("abc")]}]
    return write_rows(folder / name, rows)


def run_folder(folder: Path) -> Path:
    for k in (1, 2, 10):
        (folder / f"iter-{k}").mkdir(parents=True)
        responses_file(folder / f"iter-{k}", "responses.jsonl")
    (folder / "run.json").write_text("{}")
    return folder


def test_the_command_finds_its_files(cli: Any, tmp_path: Path) -> None:
    """By what it exports: nothing, and the file of labels is where it should be."""
    run = run_folder(tmp_path / "run")
    rows = responses_file(tmp_path)
    for arguments, expected in (
        ([run], run / "iter-10/labels.jsonl"),
        ([run, "--iteration", 2], run / "iter-2/labels.jsonl"),
        (["--run", rows], tmp_path / "r.labels.jsonl"),
        ([rows, "--labels", tmp_path / "new/mine.jsonl"], tmp_path / "new/mine.jsonl"),
    ):
        assert not expected.exists()
        (tmp_path / "out.json").unlink(missing_ok=True)
        ended = cli("annotate", [*arguments, "--export_to", tmp_path / "out.json", "--format", "label_studio"])
        assert ended.status == 0, ended.err
        assert expected.exists()
        assert len(json.loads((tmp_path / "out.json").read_text())) == 3
        assert "0 labels in" in ended.err
        assert '<Choices name="choice"' in ended.err


def test_the_command_takes_labels_in_and_gives_them_out(cli: Any, tmp_path: Path) -> None:
    rows = responses_file(tmp_path)
    given = [{"prompt_id": "p", "responses": [2, 0], "judge": "human", "annotator": "ada", "probability": 1.0}]
    source = write_rows(tmp_path / "given.jsonl", given)
    ended = cli("annotate", [rows, "--import_from", source])
    assert ended.status == 0, ended.err
    assert "1 of 1 labels of" in ended.err
    labels = read_labels(tmp_path / "r.labels.jsonl", read_candidates(rows, BadRows()), BadRows())
    assert [(c.responses, c.probability) for c in labels] == [((0, 2), 0.0)]
    ended = cli("annotate", [rows, "--export_to", tmp_path / "out.jsonl"])
    assert "1 labels in" in ended.err
    assert read_rows(tmp_path / "out.jsonl")[0]["annotator"] == "ada"
    assert_error(cli("annotate", [rows, "--export_to", tmp_path / "out.jsonl"]), 2, "export_to", "exists already")


def test_what_the_command_refuses(cli: Any, tmp_path: Path) -> None:
    run, rows = run_folder(tmp_path / "run"), responses_file(tmp_path)
    write_rows(run / "iter-1/verdicts.jsonl", [{"prompt_id": "z", "response": 0, "judge": "exact", "score": 1}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text("{}")
    for arguments, parts in (
        ([], ("run: missing",)),
        ([tmp_path / "nowhere"], ("nowhere is neither a run folder nor a file of responses",)),
        ([tmp_path / "empty"], ("is neither a run folder",)),
        ([tmp_path / "begun"], ("no iteration with responses yet",)),
        ([run, "--iteration", 1], ("iter-1/verdicts.jsonl:1", "'prompt_id' is 'z'")),
        ([run, "--iteration", 3], ("iteration: ", "expected one of 1, 2, 10")),
        ([rows, "--iteration", 3], ("iteration: it has no effect",)),
        ([rows, "--verdicts", tmp_path / "none.jsonl"], ("none.jsonl: no such file",)),
        ([rows, "--port", 70000], ("port: got 70000",)),
        ([rows, "--overlap", 2], ("overlap: got 2.0, expected a probability",)),
        ([rows, "--annotator", " "], ("annotator: got ' '",)),
        ([rows, "--max_pairs", 0], ("max_pairs: got 0",)),
        ([rows, "--format", "argilla"], ("format: 'argilla' has no effect",)),
        ([rows, "--export_to", "a", "--import_from", "b"], ("not both",)),
        ([rows, "--import_from", tmp_path / "none.json", "--format", "argilla"], ("import_from: ", "cannot be read")),
        ([rows, "--pasword", "x"], ("unknown key 'pasword'; did you mean 'password'?",)),
    ):
        assert_error(cli("annotate", arguments), 2, *parts)


def needs_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install 'tso-fast[annotate]'")


def test_a_port_in_use(cli: Any, tmp_path: Path) -> None:
    needs_gradio()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = cli("annotate", [responses_file(tmp_path), "--port", port])
    assert_error(ended, 2, f"cannot listen on 127.0.0.1:{port}", "in use", "another --port")


@pytest.mark.parametrize(
    ("host", "password", "is_warned"),
    [
        ("127.0.0.1", "", False),
        ("localhost", "", False),
        ("::1", "", False),
        ("0.0.0.0", "", True),
        ("a.host", "", True),
        ("0.0.0.0", "secret", False),
    ],
)
def test_it_warns_where_everybody_could_come_in(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, password: str, is_warned: bool
) -> None:
    needs_gradio()
    served: list[Any] = []
    monkeypatch.setattr("tso_fast.annotate.page.serve", lambda *arguments: served.append(arguments[1:]))
    monkeypatch.setenv("TSO_FAST_PASSWORD", password)
    ended = cli("annotate", [responses_file(tmp_path), "--host", host, "--annotator", "ada"])
    assert ended.status == 0
    assert served == [("ada", host, 7860, password or None, None)]
    assert ("warning: " in ended.err and "TSO_FAST_PASSWORD" in ended.err) == is_warned


def test_without_gradio_it_says_how_to_get_it(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    ended = cli("annotate", [responses_file(tmp_path)])
    assert_error(ended, 2, "needs gradio", "pip install 'tso-fast[annotate]'")
    assert cli("annotate", [responses_file(tmp_path), "--export_to", tmp_path / "out.jsonl"]).status == 0

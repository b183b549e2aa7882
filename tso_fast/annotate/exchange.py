"""Import and export of labels: Label Studio's tasks, Argilla's records, and our own rows.

Every file names a pair by ``prompt_id`` and the responses at its left and right, and repeats their texts, so that a
label cannot be applied to texts that the annotator did not see. A choice is ``left``, ``right``, ``tie`` or ``bad``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tso_fast.annotate.order import sides
from tso_fast.errors import InputError
from tso_fast.files.atomic import write_json, write_jsonl
from tso_fast.files.labels import (
    Label,
    LabelFile,
    Pair,
    label_row,
    make_label,
    parse_seconds,
    parse_time,
    read_history,
    standing,
)
from tso_fast.files.sources import BadRows, Row, check_leaves, kind_of
from tso_fast.types import Candidates

PROBABILITY: dict[str, float | None] = {"left": 1.0, "right": 0.0, "tie": 0.5, "bad": None}
"""Probability that the left response is better, for each choice."""

LABEL_STUDIO_CONFIG = """\
<View>
  <Text name="prompt" value="$prompt"/>
  <View style="display: grid; grid-template: auto / 1fr 1fr; column-gap: 1em">
    <Text name="left" value="$left"/>
    <Text name="right" value="$right"/>
  </View>
  <Choices name="choice" toName="prompt" choice="single" showInline="true">
    <Choice value="left"/> <Choice value="right"/> <Choice value="tie"/> <Choice value="bad"/>
  </Choices>
</View>
"""


# ---- out


def export_labels(
    path: Path, form: str, candidates: Sequence[Candidates], queue: Sequence[Pair], labels: LabelFile, seed: int
) -> int:
    """Writes the current labels and returns their number; other tools' files also get the queue's unlabelled pairs."""
    newest = standing(labels.history())
    if form == "jsonl":
        write_jsonl(path, map(label_row, newest.values()))
        return len(newest)
    of_pair: dict[Pair, list[Label]] = {}
    for (pair, _), label in newest.items():
        of_pair.setdefault(pair, []).append(label)
    items = {c.prompt.id: c for c in candidates}
    make = _label_studio_task if form == "label_studio" else _argilla_record
    write_json(
        path,
        [
            make(number, items[pair[0]], sides(pair, "", seed), of_pair.get(pair, []))
            for number, pair in enumerate(dict.fromkeys([*of_pair, *queue]), start=1)
        ],
    )
    return len(newest)


def _said(label: Label, left: int) -> str:
    probability = label.comparison.probability
    if probability is None:
        return "bad"
    if probability == 0.5:
        return "tie"
    better = label.comparison.responses[0 if probability == 1 else 1]
    return "left" if better == left else "right"


def _texts(item: Candidates, shown: tuple[int, int]) -> Row:
    left, right = (item.responses[i].text for i in shown)
    return {"prompt": item.prompt.text, "left": left, "right": right}


def _names(item: Candidates, shown: tuple[int, int]) -> Row:
    return {"prompt_id": item.prompt.id, "left_response": shown[0], "right_response": shown[1]}


def _label_studio_task(number: int, item: Candidates, shown: tuple[int, int], labels: Iterable[Label]) -> Row:
    def annotation(label: Label) -> Row:
        result = {
            "from_name": "choice",
            "to_name": "prompt",
            "type": "choices",
            "value": {"choices": [_said(label, shown[0])]},
        }
        # Not completed_by: Label Studio expects the number of one of its own users there.
        row: Row = {"annotator": label.annotator, "result": [result]}
        if label.time is not None:
            row["created_at"] = label.time.astimezone(UTC).isoformat()
        if label.seconds is not None:
            row["lead_time"] = label.seconds
        return row

    return {
        "id": number,
        "data": {**_texts(item, shown), **_names(item, shown)},
        "annotations": [annotation(label) for label in labels],
    }


def _argilla_record(number: int, item: Candidates, shown: tuple[int, int], labels: Iterable[Label]) -> Row:
    answers = [{"user_id": label.annotator, "value": _said(label, shown[0]), "status": "submitted"} for label in labels]
    return {
        "id": f"pair-{number}",
        "fields": _texts(item, shown),
        "metadata": _names(item, shown),
        "questions": [{"name": "preference", "type": "label_selection", "labels": list(PROBABILITY)}],
        "responses": {"preference": answers},
    }


# ---- in


def import_labels(
    path: Path,
    form: str,
    candidates: Sequence[Candidates],
    labels: LabelFile,
    annotator: str | None,
    bad: BadRows,
    on_unknown_field: str = "ignore",
) -> tuple[int, int]:
    """Adds the labels of a file, all or none.

    A label without a time counts as given now. A label that repeats the current one, or is older than the annotator's
    newest label or withdrawal of the pair, is skipped.

    Args:
        annotator: name for labels that carry none.
        on_unknown_field: what happens to fields of ours that look misspelt.

    Returns:
        Number of labels in the file, and number of labels added.

    Raises:
        InputError: a row is wrong, with its place and the error; nothing was added.
    """
    given = list(standing(_read(path, form, candidates, annotator, bad, on_unknown_field)).values())
    now = datetime.now(UTC)
    given = [label if label.time is not None else replace(label, time=now) for label in given]
    history = labels.history()
    before, after = standing(history), standing([*history, *given])
    new = [
        label
        for label in given
        if after.get(key := (label.pair, label.annotator)) is label
        and (key not in before or before[key].value != label.value)
    ]
    if new:
        labels.append_all(new)
    return len(given), len(new)


def _read(
    path: Path,
    form: str,
    candidates: Sequence[Candidates],
    annotator: str | None,
    bad: BadRows,
    on_unknown_field: str,
) -> Iterator[Label]:
    if form == "jsonl":
        yield from read_history(path, candidates, bad, on_unknown_field)
        return
    items = {c.prompt.id: c for c in candidates}
    parse = _from_label_studio if form == "label_studio" else _from_argilla
    for number, record in enumerate(_read_list(path)):
        where = f"{path}: [{number}]"
        try:
            check_leaves(record, where)
        except InputError as error:
            bad.handle(error, repr(record))
            continue
        try:
            yield from parse(record, where, items, annotator)
        except InputError as error:
            bad.handle(error, record)


def _read_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"import_from: {path} cannot be read: {error}; expected a JSON list") from error
    if isinstance(content, dict) and isinstance(content.get("records"), list):
        content = content["records"]
    if not isinstance(content, list):
        raise InputError(f"import_from: {path} holds no list; expected the tool's JSON export")
    return content


def _field(row: Any, name: str, where: str, kind: type, expected: str) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        given = "missing" if value is None else repr(value)[:60]
        raise InputError(f"{where}: field {name!r} is {given}; expected {expected}")
    return value


def _pair(names: Any, texts: Any, where: str, items: Mapping[str, Candidates]) -> tuple[Candidates, int, int]:
    prompt_id = _field(names, "prompt_id", where, str, "the id of a prompt, as our export wrote it")
    if prompt_id not in items:
        raise InputError(f"{where}: field 'prompt_id' is {prompt_id!r}; no such prompt among the responses")
    item = items[prompt_id]
    found = []
    for side in ("left", "right"):
        index = _field(names, f"{side}_response", where, int, "the index of a response, as our export wrote it")
        if not 0 <= index < len(item.responses):
            raise InputError(
                f"{where}: field '{side}_response' is {index}; prompt {prompt_id!r} has {len(item.responses)} responses"
            )
        if _field(texts, side, where, str, "the text that was shown") != item.responses[index].text:
            raise InputError(
                f"{where}: field {side!r} is not the text of response {index} of prompt {prompt_id!r}: "
                "the label was given to another text"
            )
        found.append(index)
    if found[0] == found[1]:
        raise InputError(f"{where}: left and right are the same response, {found[0]}; expected two")
    return item, found[0], found[1]


def _probability(choice: Any, where: str) -> float | None:
    if not isinstance(choice, str) or choice not in PROBABILITY:
        raise InputError(f"{where}: the choice is {choice!r}; expected one of {', '.join(PROBABILITY)}")
    return PROBABILITY[choice]


def _name(value: Any, default: str | None, where: str) -> str:
    """Name of a user, which tools write as a name, a number, or an object with one of the two."""
    if isinstance(value, dict):
        value = next((value[k] for k in ("email", "username", "name", "id") if value.get(k)), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"user-{value}"
    if value is None:
        value = default
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: names no annotator; say whose labels these are with --annotator NAME")
    return value.strip()


def _from_label_studio(task: Any, where: str, items: Mapping[str, Candidates], annotator: str | None) -> list[Label]:
    """Labels of a task of the JSON export, or of JSON-MIN, which has data and choice side by side."""
    data = task.get("data", task) if isinstance(task, dict) else None
    item, left, right = _pair(data, data, where, items)
    assert isinstance(task, dict)
    annotations = task.get("annotations")
    if annotations is None and "choice" in task:
        annotations = [
            {
                "result": [{"from_name": "choice", "value": {"selected": task["choice"]}}],
                "completed_by": task.get("annotator"),
                "created_at": task.get("created_at"),
                "lead_time": task.get("lead_time"),
            }
        ]
    out = []
    for k, annotation in enumerate(_list(annotations, "annotations", where)):
        place = f"{where}.annotations[{k}]"
        results = _field(annotation, "result", place, list, "a list of results")
        if annotation.get("was_cancelled") or not results:
            continue
        value = _field(results[0], "value", f"{place}.result[0]", dict, "a choice")
        choices = value.get("choices") or [value.get("selected", value.get("choice"))]
        if not isinstance(choices, list) or len(choices) != 1:
            raise InputError(f"{place}: the choices are {kind_of(choices)}; expected a list of one")
        who = _name(annotation.get("annotator", annotation.get("completed_by")), annotator, place)
        out.append(
            make_label(
                item,
                (left, right),
                who,
                _probability(choices[0], place),
                parse_time(annotation.get("created_at"), place),
                seconds=parse_seconds(annotation.get("lead_time"), f"{place}: field 'lead_time'"),
                shown=(left, right),
                where=place,
            )
        )
    return out


def _from_argilla(record: Any, where: str, items: Mapping[str, Candidates], annotator: str | None) -> list[Label]:
    """Labels of a record as Argilla's ``records.to_json`` writes it, or as exports of Argilla 1 do."""
    fields = _field(record, "fields", where, dict, "the texts that were shown")
    item, left, right = _pair(record.get("metadata"), fields, where, items)
    answers = record.get("responses")
    if isinstance(answers, dict):
        answers = answers.get("preference")
    elif isinstance(answers, list):
        answers = [_flat(answer) for answer in answers]
    out = []
    for k, answer in enumerate(_list(answers, "responses", where)):
        place = f"{where}.responses[{k}]"
        if not isinstance(answer, dict):
            raise InputError(f"{place}: is {answer!r:.60}; expected an object with 'user_id' and 'value'")
        if answer.get("status", "submitted") != "submitted":
            continue
        out.append(
            make_label(
                item,
                (left, right),
                _name(answer.get("user_id"), annotator, place),
                _probability(answer.get("value"), place),
                shown=(left, right),
                where=place,
            )
        )
    return out


def _flat(answer: Any) -> Any:
    """A response of Argilla 1, ``{"user_id", "status", "values": {"preference": {"value"}}}``, as one of today's."""
    inside = answer
    for name in ("values", "preference"):
        inside = inside.get(name) if isinstance(inside, dict) else None
    return {**answer, **inside} if isinstance(inside, dict) else answer


def _list(value: Any, name: str, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{where}: field {name!r} is {kind_of(value)}; expected a list")
    return value

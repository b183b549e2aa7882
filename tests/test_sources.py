"""Data as users have them: formats of files, forms of rows, names of fields; and nothing of them is lost silently."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers import read_rows, write_rows

from tso_fast.config.settings import RowsConfig
from tso_fast.errors import InputError
from tso_fast.files.atomic import sha256_file
from tso_fast.files.labels import read_labels
from tso_fast.files.rows import BadRows, candidates_row, read_candidates, read_verdicts
from tso_fast.types import Candidates, Message, Prompt, Response

ROWS = [
    {"prompt": "2 + 3?", "answer": "5", "human_response": 'five,\n"5"'},
    {"prompt": "ä ö\n?", "answer": "007"},
    {"prompt": "NA", "answer": "None"},
]
"""What readers of tables like to change: quotes, line breaks, numbers with zeros, words for nothing."""


def read(path: Path, bad: BadRows | None = None, **settings: Any) -> list[Candidates]:
    return read_candidates(path, bad or BadRows(), RowsConfig(**settings))


def error_of(path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **settings)
    assert str(caught.value).startswith(f"{path}")
    return str(caught.value).removeprefix(f"{path}").removesuffix(" (--on_bad_row skip sets such rows aside)")


def told(candidates: list[Candidates]) -> list[dict[str, Any]]:
    rows = [{"prompt": c.prompt.prompt, "answer": c.prompt.answer, "human_response": None} for c in candidates]
    for row, item in zip(rows, candidates, strict=True):
        row["human_response"] = "".join(item.prompt.human_responses) or None
        assert [r.text for r in item.responses] == list(item.prompt.human_responses)
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


# ---- formats


def as_array(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def as_csv(path: Path, delimiter: str = ",") -> Path:
    quoted = [[f'"{(row.get(name) or "").replace(chr(34), chr(34) * 2)}"' for name in ROWS[0]] for row in ROWS]
    path.write_text("\ufeff" + "\r\n".join([delimiter.join(ROWS[0]), *map(delimiter.join, quoted)]), encoding="utf-8")
    return path


def as_parquet(path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def as_dataset(path: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(path)
    return path


def zipped(path: Path) -> Path:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.with_name(f"{path.name}.gz")


def test_every_format_gives_the_same_rows_each_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    compact = tmp_path / "compact.json"
    compact.write_text(json.dumps(ROWS))
    places = {
        write_rows(tmp_path / "p.jsonl", ROWS): [":1", ":2", ":3"],
        write_rows(tmp_path / "lines.json", ROWS): [":1", ":2", ":3"],
        as_array(tmp_path / "p.json"): [":2[1]", ":7[2]", ":11[3]"],
        zipped(tmp_path / "p.json"): [":2[1]", ":7[2]", ":11[3]"],
        compact: [":1[1]", ":1[2]", ":1[3]"],
        as_csv(tmp_path / "p.csv"): [":2", ":4", ":6"],
        as_csv(tmp_path / "semicolons.csv", ";"): [":2", ":4", ":6"],
        zipped(as_csv(tmp_path / "p.tsv", "\t")): [":2", ":4", ":6"],
        as_parquet(tmp_path / "p.parquet"): [":1", ":2", ":3"],
        as_dataset(tmp_path / "saved"): [":1", ":2", ":3"],
    }
    for path, expected in places.items():
        found = read(path)
        assert told(found) == ROWS, path
        assert [c.prompt.where.removeprefix(str(path)) for c in found] == expected
    assert [c.prompt.id for c in read(compact)] == ["row-1", "row-2", "row-3"]


def test_a_folder_of_several_splits_names_them(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    both = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    both.save_to_disk(tmp_path / "both")
    assert error_of(tmp_path / "both") == (
        f": it holds the splits train, test; name one of them: {tmp_path / 'both' / 'test'}"
    )
    assert told(read(tmp_path / "both" / "train")) == ROWS
    DatasetDict(train=both["train"]).save_to_disk(tmp_path / "one")
    assert told(read(tmp_path / "one")) == ROWS
    first = sha256_file(tmp_path / "one")
    assert first == sha256_file(tmp_path / "one") != sha256_file(tmp_path / "both")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.json",
            '[{"prompt": "a"},\n {"prompt": }]',
            ":2: broken JSON: Expecting value at column 13; expected a JSON",
        ),
        ("p.json", '[{"prompt": "a"}\n {"prompt": "b"}]', ":1[1]: expected a comma or the end of the array after it"),
        ("p.json", '[{"prompt": "a"},\n3]', ":2[2]: expected an object, got a number (3)"),
        ("p.json", '[{"prompt": "a"},\n{"prompt": 3}]', ":2[2]: field 'prompt' is a number (3)"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', ":1[1]: field 'prompt' is given twice"),
        ("p.json", '[{"prompt": "a"}]]', ": ']' stands after the end of the array"),
        ("p.json", '[{"prompt": "a"}', ":1[1]: expected a comma or the end of the array after it, got ''"),
        ("p.json", "[" * 100_000, ":1[1]: JSON that cannot be read: maximum recursion"),
        ("p.json", "[]", ": holds no prompts; expected"),
        ("p.csv", "prompt,answer\na,1\nb\n", ":3: 1 cells; the header has 2"),
        ("p.csv", "prompt,prompt\na,b\n", ":1: column 'prompt' is given twice; expected it once"),
        ("p.csv", 'prompt,answer\n"a"b,1\n', ":2: broken CSV: ',' expected after"),
        ("p.csv", 'prompt\n"a', ":2: broken CSV: unexpected end of data"),
        ("p.csv", "", ": holds no prompts; expected"),
        ("p.csv", b"prompt\n\xe9\n", ":2: byte 0xe9 at column 1 is not UTF-8"),
        ("p.parquet", "PAR1", ":1: cannot be read: ArrowInvalid"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_bad_row_is_named_in_every_format(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_of(tmp_path / name).startswith(message)


def test_a_bad_item_of_an_array_is_set_aside_and_the_others_are_read(tmp_path: Path) -> None:
    items = [
        "3",
        '{"prompt": "b", "prompt": "c"}',
        '{"prompt": "d", "x": NaN}',
        '{"prompt": "\\ud800"}',
        '{"prompt": 5}',
    ]
    (tmp_path / "p.json").write_text(f'[{{"prompt": "a"}}, {", ".join(items)}, {{"prompt": "z"}}]')
    bad = BadRows("skip")
    assert [c.prompt.prompt for c in read(tmp_path / "p.json", bad)] == ["a", "z"]
    (written,) = bad.set_aside(tmp_path / "bad.jsonl")
    assert [row["row"] for row in read_rows(written)] == [*items[:-1], {"prompt": 5}]


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert "to read it takes pyarrow.parquet" in (error := error_of(tmp_path / "p.parquet"))
    assert error.endswith("pip install 'tso-fast[data]'")


# ---- forms of rows

USER, ASSISTANT = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]}
SHAREGPT = [{"from": "system", "value": "Add."}, {"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]
TURNS = (Message(role="system", content="Add."), Message(role="user", content="2 + 3?"))


@pytest.mark.parametrize(
    ("row", "prompt", "humans"),
    [
        ({"messages": [USER, ASSISTANT]}, TURNS[1:], ("5",)),
        ({"messages": [USER]}, TURNS[1:], ()),
        ({"messages": [PARTS, ASSISTANT]}, TURNS[1:], ("5",)),
        ({"messages": [USER, ASSISTANT], "human_response": "five"}, TURNS[1:], ("five",)),
        ({"messages": [USER, ASSISTANT, USER]}, (TURNS[1], Message(role="assistant", content="5"), TURNS[1]), ()),
        ({"conversations": SHAREGPT}, TURNS, ("5",)),
        ({"conversations": json.dumps(SHAREGPT)}, TURNS, ("5",)),
        ({"conversations": {"from": ["human", "gpt"], "value": ["2 + 3?", "5"]}}, TURNS[1:], ("5",)),
        ({"prompt": [PARTS]}, TURNS[1:], ()),
        ({"prompt": "2 + 3?", "human_response": ["5", "five"]}, "2 + 3?", ("5", "five")),
        ({"prompt": [USER], "human_response": [ASSISTANT]}, TURNS[1:], ("5",)),
        ({"prompt": "2 + 3?", "human_response": []}, "2 + 3?", ()),
    ],
    ids=lambda value: json.dumps(value, default=str)[:60],
)
def test_a_conversation_is_a_prompt_and_a_human_response(
    tmp_path: Path, row: dict[str, Any], prompt: Any, humans: tuple[str, ...]
) -> None:
    (item,) = read(write_rows(tmp_path / "p.jsonl", [row]))
    assert item.prompt.prompt == prompt
    assert item.prompt.human_responses == humans
    assert [(r.model, r.sample, r.text) for r in item.responses] == [("human", i, t) for i, t in enumerate(humans)]
    again = read_candidates(write_rows(tmp_path / "again.jsonl", [candidates_row(item)]), BadRows())
    assert [r.text for r in again[0].responses] == list(humans)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "has a part of type 'image_url'; expected",
        ),
        ({"messages": [ASSISTANT]}, ": field 'messages' is an answer alone; expected the turns before it"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "has role 'alien'; expected one of system, user"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "field 'prompt[0]' is an object"),
        ({"conversations": "[1"}, ": field 'conversations' is a string that is no JSON"),
        ({"conversations": '["\\ud800"]'}, "half of a surrogate pair"),
        ({"prompt": "a", "responses": '[{"model": "m", "text": "t", "logprob": NaN}]'}, "expected a finite number"),
        ({"prompt": "a", "responses": '[{"model": "m", "text": "t", "text": "u"}]'}, "'text' is given twice in one"),
    ],
)
def test_a_conversation_that_cannot_be_read_names_the_turn(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    error = error_of(write_rows(tmp_path / "p.jsonl", [row]))
    assert error.startswith(":1: ")
    assert message in error


# ---- names of fields


def test_fields_of_other_names(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "solution": "h", "target": 5, "uid": "x", "prompt": "unread"},
        {"question": [USER, ASSISTANT]},
    ]
    names = {
        "prompt_field": "question",
        "human_response_field": "solution",
        "answer_field": "target",
        "id_field": "uid",
    }
    first, second = read(write_rows(tmp_path / "p.jsonl", rows), **names)
    assert (first.prompt.prompt, first.prompt.human_responses) == ("a", ("h",))
    assert (first.prompt.answer, first.prompt.id) == ("5", "x")
    assert (second.prompt.prompt, second.prompt.human_responses) == (TURNS[1:], ("5",))


def test_a_name_that_no_row_has_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"question": "a", "solution": "h"}])
    assert error_of(file, prompt_field="qestion") == (
        ":1: field 'qestion', which prompt_field names, is missing; did you mean 'question'?"
    )
    assert error_of(file, prompt_field="question", human_response_field="sulution") == (
        ": no row has the field 'sulution', which human_response_field names"
    )


def test_misspelt_fields_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "human_reponse": "h", "source": "web"}] * 3
    rows += [{"prompt": "b", "reponses": []}, {"prompt": "c", "responses": [{"model": "m", "text": "t", "scroes": {}}]}]
    file = write_rows(tmp_path / "p.jsonl", rows)
    with caplog.at_level(logging.WARNING, "tso_fast"):
        assert len(read(file)) == 5
    near = [("human_reponse", "human_response", 3), ("reponses", "responses", 1), ("responses[].scroes", "scores", 1)]
    assert [r.getMessage().partition("; did")[0] for r in caplog.records] == [
        f"{file}: {count} of 5 rows have a field {name!r}, which is not read" for name, _, count in near
    ]
    assert all(
        f"did you mean {known!r}?" in r.getMessage() for r, (_, known, _) in zip(caplog.records, near, strict=True)
    )
    caplog.clear()
    assert len(read(file, on_unknown_field="ignore")) == 5
    assert not caplog.records
    assert error_of(file, on_unknown_field="raise") == (
        ":1: field 'human_reponse' is not read; did you mean 'human_response'? (--on_unknown_field ignore allows it)"
    )


VERDICT: dict[str, Any] = {"prompt_id": "p", "response": 0, "judge": "j", "score": 1.0}
LABEL: dict[str, Any] = {"prompt_id": "p", "responses": [0, 1], "judge": "human", "probability": 1, "annotator": "ada"}


@pytest.mark.parametrize(
    ("reader", "row", "misspelt", "known"),
    [
        (read_verdicts, VERDICT, "raeson", "reason"),
        (read_verdicts, LABEL, "annotater", "annotator"),
        (read_labels, LABEL, "withdrawen", "withdrawn"),
    ],
)
def test_misspelt_fields_of_verdicts_and_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reader: Any, row: dict[str, Any], misspelt: str, known: str
) -> None:
    responses = tuple(Response(model="m", sample=i, text=str(i)) for i in range(2))
    candidates = [Candidates(prompt=Prompt(id="p", prompt="q"), responses=responses)]
    given = {name: value for name, value in row.items() if name != known} | {misspelt: "x", "source": "web"}
    file = write_rows(tmp_path / "rows.jsonl", [given])
    with caplog.at_level(logging.WARNING, "tso_fast"):
        assert len(reader(file, candidates, BadRows(), on_unknown_field="warn")) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{file}: 1 of 1 rows have a field {misspelt!r}, which is not read; did you")
    bad = BadRows("skip")
    assert len(reader(write_rows(file, [row, given]), candidates, bad, on_unknown_field="raise")) == 1
    assert [r["error"] for r in bad.rows] == [
        f"{file}:2: field {misspelt!r} is not read; did you mean {known!r}? (--on_unknown_field ignore allows it)"
    ]

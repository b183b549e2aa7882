"""Rows in and out: every error names file:line and field, and what is written reads back the same."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import read_rows, write_rows

from tso_fast.errors import InputError
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.rows import (
    BadRows,
    candidates_row,
    pair_row,
    read_candidates,
    read_pairs,
    read_verdicts,
    text_hash,
    verdict_row,
)
from tso_fast.types import Candidates, Comparison, Message, PreferencePair, Prompt, Response, Verdict


def error_of(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_candidates(path, BadRows())
    assert str(caught.value).startswith(f"{path}")
    return str(caught.value).removeprefix(f"{path}").removesuffix(" (--on_bad_row skip sets such rows aside)")


def response(**fields: Any) -> str:
    return json.dumps({"prompt": "a", "responses": [{"model": "m", "text": "t", **fields}]})


MESSAGE = 'expected {"role": ..., "content": ...} with two strings'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # broken JSON, or JSON of another kind
        ('{"prompt": "a"', ": broken JSON: Expecting ',' delimiter at column 15; expected one JSON object a line"),
        ("{'prompt': 'a'}", ": broken JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "a"}, {"prompt": "b"}', ": broken JSON: Extra data at column 16"),
        ('["a"]', ': expected one JSON object a line, got a list (["a"])'),
        ('"a"', ': expected one JSON object a line, got a string ("a")'),
        ("[" * 100_000, ": JSON that cannot be read: maximum recursion depth exceeded"),
        ('{"prompt": ' + "1" * 5000 + "}", ": JSON that cannot be read: Exceeds the limit"),
        # prompt
        ('{"id": "1"}', ": field 'prompt' is missing; expected a string or a list of messages"),
        ('{"promt": "a"}', ": field 'prompt' is missing, but there is 'promt'; expected"),
        ('{"prompt": null}', ": field 'prompt' is null; expected a string or a list of messages"),
        ('{"prompt": " \\n"}', ": field 'prompt' is empty; expected some text"),
        ('{"prompt": 3}', ": field 'prompt' is a number (3); expected a string or a list of messages"),
        ('{"prompt": "\\ud800!"}', ": field 'prompt' has half of a surrogate pair ('\\ud800!')"),
        # messages
        ('{"prompt": []}', ": field 'prompt' is empty; expected at least one message with content"),
        ('{"prompt": [{"role": "user", "content": " "}]}', ": field 'prompt' is empty; expected at least one message"),
        ('{"prompt": ["a"]}', f": field 'prompt[0]' is a string (\"a\"); {MESSAGE}"),
        ('{"prompt": [{"role": "user"}]}', f': field \'prompt[0]\' is an object ({{"role": "user"}}); {MESSAGE}'),
        ('{"prompt": [{"role": "user", "content": null}]}', ": field 'prompt[0]' is an object"),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
            ": field 'prompt[1]' has role 'bot'; expected one of system, user, assistant, tool",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            ": field 'prompt' ends with an assistant message; expected a turn to answer",
        ),
        # id, answer, human_response
        ('{"prompt": "a", "id": ""}', ": field 'id' is a string (\"\"); expected a non-empty string"),
        ('{"prompt": "a", "id": 1.5}', ": field 'id' is a number (1.5); expected a non-empty string"),
        ('{"prompt": "a", "id": true}', ": field 'id' is a boolean (true); expected a non-empty string"),
        ('{"prompt": "a", "answer": [1]}', ": field 'answer' is a list ([1]); expected a string or a number"),
        ('{"prompt": "a", "answer": false}', ": field 'answer' is a boolean (false); expected a string or a number"),
        ('{"prompt": "a", "human_response": ""}', ": field 'human_response' is empty; expected some text"),
        ('{"prompt": "a", "human_response": 7}', ": field 'human_response' is a number (7); expected a string"),
        (
            '{"prompt": "a", "human_response": ["b", " "]}',
            ": field 'human_response[1]' is a string (\" \"); expected some",
        ),
        ('{"prompt": "a", "human_response": [{"role": "user", "content": "b"}]}', ": field 'human_response' is a list"),
        # keys that Python's own reader would drop
        ('{"prompt": "a", "prompt": "b"}', ": field 'prompt' is given twice in one object; expected it once"),
        (response(scores={"j": 1}).replace('"j": 1', '"j": 1, "j": 0'), ": field 'j' is given twice in one object"),
        # responses
        ('{"prompt": "a", "responses": {}}', ": field 'responses' is an object ({}); expected a list of responses"),
        ('{"prompt": "a", "responses": ["b"]}', ": field 'responses[0]' is a string (\"b\"); expected an object with"),
        ('{"prompt": "a", "responses": [{"text": "t"}]}', ": field 'responses[0]': field 'model' is missing"),
        (response(model=""), ": field 'responses[0]': field 'model' is empty"),
        (response(text=None), ": field 'responses[0]': field 'text' is null; expected a string"),
        (response(text=3), ": field 'responses[0]': field 'text' is a number (3); expected a string"),
        (response(size_b="6"), ": field 'responses[0]': field 'size_b' is a string (\"6\"); expected a number"),
        (response(size_b=10**400), "expected a number that float32 can hold"),
        (response(version=3), ": field 'responses[0]': field 'version' is a number (3); expected a string"),
        (response(version_rank=1.5), ": field 'responses[0]': field 'version_rank' is a number (1.5); expected an int"),
        (response(version_rank=True), ": field 'responses[0]': field 'version_rank' is a boolean (true)"),
        (response(sample="0"), ": field 'responses[0]': field 'sample' is a string (\"0\"); expected an integer"),
        (response(seed=0.5), ": field 'responses[0]': field 'seed' is a number (0.5); expected an integer"),
        (response(weight_hash=1), ": field 'responses[0]': field 'weight_hash' is a number (1); expected a string"),
        (response(logprob="-1"), ": field 'responses[0]': field 'logprob' is a string (\"-1\"); expected a number"),
        (response(finish_reason="eos"), ": field 'finish_reason' is 'eos'; expected 'stop' or 'length'"),
        (response(token_ids="1 2"), ": field 'token_ids' is a string (\"1 2\"); expected a list of token ids"),
        (response(token_ids=[1, -2]), ": field 'token_ids' has an item that is no token id; expected integers >= 0"),
        (response(scores=[1]), ": field 'scores' is a list ([1]); expected an object of name: number"),
        (response(scores={"j": "0.5"}), "'scores': field 'j' is a string (\"0.5\"); expected a number"),
        (response(scores={"j": True}), "'scores': field 'j' is a boolean (true); expected a number"),
        (response(scores={"j": 1e39}), "'scores': field 'j' is a number (1e+39); expected a number that float32"),
        (response(scores={"j": float("nan")}), ": field 'responses[0].scores.j' is nan; expected a finite number"),
        (response(scores={"j": -float("inf")}), ": field 'responses[0].scores.j' is -inf; expected a finite number"),
        (response().replace('"t"', '"t", "size_b": 1e999'), ": field 'responses[0].size_b' is inf; expected a finite"),
    ],
    ids=lambda value: value[:70].encode("ascii", "backslashreplace").decode(),
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    """On line 3, after a good row and a blank line, which counts."""
    error = error_of(tmp_path / "prompts.jsonl", f'{{"prompt": "good"}}\n\n{line}\n')
    assert error.startswith(":3: ")
    assert message.removeprefix(": ") in error


def test_two_samples_of_a_model_with_one_number(tmp_path: Path) -> None:
    same = {"model": "m", "text": "t", "sample": 1}
    line = json.dumps({"prompt": "a", "responses": [same, same]})
    assert "field 'responses[1]' repeats model 'm', sample 1 of responses[0]" in error_of(tmp_path / "p.jsonl", line)


def test_unnumbered_samples_of_a_model_are_numbered(tmp_path: Path) -> None:
    same = {"model": "m", "text": "t"}
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "responses": [same, {**same, "model": "n"}, same]}])
    (item,) = read_candidates(file, BadRows())
    assert [(r.model, r.sample) for r in item.responses] == [("m", 0), ("n", 0), ("m", 1)]


def test_repeated_ids_name_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    error = error_of(file, '{"id": 7, "prompt": "a"}\n{"id": "b", "prompt": "b"}\n{"id": "7", "prompt": "c"}\n')
    assert error == f":3: field 'id' is '7', as at {file}:1; expected unique ids"


def test_latin_1_names_the_column_and_the_remedy(tmp_path: Path) -> None:
    error = error_of(tmp_path / "p.jsonl", '{"prompt": "café"}\n'.encode("latin-1"))
    assert error.startswith(":1: byte 0xe9 at column 16 is not UTF-8")
    assert "iconv -f latin1 -t utf-8" in error


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    assert error_of(tmp_path / "p.jsonl", content) == ": holds no prompts; expected at least one row"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; expected JSONL"):
        read_candidates(tmp_path / "missing.jsonl", BadRows())
    with pytest.raises(InputError, match="a folder, but none that save_to_disk of `datasets` wrote; expected JSONL"):
        read_candidates(tmp_path, BadRows())


def test_windows_files_read_like_others(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, no newline at the end."""
    file = tmp_path / "p.jsonl"
    file.write_bytes('\ufeff{"prompt": "ä"}\r\n\r\n{"prompt": "b\\r\\n"}'.encode())
    candidates = read_candidates(file, BadRows())
    assert [(c.prompt.id, c.prompt.prompt) for c in candidates] == [("row-1", "ä"), ("row-3", "b\r\n")]


def test_numbers_as_ids_and_answers(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"id": 0, "prompt": "a", "answer": 70000}, {"prompt": "b", "answer": 0.5}])
    assert [(c.prompt.id, c.prompt.answer) for c in read_candidates(file, BadRows())] == [
        ("0", "70000"),
        ("row-2", "0.5"),
    ]


def test_gz_reads_like_plain(tmp_path: Path, gsm8k_dev: Path) -> None:
    plain = tmp_path / "dev.jsonl"
    plain.write_bytes(gzip.decompress(gsm8k_dev.read_bytes()))
    packed, unpacked = read_candidates(gsm8k_dev, BadRows()), read_candidates(plain, BadRows())
    assert len(packed) == 660
    assert [candidates_row(c) for c in packed] == [candidates_row(c) for c in unpacked]


def test_a_damaged_gz_names_the_line_it_got_to(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % i for i in range(5000)))
    block_type, checksum = 10, len(whole) - 8
    cases = {
        "cut": (whole[: len(whole) // 2], "ended before the end-of-stream marker"),
        "text": (b'{"prompt": "a"}', "Not a gzipped file"),
        "block": (whole[:block_type] + b"\x07" + whole[block_type + 1 :], "invalid block type"),
        "checksum": (whole[:checksum] + bytes(4) + whole[checksum + 4 :], "CRC check failed"),
    }
    lines = {}
    for name, (content, reason) in cases.items():
        error = error_of(tmp_path / f"{name}.jsonl.gz", content)
        lines[name] = int(error.split(":")[1])
        assert error.startswith(f":{lines[name]}: cannot be read: ")
        assert reason in error
    assert lines["text"] == lines["block"] == 1 < lines["cut"] < lines["checksum"] == 5001


def test_the_human_response_is_a_candidate_once(tmp_path: Path) -> None:
    given = {"model": "human", "text": "h"}
    rows = [{"prompt": "a", "human_response": "h"}, {"prompt": "b", "human_response": "h", "responses": [given]}]
    for item in read_candidates(write_rows(tmp_path / "p.jsonl", rows), BadRows()):
        assert [(r.model, r.text) for r in item.responses] == [("human", "h")]


def test_skip_sets_rows_aside_with_their_error(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [
        '{"id": "1", "prompt": "a"}',
        "{",
        '{"id": "1", "prompt": "b"}',
        '{"prompt": NaN}',
        '{"prompt": ""}',
        '{"prompt": "\\udc00"}',
        '{"id": "2", "prompt": "c"}',
    ]
    file.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xe9"}\n')
    bad = BadRows("skip")
    assert [c.prompt.id for c in read_candidates(file, bad)] == ["1", "2"]
    assert [row["error"].split(": ")[0] for row in bad.rows] == [f"{file}:{n}" for n in (2, 3, 4, 5, 6, 8)]
    assert [row["row"] for row in bad.rows[:2]] == ["{", {"id": "1", "prompt": "b"}]
    write_jsonl(tmp_path / "aside.jsonl", bad.rows)  # whatever was in them
    assert read_rows(tmp_path / "aside.jsonl") == bad.rows


def test_skipping_every_row_is_an_error_that_shows_the_first(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("x\ny\n")
    with pytest.raises(InputError, match=r"holds no prompts \(2 bad rows were skipped, the first: .*p.jsonl:1: broken"):
        read_candidates(file, BadRows("skip"))


# ---- round trips

TEXTS = ("", "5", " 5\n", "käse\u2028🙂", '"quoted" \\', "line\r\nline", "\x00\x1f")


def random_response(r: random.Random, model: str, sample: int) -> Response:
    return Response(
        model=model,
        text=r.choice(TEXTS),
        size_b=r.choice([None, 0.0008, 175.0]),
        version=r.choice([None, "v1"]),
        version_rank=r.choice([None, -1, 0, 3]),
        sample=sample,
        token_ids=r.choice([None, (), (0, 5, 2**31)]),
        finish_reason=r.choice([None, "stop", "length"]),
        seed=r.choice([None, 2**63 - 1]),
        weight_hash=r.choice([None, "5f0c"]),
        logprob=r.choice([None, -3.25, 0.0]),
        scores=r.choice([{}, {"a": 0.1, "b": -1e30}]),
    )


def random_candidates(r: random.Random, i: int) -> Candidates:
    conversation = tuple(
        Message(role=role, content=r.choice(TEXTS[1:])) for role in ("system", "user", "assistant", "user")
    )
    humans = r.choice([(), ("by hand",), ("by hand", "by another")])
    prompt = Prompt(
        id=f"id {i}",
        prompt=r.choice(["What?", "  spaces  ", conversation]),
        human_responses=humans,
        answer=r.choice([None, "", "5"]),
        prefix=r.choice([(), (0, 7)]),
    )
    responses = [random_response(r, model, sample) for model in ("m", "n") for sample in range(r.randrange(3))]
    responses += [Response(model="human", text=text, sample=i) for i, text in enumerate(humans)]
    return Candidates(prompt=prompt, responses=tuple(responses))


def nowhere(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, where="")


def test_candidates_round_trip(tmp_path: Path) -> None:
    r = random.Random("candidates")
    made = [random_candidates(r, i) for i in range(200)]
    write_jsonl(tmp_path / "c.jsonl", map(candidates_row, made))
    read = read_candidates(tmp_path / "c.jsonl", BadRows())
    assert [Candidates(prompt=nowhere(c.prompt), responses=c.responses) for c in read] == made


def test_verdicts_round_trip(tmp_path: Path) -> None:
    r = random.Random("verdicts")
    candidates = [random_candidates(r, i) for i in range(100)]
    made = [
        Verdict(prompt_id=c.prompt.id, response=i, judge=judge, score=r.choice([None, 0.5]), reason=r.choice(TEXTS))
        for c in candidates
        for i in range(len(c.responses))
        for judge in ("one", "two")
    ]
    write_jsonl(tmp_path / "v.jsonl", map(verdict_row, made))
    assert read_verdicts(tmp_path / "v.jsonl", candidates, BadRows()) == made


def test_comparisons_round_trip(tmp_path: Path) -> None:
    r = random.Random("comparisons")
    candidates = [c for i in range(100) if len((c := random_candidates(r, i)).responses) > 1]
    made = [
        Comparison(
            prompt_id=c.prompt.id,
            responses=r.choice([(0, 1), (1, 0)]),
            judge=judge,
            annotator=annotator,
            probability=r.choice([None, 0.0, 0.25]),
            orders=r.choice([None, (None, 0.5), (0.25, 0.75)]),
            reason=r.choice(TEXTS),
        )
        for c in candidates
        for judge, annotator in (("llm", None), ("human", "ann"), ("human", "bo"))
    ]
    made = [
        dataclasses.replace(c, hashes=tuple(text_hash(item.responses[i].text) for i in c.responses))
        if r.random() < 0.5
        else c
        for item, of in zip(candidates, zip(*[iter(made)] * 3, strict=True), strict=True)
        for c in of
    ]
    assert len(made) > 60
    write_jsonl(tmp_path / "v.jsonl", map(verdict_row, made))
    assert read_verdicts(tmp_path / "v.jsonl", candidates, BadRows()) == made


def test_pairs_round_trip(tmp_path: Path) -> None:
    """What a pairs row has no column for is left out here: human_response, version, seed, weight_hash, ..."""
    r = random.Random("pairs")
    kept = ("model", "text", "version_rank", "size_b", "sample", "finish_reason", "token_ids")

    def side(model: str) -> Response:
        whole = random_response(r, model, 1)
        return Response(**{name: getattr(whole, name) for name in kept})

    made = [
        PreferencePair(
            prompt=dataclasses.replace(random_candidates(r, i).prompt, human_responses=()),
            chosen=side("new"),
            rejected=side("old"),
            score_chosen=r.choice([None, 1.0]),
            score_rejected=r.choice([None, 0.25]),
            scale=r.choice([0.0, 2.5]),
            soft_label=r.choice([0.5, 1.0]),
            margin=r.choice([0.0, 0.7]),
            prior=r.choice(["none", "newer+larger"]),
            decision=r.choice(["keep", "swap"]),
            reason=r.choice(["", "confirmed"]),
            probability=r.choice([None, 0.5, 0.9]),
            win_rates=r.choice([None, (0.75, 0.0)]),
            extra=r.choice([(), (side("new"), side("old"))]),
        )
        for i in range(200)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", map(pair_row, made))
    read = read_pairs(tmp_path / "pairs.jsonl", BadRows())
    assert [dataclasses.replace(p, prompt=nowhere(p.prompt)) for p in read] == made


# ---- verdicts and pairs from elsewhere

ONE = Candidates(prompt=Prompt(id="q", prompt="a"), responses=(Response(model="m", text="t"),))
VERDICT = {"prompt_id": "q", "response": 0, "judge": "j", "score": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_id": "p"}, "field 'prompt_id' is 'p'; no such prompt among the responses"),
        ({"response": 1}, "field 'response' is 1; prompt 'q' has 1 responses"),
        ({"response": -1}, "field 'response' is -1"),
        ({"response": "0"}, "field 'response' is a string (\"0\"); expected the index of a response"),
        ({"judge": None}, "field 'judge' is null"),
        ({"score": "good"}, "field 'score' is a string (\"good\"); expected a number"),
        ({"score": float("nan")}, "field 'score' is nan; expected a finite number or null"),
        ({"judge": "j"}, "judge 'j' has a verdict on response 0 of 'q' already at"),
        ({"judge": "human"}, "field 'judge' is 'human' in a verdict on one response; expected another name"),
        ({"judge": "human"}, "labels, which name two 'responses': rename the judge, or write labels"),
    ],
    ids=str,
)
def test_a_bad_verdict_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_rows(tmp_path / "v.jsonl", [VERDICT, {**VERDICT, "judge": "other", **change}])
    with pytest.raises(InputError) as caught:
        read_verdicts(file, [ONE], BadRows())
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)


TWO = Candidates(prompt=Prompt(id="q", prompt="a"), responses=tuple(Response(model=m, text=m) for m in "ab"))
COMPARISON = {"prompt_id": "q", "responses": [0, 1], "judge": "j", "probability": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": [0, 2]}, "field 'responses' is [0, 2]; expected two different indices of the 2 responses of"),
        ({"responses": [1, 1]}, "field 'responses' is [1, 1]"),
        ({"responses": [0]}, "field 'responses' is [0]"),
        ({"responses": [0, True]}, "field 'responses' is [0, true]"),
        ({"responses": "01"}, "field 'responses' is a string"),
        ({"judge": None}, "field 'judge' is null"),
        ({"probability": 1.5}, "field 'probability' is 1.5; expected a probability in [0, 1]"),
        ({"probability": "A"}, "field 'probability' is a string"),
        ({"orders": [0.5]}, "field 'orders' has 1 items"),
        ({"orders": [0.5, 2]}, "field 'orders' is 2.0; expected a probability"),
        ({"hashes": ["00000000", "11111111"]}, "it was said of other texts"),
        ({"judge": "j"}, "judge 'j' has a verdict on responses [0, 1] of 'q' already at"),
        ({"judge": "j", "responses": [1, 0]}, "judge 'j' has a verdict on responses [1, 0] of 'q' already at"),
    ],
    ids=str,
)
def test_a_bad_comparison_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_rows(tmp_path / "v.jsonl", [COMPARISON, {**COMPARISON, "judge": "other", **change}])
    with pytest.raises(InputError) as caught:
        read_verdicts(file, [TWO], BadRows())
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("row", "key"), [(VERDICT, "score"), (COMPARISON, "probability")], ids=["one", "two"])
def test_a_judge_abstains_by_null_not_by_a_missing_key(tmp_path: Path, row: dict[str, Any], key: str) -> None:
    rest = {name: value for name, value in row.items() if name != key}
    file = write_rows(tmp_path / "v.jsonl", [{**rest, key: None}, {**rest, "judge": "other", f"{key}s": 1.0}])
    bad = BadRows("skip")
    (verdict,) = read_verdicts(file, [TWO], bad)
    assert getattr(verdict, key) is None
    (skipped,) = bad.rows
    assert skipped["error"].startswith(f"{file}:2: field {key!r} is missing, but there is '{key}s'; expected ")
    assert "or null where the judge abstains" in skipped["error"]
    assert verdict_row(verdict)[key] is None


def test_an_annotator_labels_a_pair_once(tmp_path: Path) -> None:
    said = {**COMPARISON, "judge": "human"}
    rows = [{**said, "annotator": "ann"}, {**said, "annotator": "bo"}, {**said, "annotator": "ann"}]
    with pytest.raises(InputError, match="annotator 'ann' has a verdict on responses"):
        read_verdicts(write_rows(tmp_path / "v.jsonl", rows), [TWO], BadRows())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "field 'rejected' is null; expected a string or a list of one assistant message"),
        ({"chosen": []}, "field 'chosen' has 0 messages; expected one assistant message"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "field 'chosen' has 1 messages; expected one assistant"),
        ({"scale": -1}, "field 'scale' is -1.0; expected a number in [0, inf]"),
        ({"soft_label": 1.5}, "field 'soft_label' is 1.5; expected a number in [0, 1]"),
        ({"margin": "big"}, "field 'margin' is a string (\"big\"); expected a number"),
    ],
    ids=str,
)
def test_a_bad_pair_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"prompt": "a", "chosen": "yes", "rejected": "no"}  # TRL's plain form
    file = write_rows(tmp_path / "pairs.jsonl", [good])
    assert [(p.chosen.text, p.rejected.text) for p in read_pairs(file, BadRows())] == [("yes", "no")]
    with pytest.raises(InputError) as caught:
        read_pairs(write_rows(file, [good, {**good, **change}]), BadRows())
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)


@pytest.mark.slow
def test_pairs_train_in_trl_unchanged(tmp_path: Path, gsm8k_dev: Path, tiny_matrix: Path, cli: Any) -> None:
    """The file goes through `load_dataset("json")` into a real DPOTrainer; no column is renamed or removed."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    few = write_rows(tmp_path / "few.jsonl", read_rows(gsm8k_dev)[:40])
    file = tmp_path / "pairs.jsonl"
    assert cli("pairs", ["--responses", few, "--verifier", "numeric", "--output", file]).status == 0
    data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == len(read_rows(file)) > 20
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        max_length=256,
        bf16=False,
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_matrix / "s.v2"),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny_matrix / "s.v2"),
    )
    assert trainer.train().training_loss == pytest.approx(0.693147, abs=1e-3)

"""Feeds what is nearly right, and what is not right at all, to everything that reads a user's files and arguments.

    python benchmarks/fuzz.py [PARSER ...] [--inputs 10000] [--seed 0] [--out FILE]

An input is taken, or refused by an error that is meant for people; anything else is a fault. Where there are rows, each
is used, refused with its place, or counted: none is lost. What is taken can be written, and read again as the same. The
exit status is 1 if there is a fault, which is shown as small as hypothesis can make it. Twenty minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gzip
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tso_fast.annotate.exchange import export_labels, import_labels
from tso_fast.config.parse import parse
from tso_fast.config.settings import PairsConfig, RowsConfig, TrainConfig
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.errors import EngineError, InputError, OutputError, TrainingError
from tso_fast.files import run as run_files
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.labels import LabelFile, make_label, read_labels, standing
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
from tso_fast.judges import template
from tso_fast.judges.constraints import check_constraint
from tso_fast.judges.replies import read_label, read_rating
from tso_fast.types import Candidates, Prompt, Response

REFUSED = (InputError, OutputError, EngineError, TrainingError)
"""Errors whose message is for the person at the keyboard."""
Row = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

# ------------------------------------------------------------------------------------------------- what is nearly right

NAMES = ("p", "q")
TEXTS = (("one", "two", "three"), ("four", "five"))
CANDIDATES = [
    Candidates(
        prompt=Prompt(id=name, prompt=f"What of {name}?"),
        responses=tuple(Response(model=f"m.v{k}", version_rank=k, text=text) for k, text in enumerate(texts)),
    )
    for name, texts in zip(NAMES, TEXTS, strict=True)
]
"""What verdicts and labels are about."""
USER, ANSWER = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}
RESPONSE = {"model": "m.v1", "text": "five", "size_b": 0.5, "version": "v1", "version_rank": 1, "sample": 0} | {
    "token_ids": [5, 2], "finish_reason": "stop", "seed": 7, "weight_hash": "ab", "logprob": -1.5, "is_correct": True,
    "scores": {"judge": 0.5},
}  # fmt: skip
PROMPTS: list[Row] = [
    {"id": "a", "prompt": "2 + 3?", "human_response": "five", "answer": "5"},
    {"prompt": [USER], "human_response": [ANSWER], "answer": 5},
    {"messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
    {"prompt": "x", "constraints": [{"id": "punctuation:no_comma", "kwargs": {}}]},
    {"prompt": "x", "instruction_id_list": ["detectable_format:title"], "kwargs": [{"num_words": None}]},
    {"prompt": "x", "responses": [RESPONSE, {"model": "m.v2", "text": "six"}], "human_response": ["5", "five"]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
]
VERDICTS: list[Row] = [
    {"prompt_id": "p", "response": 0, "judge": "exact", "score": 1.0, "reason": ""},
    {"prompt_id": "p", "response": 1, "judge": "exact", "score": None},
    {"prompt_id": "q", "responses": [0, 1], "judge": "llm", "probability": 0.9, "orders": [0.95, 0.85]},
    {"prompt_id": "p", "responses": [2, 1], "judge": "llm", "probability": None, "orders": [None, 0.5]},
]
LABELS: list[Row] = [
    {"prompt_id": "p", "responses": [0, 2], "judge": "human", "probability": 1.0, "annotator": "ada"}
    | {"hashes": [text_hash("one"), text_hash("three")], "time": "2026-11-21T16:28:01.345678+00:00"}
    | {"seconds": 8.2, "shown": [2, 0], "reason": ""},
    {"prompt_id": "q", "responses": [1, 0], "judge": "human", "probability": None, "annotator": "bob"},
    {"prompt_id": "q", "responses": [1, 0], "judge": "human", "probability": 0, "annotator": "bob", "withdrawn": True},
]
PAIRS: list[Row] = [
    {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER], "score_chosen": 1.0, "score_rejected": 0.0}
    | {"margin": 0.5, "scale": 2, "soft_label": 0.75, "prompt_id": "a", "prompt_text": "2 + 3?", "answer": "5"}
    | {"prior": "newer", "decision": "swap", "reason": "", "probability": 0.75, "chosen_model": "m.v1"}
    | {"chosen_sample": 0, "chosen_version_rank": 1, "chosen_size_b": 0.5, "chosen_token_ids": [5, 2]},
]
TASKS: list[Row] = [  # of Label Studio
    {"id": 1, "data": {"prompt": "x", "left": "one", "right": "two", "prompt_id": "p"}
     | {"left_response": 0, "right_response": 1},
     "annotations": [{"annotator": "ada", "created_at": "2026-11-21T16:28:01Z", "lead_time": 3.5}
     | {"result": [{"from_name": "choice", "type": "choices", "value": {"choices": ["left"]}}]}]},
    {"prompt_id": "q", "left": "five", "right": "four", "left_response": 1, "right_response": 0, "choice": "tie"}
    | {"annotator": 3, "created_at": "2026-11-21 16:28:01", "lead_time": 1},
]  # fmt: skip
RECORDS: list[Row] = [  # of Argilla
    {"id": "pair-1", "fields": {"prompt": "x", "left": "one", "right": "two"}}
    | {"metadata": {"prompt_id": "p", "left_response": 0, "right_response": 1}}
    | {"responses": {"preference": [{"user_id": "ada", "value": "left", "status": "submitted"}]}},
    {"id": "pair-2", "fields": {"prompt": "x", "left": "five", "right": "four"}}
    | {"metadata": {"prompt_id": "q", "left_response": 1, "right_response": 0}}
    | {"responses": [{"user_id": {"username": "bob"}, "status": "submitted"}
                     | {"values": {"preference": {"value": "right"}}}]},
]  # fmt: skip
METRICS: list[Row] = [
    {"iteration": 1, "step": 1, "epoch": 0, "loss": 0.6931, "grad_norm": 1.5, "rewards/chosen": -0.1},
    {"iteration": 1, "step": 2, "loss": None},
]
CONFIG: Row = {
    "output_dir": "runs/x",
    "prompts": "p.jsonl",
    "cells": [{"path": "models/a", "version_rank": 1, "temperature": 0.5}, {"path": "models/b", "name": "b"}],
    "judges": [{"kind": "llm", "cell": "policy", "args": {"a": 1}}],
    "verifier": "numeric",
    "loss_type": ["dual_clip", "sft"],
    "loss_weights": [1, 0.5],
    "loss_args": {"beta": 0.1},
    "learning_rate": 1.0e-6,
    "num_iterations": 2,
    "score_weights": {"verifier": 1.0},
    "stop": ["\n"],
    "eval_prompts": None,
    "bf16": True,
}
TEMPLATE = "---\nread: label\n---\n{prompt} {first} {second} {{prompt}} A or B?\n"

LEAVES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 5, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, 1e39,
    float("nan"), float("inf"), "", " ", "a", "0", "1", "none", "null", "5", "human", "p", "q", "exact", "left", "tie",
    "\ud800", "\u202ex", "[/x]", "[b]", "\0", "\x1b[31m", "é", "🙂", "\u2028", "a\nb", "../x", "~", "{prompt}", "{{x}}",
    "%s", "stop", "9" * 5000, "x" * 200, "=cmd", "!!python/object:os.system", "2026-01-31", "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00", "2026-11-21T16:28:01", [], {}, [[]], [0, 1], [1, 0], ["0", "1"], [True, False], [None],
    [0.5, 0.5], {"": None}, {"role": "user", "content": ""}, {"type": "image_url"}, {"a": {"b": [1]}}, "[1]", "[[[[",
    "length_constraints:number_words", "detectable_format:title",
)  # fmt: skip
GARBAGE = (b"", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b"{", b"}", b'"', b",", b"\0", b"NaN", b"1e999")
ODD = st.one_of(st.floats(), st.integers(), st.text(max_size=5))
INDEX = st.integers(0, 999)
NUMBERS = st.lists(st.integers(0, 2**32 - 1), max_size=4)
"""What happens to one thing, a change each: few draws, as most of the time goes into them."""


@st.composite
def changed(draw: Draw, templates: Sequence[Any]) -> Any:
    """One of the templates with some of its values changed, taken away, doubled or moved."""
    value = copy.deepcopy(templates[draw(st.integers(0, len(templates) - 1))])
    for number in draw(NUMBERS):
        number, what = divmod(number, 16)
        places = list(_places(value))
        if not places:
            break
        number, at = divmod(number, len(places))
        inside, key = places[at]
        if what == 0:
            del inside[key]
        elif what == 1:
            inside[key] = [inside[key]]
        elif what == 2 and isinstance(inside, dict):
            inside[str(key)[:-1]] = inside.pop(key)
        elif what == 3:
            inside[key] = copy.deepcopy(places[number % len(places)][0])
        elif what == 4:
            inside[key] = draw(ODD)
        else:
            inside[key] = copy.deepcopy(LEAVES[number % len(LEAVES)])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything inside, each as what holds it and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


@st.composite
def damaged(draw: Draw, content: bytes) -> bytes:
    """Bytes of which a few are others, lost, doubled or in between; often none."""
    for number in draw(NUMBERS)[1:]:
        number, what = divmod(number, 5)
        number, at = divmod(number, len(content) + 1)
        end = at + number % 20
        if what == 0:
            content = content[:at]
        elif what == 1:
            content = content[:at] + content[end:]
        elif what == 2:
            content = content[:end] + content[at:]
        elif what == 3:
            content = content[:at] + GARBAGE[number % len(GARBAGE)] + content[at:]
        else:
            content = content[:at] + bytes([number % 256]) + content[at + 1 :]
    return content


def dumped(value: Any, ascii_too: bool = True) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_too).encode("utf-8", "surrogatepass")


@st.composite
def lines(draw: Draw, templates: Sequence[Row]) -> bytes:
    """JSON, an object a line."""
    form = draw(INDEX)
    rows = [draw(changed(templates)) for _ in range(1 + form % 3)]
    end = b"\r\n" if form % 7 == 0 else b"\n"
    content = end.join(dumped(row, ascii_too=bool(form % 2)) for row in rows)
    return draw(damaged(content + (end if form % 11 else b"")))


@st.composite
def array(draw: Draw, templates: Sequence[Any]) -> bytes:
    form = draw(INDEX)
    rows = [draw(changed(templates)) for _ in range(form % 4)]
    return draw(damaged(json.dumps(rows, indent=1 if form % 2 else None).encode()))


@st.composite
def document(draw: Draw, template_: Any) -> bytes:
    return draw(damaged(dumped(draw(changed([template_])))))


@st.composite
def table(draw: Draw) -> bytes:
    """CSV with columns of prompts."""
    form = draw(INDEX)
    rows = [draw(changed(PROMPTS)) for _ in range(1 + form % 3)]
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    out = io.StringIO()
    write = csv.writer(out, delimiter=",;\t"[form // 3 % 3], lineterminator="\r\n" if form % 2 else "\n")
    write.writerow(names)
    for row in rows:
        if isinstance(row, dict):
            values = [row.get(name, "") for name in names]
            write.writerow([v if isinstance(v, str) else json.dumps(v) for v in values])
    return draw(damaged(out.getvalue().encode("utf-8", "surrogatepass")))


# ------------------------------------------------------------------------------------------------------ what must hold


class Lost(AssertionError):  # noqa: N818
    """Something was neither used nor refused nor counted."""


def must(holds: object, what: object) -> None:
    if not holds:
        raise AssertionError(what)


def all_told(used: int, refused: int, rows: int, what: object = "") -> None:
    if used + refused != rows:
        raise Lost(f"{rows} rows: {used} used, {refused} refused; {what}")


def checked_rows(path: Path, read: Callable[[BadRows], Sequence[Any]], rows: int | None) -> Sequence[Any]:
    """What is read where bad rows are set aside; without that the first of them stops everything, by its place.

    Args:
        rows: how many there are; None: not known.
    """
    bad = BadRows("skip")
    try:
        used = read(bad)
    except InputError as error:
        if ": holds no " in str(error) and rows is not None:
            all_told(0, len(bad.rows), rows, error)
        raise
    if rows is not None:
        all_told(len(used), len(bad.rows), rows, [row["error"] for row in bad.rows])
    for row in bad.rows:
        assert row["error"].startswith(f"{path}:"), row["error"]
    aside = path.with_name("aside.jsonl")
    aside.unlink(missing_ok=True)
    bad.set_aside(aside)
    assert (len(aside.read_bytes().splitlines()) if bad.rows else 0) == len(bad.rows)
    try:
        again = read(BadRows())
    except InputError as error:
        must(bad.rows and str(error) == f"{bad.rows[0]['error']} (--on_bad_row skip sets such rows aside)", error)
    else:
        assert not bad.rows
        assert len(again) == len(used)
    return used


def num_lines(content: bytes) -> int:
    return sum(1 for line in content.split(b"\n") if line.strip())


def same_again(path: Path, rows: Sequence[Row], read: Callable[[Path], Sequence[Any]], to_row: Any) -> None:
    """What was taken can be written, and is then read as the same."""
    again = path.with_name("again.jsonl")
    write_jsonl(again, rows)
    assert [to_row(item) for item in read(again)] == list(rows)


def check_prompts(path: Path, rows: int | None) -> None:
    """Prompts and responses, and what correction and pairing make of them."""
    used = checked_rows(path, lambda bad: read_candidates(path, bad, RowsConfig()), rows)
    same_again(path, [candidates_row(c) for c in used], lambda again: read_candidates(again, BadRows()), candidates_row)
    for item in used:
        for constraint in item.prompt.constraints:
            with contextlib.suppress(InputError):
                check_constraint(constraint)
    paired(used, [])


def paired(candidates: Sequence[Candidates], said: Sequence[Any]) -> None:
    """What correction and pairing make of it; of every fourth, as it takes longest."""
    config = PairsConfig(responses="", output="")
    if len(str(candidates)) + len(str(said)) & 3 == 0:
        make_pairs(candidates, said, config, config, 0)


def file_of(name: str, content: bytes) -> Path:
    Path(name).write_bytes(content)
    return Path(name)


def jsonl(content: bytes) -> None:
    check_prompts(file_of("p.jsonl", content), num_lines(content))


def json_array(content: bytes) -> None:
    path = file_of("p.json", content)
    try:
        rows = len(json.loads(content)) if content.lstrip().startswith(b"[") else num_lines(content)
    except (ValueError, RecursionError):
        rows = None
    check_prompts(path, rows)


def zipped(content: bytes) -> None:
    packed = gzip.compress(content, mtime=0)
    at = len(content) * 7 % (2 * len(packed))  # half of them damaged
    if at < len(packed):
        packed = packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]
    check_prompts(file_of("p.jsonl.gz", packed), None if at < len(packed) else num_lines(content))


def comma_separated(content: bytes) -> None:
    try:
        text = content.decode("utf-8-sig")
        first = text.partition("\n")[0]
        cells = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True))
        rows: int | None = max(0, sum(map(bool, cells)) - 1)
    except (ValueError, csv.Error):
        rows = None
    check_prompts(file_of("p.csv", content), rows)


def parquet(rows: list[Row]) -> None:
    import pyarrow
    from pyarrow import parquet as files

    try:
        table_ = pyarrow.Table.from_pylist(rows)
        files.write_table(table_, "p.parquet")
    except (ValueError, TypeError, OverflowError, pyarrow.ArrowException):  # columns of one type only
        return
    check_prompts(Path("p.parquet"), table_.num_rows)


def verdicts(content: bytes) -> None:
    path = file_of("v.jsonl", content)
    used = checked_rows(path, lambda bad: read_verdicts(path, CANDIDATES, bad, may_be_empty=True), num_lines(content))
    same_again(
        path, [verdict_row(v) for v in used], lambda p: read_verdicts(p, CANDIDATES, BadRows(), True), verdict_row
    )
    paired(CANDIDATES, used)


def labels(content: bytes) -> None:
    """Rows of labels, the file that more are added to, and what other tools get of them."""
    path = file_of("l.jsonl", content)
    bad = BadRows("skip")
    try:
        said = read_labels(path, CANDIDATES, bad)
    except InputError as error:  # labels that contradict each other
        must(str(error).startswith(f"{path}:"), error)
        said = []
    paired(CANDIDATES, said)
    is_torn = not content.endswith(b"\n")
    file = LabelFile(path, CANDIDATES)
    before = len(file.history())
    all_told(before, 0, num_lines(path.read_bytes()))
    assert is_torn or path.read_bytes() == content
    file.append(make_label(CANDIDATES[0], (0, 1), "zoe", 1.0))
    again = LabelFile(path, CANDIDATES)
    assert len(again.history()) == before + 1
    for form in ("jsonl", "label_studio", "argilla")[: len(content) % 4]:
        out = Path(f"out-{form}")
        out.unlink(missing_ok=True)
        count = export_labels(out, form, CANDIDATES, [], again, 0)
        assert count == len(standing(again.history()))
        Path("copy.jsonl").unlink(missing_ok=True)
        copied = LabelFile("copy.jsonl", CANDIDATES)
        assert import_labels(out, form, CANDIDATES, copied, None, BadRows()) == (count, count)


def imported(form: str) -> Callable[[bytes], None]:
    def check(content: bytes) -> None:
        path = file_of("i.json", content)
        Path("l.jsonl").unlink(missing_ok=True)
        file = LabelFile("l.jsonl", CANDIDATES)
        bad = BadRows("skip")
        given_, new = import_labels(path, form, CANDIDATES, file, "eve", bad)
        bad.set_aside(Path("aside.jsonl"))
        LabelFile("l.jsonl", CANDIDATES)
        records = json.loads(content.decode("utf-8-sig"))
        records = records["records"] if isinstance(records, dict) else records
        said = [answers for record in records if (answers := _said(form, record))]
        assert new <= given_ <= sum(map(len, said))
        if said and not given_ and not bad.rows:
            raise Lost(f"{said} is neither taken nor refused")

    return check


def _said(form: str, record: Any) -> list[Any]:
    """The labels in a record of another tool, all but those that were taken back."""
    if not isinstance(record, dict):
        return [record]
    if form == "label_studio":
        given_ = record.get("annotations", record.get("choice"))
        if isinstance(given_, list):
            return [
                a for a in given_ if not (isinstance(a, dict) and (a.get("was_cancelled") or a.get("result") == []))
            ]
    else:
        given_ = record.get("responses")
        given_ = given_.get("preference") if isinstance(given_, dict) else given_
        if isinstance(given_, list):
            return [a for a in given_ if not isinstance(a, dict) or a.get("status", "submitted") == "submitted"]
    return [] if given_ is None else [given_]


def pairs(content: bytes) -> None:
    path = file_of("pairs.jsonl", content)
    used = checked_rows(path, lambda bad: read_pairs(path, bad), num_lines(content))
    same_again(path, [pair_row(p) for p in used], lambda again: read_pairs(again, BadRows()), pair_row)


def metrics(content: bytes) -> None:
    file_of("metrics.jsonl", content)
    with _warnings() as told:
        rows = run_files.read_metrics(Path())
    left_out = sum(int(record.args[1]) for record in told)  # type: ignore[index,arg-type]
    number = len(content.splitlines())
    is_cut = bool(content) and not content.endswith(b"\n")
    assert number - is_cut <= len(rows) + left_out <= number


@contextlib.contextmanager
def _warnings() -> Iterator[list[logging.LogRecord]]:
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign,assignment]
    log = logging.getLogger("tso_fast")
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)


STATE: Row = {
    "format": run_files.FORMAT,
    "versions": {"python": "3"},
    "config": {"num_iterations": 1, "output_dir": "é"},
    "inputs": {"cells.a": "ab"},
    "prompts": run_files.hash_prompts(CANDIDATES),
    "mini_batches": [[0, 2]],
    "stages": [{"name": "iter-0/eval", "info": {"accuracy": 0.5}, "files": []}],
    "manifest": {},
}


def run_json(content: bytes) -> None:
    """Whatever happened to run.json, a run goes on from what it said or is refused, with where a copy is."""
    shutil.rmtree("run", ignore_errors=True)
    Path("run").mkdir()
    run_files.write_state(Path("run"), STATE)
    whole = Path("run/run.json").read_bytes()
    shutil.copy("run/run.json", "run/run.json.bak")
    at = len(whole) * (sum(content) % 97) // 97
    damaged_ = whole[:at] + content[:20] + whole[at + len(content) % 3 :] if content[:1] != b"{" else content
    Path("run/run.json").write_bytes(damaged_)
    try:
        state = run_files.read_run("run")
    except InputError as error:
        must("run.json.bak" in str(error) or "run.json has format" in str(error), error)
    else:
        assert {**state, "mini_batches": [[0, 2]]} == STATE
    with contextlib.suppress(InputError):
        settings_ = STATE["config"]
        run_files.Run.open("run", settings_, STATE["inputs"], {}, prompts=CANDIDATES).__exit__()


class _Checkpoint:
    """A checkpoint of a small model, made once, damaged and read in a copy."""

    folder = Path()
    trained: Any = None

    @classmethod
    def make(cls) -> None:
        import torch
        from accelerate import Accelerator

        from tso_fast.training.checkpoint import Checkpoints
        from tso_fast.training.monitors import Meter, NonFiniteGuard

        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        folder = Path(tempfile.mkdtemp(dir=".")).resolve()
        cls.trained = Checkpoints(
            folder,
            accelerator=Accelerator(cpu=True),
            model=model,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.LinearLR(optimizer),
            meters=[Meter()],
            guard=NonFiniteGuard(folder, 3),
        )
        with cls.trained:
            cls.trained.save(4)
        cls.folder, cls.model = folder / "step-4", model
        cls.weights = {name: value.clone() for name, value in model.state_dict().items()}
        cls.files = {file.name: file.read_bytes() for file in sorted(cls.folder.iterdir())}

    @classmethod
    def check(cls, change: tuple[int, Any]) -> None:
        import torch

        if cls.trained is None or not cls.folder.parent.exists():
            cls.make()
        number, value = change
        name = sorted(cls.files)[number % len(cls.files)]
        for file, content in cls.files.items():
            (cls.folder / file).write_bytes(content)
        content = cls.files[name]
        at = (number * 31) % len(content)
        if isinstance(value, bytes):
            content = content[:at] + value + content[at + 1 :] if number % 2 else value
        else:  # a manifest or state of another form
            content = dumped(value)
        (cls.folder / name).write_bytes(content)
        with torch.no_grad():
            cls.model.weight.zero_()
        step = cls.trained.load()
        assert step in (0, 4)
        if step == 4:
            assert all(torch.equal(value, cls.weights[name]) for name, value in cls.model.state_dict().items())
        elif content == cls.files[name]:
            raise Lost("a whole checkpoint is passed over")


@st.composite
def changes_of_checkpoints(draw: Draw) -> tuple[int, Any]:
    number = draw(INDEX)
    entry = {"size": 10, "sha256": "ab"}
    manifest = {"state.json": entry, "x.safetensors": entry}
    return number, draw(changed([manifest])) if draw(st.booleans()) else draw(damaged(draw(st.binary(max_size=4))))


def yaml_file(content: bytes) -> None:
    parse("train", TrainConfig, ["--config", str(file_of("c.yaml", content))])


def arguments(given_: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parse("pairs", PairsConfig, given_)


@st.composite
def yaml_text(draw: Draw) -> bytes:
    import yaml

    content = draw(changed([CONFIG]))
    if draw(INDEX) % 2:
        return draw(damaged(dumped(content)))  # JSON is YAML
    with contextlib.suppress(yaml.YAMLError):
        return draw(damaged(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")))
    return b""


VALID = ("--responses", "r.jsonl", "--output", "o.jsonl")
OPTIONS = (
    *("--responses", "--output", "--min_margin", "--pair_strategy", "--judges", "--score_weights", "--config", "-h"),
    *("--max_pairs", "--soft_label_by", "--seed", "--score_weights.verifier", "--judges+", "--judges.kind", "--help"),
    *("--calibrate_soft_labels", "--chosen_from", "--verifier", "--print_config", "--labels", "--", "-x", "--no_such"),
)


@st.composite
def argument_lists(draw: Draw) -> list[str]:
    form = draw(INDEX)
    out = list(VALID) if form % 4 else []
    for number in draw(NUMBERS):
        number, option = divmod(number, len(OPTIONS))
        value = LEAVES[number % len(LEAVES)]
        text = (value if isinstance(value, str) else json.dumps(value)).replace("\0", "")  # which no system passes
        out += [f"{OPTIONS[option]}={text}"] if number % 3 else [OPTIONS[option], text][: 1 + form % 2]
    return out


def templates(content: bytes) -> None:
    try:
        found = template.parse(content.decode("utf-8", "replace"), "t.txt")
    except InputError as error:
        must(str(error).startswith("t.txt"), error)
        return
    values = dict.fromkeys(found.placeholders, "{prompt}{0.__class__}")
    found.render(**values)


def replies(text: str) -> None:
    value, why = read_label(text)
    assert (value is None) == bool(why)
    value, why = read_rating(text, 1, 10)
    assert (value is None) == bool(why)
    assert value is None or 1 <= value <= 10


REPLY = st.lists(
    st.one_of(
        st.sampled_from(("[[A]]", "[[", "]]", "A", "B", "tie", "Rating: ", "7", "/10", "out of", "-", ".", "**", "\n")),
        st.sampled_from(("<think>", "</think>", "the better answer is ", "9" * 400, "−3", "1e5", "%", "²", "٣")),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)


@dataclass(frozen=True)
class Parser:
    """What is read, its inputs, and what must hold of each."""

    title: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


PARSERS = {
    "jsonl": Parser("prompts and responses, JSONL", lines(PROMPTS), jsonl),
    "array": Parser("prompts and responses, a JSON array", array(PROMPTS), json_array),
    "gz": Parser("prompts and responses, JSONL zipped", lines(PROMPTS), zipped),
    "csv": Parser("prompts, CSV", table(), comma_separated),
    "parquet": Parser("prompts and responses, parquet", st.lists(changed(PROMPTS), min_size=1, max_size=3), parquet),
    "verdicts": Parser("verdicts", lines(VERDICTS), verdicts),
    "labels": Parser("labels", lines(LABELS), labels),
    "label_studio": Parser("labels of Label Studio", array(TASKS), imported("label_studio")),
    "argilla": Parser("labels of Argilla", array(RECORDS), imported("argilla")),
    "pairs": Parser("pairs", lines(PAIRS), pairs),
    "metrics": Parser("metrics.jsonl", lines(METRICS), metrics),
    "run": Parser("run.json", st.one_of(st.binary(min_size=1, max_size=30), document(STATE)), run_json),
    "checkpoint": Parser("checkpoints", changes_of_checkpoints(), _Checkpoint.check),
    "yaml": Parser("configuration, YAML", yaml_text(), yaml_file),
    "arguments": Parser("arguments", argument_lists(), arguments),
    "template": Parser("templates of judges", damaged(TEMPLATE.encode()), templates),
    "reply": Parser("replies of judges", REPLY, replies),
}


def fuzz(name: str, inputs: int, seed_: int = 0) -> Counter[str]:
    """Feeds so many inputs to a parser, in a folder of their own; how many were taken, and how many refused.

    Raises:
        Exception: an input was neither; the smallest that was found is in its notes.
    """
    parser = PARSERS[name]
    outcomes: Counter[str] = Counter()

    @seed(seed_)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs)
    def feed(value: Any) -> None:
        try:
            parser.check(value)
        except REFUSED:
            outcomes["refused"] += 1
        else:
            outcomes["taken"] += 1

    before = Path.cwd()
    log = logging.getLogger("tso_fast")
    level = log.level
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        os.chdir(folder)
        try:
            feed()
        finally:
            os.chdir(before)
            log.setLevel(level)
    return outcomes


def main() -> int:
    from harness import commit, machine, versions, write_json
    from harness import table as printed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    logging.getLogger("tso_fast").addHandler(logging.NullHandler())
    rows = []
    for name in options.parsers or PARSERS:
        began = time.perf_counter()
        try:
            outcomes, fault = fuzz(name, options.inputs, options.seed), ""
        except BaseException as error:
            traceback.print_exception(error)
            outcomes, fault = Counter(), f"{type(error).__name__}: {error}"
        row = {"parser": name, "inputs": outcomes.total(), **outcomes, "fault": fault}
        rows.append({**row, "seconds": round(time.perf_counter() - began, 1)})
        print(rows[-1], file=sys.stderr, flush=True)
    header = ("parser", "inputs", "taken", "refused", "seconds", "fault")
    print(printed(header, ([str(row.get(name, 0)) for name in header] for row in rows)))
    if options.out:
        facts = {"machine": machine(), "versions": versions("tso-fast", "hypothesis"), "commit": commit()}
        write_json(options.out, {**facts, "seed": options.seed, "parsers": rows})
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

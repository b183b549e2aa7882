"""Rows of files as users have them, each with the place it came from.

    .jsonl .json      a JSON object a line, or in .json a JSON array of objects
    .csv .tsv         a header and cells; separated by commas, semicolons or tabs
    .parquet          with the package pyarrow, which comes with `datasets`
    a folder          of a save by the package `datasets`

``.gz`` after any of the first two is read too.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tso_fast.errors import InputError
from tso_fast.files.atomic import write_jsonl

logger = logging.getLogger(__name__)

Row = dict[str, Any]

ONE_A_LINE = "one JSON object a line"
FORMATS = "JSONL, a JSON array in .json, .csv, .tsv, .parquet, or a folder of a `datasets` save"


@dataclass
class BadRows:
    """What happens to a row that cannot be used: ``raise`` its error, or ``skip`` it, counted and set aside."""

    policy: str = "raise"
    rows: list[Row] = field(default_factory=list)

    def handle(self, error: InputError, row: Any) -> None:
        if self.policy == "raise":
            raise InputError(f"{error} (--on_bad_row skip sets such rows aside)") from error
        self.rows.append({"error": str(error), "row": row})

    def set_aside(self, file: Path) -> list[Path]:
        """Writes the skipped rows, if there are any; returns the files written."""
        if not self.rows:
            return []
        write_jsonl(file, (json.loads(json.dumps(row, default=str)) for row in self.rows))
        return [file]


def read_rows(path: str | Path, bad: BadRows, may_be_torn: bool = False) -> Iterator[tuple[str, Row]]:
    """Yields ``("file:line", row)``; blank lines are passed over.

    A row of an array is at ``file:line[number]``, since several may share a line; where there are no lines, in parquet
    and a folder, ``file:number`` counts rows from 1.

    ``may_be_torn``: a last line of JSONL that never got its end, as a writer leaves it that was killed, is passed over
    too.
    """
    path = Path(path)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if os.path.isdir(path):
        return _table(path, _saved(path), bad)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected {FORMATS}")
    if path.suffix == ".parquet":
        return _table(path, _parquet(path), bad)
    if kind in (".csv", ".tsv"):
        return _cells(path, bad)
    if kind == ".json" and next((line for line in _lines(path) if line.strip()), b"").lstrip().startswith(b"["):
        return _array(path, bad)
    return _objects(path, bad, may_be_torn)


def number_of(where: str) -> str:
    """The line or number of a row in its file: ``12`` of ``p.jsonl:12``, ``3`` of ``p.json:1[3]``."""
    return re.findall(r"\d+", where)[-1]


def _objects(path: Path, bad: BadRows, may_be_torn: bool) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = _parse(_text(line, where), where)
        except InputError as error:
            if may_be_torn and not line.endswith(b"\n"):
                logger.warning("%s: the last line is torn and passed over: %r", where, line[:60])
                continue
            bad.handle(error, line.decode("utf-8", "replace").rstrip("\r\n"))
        else:
            yield where, row


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            while line := lines.readline():
                number += 1
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: cannot be read: {error}") from error


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8; "
            "convert the file, for example: iconv -f latin1 -t utf-8"
        ) from error


class _Decoder(json.JSONDecoder):
    """Notes what Python's own passes over: numbers that are not finite, keys given twice."""

    def __init__(self) -> None:
        self.not_finite: list[str] = []
        self.repeated: list[str] = []
        super().__init__(parse_float=self._number, parse_constant=self._number, object_pairs_hook=self._object)

    def _number(self, literal: str) -> float:
        if not math.isfinite(value := float(literal)):
            self.not_finite.append(literal)
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        if len(row := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated += sorted({key for key in keys if keys.count(key) > 1})
        return row


def _parse(text: str, where: str) -> Row:
    decoder = _Decoder()
    try:
        row = decoder.decode(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: broken JSON: {error.msg} at column {error.colno}; expected {ONE_A_LINE}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets in brackets
        raise InputError(f"{where}: JSON that cannot be read: {error}") from error
    return _checked(row, where, decoder, ONE_A_LINE, "\\u" in text)


def parse_value(text: str, place: str) -> Any:
    """What a field's text of JSON holds, read as strictly as a row; ``place`` begins the message of an error."""
    decoder = _Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is a string that is no JSON: {error}; expected a list") from error
    if decoder.repeated:
        raise InputError(f"{place}: {decoder.repeated[0]!r} is given twice in one object; expected it once")
    check_leaves(value, place)
    return value


def _array(path: Path, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """The items of a JSON array, one after the other; behind one that is no JSON nothing can be read."""
    text = "".join(_text(line, f"{path}:{n}") for n, line in enumerate(_lines(path), start=1))
    space = re.compile(r"\s*")
    at, line, counted = space.match(text).end() + 1, 1, 0  # type: ignore[union-attr]
    for number in range(1, len(text)):
        at = space.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and number == 1:
            break
        decoder, where = _Decoder(), f"{path}:{line}[{number}]"
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}; expected a JSON array"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: JSON that cannot be read: {error}") from error
        try:
            found = _checked(row, where, decoder, "an object", "\\u" in text[at:end])
        except InputError as error:
            bad.handle(error, text[at:end])
        else:
            yield where, found
        at = space.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise InputError(f"{where}: expected a comma or the end of the array after it, got {text[at : at + 20]!r}")
        at += 1
    if rest := text[at + 1 :].strip():
        raise InputError(f"{path}: {rest[:20]!r} stands after the end of the array")


def _checked(row: Any, where: str, decoder: _Decoder, expected: str, has_escapes: bool) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected {expected}, got {kind_of(row)}")
    if decoder.repeated:
        raise InputError(f"{where}: field {decoder.repeated[0]!r} is given twice in one object; expected it once")
    if decoder.not_finite or has_escapes:
        check_leaves(row, where)
    return row


def check_leaves(row: Any, where: str) -> None:
    """Raises InputError for a number that is not finite, and for text that UTF-8 cannot hold."""
    for name, leaf in _leaves(row):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise InputError(f"{where}: field {name!r} is {leaf}; expected a finite number or null")
        if isinstance(leaf, str) and any("\ud800" <= character <= "\udfff" for character in leaf):
            raise InputError(
                f"{where}: field {name!r} has half of a surrogate pair ({leaf!r:.60}), which is no "
                "character; expected text that UTF-8 can hold"
            )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values inside, each with a name such as ``responses[0].scores.judge``."""
    if isinstance(value, dict):
        for key, child in value.items():
            inner = f"{name}.{key}" if name else key
            yield inner, key
            yield from _leaves(child, inner)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _leaves(child, f"{name}[{i}]")
    else:
        yield name, value


def kind_of(value: Any) -> str:
    """``a number (3)``, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    shown = json.dumps(value, ensure_ascii=False, default=str)
    kind = names.get(type(value), f"a {type(value).__name__}")
    return "null" if value is None else f"{kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def _cells(path: Path, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """Rows of CSV; an empty cell is a field that is not there, and everything else is text."""
    lines = (_text(line, f"{path}:{n}") for n, line in enumerate(_lines(path), start=1))
    first = next(lines, "")
    csv.field_size_limit(2**31 - 1)
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(_and(first, lines), delimiter=delimiter, strict=True)
    before = 0
    header: list[str] | None = None
    try:
        for cells in reader:
            where, before = f"{path}:{before + 1}", reader.line_num
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if twice := [name for name in header if header.count(name) > 1]:
                    raise InputError(f"{where}: column {twice[0]!r} is given twice; expected it once")
                continue
            row = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
            if len(cells) != len(header):
                bad.handle(InputError(f"{where}: {len(cells)} cells; the header has {len(header)}"), cells)
            else:
                yield where, row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: broken CSV: {error}") from error


def _and(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _table(path: Path, rows: Iterator[Row], bad: BadRows) -> Iterator[tuple[str, Row]]:
    number = 0
    while True:
        where = f"{path}:{number + 1}"
        try:
            row = next(rows, None)
        except InputError:
            raise
        except Exception as error:  # arrow's, of many kinds
            raise InputError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
        if row is None:
            return
        number += 1
        try:
            check_leaves(row, where)
        except InputError as error:
            bad.handle(error, repr(row))
        else:
            yield where, row


def _library(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{path}: to read it takes {name}: {error}; pip install 'tso-fast[data]'") from error


def _parquet(path: Path) -> Iterator[Row]:
    parquet = _library(path, "pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _saved(path: Path) -> Iterator[Row]:
    """Rows of a folder that ``save_to_disk`` wrote; of several splits the path names one."""
    splits = path / "dataset_dict.json"
    if not splits.is_file() and not (path / "state.json").is_file():
        raise InputError(f"{path}: a folder, but none that save_to_disk of `datasets` wrote; expected {FORMATS}")
    found = _library(path, "datasets").load_from_disk(str(path))
    if splits.is_file():
        if len(found) != 1:
            raise InputError(f"{path}: it holds the splits {', '.join(found)}; name one of them: {path / min(found)}")
        (found,) = found.values()
    yield from found.with_format(None)

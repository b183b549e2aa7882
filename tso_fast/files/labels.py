"""Human labels on pairs of responses: an append-only file and its reader.

A row is a ``Comparison`` by the judge ``human`` as ``files.rows.verdict_row`` writes it, plus ``time`` (ISO, UTC),
``seconds`` spent, ``shown`` (the responses at the left and right) and ``withdrawn``. Rows never change in place: a
later row of the same annotator on the same pair replaces an earlier one, or withdraws it.

    {"prompt_id": "q1", "responses": [0, 2], "judge": "human", "probability": 1.0, "annotator": "ada",
     "hashes": ["1b4f0e98", "60303ae2"], "reason": "", "time": "2026-11-21T16:28:01.345678+00:00", "seconds": 8.2,
     "shown": [2, 0]}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tso_fast.errors import InputError
from tso_fast.files.atomic import fsync_folder, writing
from tso_fast.files.forms import Spelling
from tso_fast.files.rows import FLOAT32_MAX, fields_of, parse_verdict, text_hash, texts_of, verdict_row
from tso_fast.files.sources import BadRows, Row, kind_of, read_rows
from tso_fast.types import HUMAN, Candidates, Comparison

logger = logging.getLogger(__name__)

BAD = "bad"
"""The ``reason`` of a pair that cannot be judged; its probability is None."""

Pair = tuple[str, int, int]
"""Prompt id and the indices of two responses, in increasing order."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """One row of a labels file."""

    comparison: Comparison
    """``responses`` in increasing order; ``probability`` 1, 0 or 0.5, None for a bad pair."""
    time: datetime | None = None
    seconds: float | None = None
    """Time from the pair's appearance to the label."""
    shown: tuple[int, int] | None = None
    """Indices of the responses shown at the left and at the right."""
    withdrawn: bool = False
    """Whether this row takes back the annotator's earlier label on the pair."""
    where: str = ""
    """Source of the row, as ``file:line``."""

    @property
    def pair(self) -> Pair:
        return (self.comparison.prompt_id, *self.comparison.responses)

    @property
    def annotator(self) -> str:
        return self.comparison.annotator or ""

    @property
    def value(self) -> float | None:
        """1: the first is better, -1: the second is better, 0: a tie; None: the pair is bad."""
        return None if self.comparison.probability is None else 2 * self.comparison.probability - 1


def make_label(
    item: Candidates,
    responses: tuple[int, int],
    annotator: str,
    probability: float | None,
    time: datetime | None = None,
    **more: Any,
) -> Label:
    """A label on two responses of ``item``; ``probability`` is that the first is better, None marks a bad pair."""
    i, j = responses
    if i > j:
        i, j, probability = j, i, None if probability is None else 1 - probability
    hashes = (text_hash(item.responses[i].text), text_hash(item.responses[j].text))
    comparison = Comparison(
        prompt_id=item.prompt.id,
        responses=(i, j),
        judge=HUMAN,
        probability=probability,
        annotator=annotator,
        hashes=hashes,
        reason=BAD if probability is None else "",
    )
    return Label(comparison=comparison, time=time, **more)


def label_row(label: Label) -> Row:
    row = verdict_row(label.comparison)
    if label.time is not None:
        row["time"] = label.time.astimezone(UTC).isoformat(timespec="microseconds")
    if label.seconds is not None:
        row["seconds"] = round(label.seconds, 3)
    if label.shown is not None:
        row["shown"] = list(label.shown)
    return {**row, "withdrawn": True} if label.withdrawn else row


def parse_label(row: Row, where: str, texts: Mapping[str, Sequence[str]]) -> Label:
    """Parses a row of a labels file; ``texts`` are the texts of the responses, by prompt id."""
    if "responses" not in row:
        raise InputError(f"{where}: field 'responses' is missing; expected the indices of the two responses")
    comparison = parse_verdict(row, where, texts)
    assert isinstance(comparison, Comparison)
    if comparison.judge != HUMAN:
        raise InputError(f"{where}: field 'judge' is {comparison.judge!r}; expected {HUMAN!r} in a file of labels")
    if not (comparison.annotator or "").strip():
        raise InputError(f"{where}: field 'annotator' is missing; expected the name of who said so")
    if comparison.probability not in (None, 0.0, 0.5, 1.0):
        raise InputError(
            f"{where}: field 'probability' is {comparison.probability}; expected 1 (the first is better), "
            "0 (the second), 0.5 (a tie) or null (a bad pair)"
        )
    (i, j), probability, hashes = comparison.responses, comparison.probability, comparison.hashes
    if i > j:
        comparison = replace(
            comparison,
            responses=(j, i),
            probability=None if probability is None else 1 - probability,
            hashes=None if hashes is None else (hashes[1], hashes[0]),
        )
    withdrawn, shown = row.get("withdrawn", False), row.get("shown")
    if not isinstance(withdrawn, bool):
        raise InputError(f"{where}: field 'withdrawn' is {kind_of(withdrawn)}; expected true or false")
    if shown is not None and (shown not in ([i, j], [j, i]) or not all(type(index) is int for index in shown)):
        raise InputError(f"{where}: field 'shown' is {kind_of(shown)}; expected the two responses, left and right")
    return Label(
        comparison=comparison,
        time=parse_time(row.get("time"), where),
        seconds=parse_seconds(row.get("seconds"), f"{where}: field 'seconds'"),
        shown=None if shown is None else (shown[0], shown[1]),
        withdrawn=withdrawn,
        where=where,
    )


def parse_time(value: Any, where: str) -> datetime | None:
    """Parses an ISO 8601 time; one without a zone is UTC."""
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as error:  # the latter of year 1 in the east
        raise InputError(
            f"{where}: field 'time' is {kind_of(value)}; expected ISO 8601 such as 2026-11-21T16:28:01+00:00"
        ) from error


def parse_seconds(value: Any, place: str) -> float | None:
    """Parses the time that a label took; ``place`` is the start of the message of an error."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= FLOAT32_MAX:
        raise InputError(f"{place} is {kind_of(value)}; expected a number >= 0")
    return float(value)


LABEL_FIELDS = (*fields_of(Comparison), *fields_of(Label))
"""Fields of a row of labels, and two of ``Label`` that no row has."""


def read_history(
    path: str | Path, candidates: Iterable[Candidates], bad: BadRows, on_unknown_field: str = "ignore"
) -> list[Label]:
    """All rows of a labels file in order; a torn last line is skipped with a warning."""
    texts, labels, spelling = texts_of(candidates), [], Spelling(str(path), on_unknown_field)
    for where, row in read_rows(path, bad, may_be_torn=True):
        try:
            labels.append(parse_label(row, where, texts))
            spelling.check(row, LABEL_FIELDS, where)
        except InputError as error:
            bad.handle(error, row)
    spelling.finish()
    return labels


def standing(labels: Iterable[Label]) -> dict[tuple[Pair, str], Label]:
    """The newest label of each annotator on each pair, unless it is a withdrawal.

    The newest label has the latest time, or comes last in the file if a row has no time.

    Raises:
        InputError: an annotator has different labels on a pair, and neither times nor a withdrawal order them.
    """
    groups: dict[tuple[Pair, str], list[Label]] = {}
    for label in labels:
        groups.setdefault((label.pair, label.annotator), []).append(label)
    newest = {}
    for key, group in groups.items():
        times = [label.time for label in group if label.time is not None]
        if len(times) == len(group):
            last = max(zip(times, range(len(group)), strict=True))[1]
        else:
            last, first = len(group) - 1, group[0]
            other = next((x for x in group if x.value != first.value), None)
            if other is not None and not any(x.withdrawn for x in group):
                raise InputError(
                    f"{other.where}: annotator {first.annotator!r} says another thing of responses "
                    f"{list(first.comparison.responses)} of {first.comparison.prompt_id!r} than at "
                    f"{first.where}; expected one label, or a 'time' in both"
                )
        if not group[last].withdrawn:
            newest[key] = group[last]
    return newest


def read_labels(
    path: str | Path, candidates: Iterable[Candidates], bad: BadRows, on_unknown_field: str = "ignore"
) -> list[Comparison]:
    """Each annotator's current label on each pair, in the order of the file.

    Raises:
        InputError: a row names an unknown prompt or response, or its hashes do not match the texts; see also
            ``standing``.
    """
    labels = read_history(path, candidates, bad, on_unknown_field)
    kept = {id(label) for label in standing(labels).values()}
    return [label.comparison for label in labels if id(label) in kept]


class LabelFile:
    """Appends labels so that each is on disk before the next is asked for; safe for several threads and processes.

    Writers hold a lock next to the file, and a line is one write. If a killed writer left a last line without newline,
    it is repaired first: a complete row is kept, a partial one is cut off with a warning, since it was never confirmed.
    """

    def __init__(self, path: str | Path, candidates: Sequence[Candidates]) -> None:
        """Raises InputError if an existing file cannot be read, OutputError if the file cannot be written."""
        self.path = Path(path)
        self.candidates = candidates
        self._mutex = threading.Lock()
        self._known: tuple[int, int] | None = None
        self._history: list[Label] = []
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as handle:
                _mend(handle, self.path)
        standing(self.history())

    def history(self) -> list[Label]:
        """All rows, including those written by other processes."""
        with self._mutex:
            stat = self.path.stat()
            if self._known != (stat.st_ino, stat.st_size):
                self._history = read_history(self.path, self.candidates, BadRows())
                self._known = (stat.st_ino, stat.st_size)
            return list(self._history)

    def append(self, label: Label) -> None:
        """Appends a label and returns when it is on disk.

        Raises:
            OutputError: the label could not be written; the file is unchanged.
        """
        data = _line(label)
        with self._mutex, writing(self.path), self._locked() as handle:
            _mend(handle, self.path)
            before = os.fstat(handle)
            try:
                written = os.write(handle, data)
                if written != len(data):
                    raise OSError(f"{written} of {len(data)} bytes written")
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, before.st_size)
                raise
            if self._known == (before.st_ino, before.st_size):
                self._history.append(label)
                self._known = (before.st_ino, before.st_size + len(data))

    def append_all(self, labels: Sequence[Label]) -> None:
        """Appends all labels or, whatever happens, none: a complete new file replaces the old one by a rename."""
        with self._mutex, writing(self.path), self._locked() as handle:
            _mend(handle, self.path)
            tmp = self.path.with_name(f".tmp-{self.path.name}")
            try:
                with open(tmp, "wb") as out:
                    out.write(self.path.read_bytes())
                    out.writelines(map(_line, labels))
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(tmp, self.path)
                fsync_folder(self.path.parent)
            finally:
                tmp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, locked and open for appending. The lock is a separate file, since ``append_all`` replaces this."""
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_new = not self.path.exists()
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if is_new:
                    fsync_folder(self.path.parent)
                yield handle
            finally:
                os.close(handle)


def _line(label: Label) -> bytes:
    return (json.dumps(label_row(label), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _mend(handle: int, path: Path) -> None:
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return
    content = os.pread(handle, size, 0)
    tail = content[content.rfind(b"\n") + 1 :]
    try:
        is_whole = isinstance(json.loads(tail), dict)
    except (ValueError, RecursionError):
        is_whole = False
    if is_whole:
        os.write(handle, b"\n")
    else:
        os.ftruncate(handle, size - len(tail))
        logger.warning("%s: the last line was torn and is cut off, %d bytes: %r", path, len(tail), tail[:60])
    os.fsync(handle)

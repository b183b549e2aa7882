"""Responses on disk, keyed by a hash of everything they depend on, so that none is generated twice.

A store is one SQLite file. Rows are added in transactions: once ``add`` returns, they survive a killed process. After a
power cut the last rows may be missing, and are generated again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tso_fast.errors import InputError, OutputError
from tso_fast.types import TopLogprobs

STORE_FILE = "responses.sqlite3"
FORMAT = 2
# SQLite's limit on variables in a statement was 999 before version 3.32.
CHUNK = 900

Row = tuple[bytes, tuple[int, ...], str, str, float | None, TopLogprobs | None]
"""Key, token ids, text, finish reason, log-prob under the sampling distribution (nats), likeliest first tokens."""


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    return _hash(array("q", token_ids).tobytes())


def settings_hash(**settings: object) -> bytes:
    """Hash of everything a cell samples with: its weights, its engine and every sampling option."""
    return _hash(json.dumps(settings, sort_keys=True).encode())


def response_key(prompt: bytes, settings: bytes, seed: int) -> bytes:
    """Key of a response in the store, 16 bytes."""
    return _hash(prompt, settings, struct.pack("<Q", seed))


def _checksum(token_ids: bytes, text: str, top_logprobs: str | None) -> int:
    """Checksum of a row; SQLite notices a broken page, but not a changed value."""
    return zlib.crc32((text + (top_logprobs or "")).encode(), zlib.crc32(token_ids))


class ResponseStore:
    """The responses of a folder; used by one thread of one process, which locks the file.

    The index is a dictionary, read at the start, and both tables only grow at their end. Keys are random, so an SQLite
    index would be rewritten all over at every commit (54 instead of 17 us per response with a million of them).

    Raises:
        InputError: another process has the store open, or the file is not a store.
        OutputError: the store cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / STORE_FILE
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=1, isolation_level=None)
        try:
            with self._errors():
                # With a permanent lock the write-ahead log needs no shared memory, which network file systems lack.
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._db.execute("PRAGMA page_size = 16384")  # rows are a few kilobytes
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("BEGIN IMMEDIATE")
                self._create()
                self._db.execute("COMMIT")
                self._rows: dict[bytes, int] = dict(self._db.execute("SELECT key, id FROM keys"))
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= FORMAT:
            raise InputError(
                f"response_store: {self.path} has format {version}, this release reads 1 to {FORMAT}; "
                "choose another folder"
            )
        if version == 0:
            columns = "token_ids BLOB NOT NULL, text TEXT NOT NULL, finish_reason TEXT, logprob REAL, crc32 INTEGER"
            self._db.execute("CREATE TABLE keys (id INTEGER PRIMARY KEY, key BLOB NOT NULL)")
            self._db.execute(f"CREATE TABLE responses (id INTEGER PRIMARY KEY, {columns})")
        if version < FORMAT:
            self._db.execute("ALTER TABLE responses ADD COLUMN top_logprobs TEXT")  # JSON
            self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def __enter__(self) -> ResponseStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def get(self, keys: Sequence[bytes]) -> list[Row]:
        """The responses under these keys, in the same order.

        Raises:
            KeyError: a key is not in the store.
        """
        wanted = [self._rows[key] for key in keys]
        found = {}
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            marks = ", ".join("?" * len(chunk))
            with self._errors():
                for number, *row in self._db.execute(f"SELECT * FROM responses WHERE id IN ({marks})", chunk):
                    found[number] = row
        out = []
        for key, number in zip(keys, wanted, strict=True):
            token_ids, text, finish_reason, logprob, checksum, top = found.get(number) or (b"", "", "", 0, None, None)
            if checksum != _checksum(token_ids, text, top):
                raise InputError(
                    f"response_store: {self.path} is damaged: a response differs from its checksum; "
                    "remove it, and its responses are generated again"
                )
            ids = array("i")
            ids.frombytes(token_ids)
            top_logprobs = None if top is None else tuple(map(tuple, json.loads(top)))
            out.append((key, tuple(ids), text, finish_reason, logprob, top_logprobs))
        return out

    def add(self, rows: Iterable[Row]) -> None:
        """Stores all of the rows or none; existing keys keep their responses."""
        new = {row[0]: row[1:] for row in rows if row[0] not in self._rows}
        numbers = range(len(self._rows) + 1, len(self._rows) + 1 + len(new))
        values = []
        for number, (token_ids, text, finish_reason, logprob, top_logprobs) in zip(numbers, new.values(), strict=True):
            ids = array("i", token_ids).tobytes()
            top = None if top_logprobs is None else json.dumps(top_logprobs, separators=(",", ":"))
            values.append((number, ids, text, finish_reason, logprob, _checksum(ids, text, top), top))
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT INTO keys VALUES (?, ?)", zip(numbers, new, strict=True))
                self._db.executemany("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
        self._rows.update(zip(new, numbers, strict=True))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise InputError(
                    f"response_store: {self.path} is in use by another process; wait for it or choose another folder"
                ) from error
            raise OutputError(
                f"cannot write {self.path}: {error}. Everything complete before is kept; mend the cause "
                "(space, permissions) and run the same command again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"response_store: {self.path} is damaged or no store ({error}); remove it, and its "
                "responses are generated again"
            ) from error
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; mend the cause and run the same command again"
            ) from error

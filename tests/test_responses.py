"""The store of responses: what goes in comes out, killed or not, once."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import zlib
from array import array
from pathlib import Path

import pytest

from tso_fast.errors import InputError, OutputError
from tso_fast.files.responses import CHUNK, STORE_FILE, ResponseStore, Row, prompt_hash, response_key, settings_hash


def key(number: int) -> bytes:
    return response_key(prompt_hash([1, 2, 3]), settings_hash(weights="w"), number)


def row(number: int) -> Row:
    top = ((151_000, -0.1 * number), ("ü A", -1 / 3)) if number % 3 == 0 else None
    return (key(number), (*range(number % 7 + 1), 151_000), f"text {number} ü", "stop", -number / 8, top)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    rows = [row(n) for n in range(2 * CHUNK + 5)]
    with ResponseStore(tmp_path) as store:
        store.add(rows[:10])
        store.add(rows)  # those that are there stay
        store.add([])
        assert len(store) == len(rows)
        assert store.get([r[0] for r in rows[::-1]]) == rows[::-1]
        assert store.get([rows[3][0], rows[3][0]]) == [rows[3], rows[3]]
    with ResponseStore(tmp_path) as store:
        assert len(store) == len(rows)
        assert rows[7][0] in store
        assert key(10**6) not in store
        with pytest.raises(KeyError):
            store.get([key(10**6)])
        assert store.get([r[0] for r in rows]) == rows


def test_a_key_keeps_its_first_response(tmp_path: Path) -> None:
    first, second = row(1), (key(1), (9,), "other", "length", None, None)
    with ResponseStore(tmp_path) as store:
        store.add([first, second][::-1][:1])
        store.add([first])
        assert store.get([key(1)]) == [second]


def test_the_key_depends_on_everything_and_on_nothing_else() -> None:
    prompt, settings = prompt_hash([1, 2, 3]), settings_hash(weights="w", sampling={"temperature": 1.0, "top_k": 0})
    assert response_key(prompt, settings, 5) == response_key(
        prompt_hash((1, 2, 3)), settings_hash(sampling={"top_k": 0, "temperature": 1.0}, weights="w"), 5
    )
    others = {
        response_key(prompt, settings, 5),
        response_key(prompt, settings, 6),
        response_key(prompt, settings, 2**63 - 1),
        response_key(prompt_hash([1, 2, 4]), settings, 5),
        response_key(prompt_hash([1, 2]), settings, 5),
        response_key(prompt, settings_hash(weights="v", sampling={"temperature": 1.0, "top_k": 0}), 5),
        response_key(prompt, settings_hash(weights="w", sampling={"temperature": 0.9, "top_k": 0}), 5),
    }
    assert len(others) == 7
    assert all(len(k) == 16 for k in others)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with ResponseStore(tmp_path), pytest.raises(InputError, match=r"responses.sqlite3 is in use by another process"):
        ResponseStore(tmp_path)
    ResponseStore(tmp_path).close()


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_responses import row
from tso_fast.files.responses import ResponseStore
store = ResponseStore(sys.argv[1])
for n in range(100_000):
    store.add([row(2 * n), row(2 * n + 1)])
    print(2 * n + 1, flush=True)
"""


def test_what_add_returned_from_survives_a_kill(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path, Path(__file__).parent], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    last = 0
    for line in writer.stdout:
        last = int(line)
        if last > 300:
            os.kill(writer.pid, signal.SIGKILL)
            break
    last = max([last, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    with ResponseStore(tmp_path) as store:
        assert last + 1 <= len(store) <= last + 3
        assert len(store) % 2 == 0  # both of a call or neither
        assert store.get([key(n) for n in range(last + 1)]) == [row(n) for n in range(last + 1)]


def test_a_full_disk(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as store:
        store.add([row(n) for n in range(10)])
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own word for a disk of that size
        with pytest.raises(
            OutputError, match=r"cannot write .*responses\.sqlite3: database or disk is full.*run the same"
        ):
            store.add([(key(n), (1,) * 5000, "x" * 9000, "stop", 0.0, None) for n in range(100, 200)])
        assert len(store) == 10
        assert key(100) not in store
    with ResponseStore(tmp_path) as store:
        assert store.get([key(n) for n in range(10)]) == [row(n) for n in range(10)]


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 40, b"\0" * 5000])
def test_something_else_in_its_place(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STORE_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"responses\.sqlite3 is damaged or no store .*remove it"):
        ResponseStore(tmp_path)


def test_a_damaged_row(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as store:
        store.add([row(n) for n in range(3000)])
    file = tmp_path / STORE_FILE
    data = bytearray(file.read_bytes())
    where = data.index(b"text 1500 ")
    data[where : where + 4] = b"tent"
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"responses\.sqlite3 is damaged.*remove it"), ResponseStore(tmp_path) as store:
        store.get([key(n) for n in range(3000)])


def test_a_store_of_a_later_release(tmp_path: Path) -> None:
    ResponseStore(tmp_path).close()
    db = sqlite3.connect(tmp_path / STORE_FILE)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(InputError, match="has format 9, this release reads 1 to 2"):
        ResponseStore(tmp_path)


def test_a_store_of_format_1_goes_on(tmp_path: Path) -> None:
    """As the first release made it: its responses stay under their keys, and new ones join them."""
    db = sqlite3.connect(tmp_path / STORE_FILE)
    db.execute("CREATE TABLE keys (id INTEGER PRIMARY KEY, key BLOB NOT NULL)")
    db.execute(
        "CREATE TABLE responses (id INTEGER PRIMARY KEY, token_ids BLOB NOT NULL, text TEXT NOT NULL, "
        "finish_reason TEXT, logprob REAL, crc32 INTEGER)"
    )
    ids = array("i", [5, 6]).tobytes()
    db.execute("INSERT INTO keys VALUES (1, ?)", (key(1),))
    db.execute(
        "INSERT INTO responses VALUES (1, ?, 'ü', 'stop', -0.5, ?)", (ids, zlib.crc32("ü".encode(), zlib.crc32(ids)))
    )
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    old: Row = (key(1), (5, 6), "ü", "stop", -0.5, None)
    for _ in range(2):
        with ResponseStore(tmp_path) as store:
            store.add([row(3)])
            assert store.get([key(1), key(3)]) == [old, row(3)]


def test_the_checksum_covers_the_likeliest_tokens(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as store:
        store.add([row(3)])
    db = sqlite3.connect(tmp_path / STORE_FILE)
    db.execute("UPDATE responses SET top_logprobs = '[[1,-0.5]]'")
    db.commit()
    db.close()
    with pytest.raises(InputError, match="differs from its checksum"), ResponseStore(tmp_path) as store:
        store.get([key(3)])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/responses.sqlite3"):
        ResponseStore(tmp_path / "file")

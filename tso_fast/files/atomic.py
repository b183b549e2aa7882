"""Atomic writes: a file appears under its name only when it is complete and on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from tso_fast.errors import OutputError

TMP = ".tmp-"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns operating system errors into OutputErrors that name ``path``."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            reason = f"{error.filename} is no folder"
        raise OutputError(
            f"cannot write {path}: {reason}. Everything complete before is kept; mend the cause "
            "(space, permissions) and run the same command again"
        ) from error


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when it is complete and on disk."""
    tmp = path.with_name(f"{TMP}{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(tmp, "w", encoding="utf-8") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(tmp, path)
            fsync_folder(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when all of its files are on disk; replaces an old one.

    The old one is renamed before it is deleted: half a folder never has the name.
    """
    tmp, old = path.with_name(f"{TMP}{path.name}"), path.with_name(f"{TMP}{path.name}.old")
    with writing(path):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            yield tmp
            for file in sorted(tmp.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            os.replace(tmp, path)
            fsync_folder(path.parent)
        finally:
            for leftover in (tmp, old):
                shutil.rmtree(leftover, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raises OutputError if a file cannot be written at ``path``; to be called before long work."""
    probe = path.with_name(f"{TMP}{path.name}.probe")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as handle:
        json.dump(value, handle, indent=1, ensure_ascii=False, allow_nan=False)
        handle.write("\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_file(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def place_file(source: Path, target: Path) -> None:
    """Makes ``target`` a hard link to ``source``, or a copy if that fails, in one rename."""
    tmp = target.with_name(f"{TMP}{target.name}")
    with writing(target):
        tmp.unlink(missing_ok=True)
        try:
            os.link(source, tmp)
        except OSError:
            shutil.copyfile(source, tmp)
        os.replace(tmp, target)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, for a manifest."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def damage(path: Path, written: Mapping[str, Any]) -> str | None:
    """How a file differs from its ``fingerprint`` when it was written, as the end of a sentence; None: not at all."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != written["size"]:
        return f"has {size} bytes, the manifest says {written['size']}"
    return None if sha256_file(path) == written["sha256"] else "differs from its sha256"


def sha256_file(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = (f"{file.relative_to(path).as_posix()} {sha256_file(file)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

"""The run folder: atomic files, a manifest that comes last, and what is complete.

A stage writes its files to temporary names, syncs and renames them; then ``Run.commit`` adds them to ``run.json``
with size and sha256. A stage that is not in ``run.json`` did not happen, whatever files it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from tso_fast.errors import InputError, OutputError

logger = logging.getLogger(__name__)

RUN_FILE, METRICS_FILE, SKIPPED_FILE, REPORT_FILE = "run.json", "metrics.jsonl", "skipped.jsonl", "report.html"
FORMAT = 1
TMP = ".tmp-"

# Config keys that may differ when a run is resumed: they change what is shown, not what is computed.
FREE_KEYS = frozenset({
    "output_dir", "compare", "logging_steps", "report_to", "save_steps", "response_store", "executor", "ray_address",
    "num_engines", "engine_start_timeout_s", "engine_timeout_s", "max_concurrency", "max_retries", "max_shard_retries",
})  # fmt: skip


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the operating system inside becomes one that names ``path``."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            reason = f"{error.filename} is no folder"
        raise OutputError(f"cannot write {path}: {reason}. Everything complete before is kept; mend the cause "
                          "(space, permissions) and run the same command again") from error  # fmt: skip


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when it is whole and on disk."""
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
    """A folder that appears under its name only when all of its files are on disk; an old one is replaced."""
    tmp = path.with_name(f"{TMP}{path.name}")
    with writing(path):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            yield tmp
            for file in sorted(tmp.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            shutil.rmtree(path, ignore_errors=True)
            os.replace(tmp, path)
            fsync_folder(path.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raises OutputError when a file could not be written there, before the work that it is for."""
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
    """Makes ``target`` a link to (else a copy of) ``source``, in one rename."""
    tmp = target.with_name(f"{TMP}{target.name}")
    with writing(target):
        tmp.unlink(missing_ok=True)
        try:
            os.link(source, tmp)
        except OSError:
            shutil.copyfile(source, tmp)
        os.replace(tmp, target)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


class Run:
    """One run folder. ``with Run.open(...) as run`` holds its lock."""

    def __init__(self, folder: Path, state: dict[str, Any], lock: IO[str] | None) -> None:
        self.folder = folder
        self.state = state
        self._lock = lock

    @classmethod
    def open(cls, folder: str | Path, config: dict[str, Any], inputs: dict[str, str], versions: dict[str, str]) -> Run:
        """Creates a run folder, or resumes the one that is there.

        Args:
            config: the resolved configuration; a resumed run must have the same one, ``FREE_KEYS`` aside.
            inputs: sha256 of every input, by config key; a resumed run must read the same data.
            versions: of this program and of the libraries that results depend on.

        Raises:
            InputError: the folder is something else, is in use, or belongs to another configuration.
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")  # noqa: SIM115 held until close()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(f"output_dir: {folder} is in use by another process; wait for it or choose another "
                             "folder") from error  # fmt: skip
        try:
            for leftover in [*folder.glob(f"{TMP}*"), *folder.glob(f"*/{TMP}*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if (folder / RUN_FILE).exists():
                run = cls(folder, _read_state(folder), lock)
                run._check_same(config, inputs)
                run._drop_incomplete()
            else:
                if strangers := sorted(p.name for p in folder.iterdir() if p.name != ".lock"):
                    raise InputError(f"output_dir: {folder} is not empty ({', '.join(strangers[:3])}, ...) and holds "
                                     f"no {RUN_FILE}; choose a new folder")  # fmt: skip
                state = {"format": FORMAT, "versions": versions, "config": config, "inputs": inputs,
                         "stages": [], "manifest": {}}  # fmt: skip
                run = cls(folder, state, lock)
                run._save()
        except BaseException:
            lock.close()
            raise
        return run

    @classmethod
    def follow(cls, folder: str | Path) -> Run:
        """The run that another process has open, for reading."""
        return cls(Path(folder), read_run(folder), None)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def info(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage recorded; None when it is not complete."""
        if self._lock is None:
            self.state = _read_state(self.folder)
        return next((s["info"] for s in self.state["stages"] if s["name"] == stage), None)

    def commit(self, stage: str, paths: Iterable[Path], info: dict[str, Any]) -> None:
        """Declares a stage complete: its files are on disk under their names."""
        files = [file for path in paths for file in _files_of(path)]
        names = [file.relative_to(self.folder).as_posix() for file in files]
        for name, file in zip(names, files, strict=True):
            self.state["manifest"][name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
        self.state["stages"].append({"name": stage, "info": info, "files": names})
        self._save()

    def _save(self) -> None:
        write_json(self.folder / RUN_FILE, self.state)

    def _check_same(self, config: dict[str, Any], inputs: dict[str, str]) -> None:
        old = self.state["config"]
        changed = [key for key in sorted({*old, *config} - FREE_KEYS) if old.get(key) != config.get(key)]
        if changed:
            lines = "".join(f"\n  {key}: the run has {old.get(key)!r}, given {config.get(key)!r}" for key in changed)
            raise InputError(f"output_dir: {self.folder} holds a run with another configuration:{lines}\n"
                             "give the same values to resume it, or choose a new folder")  # fmt: skip
        for key in sorted({*self.state["inputs"], *inputs}):
            if self.state["inputs"].get(key) != inputs.get(key):
                raise InputError(f"{key}: its content changed since the run in {self.folder} started; restore it to "
                                 "resume, or choose a new folder")  # fmt: skip

    def _drop_incomplete(self) -> None:
        """Keeps the stages up to the first one whose files are not as the manifest says."""
        stages, manifest = self.state["stages"], self.state["manifest"]
        for i, stage in enumerate(stages):
            problem = next((p for name in stage["files"] if (p := self._problem(name, manifest[name]))), None)
            if problem is None:
                continue
            logger.warning(
                "resume: stage %s is damaged (%s); it and what follows is done again", stage["name"], problem
            )
            self.state["stages"] = stages[:i]
            kept = {name for s in self.state["stages"] for name in s["files"]}
            self.state["manifest"] = {name: entry for name, entry in manifest.items() if name in kept}
            self._save()
            return

    def _problem(self, name: str, entry: dict[str, Any]) -> str | None:
        file = self.folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, the manifest says {entry['size']}"
        return None if sha256_file(file) == entry["sha256"] else f"{name} differs from its sha256"


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"output_dir: {folder / RUN_FILE} cannot be read: {error}") from error
    written = state.get("format") if isinstance(state, dict) else None
    if written != FORMAT:
        raise InputError(f"output_dir: {folder / RUN_FILE} has format {written!r}, this release reads {FORMAT}")
    return state


def read_run(folder: str | Path) -> dict[str, Any]:
    """The state of a run, for reports; takes no lock.

    Raises:
        InputError: no run there.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder}: holds no {RUN_FILE}; expected the output_dir of a run")
    return _read_state(folder)

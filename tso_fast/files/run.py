"""The run folder: where each iteration keeps its files, and a manifest of the complete stages.

A stage writes its files under temporary names, syncs and renames them; then ``Run.commit`` adds them to ``run.json``
with size and sha256. A stage that is not in ``run.json`` did not happen, whatever files it left.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import platform
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tso_fast.errors import InputError
from tso_fast.files.atomic import TMP, damage, fingerprint, place_file, write_json, writing

logger = logging.getLogger(__name__)

RUN_FILE, METRICS_FILE, SKIPPED_FILE, REPORT_FILE = "run.json", "metrics.jsonl", "skipped.jsonl", "report.html"
LABELS_FILE = "labels.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Iteration:
    """Paths of one iteration of a run: ``Iteration(Path("runs/first"), 2)``."""

    run: Path
    number: int
    """Iteration number, from 1; 0 is the evaluation before training."""

    @property
    def name(self) -> str:
        return f"iter-{self.number}"

    @property
    def folder(self) -> Path:
        return self.run / self.name

    @property
    def responses(self) -> Path:
        return self.folder / "responses.jsonl"

    @property
    def refused(self) -> Path:
        """Prompts that an engine refused."""
        return self.folder / "refused.jsonl"

    @property
    def verdicts(self) -> Path:
        return self.folder / "verdicts.jsonl"

    @property
    def skipped(self) -> Path:
        """Prompts that a judge could not judge."""
        return self.folder / SKIPPED_FILE

    @property
    def labels(self) -> Path:
        return self.folder / LABELS_FILE

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    @property
    def reference(self) -> Path:
        """The running mean of ``reference: ema``."""
        return self.folder / "reference"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def stage(self, name: str) -> str:
        """Name in ``run.json`` of a stage of this iteration."""
        return f"{self.name}/{name}"


def iterations(run: Path) -> list[Iteration]:
    """Iterations that have a folder, oldest first."""
    numbers = [int(found[1]) for path in run.glob("iter-*") if (found := re.fullmatch(r"iter-(\d+)", path.name))]
    return [Iteration(run, number) for number in sorted(numbers)]


def parse_stage(name: str) -> tuple[int, str]:
    """Iteration number and stage for a name in ``run.json``."""
    iteration, stage = name.removeprefix("iter-").split("/")
    return int(iteration), stage


def library_versions() -> dict[str, str]:
    """Versions of this program and of the libraries that results depend on, for run.json."""
    packages = {"tso_fast": "tso-fast", "torch": "torch", "accelerate": "accelerate", "transformers": "transformers"}
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {**versions, "python": platform.python_version()}


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


class Run:
    """One run folder. ``with Run.open(...) as run`` holds its lock."""

    def __init__(self, folder: Path, state: dict[str, Any], lock: IO[str] | None) -> None:
        self.folder = folder
        self.state = state
        self._lock = lock

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: dict[str, Any],
        inputs: dict[str, str],
        versions: dict[str, str],
        free_keys: Collection[str] = (),
    ) -> Run:
        """Creates a run folder, or resumes the one that is there.

        Args:
            config: the resolved configuration; a resumed run must have the same one, ``free_keys`` aside.
            inputs: sha256 of every input, by config key; a resumed run must read the same data.
            versions: versions of this program and of the libraries that results depend on.
            free_keys: settings that may change when the run is resumed.

        Raises:
            InputError: the folder is not a run, is in use, or belongs to another configuration.
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
            raise InputError(
                f"output_dir: {folder} is in use by another process; wait for it or choose another folder"
            ) from error
        try:
            places = ("", "*/", "iter-*/checkpoint/")
            for leftover in [path for place in places for path in folder.glob(f"{place}{TMP}*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if (folder / RUN_FILE).exists():
                run = cls(folder, _read_state(folder), lock)
                run._check_same(config, inputs, free_keys)
                run._drop_incomplete()
            else:
                if strangers := sorted(p.name for p in folder.iterdir() if p.name != ".lock"):
                    raise InputError(
                        f"output_dir: {folder} is not empty ({', '.join(strangers[:3])}, ...) and holds "
                        f"no {RUN_FILE}; choose a new folder"
                    )
                state = {
                    "format": FORMAT,
                    "versions": versions,
                    "config": config,
                    "inputs": inputs,
                    "stages": [],
                    "manifest": {},
                }
                run = cls(folder, state, lock)
                run._save()
        except BaseException:
            lock.close()
            raise
        return run

    @classmethod
    def follow(cls, folder: str | Path) -> Run:
        """Opens for reading a run that another process has locked."""
        return cls(Path(folder), read_run(folder), None)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def iteration(self, number: int) -> Iteration:
        return Iteration(self.folder, number)

    def info(self, stage: str) -> dict[str, Any] | None:
        """The record of a complete stage; None: the stage is not complete."""
        if self._lock is None:
            self.state = _read_state(self.folder)
        return next((s["info"] for s in self.state["stages"] if s["name"] == stage), None)

    def commit(self, stage: str, paths: Iterable[Path], info: dict[str, Any]) -> None:
        """Declares a stage complete; its files must be on disk under their final names."""
        files = [file for path in paths for file in _files_of(path)]
        names = [file.relative_to(self.folder).as_posix() for file in files]
        for name, file in zip(names, files, strict=True):
            self.state["manifest"][name] = fingerprint(file)
        self.state["stages"].append({"name": stage, "info": info, "files": names})
        self._save()

    def publish(self, policy: Path) -> None:
        """Puts the files of the newest policy at the top of the run, where ``from_pretrained`` looks."""
        for file in sorted(policy.iterdir()):
            place_file(file, self / file.name)

    def _save(self) -> None:
        write_json(self.folder / RUN_FILE, self.state)

    def _check_same(self, config: dict[str, Any], inputs: dict[str, str], free_keys: Collection[str]) -> None:
        old = self.state["config"]
        keys = sorted({*old, *config} - set(free_keys))
        # Settings that an older release did not have count as None.
        changed = [key for key in keys if _without_none(old.get(key)) != _without_none(config.get(key))]
        if changed:
            lines = "".join(f"\n  {key}: the run has {old.get(key)!r}, given {config.get(key)!r}" for key in changed)
            raise InputError(
                f"output_dir: {self.folder} holds a run with another configuration:{lines}\n"
                "give the same values to resume it, or choose a new folder"
            )
        for key in sorted({*self.state["inputs"], *inputs}):
            if self.state["inputs"].get(key) != inputs.get(key):
                raise InputError(
                    f"{key}: its content changed since the run in {self.folder} started; restore it to "
                    "resume, or choose a new folder"
                )

    def _drop_incomplete(self) -> None:
        """Drops the first stage whose files do not match the manifest, and all stages after it."""
        stages, manifest = self.state["stages"], self.state["manifest"]
        for i, stage in enumerate(stages):
            problems = (f"{name} {how}" for name in stage["files"] if (how := damage(self / name, manifest[name])))
            problem = next(problems, None)
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


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


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
        InputError: the folder is not a run.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder}: holds no {RUN_FILE}; expected the output_dir of a run")
    return _read_state(folder)

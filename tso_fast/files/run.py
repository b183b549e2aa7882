"""The run folder: where each iteration keeps its files, and a manifest of the complete stages.

A stage writes its files under temporary names, syncs and renames them; then ``Run.commit`` adds them to ``run.json``
with size and sha256. A stage that is not in ``run.json`` did not happen, whatever files it left.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tso_fast.errors import InputError
from tso_fast.files.atomic import TMP, damage, fingerprint, place_file, write_json, writing
from tso_fast.files.schedule import Bounds, hash_prompts, schedule
from tso_fast.types import Candidates

logger = logging.getLogger(__name__)

RUN_FILE, METRICS_FILE, SKIPPED_FILE, REPORT_FILE = "run.json", "metrics.jsonl", "skipped.jsonl", "report.html"
BACKUP_FILE = f"{RUN_FILE}.bak"
"""Copy of run.json as it was last written, in case somebody or something damages that."""
LABELS_FILE, LOCK_FILE = "labels.jsonl", ".lock"
FORMAT = 2
SEAL = "sha256"
"""Key of the hash of all else in run.json."""

Settings = dict[str, Any]


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
    def judgments(self) -> Path:
        """What a judge was asked and replied, if that becomes pairs."""
        return self.folder / "judgments.jsonl"

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
    def optimizer(self) -> Path:
        """What the optimiser kept at the end, for the next iteration."""
        return self.folder / "optimizer"

    @property
    def reference_logprobs(self) -> Path:
        """Reference log-probs of the pairs, which a resumed run takes over."""
        return self.folder / "reference-logprobs.safetensors"

    @property
    def second_logprobs(self) -> Path:
        """The same under the second reference."""
        return self.folder / "second-reference-logprobs.safetensors"

    @property
    def reward_logprobs(self) -> Path:
        """The same under the cell that rewards tokens."""
        return self.folder / "reward-logprobs.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def stage(self, name: str) -> str:
        """Name in ``run.json`` of a stage of this iteration."""
        return f"{self.name}/{name}"


def iterations(run: Path) -> list[Iteration]:
    """Iterations that have a folder, oldest first."""
    names = os.listdir(run) if os.path.isdir(run) else []
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"iter-(\d+)", name))]
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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl. Lines that are none are left out, with a warning unless it is a last one that was cut."""
    file = folder / METRICS_FILE
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    rows = [row for line in lines if (row := _metrics_row(line)) is not None]
    is_cut = bool(lines) and not lines[-1].endswith(b"\n")
    if (num_bad := len(lines) - len(rows) - is_cut) > 0:
        logger.warning("%s: %d lines are no rows of metrics and are left out", file, num_bad)
    return rows


def _metrics_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = (
        isinstance(row, dict)
        and all(isinstance(row.get(key), int) for key in ("iteration", "step"))
        and all(
            value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)
            for value in row.values()
        )
    )
    return row if is_row else None


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
        config: Settings,
        inputs: dict[str, str],
        versions: dict[str, str],
        fixed: Callable[[Settings], Settings] = lambda config: config,
        prompts: Sequence[Candidates] = (),
        may_resume: bool = True,
    ) -> Run:
        """Creates a run folder, or resumes the one that is there.

        A run without a complete stage takes whatever configuration and inputs it is given.

        Args:
            config: the resolved configuration.
            inputs: sha256 of every input, by config key; a resumed run must read the same data.
            versions: versions of this program and of the libraries that results depend on.
            fixed: the settings that may not change when the run is resumed, of a configuration.
            prompts: what ``num_iterations`` mini-batches are made of. A resumed run may have more of them, after those
                that it began with.
            may_resume: False refuses a run that is there.

        Raises:
            InputError: the folder is not a run, is in use, or belongs to another configuration.
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        is_new = not os.path.exists(folder / RUN_FILE)
        num_iterations = config.get("num_iterations", 0)
        if is_new:
            _refuse_strangers(folder)
            schedule(len(prompts), num_iterations)
        elif not may_resume:
            raise InputError(
                f"output_dir: {folder} holds a run already, and resume is false; choose a new folder, or give "
                "--overwrite to delete it"
            )
        lock = _locked(folder)
        try:
            places = ("", "*/", "iter-*/checkpoint/")
            for leftover in [path for place in places for path in folder.glob(f"{place}{TMP}*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            state = {"format": FORMAT, "versions": versions, "config": config, "inputs": inputs}
            found = None if is_new else _read_state(folder)
            run = cls(folder, found or {**state, "prompts": "", "mini_batches": [], "stages": [], "manifest": {}}, lock)
            before = run.state.copy()
            if run.state["stages"]:
                run._check_same(config, inputs, fixed)
                run._check_prompts(prompts)
                run._drop_incomplete()
                del state["versions"]
            state["mini_batches"] = schedule(len(prompts), num_iterations, run.mini_batches, run._num_begun())
            run.state |= {**state, "prompts": hash_prompts(prompts)}
            if is_new or run.state != before:
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

    def labelled(self, number: int) -> list[tuple[Path, Path]]:
        """Files of responses and of human labels on them, of the iterations before one."""
        before = (self.iteration(k) for k in range(1, number))
        return [(files.responses, files.labels) for files in before if files.labels.exists()]

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

    @property
    def mini_batches(self) -> list[Bounds]:
        """The mini-batch of each iteration, as ``schedule`` planned it."""
        batches: list[Bounds] = self.state["mini_batches"]
        return batches

    def publish(self, policy: Path) -> None:
        """Puts the files of the newest policy at the top of the run, where ``from_pretrained`` looks."""
        for file in sorted(policy.iterdir()):
            place_file(file, self / file.name)

    def _save(self) -> None:
        write_state(self.folder, self.state)
        with writing(self.folder / BACKUP_FILE):
            shutil.copyfile(self.folder / RUN_FILE, self.folder / BACKUP_FILE)

    def _check_same(self, config: Settings, inputs: dict[str, str], fixed: Callable[[Settings], Settings]) -> None:
        # Settings that an older release did not have count as None.
        old, new = (_without_none(fixed(settings)) for settings in (self.state["config"], config))
        if changed := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
            lines = "".join(f"\n  {key}: the run has {old.get(key)!r}, given {new.get(key)!r}" for key in changed)
            raise InputError(
                f"output_dir: {self.folder} holds a run with another configuration:{lines}\n"
                "give the same values to resume it, or choose a new folder"
            )
        for key in sorted({*self.state["inputs"], *inputs}):
            if self.state["inputs"].get(key) != inputs.get(key):
                is_both = key in self.state["inputs"] and key in inputs
                raise InputError(
                    f"{key}: {'its content changed' if is_both else 'it was added or taken away'} since the run in "
                    f"{self.folder} started; restore it to resume, or choose a new folder"
                )

    def _check_prompts(self, prompts: Sequence[Candidates]) -> None:
        number = max((end for _, end in self.mini_batches), default=0)
        if hash_prompts(prompts[:number]) != self.state["prompts"]:
            raise InputError(
                f"prompts: its content changed since the run in {self.folder} started; its first {number} prompts must "
                "stay as they were, new ones go to the end. Restore it to resume, or choose a new folder"
            )

    def _num_begun(self) -> int:
        """Number of iterations whose cells have answered; the first of them have."""
        return sum(parse_stage(stage["name"])[1] == "generate" for stage in self.state["stages"])

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


def _refuse_strangers(folder: Path) -> None:
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    strangers = [name for name in names if name != LOCK_FILE and not name.startswith(TMP)]
    if strangers:
        raise InputError(
            f"output_dir: {folder} is not empty ({', '.join(strangers[:3])}, ...) and holds no {RUN_FILE}; choose a "
            "new folder"
        )


def _locked(folder: Path) -> IO[str]:
    """The lock of a run folder, which is made if it is not there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK_FILE, "w")  # noqa: SIM115 held until it is closed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(
            f"output_dir: {folder} is in use by another process; wait for it or choose another folder"
        ) from error
    return lock


def remove_run(folder: Path, confirm: Callable[[str], bool]) -> None:
    """Deletes a run folder with all that is in it, if there is one and ``confirm(question)`` agrees.

    Raises:
        InputError: nobody agreed, or the run is in use.
    """
    if not os.path.exists(folder / RUN_FILE):
        return
    with _locked(folder):
        size = sum(file.stat().st_size for file in _files_of(folder))
        if not confirm(f"delete {folder.resolve()} and all {size / 2**20:,.1f} MiB in it, responses included?"):
            raise InputError(f"overwrite: {folder} is kept; choose another output_dir, or leave out overwrite to go on")
        with writing(folder):
            shutil.rmtree(folder)


def _read_state(folder: Path) -> Settings:
    """What run.json holds.

    Raises:
        InputError: it cannot be read or its content cannot be that of a run; says where a copy is.
    """
    file, backup = folder / RUN_FILE, folder / BACKUP_FILE
    try:
        return _parsed(file)
    except _NewerError:
        raise
    except InputError as error:
        try:
            _parsed(backup)
            advice = f"its last whole version is in {backup}: {shlex.join(['cp', str(backup), str(file)])}"
        except InputError:
            advice = (
                "restore it from a copy, or choose a new folder; with response_store: "
                f"{folder} nothing is generated twice there"
            )
        raise InputError(f"output_dir: {file} cannot be read: {error}; {advice}") from error


class _NewerError(InputError):
    pass


def _parsed(file: Path) -> Settings:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(error)) from error
    if not isinstance(state, dict):
        raise InputError(f"it holds a {type(state).__name__}, expected keys and values")
    written = state.get("format")
    if isinstance(written, int) and written != FORMAT:
        raise _NewerError(f"output_dir: {file} has format {written!r}, this release reads {FORMAT}")
    if state.pop(SEAL, None) != _seal(state):
        raise InputError("it is not as it was written, but edited or damaged")
    state["mini_batches"] = [tuple(bounds) for bounds in state["mini_batches"]]
    return state


def write_state(folder: Path, state: Settings) -> None:
    """Writes run.json with a seal, by which every later change of its content is seen."""
    write_json(folder / RUN_FILE, {**state, SEAL: _seal(state)})


def _seal(state: Settings) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_run(folder: str | Path) -> Settings:
    """The state of a run, for reports; takes no lock.

    Raises:
        InputError: the folder is not a run.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / RUN_FILE):
        raise InputError(f"{folder}: holds no {RUN_FILE}; expected the output_dir of a run")
    return _read_state(folder)

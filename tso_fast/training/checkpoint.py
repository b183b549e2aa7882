"""Checkpoints inside an iteration: everything that the next optimiser step depends on.

``checkpoint/step-N/`` holds what is trained and what the optimiser keeps of it, as safetensors that each process writes
its part of, the rest as JSON, and a manifest with the sha256 of all files. It is written while training goes on, and
gets its name when it is complete; older ones are removed after that, so that a kill at any moment leaves a whole one. A
checkpoint that does not match its manifest is passed over. Another number of processes can go on from one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tso_fast.errors import OutputError
from tso_fast.files.atomic import TMP, damage, fingerprint, fsync_folder, write_json, writing
from tso_fast.progress import console
from tso_fast.training.monitors import Meter, NonFiniteGuard

# One process alone is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

KEPT = 2
"""Checkpoints that are kept, in case the newest is damaged."""
STATE, MANIFEST = "state.json", "manifest.json"


class Checkpoints:
    """The checkpoints of an iteration: ``load`` before the first step, ``save`` after some of them.

    Every process makes the same calls. Used as a context, whose end waits for what is being written.

    Args:
        notes: what else is saved as it is then, and restored in place; values of JSON.
        kept: the same, of tensors that all processes have or share out.
    """

    def __init__(
        self,
        folder: Path,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        meters: Sequence[Meter],
        guard: NonFiniteGuard,
        notes: dict[str, Any] | None = None,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.folder, self.accelerator, self.optimizer, self.scheduler = folder, accelerator, optimizer, scheduler
        self.meters, self.guard = meters, guard
        self.notes = {} if notes is None else notes
        self.kept = dict(kept or {})
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.rank, self.is_alone = accelerator.process_index, accelerator.num_processes == 1
        # Its own group: what is written meets no collective of training.
        self.group = None if self.is_alone else dist.new_group(backend="gloo")
        self.writing: Future[None] | None = None

    def save(self, step: int) -> None:
        """Copies the state after ``step`` to main memory and writes it in the background.

        Raises:
            OutputError: the checkpoint before could not be written.
        """
        self.wait()
        target = self.folder / f"step-{step}"
        tmp = target.with_name(TMP + target.name)
        with writing(target):
            tmp.mkdir(parents=True, exist_ok=True)
        rest = {
            "step": step,
            "processes": self.accelerator.num_processes,
            "scheduler": self.scheduler.state_dict(),
            "skipped": [self.guard.in_a_row, self.guard.total],
            "notes": self.notes.copy(),
        }
        copies = {key: _copy(value) for key, value in (self._tensors() | self._own()).items()}
        threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = threads.submit(self._write, copies, tmp, target, rest)
        threads.shutdown(wait=False)

    def _write(self, copies: dict[str, torch.Tensor], tmp: Path, target: Path, rest: dict[str, Any]) -> None:
        """Writes this process's part; when all have, the first gives the checkpoint its name and removes old ones."""
        self._save(copies, tmp, target)
        if self.rank != 0:
            return
        write_json(tmp / STATE, rest)
        write_json(tmp / MANIFEST, {file.name: fingerprint(file) for file in sorted(tmp.iterdir())})
        with writing(target):
            os.replace(tmp, target)
            fsync_folder(target.parent)
        for old in _found(self.folder)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def _save(self, tensors: dict[str, torch.Tensor], tmp: Path, target: Path) -> None:
        try:
            dcp.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(tmp), save_distributed=True),
                process_group=self.group,
                no_dist=self.is_alone,
            )
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            shutil.rmtree(tmp, ignore_errors=True)
            raise OutputError(
                f"cannot write {target}: {_last_line(error)}. Everything complete before is kept; mend the cause "
                "(space, permissions) and run the same command again"
            ) from error

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            OutputError: it could not be.
        """
        last, self.writing = self.writing, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.wait()
        except OutputError:
            if kind is None:
                raise

    def load(self) -> int:
        """Restores the newest whole checkpoint and returns its number of finished steps; 0 when there is none."""
        path: list[str | None] = [None]
        if self.rank == 0:
            for leftover in self.folder.glob(f"{TMP}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            path[0] = next((str(found) for found in _found(self.folder) if _is_whole(found)), None)
        if self.group is not None:
            dist.broadcast_object_list(path, src=0, group=self.group)
        if path[0] is None:
            return 0
        found = Path(path[0])
        rest = json.loads((found / STATE).read_text(encoding="utf-8"))
        reader = HuggingFaceStorageReader(str(found))
        tensors = self._tensors(reader.read_metadata().state_dict_metadata)
        are_as_many = rest["processes"] == self.accelerator.num_processes
        own = self._own() if are_as_many else self._sums_of_all(rest["processes"])
        dcp.load(tensors | own, storage_reader=reader, process_group=self.group, no_dist=self.is_alone)
        self._restore(own, are_as_many)
        self._to_numbers()
        self.scheduler.load_state_dict(rest["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.guard.in_a_row, self.guard.total = rest["skipped"]
        self.notes |= rest["notes"]
        step: int = rest["step"]
        return step

    def write_optimizer(self, folder: Path) -> None:
        """Writes what the optimiser keeps of the weights; every process takes part.

        Raises:
            OutputError: it cannot be written.
        """
        self.wait()
        tmp = folder.with_name(TMP + folder.name)
        with writing(folder):
            if self.rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._save(self._optimizer_tensors(), tmp, folder)
            if self.rank == 0:
                os.replace(tmp, folder)
        self.accelerator.wait_for_everyone()

    def read_optimizer(self, folder: Path) -> None:
        """Takes over what ``write_optimizer`` wrote."""
        reader = HuggingFaceStorageReader(str(folder))
        tensors = self._optimizer_tensors(reader.read_metadata().state_dict_metadata)
        dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.is_alone)
        self._to_numbers()

    def _to_numbers(self) -> None:
        """Turns counts of steps, which files hold as tensors, into the numbers that some optimisers keep."""
        for state in self.optimizer.state.values():
            for key, item in state.items():
                if item.ndim == 0 and item.dtype == torch.int64:
                    state[key] = int(item)

    def _tensors(self, stored: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """What is trained, what is kept beside it and what the optimiser keeps, to be saved or to be read into."""
        weights = {f"model.{name}": value.detach() for name, value in self.trained.items()}
        return weights | self.kept | self._optimizer_tensors(stored)

    def _optimizer_tensors(self, stored: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """What the optimiser keeps of each weight, by name.

        Args:
            stored: what a file holds; the optimiser's state is made like it, to be read into.
        """
        out: dict[str, torch.Tensor] = {}
        for name, value in self.trained.items():
            prefix = f"optimizer.{name}/"
            if stored is not None:
                self.optimizer.state[value] = {
                    key.removeprefix(prefix): _like(value, item)
                    for key, item in stored.items()
                    if key.startswith(prefix)
                }
            out |= {prefix + key: torch.as_tensor(item) for key, item in self.optimizer.state[value].items()}
        return out

    def _own(self) -> dict[str, torch.Tensor]:
        """What only this process knows: its sums, and what its dropout draws from."""
        own = {f"sums.{self.rank}.{i}": meter.sums for i, meter in enumerate(self.meters)}
        own[f"random.{self.rank}.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and self.accelerator.device.type == "cuda":
            own[f"random.{self.rank}.cuda"] = torch.cuda.get_rng_state()
        return own

    def _sums_of_all(self, processes: int) -> dict[str, torch.Tensor]:
        """Room for the sums of all processes that wrote a checkpoint."""
        return {
            f"sums.{rank}.{i}": torch.empty_like(meter.sums)
            for rank in range(processes)
            for i, meter in enumerate(self.meters)
        }

    def _restore(self, own: dict[str, torch.Tensor], are_as_many: bool) -> None:
        """Takes over what ``_own`` holds. Of another number of processes that is their sums, with which the first one
        goes on, and every process draws afresh."""
        for i, meter in enumerate(self.meters):
            parts = [value for key, value in own.items() if key.startswith("sums.") and key.endswith(f".{i}")]
            meter.sums = sum(parts, torch.zeros_like(meter.sums)) if are_as_many or self.rank == 0 else meter.sums
        if are_as_many:
            torch.set_rng_state(own[f"random.{self.rank}.cpu"])
            if f"random.{self.rank}.cuda" in own:
                torch.cuda.set_rng_state(own[f"random.{self.rank}.cuda"])


def _copy(value: torch.Tensor) -> torch.Tensor:
    """A copy in main memory."""
    value = value.detach()
    return value.clone() if value.device.type == "cpu" else value.cpu()


def _like(value: torch.Tensor, stored: TensorStorageMetadata) -> torch.Tensor:
    """An optimiser's tensor to read into: shared out like the weight if it has its shape, else whole."""
    dtype = stored.properties.dtype
    if stored.size == value.shape:
        return torch.zeros_like(value, dtype=dtype, requires_grad=False)
    return torch.zeros(stored.size, dtype=dtype)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _found(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    steps = {int(found[1]): path for path in folder.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _is_whole(path: Path) -> bool:
    """Whether the files of a checkpoint are those of its manifest; says so if they are not."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        problems = (f"{name} {how}" for name, wanted in manifest.items() if (how := damage(path / name, wanted)))
        reason = next(problems, None if STATE in manifest else f"{MANIFEST} names no {STATE}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it is incomplete ({type(error).__name__}: {error})"
    if reason is not None:
        console.print(
            f"warning: {path} is passed over: {reason}; training goes on from the one before, or from the start of the "
            "iteration",
        )
    return reason is None

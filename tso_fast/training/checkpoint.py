"""Checkpoints inside an iteration: everything that the next optimiser step depends on.

``checkpoint/step-N/`` holds the weights, the rest, and a manifest with the sha256 of both. It gets its name when it is
complete, and older ones are removed after that, so that a kill at any moment leaves a whole one. A checkpoint that does
not match its manifest is passed over.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from tso_fast.files.atomic import atomic_folder, damage, fingerprint, write_json
from tso_fast.progress import console
from tso_fast.training.monitors import Meter, NonFiniteGuard

KEPT = 2
"""Checkpoints that are kept, in case the newest is damaged."""
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


def save(
    folder: Path,
    *,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    step: int,
    meters: list[Meter],
    guard: NonFiniteGuard,
) -> None:
    """Writes a checkpoint and removes those that are no longer kept; every process takes part, the main one writes."""
    random_states = gather_object([_random_state()])
    if not accelerator.is_main_process:
        return
    with atomic_folder(folder / f"step-{step}") as tmp:
        safetensors.torch.save_model(model, str(tmp / WEIGHTS))
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "meters": [meter.sums for meter in meters],
            "skipped": [guard.in_a_row, guard.total],
            "random": random_states,
        }
        try:
            torch.save(state, tmp / STATE)
        except RuntimeError as error:  # torch's name for a full disk
            raise OSError(str(error)) from error
        write_json(tmp / MANIFEST, {name: fingerprint(tmp / name) for name in (WEIGHTS, STATE)})
    for old in _found(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def load(
    folder: Path, *, model: Any, optimizer: Any, scheduler: Any, meters: list[Meter], guard: NonFiniteGuard
) -> int:
    """Restores the newest whole checkpoint and returns its number of finished steps; 0 when there is none."""
    found = next((path for path in _found(folder) if _is_whole(path)), None)
    if found is None:
        return 0
    safetensors.torch.load_model(model, str(found / WEIGHTS))
    state = torch.load(found / STATE, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    for meter, sums in zip(meters, state["meters"], strict=True):
        meter.sums = sums
    guard.in_a_row, guard.total = state["skipped"]
    _restore_random_state(state["random"][PartialState().process_index])
    step: int = state["step"]
    return step


def _found(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    steps = {int(found[1]): path for path in folder.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _is_whole(path: Path) -> bool:
    """Whether the files of a checkpoint are those of its manifest; says so if they are not."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        problems = (f"{name} {how}" for name in (WEIGHTS, STATE) if (how := damage(path / name, manifest[name])))
        reason = next(problems, None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it is incomplete ({type(error).__name__}: {error})"
    if reason is not None:
        console.print(
            f"warning: {path} is passed over: {reason}; training goes on from the one before, or from the start of the "
            "iteration",
            highlight=False,
            markup=False,
        )
    return reason is None


def _random_state() -> dict[str, torch.Tensor]:
    """What dropout draws from; everything else is seeded by name."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

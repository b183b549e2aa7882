"""Checkpoints inside an iteration: everything that the next optimiser step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from tso_fast.files.atomic import atomic_folder
from tso_fast.training.monitors import Meter, NonFiniteGuard


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
    """Writes a checkpoint; every process takes part, the main one writes."""
    random_states = gather_object([_random_state()])
    if not accelerator.is_main_process:
        return
    with atomic_folder(folder) as tmp:
        safetensors.torch.save_model(model, str(tmp / "model.safetensors"))
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "meters": [meter.sums for meter in meters],
            "skipped": [guard.in_a_row, guard.total],
            "random": random_states,
        }
        try:
            torch.save(state, tmp / "state.pt")
        except RuntimeError as error:  # torch's name for a full disk
            raise OSError(str(error)) from error


def load(
    folder: Path, *, model: Any, optimizer: Any, scheduler: Any, meters: list[Meter], guard: NonFiniteGuard
) -> int:
    """Restores what ``save`` wrote and returns the number of finished steps; 0 when there is no checkpoint."""
    if not (folder / "state.pt").is_file():
        return 0
    safetensors.torch.load_model(model, str(folder / "model.safetensors"))
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    for meter, sums in zip(meters, state["meters"], strict=True):
        meter.sums = sums
    guard.in_a_row, guard.total = state["skipped"]
    _restore_random_state(state["random"][PartialState().process_index])
    step: int = state["step"]
    return step


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

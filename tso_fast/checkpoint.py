"""Checkpoints inside an iteration: everything that the next optimiser step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from tso_fast.monitors import Meter, NonFiniteGuard
from tso_fast.store import atomic_folder


def save(
    folder: Path, *, model: Any, optimizer: Any, scheduler: Any, step: int, meters: list[Meter], guard: NonFiniteGuard
) -> None:
    with atomic_folder(folder) as tmp:
        safetensors.torch.save_model(model, str(tmp / "model.safetensors"))
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "meters": [meter.sums for meter in meters],
            "skipped": [guard.in_a_row, guard.total],
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
    step: int = state["step"]
    return step

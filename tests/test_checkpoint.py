"""Checkpoints: killed, damaged or incomplete, the newest whole one is what training goes on from."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tso_fast.errors import OutputError
from tso_fast.training import checkpoint
from tso_fast.training.checkpoint import Checkpoints
from tso_fast.training.monitors import Meter, NonFiniteGuard

WEIGHTS = "shard-00001-model-00001-of-00001.safetensors"


class Trained:
    """A model of one layer and all that is saved with it."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.folder = folder / "checkpoint"
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.meter, self.notes = Meter(), {"last": 0}
        self.checkpoints = Checkpoints(
            self.folder,
            accelerator=Accelerator(cpu=True),
            model=self.model,
            optimizer=self.optimizer,
            scheduler=torch.optim.lr_scheduler.LinearLR(self.optimizer),
            meters=[self.meter],
            guard=NonFiniteGuard(folder, 3),
            notes=self.notes,
        )

    def save(self, step: int) -> torch.Tensor:
        """Makes a step, saves it and returns the weights."""
        self.model(torch.randn(2, 4)).square().sum().backward()
        self.optimizer.step()
        weights = self.model.weight.detach().clone()
        self.meter.sums += step
        self.notes["last"] = step
        with self.checkpoints:
            self.checkpoints.save(step)
            with torch.no_grad():  # training goes on meanwhile
                self.model.weight += 1
                self.optimizer.state[self.model.weight]["exp_avg"] += 1
                self.model.weight -= 1
                self.optimizer.state[self.model.weight]["exp_avg"] -= 1
        return weights

    def load(self) -> tuple[int, torch.Tensor]:
        return self.checkpoints.load(), self.model.weight.detach()


def saved(folder: Path) -> list[torch.Tensor]:
    """Weights after steps 2, 4 and 6, each of which was saved."""
    trained = Trained(folder)
    return [trained.save(step) for step in (2, 4, 6)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    assert names(tmp_path) == ["step-4", "step-6"]
    again = Trained(tmp_path, seed=1)
    step, found = again.load()
    assert step == again.notes["last"] == 6
    assert torch.equal(found, weights[2])
    assert Trained(tmp_path / "elsewhere").load()[0] == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the weights": lambda path: flip(path / WEIGHTS),
    "a bit of the rest": lambda path: flip(path / "state.json"),
    "half of the rest": lambda path: (path / "state.json").write_bytes((path / "state.json").read_bytes()[:100]),
    "no weights": lambda path: (path / WEIGHTS).unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half of the manifest": lambda path: (path / "manifest.json").write_text('{"state.json":'),
    "a manifest of brackets": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "another manifest": lambda path: (path / "manifest.json").write_text("[]"),
    "nothing": lambda path: [file.unlink() for file in path.iterdir()],  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoint/step-6")
    step, found = Trained(tmp_path, seed=1).load()
    assert step == 4
    assert torch.equal(found, weights[1])
    told = " ".join(capsys.readouterr().err.split())
    assert "step-6 is passed over" in told
    DAMAGES[damage](tmp_path / "checkpoint/step-4")
    fresh = Trained(tmp_path, seed=1)
    before = fresh.model.weight.detach().clone()
    assert fresh.load()[0] == 0
    assert torch.equal(fresh.model.weight, before)


def test_a_kill_while_one_is_written_or_removed_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tmp_path)
    weights = [trained.save(step) for step in (2, 4)]
    real, kills = shutil.rmtree, []

    def killed(path: Path, **options: Any) -> None:
        if Path(path).name == "step-2":  # half of it is gone
            (Path(path) / "state.json").unlink()
            kills.append(path)
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        trained.save(6)
    monkeypatch.undo()
    assert len(kills) == 1
    assert Trained(tmp_path, seed=1).load()[0] == 6
    real(tmp_path / "checkpoint/step-6")
    step, found = Trained(tmp_path, seed=1).load()
    assert step == 4
    assert torch.equal(found, weights[1])
    monkeypatch.setattr(checkpoint, "fingerprint", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained.save(8)
    assert ".tmp-step-8" in names(tmp_path)
    assert Trained(tmp_path, seed=1).load()[0] == 4
    assert ".tmp-step-8" not in names(tmp_path)


def test_a_full_disk_is_told_by_the_next_step_that_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(tmp_path)
    weights = trained.save(2)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    trained.checkpoints.save(4)
    with pytest.raises(OutputError, match=r"cannot write .*step-4: .*No space left on device"):
        trained.checkpoints.save(6)
    monkeypatch.undo()
    step, found = Trained(tmp_path, seed=1).load()
    assert step == 2
    assert torch.equal(found, weights)

"""Killed at any moment and started again, a run ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import resume_chain

pytestmark = pytest.mark.slow


def bytes_of(run: Path) -> dict[str, bytes]:
    """Every file whose content the run promises, run.json and the report aside."""
    names = ["model.safetensors", "metrics.jsonl"]
    for iteration in ("iter-1", "iter-2"):
        names += [f"{iteration}/{name}" for name in ("responses.jsonl", "verdicts.jsonl", "pairs.jsonl")]
        names += [f"{iteration}/policy/model.safetensors", f"{iteration}/reference/model.safetensors"]
    return {name: (run / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("chain")
    return folder, resume_chain.main(folder)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_file_ends_with_the_same_bytes(chain: tuple[Path, dict[str, int]], moment: str) -> None:
    folder, kills = chain
    # 2 iterations x (3 or 4 cells, responses, verdicts, pairs, checkpoints, policy, reference), and every commit
    assert kills[moment] > 40
    whole, resumed = bytes_of(folder / "whole"), bytes_of(folder / moment)
    assert [name for name in whole if whole[name] != resumed[name]] == []
    states = [json.loads((folder / name / "run.json").read_text()) for name in ("whole", moment)]
    assert states[0]["stages"] == states[1]["stages"]
    assert states[0]["manifest"] == states[1]["manifest"]


def test_nothing_temporary_is_left(chain: tuple[Path, dict[str, int]]) -> None:
    folder, _ = chain
    assert [p for p in folder.rglob("*") if ".tmp-" in p.name or p.name in ("parts", "checkpoint")] == []

"""Killed at any write and at any moment, and started again, a run ends with the same bytes and leaves nothing behind.

`benchmarks/kill_loop.py` says how; it does so 300 times, with engines in processes of their own too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_loop.py"


@pytest.fixture(scope="module")
def kill_loop() -> Any:
    spec = importlib.util.spec_from_file_location("kill_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["kill_loop"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare()
    return module


@pytest.mark.parametrize(("scenario", "kills"), [("judged", 28), ("lora", 14), ("sharded", 9), ("lora-2", 9)])
def test_a_killed_run_ends_as_if_nobody_had_killed_it(
    kill_loop: Any, scenario: str, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kill_loop.run_scenario(scenario, kills, tmp_path).total() == kills

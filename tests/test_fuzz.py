"""Everything that reads a user's files and arguments, fed with what is nearly right; `benchmarks/fuzz.py` says how, and
does so with 10,000 inputs each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
INPUTS = {
    "jsonl": 150, "array": 100, "gz": 80, "csv": 100, "parquet": 70, "verdicts": 500, "labels": 300,
    "label_studio": 100, "argilla": 100, "pairs": 500, "metrics": 250, "run": 250, "checkpoint": 50, "yaml": 30,
    "arguments": 30, "template": 250, "reply": 250,
}  # fmt: skip
"""Five hundred for each kind of file, in its several formats, and fewer where one takes long."""


@pytest.fixture(scope="module")
def fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_parser_is_fed(fuzz: Any) -> None:
    assert INPUTS.keys() == fuzz.PARSERS.keys()


@pytest.mark.parametrize("parser", INPUTS)
def test_an_input_is_taken_or_refused_and_none_is_lost(fuzz: Any, parser: str) -> None:
    outcomes = fuzz.fuzz(parser, INPUTS[parser])
    assert outcomes.total() >= INPUTS[parser]

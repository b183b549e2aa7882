"""The loop on a matrix of small real models, which trains within seconds, and recipes over it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tso_fast.config.parse import parse
from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.files.run import Run
from tso_fast.quickstart.build import Recipe, Size, build
from tso_fast.recipes import arguments
from tso_fast.trainer import train

SMALL = Recipe(
    seed=0,
    sizes={"s": Size(hidden=32, layers=1, ffn=64, steps=30), "m": Size(hidden=32, layers=2, ffn=64, steps=30)},
    versions=(0.5, 1.0),
    demonstrations=200,
    prompts=24,
    human_share=0.25,
    held_out=12,
    development=12,
)


def tiny_config(folder: Path) -> TrainConfig:
    """Two iterations over 24 prompts; runs with the same folder share what the same cells answer."""
    matrix = build(SMALL)
    return TrainConfig(
        output_dir=str(folder / "run"),
        response_store=str(folder / "store"),
        prompts=str(matrix / "prompts.jsonl"),
        eval_prompts=str(matrix / "held_out.jsonl"),
        cells=[CellConfig(path=str(matrix / name), version_rank=int(name[-1])) for name in ("s.v2", "m.v1", "m.v2")],
        verifier="toy_verifier:letters",
        num_iterations=2,
        max_completion_length=8,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
    )


def run_recipe(name: str, folder: Path, *, store: Path | None = None, **changes: Any) -> Run:
    """A run of a recipe over ``tiny_config``, without evaluation; ``changes`` are settings over those of the recipe."""
    base = dataclasses.replace(tiny_config(folder), response_store=str(store or folder / "store"), eval_prompts=None)
    given = {key: value for key, value in vars(base).items() if value is not None and key != "cells"}
    given["cells"] = [{"path": cell.path, "version_rank": cell.version_rank} for cell in base.cells]
    settings = [part for key, value in given.items() for part in (f"--{key}", _spelled(value))]
    return train(dataclasses.replace(parse("train", TrainConfig, [*settings, *arguments(name)]), **changes))


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

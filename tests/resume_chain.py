"""For test_resume.py: trains in forked children that are killed at every file that becomes visible, and at every shard
of responses that is stored.

Forking from a process that has trained once makes a start cost milliseconds instead of seconds, so every boundary can
be tried.
"""

from __future__ import annotations

import gc
import hashlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from helpers import fork, status_of

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.files.responses import ResponseStore, Row
from tso_fast.quickstart.build import Recipe, Size, build
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


def config(output_dir: Path) -> TrainConfig:
    folder = build(SMALL)
    return TrainConfig(
        output_dir=str(output_dir),
        prompts=str(folder / "prompts.jsonl"),
        eval_prompts=str(folder / "held_out.jsonl"),
        cells=[CellConfig(path=str(folder / name), version_rank=int(name[-1])) for name in ("s.v2", "m.v1", "m.v2")],
        verifier="toy_verifier:letters",
        num_iterations=2,
        max_completion_length=8,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=2,
        reference="ema",
        use_cpu=True,
    )


def key_of(source: Path, target: Path) -> str:
    """What becomes visible: run.json appears often, each time with other content."""
    content = hashlib.sha256(source.read_bytes()).hexdigest()[:12] if source.is_file() else ""
    return f"{target.name} {target.parent.name} {content}"


def killing_replace(seen_file: Path, moment: str) -> None:
    """From now on this process kills itself at the first file that no earlier process was killed at."""
    replace, add = os.replace, ResponseStore.add
    seen = set(seen_file.read_text().splitlines()) if seen_file.exists() else set()

    def dies(key: str, do: Callable[[], None]) -> None:
        if key in seen:
            return do()
        with open(seen_file, "a") as handle:
            handle.write(key + "\n")
        if moment == "after":
            do()
        os.kill(os.getpid(), signal.SIGKILL)

    def patched_replace(source: Path, target: Path) -> None:
        dies(key_of(Path(source), Path(target)), lambda: replace(source, target))

    def patched_add(self: ResponseStore, rows: Iterable[Row]) -> None:
        rows = list(rows)
        dies("add " + min(row[0] for row in rows).hex(), lambda: add(self, rows))

    os.replace = patched_replace
    ResponseStore.add = patched_add


def run_child(output_dir: Path, seen_file: Path, moment: str) -> int:
    """Trains in a child; 0 when it finished, -9 when it was killed."""

    def work() -> None:
        killing_replace(seen_file, moment)
        train(config(output_dir))

    return status_of(fork(work))


def main(folder: Path) -> dict[str, int]:
    """Trains into `whole`, and killed into `before` and `after`; how often either was killed."""
    train(config(folder / "whole"))
    # Collections in the children, of which training has several, would walk all that was imported.
    gc.collect()
    gc.freeze()
    kills = {"before": 0, "after": 0}
    for moment in kills:
        while (status := run_child(folder / moment, folder / f"seen-{moment}", moment)) != 0:
            assert status == -signal.SIGKILL, f"{moment}: ended with status {status} after {kills[moment]} kills"
            kills[moment] += 1
    return kills

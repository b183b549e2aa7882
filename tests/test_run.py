"""Files that appear whole or not at all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tso_fast.config.ranges import without_free
from tso_fast.config.settings import CellConfig, JudgeConfig, TrainConfig, to_dict
from tso_fast.errors import InputError, OutputError
from tso_fast.files.atomic import atomic_file, atomic_folder, write_json, write_jsonl
from tso_fast.files.run import BACKUP_FILE, RUN_FILE, Run, read_run, remove_run
from tso_fast.files.schedule import schedule
from tso_fast.types import Candidates, Prompt

VERSIONS = {"tso_fast": "0"}
FIXED = functools.partial(without_free, TrainConfig)


def open_run(folder: Path, **config: object) -> Run:
    return Run.open(folder, {"a": 1, **config}, {"cells.m": "00"}, VERSIONS, FIXED)


def some_prompts(n: int, text: str = "prompt") -> list[Candidates]:
    return [Candidates(prompt=Prompt(id=f"row-{i}", prompt=f"{text} {i}"), responses=()) for i in range(n)]


def begun(folder: Path, num_prompts: int, num_iterations: int, num_begun: int) -> None:
    """A run whose first iterations have responses."""
    with open_with(folder, num_prompts, num_iterations) as run:
        for t in range(1, num_begun + 1):
            run.commit(f"iter-{t}/generate", [], {})


def open_with(folder: Path, num_prompts: int, num_iterations: int, **options: Any) -> Run:
    config = {"num_iterations": num_iterations}
    return Run.open(folder, config, {}, VERSIONS, FIXED, some_prompts(num_prompts), **options)


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a.json") as handle:
        handle.write("half")
        _ = 1 / 0
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_whole_or_absent_and_replaces_an_old_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "policy") as tmp:
            (tmp / "weights").write_text(text)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "policy") as tmp:
        (tmp / "weights").write_text("half")
        _ = 1 / 0
    assert (tmp_path / "policy/weights").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_jsonl(tmp_path / "a.jsonl", [{"score": float("nan")}])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/x.json.*run the same command again"):
        write_json(tmp_path / "file/x.json", {})
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        open_run(tmp_path / "file")


def test_a_stage_counts_once_it_is_committed(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        write_jsonl(run / "iter-1/responses.jsonl", [{"a": 1}])
    with open_run(tmp_path / "run") as run:
        assert run.info("iter-1/generate") is None
        run.commit("iter-1/generate", [run / "iter-1/responses.jsonl"], {"responses": 1})
    with open_run(tmp_path / "run") as run:
        assert run.info("iter-1/generate") == {"responses": 1}
    entry = read_run(tmp_path / "run")["manifest"]["iter-1/responses.jsonl"]
    assert entry["size"] == len('{"a": 1}\n')
    assert len(entry["sha256"]) == 64


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_damage_drops_the_stage_and_what_follows(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with open_run(tmp_path / "run") as run:
        for name in ("one", "two", "three"):
            write_json(run / f"{name}.json", name)
            run.commit(f"iter-1/{name}", [run / f"{name}.json"], {})
    file = tmp_path / "run/two.json"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text('"tw' if damage == "short" else '"owt"\n')
    with open_run(tmp_path / "run") as run:
        assert [run.info(f"iter-1/{name}") for name in ("one", "two", "three")] == [{}, None, None]
    assert "stage iter-1/two is damaged" in caplog.text
    assert set(read_run(tmp_path / "run")["manifest"]) == {"one.json"}


def test_settings_that_only_show_may_change(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", logging_steps=1) as run:
        run.commit("iter-1/generate", [], {})
    open_run(tmp_path / "run", logging_steps=5).__exit__()
    assert read_run(tmp_path / "run")["config"]["logging_steps"] == 5  # the report shows what holds now
    with pytest.raises(InputError, match="beta: the run has None, given 1"):
        open_run(tmp_path / "run", beta=1)


def test_engines_places_and_batches_may_change_and_what_is_asked_may_not() -> None:
    """Also inside a cell, and inside the model of a judge."""
    cell = CellConfig(path="a", name="m", num_gpus=1)
    judge = JudgeConfig(kind="llm", model=CellConfig(path="j", name="j"))
    one = TrainConfig(output_dir="o", prompts="p", cells=[cell], judges=[judge])
    other = TrainConfig(
        output_dir="elsewhere/o",
        prompts="elsewhere/p",
        cells=[CellConfig(path="elsewhere/a", base="b", name="m", num_gpus=4, url="http://host/v1", served_name="x")],
        judges=[JudgeConfig(kind="llm", model=CellConfig(path="elsewhere/j", name="j"))],
        generator="vllm",
        vllm_args={"gpu_memory_utilization": 0.7},
        executor="ray",
        generation_batch_size=8,
        shard_size=16,
        use_cpu=True,
        gradient_checkpointing=True,
        attn_implementation="eager",
        impl="reference",
        on_bad_row="skip",
        max_skipped_steps=9,
        num_iterations=4,
    )
    assert FIXED(to_dict(one)) == FIXED(to_dict(other))
    for change in ({"seed": 1}, {"temperature": 0.5}, {"dtype": "bfloat16"}, {"verifier": "exact"}):
        assert FIXED(to_dict(one)) != FIXED({**to_dict(one), **change}), change
    cell.temperature = 0.5
    assert FIXED(to_dict(one)) != FIXED(to_dict(other))


def test_a_run_in_which_nothing_is_complete_takes_other_settings(tmp_path: Path) -> None:
    open_run(tmp_path / "run", beta=1).__exit__()
    open_run(tmp_path / "run", beta=2).__exit__()
    assert read_run(tmp_path / "run")["config"]["beta"] == 2


def test_an_existing_run_is_refused_or_deleted_on_demand(tmp_path: Path) -> None:
    asked: list[str] = []

    def answers(what: bool) -> Callable[[str], bool]:
        return lambda question: bool(asked.append(question)) or what

    remove_run(tmp_path / "run", answers(True))  # there is none: nobody is asked
    assert not asked
    begun(tmp_path / "run", 4, 2, 1)
    with pytest.raises(InputError, match=r"holds a run already, and resume is false.*--overwrite"):
        open_with(tmp_path / "run", 4, 2, may_resume=False)
    with pytest.raises(InputError, match=r"overwrite: .*run is kept"):
        remove_run(tmp_path / "run", answers(False))
    with open_with(tmp_path / "run", 4, 2) as run:
        assert run.info("iter-1/generate") == {}
        with pytest.raises(InputError, match="in use by another process"):
            remove_run(tmp_path / "run", answers(True))
    remove_run(tmp_path / "run", answers(True))
    assert not (tmp_path / "run").exists()
    assert all(str(tmp_path / "run") in question and "MiB" in question for question in asked)


def test_a_folder_that_is_refused_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty"):
        open_run(tmp_path)
    with pytest.raises(InputError, match="there are only 2 prompts"):
        open_with(tmp_path / "run", 2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# ---- more iterations, more prompts


def sizes(bounds: list[tuple[int, int]]) -> list[int]:
    return [end - first for first, end in bounds]


def test_mini_batches_are_shares_in_file_order() -> None:
    assert schedule(24, 2) == [(0, 12), (12, 24)]
    assert sizes(schedule(10, 3)) == [3, 4, 3]
    assert schedule(3, 3) == [(0, 1), (1, 2), (2, 3)]


def test_a_plan_that_nothing_changed_is_kept() -> None:
    """Shares of what is left would be cut elsewhere, and a resumed run would not be the uninterrupted one."""
    before = schedule(31, 3)
    assert schedule(31, 3, before, 1) == before


def test_more_prompts_go_to_the_iterations_to_come() -> None:
    before = schedule(24, 2)
    assert schedule(36, 3, before, 2) == [*before, (24, 36)]
    assert schedule(36, 4, before, 2) == [*before, (24, 30), (30, 36)]
    assert schedule(36, 2, before, 1) == [(0, 12), (12, 36)]


def test_more_iterations_take_the_mini_batches_over_again() -> None:
    a, b, c = before = schedule(30, 3)
    five = schedule(30, 5, before, 3)
    assert five == [a, b, c, a, b]
    assert schedule(30, 8, five, 5) == [a, b, c, a, b, c, a, b]
    assert schedule(40, 6, five, 5) == [*five, (30, 40)]
    assert schedule(30, 4, before, 1) == [a, (10, 17), (17, 23), (23, 30)]  # two thirds are not used yet


@pytest.mark.parametrize(
    ("num_prompts", "num_iterations", "message"),
    [
        (36, 3, r"got 3, but 3 iterations have begun and 12 prompts were in none of them; expected at least 4"),
        (24, 2, r"got 2, but 3 iterations have begun; expected at least 3"),
        (25, 5, r"got 5, but there are only 1 prompts for the 2 iterations after the first 3; expected at least one"),
    ],
)
def test_what_cannot_be_extended(num_prompts: int, num_iterations: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedule(num_prompts, num_iterations, schedule(24, 3), 3)


def test_a_run_keeps_the_mini_batches_of_what_has_begun(tmp_path: Path) -> None:
    begun(tmp_path / "run", 10, 2, 2)
    with open_with(tmp_path / "run", 16, 4) as run:
        assert run.mini_batches == [(0, 5), (5, 10), (10, 13), (13, 16)]
    with open_with(tmp_path / "run", 16, 4) as run:
        assert run.mini_batches == [(0, 5), (5, 10), (10, 13), (13, 16)]
    with pytest.raises(InputError, match=r"prompts: its content changed .* its first 16 prompts must stay"):
        open_with(tmp_path / "run", 15, 4)
    other = some_prompts(8) + some_prompts(8, "other")
    with pytest.raises(InputError, match=r"new ones go to the end"):
        Run.open(tmp_path / "run", {"num_iterations": 4}, {}, VERSIONS, FIXED, other)


# ---- a damaged run.json


DAMAGE: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "other keys": lambda text: json.dumps({"model": "m", "lr": 1}),
    "other types": lambda text: json.dumps({**json.loads(text), "stages": {"a": 1}}),
    "other info": lambda text: text.replace('"responses": 1', '"responses": "1"'),
    "other number": lambda text: text.replace('"responses": 1', '"responses": 2'),
    "no seal": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}),
    "no format": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "format"}),
    "nested": lambda text: "[" * 50_000,
    "bytes": lambda text: "\udcff",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_run_file_says_where_its_copy_is(tmp_path: Path, how: str) -> None:
    with open_run(tmp_path) as run:
        write_jsonl(run / "iter-1/responses.jsonl", [{"a": 1}])
        run.commit("iter-1/generate", [run / "iter-1/responses.jsonl"], {"responses": 1})
    file, backup = tmp_path / RUN_FILE, tmp_path / BACKUP_FILE
    whole = file.read_text()
    file.write_bytes(DAMAGE[how](whole).encode(errors="surrogateescape"))
    for reading in (lambda: read_run(tmp_path), lambda: open_run(tmp_path)):
        with pytest.raises(InputError, match=rf"run.json cannot be read: .*cp {backup} {file}$"):
            reading()
    file.write_bytes(backup.read_bytes())
    with open_run(tmp_path) as run:
        assert run.info("iter-1/generate") == {"responses": 1}
    for path in (file, backup):
        path.write_bytes(DAMAGE[how](whole).encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"restore it from a copy, or choose a new folder; with response_store"):
        read_run(tmp_path)


def test_an_unreadable_or_newer_run_file_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path / "run").__exit__()
    state = json.loads((tmp_path / "run/run.json").read_text())
    write_json(tmp_path / "run/run.json", {**state, "format": 99})
    with pytest.raises(InputError, match="format 99"):
        open_run(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        open_run(tmp_path / "run")
    with pytest.raises(InputError, match="expected the output_dir of a run"):
        read_run(tmp_path)

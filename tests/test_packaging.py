"""Regular, editable and source installs, the folder `kernels/`, and the direction of imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tso_fast"


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), cwd=folder / "copy")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the sdist, so whatever the sdist lacks shows."""
    folder = sdist.parent / "wheel"
    python(
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(sdist),
        cwd=sdist.parent,
    )
    return next(folder.glob("*.whl"))


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py"} <= names
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()} <= names


def test_wheel_installs_the_packages_under_their_names(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"tso_fast"}
    modules = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    data = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("templates/*.txt")}
    assert len(data) == 4
    data |= {"tso_fast/annotate/page.css", "tso_fast/annotate/page.js", "tso_fast/quickstart/quickstart.yaml"}
    assert modules | data | {"tso_fast/kernels/__init__.py", "tso_fast/py.typed"} <= set(names)
    assert any(name.startswith("tso_fast/_C.") for name in names)
    code = "import tso_fast, tso_fast.kernels, tso_fast._C; print(tso_fast.__file__, tso_fast._C.__file__)"
    shown = python("-c", code, cwd=tmp_path.parent, PYTHONPATH=str(tmp_path))
    assert shown.count(str(tmp_path)) == 2


def test_the_installed_package_leaves_the_name_kernels_free(tmp_path: Path) -> None:
    """transformers probes for a package `kernels`; ours must not answer, wherever a program is started."""
    code = (
        "import importlib.util, tso_fast.kernels; assert tso_fast.kernels.__version__ == '0.0.0'; "
        "spec = importlib.util.find_spec('kernels'); print(spec and spec.origin)"
    )
    assert str(ROOT) not in python("-c", code, cwd=tmp_path)


def test_transformers_imports_with_the_root_on_the_path() -> None:
    """Started in the checkout, `kernels/` does answer to the name; it must do no harm."""
    python("-c", "from transformers import AutoModelForCausalLM, LlamaForCausalLM", cwd=ROOT)


LEVELS = [
    {"errors", "seeds"},
    {"types", "config", "progress"},
    {"judges.constraints"},  # texts in, booleans out; records checks the constraints of a row by its table
    {"losses", "records", "scoring", "store", "response_store", "options"},
    {"reliability"},
    {"correction"},
    {"pairing", "batching"},
    {"logprob", "judges", "kernels"},
    {"policy", "monitors"},
    {"generators", "judges.implicit"},
    {"matrix", "checkpoint", "executors"},
    {"answering", "reference_policy", "environment", "evidence"},
    {"judges.llm"},
    {"judging"},
    {"stages"},
    {"optimization"},
    {"trainer", "single"},
    {"quickstart", "report", "annotate"},
    {"cli"},
]


def level_of(module: str) -> int:
    name = module.removeprefix("tso_fast.")
    for candidate in (name, name.partition(".")[0]):
        for level, names in enumerate(LEVELS):
            if candidate in names:
                return level
    raise AssertionError(f"{module} has no place in LEVELS")


def test_imports_go_one_way() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module == "tso_fast":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if isinstance(node, ast.ImportFrom) and node.module == "tso_fast":
                names = [f"tso_fast.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
            for name in names:
                if not name.startswith("tso_fast.") or name == "tso_fast._C":
                    continue
                same_package = module.split(".")[1] == name.split(".")[1]
                if not same_package and level_of(name) >= level_of(module):
                    wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_the_trainer_fits_on_a_few_pages() -> None:
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) < 300

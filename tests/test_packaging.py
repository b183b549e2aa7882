"""Regular, editable and source installs, the folder `kernels/`, and the direction of imports."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
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
    """Built from the sdist, so whatever the sdist lacks shows.

    The extension that is installed lies where the build would put its own, younger than the sources, and is taken as
    up to date: compiling it takes a minute, and was done to install it from the same sources, all of which the sdist
    holds.
    """
    folder = sdist.parent / "wheel"
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    source = sdist.parent / sdist.name.removesuffix(".tar.gz")
    extension = Path(importlib.import_module("tso_fast._C").__file__ or "")
    built = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/tso_fast" / extension.name
    built.parent.mkdir(parents=True)
    shutil.copyfile(extension, built)
    arguments = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    python("-m", "pip", "wheel", *arguments, cwd=sdist.parent)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py"} <= names
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()} <= names


@pytest.mark.slow
def test_wheel_installs_the_packages_under_their_names(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"tso_fast"}
    modules = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    data = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("templates/*.txt")}
    assert len(data) == 8
    data |= {"tso_fast/annotate/page.css", "tso_fast/annotate/page.js"}
    data |= {"tso_fast/quickstart/skills.yaml", "tso_fast/quickstart/writing.yaml"}
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


@pytest.mark.slow
def test_transformers_imports_with_the_root_on_the_path() -> None:
    """Started in the checkout, `kernels/` does answer to the name; it must do no harm."""
    python("-c", "from transformers import AutoModelForCausalLM, LlamaForCausalLM", cwd=ROOT)


def floors_of(text: str) -> list[list[str]]:
    """``a, b → c`` as [[a, b], [c]], the lowest first."""
    return [[name.strip() for name in floor.split(",")] for floor in text.split("→")]


def drawn_arrows() -> dict[str, list[list[str]]]:
    """What CONTRIBUTING.md draws: the floors of the whole package under "", and those inside each folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^What imports what.*?\n\n((?:    .*\n|\n)+)", text, re.M)
    assert block is not None
    whole, *folders = re.split(r"^    (\w+): ", block[1], flags=re.M)
    inside = {name: floors_of(line) for name, line in zip(folders[::2], folders[1::2], strict=True)}
    return {"": floors_of(whole), **inside}


def imports() -> dict[str, set[str]]:
    """Modules of ours that each module imports, wherever in its text; a folder's name is its ``__init__``."""
    files = {**{f: f.relative_to(PACKAGE) for f in PACKAGE.rglob("*.py")},
             **{f: Path("kernels") / f.name for f in (ROOT / "kernels").glob("*.py")}}  # fmt: skip
    modules = {file: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for file, path in files.items()}
    found: dict[str, set[str]] = {}
    for file, module in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tso_fast":
                full = {f"{node.module}.{alias.name}": node.module for alias in node.names}
                known = {f"tso_fast.{name}" for name in modules.values()}
                names |= {name if name in known else parent for name, parent in full.items()}
        names = {name.removeprefix("tso_fast.") for name in names if name.startswith("tso_fast.")}
        found[module] = (names & set(modules.values())) - {module}
    return {module: names for module, names in found.items() if module != "__init__"}


def wrong_arrows(floors: list[list[str]], arrows: Iterable[tuple[str, str]]) -> list[str]:
    floor = {name: level for level, names in enumerate(floors) for name in names}
    arrows = [(a, b) for a, b in arrows if a != b]
    unknown = {name for arrow in arrows for name in arrow} - set(floor)
    assert not unknown, f"{sorted(unknown)} have no place in CONTRIBUTING.md"
    return [f"{a} imports {b}" for a, b in arrows if floor[a] <= floor[b]]


def test_imports_follow_the_arrows_of_contributing() -> None:
    drawn, found = drawn_arrows(), imports()
    everything = [(a.split(".")[0], b.split(".")[0]) for a, names in found.items() for b in names]
    assert wrong_arrows(drawn.pop(""), everything) == []
    folders = {name.split(".")[0] for name in found if "." in name}
    assert set(drawn) == folders
    for folder, floors in drawn.items():
        inside = [
            tuple(name.removeprefix(f"{folder}.") if name != folder else "__init__" for name in arrow)
            for arrow in ((a, b) for a, names in found.items() for b in names)
            if all(name.split(".")[0] == folder for name in arrow)
        ]
        assert wrong_arrows(floors, inside) == [], folder


def test_an_arrow_the_wrong_way_is_seen() -> None:
    floors = [["errors"], ["files", "config"], ["trainer"]]
    assert wrong_arrows(floors, [("trainer", "files"), ("files", "errors")]) == []
    assert wrong_arrows(floors, [("files", "config"), ("errors", "trainer")]) == [
        "files imports config",
        "errors imports trainer",
    ]


def test_the_trainer_fits_on_a_few_pages() -> None:
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) < 300

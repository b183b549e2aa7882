"""The benchmark suites of a checkout, as ``tso-fast bench`` lists and runs them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tso_fast.errors import InputError, did_you_mean

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
USAGE = """usage: tso-fast bench [SUITE [--option value ...]]

Lists the benchmark suites, or runs one; tso-fast bench SUITE --help tells what it takes.
"""


def suites() -> dict[str, Path]:
    """Scripts by the names of their suites.

    Raises:
        InputError: this is no checkout, so that they are not here.
    """
    found = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    if not found:
        raise InputError(
            f"bench: {FOLDER} has no suites, which are in the repository and not in an installed package; "
            "clone it and install it with pip install -e ."
        )
    return found


def bench(arguments: Sequence[str]) -> None:
    """Lists the suites, or becomes the one that is named.

    Raises:
        InputError: no suite is called so, or there are none here.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    known = suites()
    if not arguments:
        for name, path in known.items():
            print(f"  {name:<14}{_title(path)}")
        return
    if arguments[0] not in known:
        raise InputError(
            f"bench: got {arguments[0]!r}{did_you_mean(arguments[0], known)}; expected one of {', '.join(known)}"
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(known[arguments[0]]), *arguments[1:]])


def _title(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0] if text else ""

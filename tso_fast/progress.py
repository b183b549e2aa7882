"""What commands show: consoles, and progress as bars on a terminal, as one line per stage elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WHOLE = 10_000
"""Columns of a pipe or a file: wider than any table or line, so that none is folded."""


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def make_console(**options: Any) -> Console:
    """A console as wide as its terminal, or as ``COLUMNS`` says; in a pipe or a file every line stays whole.

    Text is printed as it is: names of models, prompts and paths may look like Rich's markup, or like emoji codes.
    """
    console = Console(markup=False, emoji=False, highlight=False, **options)
    if not console.is_jupyter and not console.file.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        console.size = (WHOLE, 25)  # the height too, without which a TERM of `dumb` means 80 columns
    return console


# Not on stdout, which carries results and can be piped. Only the first of several processes prints.
console = make_console(stderr=True, quiet=not is_first_process())


def confirm(question: str) -> bool:
    """The answer of the person at the terminal, yes or no; where there is none, no."""
    if not sys.stdin.isatty():
        console.print(f"{question} Nobody is here to answer, so it is not done")
        return False
    return console.input(f"{question} [y/N] ", markup=False, emoji=False).strip().lower() in ("y", "yes")


def spelled_out(info: Mapping[str, Any]) -> str:
    """``temperature 0.7, in buffer 12``."""
    told = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in info.items())
    return ", ".join(told).replace("_", " ")


@contextlib.contextmanager
def progress_bar(title: str, total: int, note: Callable[[], str] = lambda: "") -> Iterator[Callable[[int], None]]:
    """Shows progress over ``total`` items; yields ``advance(n)``. ``note()`` is appended at the end."""
    start = time.perf_counter()
    if console.is_terminal and not console.quiet:
        columns = (
            TextColumn("{task.description:<44}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda n: progress.advance(task, n)
    else:
        yield lambda n: None
    seconds = time.perf_counter() - start
    console.print(f"{title:<44} {seconds:7.1f} s  {note()}")

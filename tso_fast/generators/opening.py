"""Opens the engine of a specification, and looks beforehand whether there is one."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Mapping

from tso_fast.errors import InputError
from tso_fast.generators.engine import Engine, EngineSpec, Kind


def check_available(kind: Kind) -> None:
    """Looks for the library of an engine, before anything is done for it.

    Raises:
        InputError: it is not installed.
    """
    if kind == "openai":
        import tso_fast.generators.openai_server  # noqa: F401 raises
    elif kind == "vllm" and importlib.util.find_spec("vllm") is None:
        from tso_fast.generators.vllm_engine import INSTALL

        raise InputError(f"generator: vLLM is not installed. {INSTALL}")


def prove_models(spec: EngineSpec) -> None:
    """Loads a cell of each configuration, unless one did before in this process, and sees whether it answers rightly.

    Raises:
        InputError: a cell cannot be loaded, or is no model that can be used.
    """
    from tso_fast.generators.hf import HFEngine

    with contextlib.closing(HFEngine(spec)) as engine:
        engine.prove()


def open_engine(
    spec: EngineSpec,
    *,
    own_process: bool = False,
    environment: Mapping[str, str] | None = None,
    log: str | None = None,
    stopped: threading.Event | None = None,
) -> Engine:
    """An engine that is ready to answer.

    Args:
        own_process: run ``hf`` in its own process too.
        environment: more variables for that process, such as CUDA_VISIBLE_DEVICES.
        log: file to which the process's output is appended; default: a temporary one.
        stopped: once it is set, that process ends at once.

    Raises:
        InputError: the engine cannot run here, e.g. a library is missing or a folder has no model.
        EngineError: the engine did not start; contains its last output.
    """
    if spec.kind == "openai":
        from tso_fast.generators.openai_server import OpenAIEngine

        return OpenAIEngine(spec)
    if spec.kind == "vllm" or own_process:
        from tso_fast.generators.process import EngineProcess

        return EngineProcess(spec, environment=environment, log=log, stopped=stopped)
    from tso_fast.generators.hf import HFEngine

    return HFEngine(spec)

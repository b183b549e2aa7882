"""Which engine answers for a specification."""

from __future__ import annotations

from collections.abc import Mapping

from tso_fast.generators.engine import Engine, EngineSpec


def open_engine(
    spec: EngineSpec, *, own_process: bool = False, environment: Mapping[str, str] | None = None, log: str | None = None
) -> Engine:
    """An engine that is ready to answer.

    Args:
        own_process: also ``hf`` in a process of its own.
        environment: more variables for that process, such as CUDA_VISIBLE_DEVICES.
        log: file that the process's output is appended to; default: a temporary one.

    Raises:
        InputError: what was asked for cannot work here: a library is missing, a folder is no model.
        EngineError: the engine did not start; with its last words.
    """
    if spec.kind == "openai":
        from tso_fast.generators.openai_server import OpenAIEngine

        return OpenAIEngine(spec)
    if spec.kind == "vllm" or own_process:
        from tso_fast.generators.process import EngineProcess

        return EngineProcess(spec, environment=environment, log=log)
    from tso_fast.generators.hf import HFEngine

    return HFEngine(spec)

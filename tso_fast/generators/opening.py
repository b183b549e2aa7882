"""Opens the engine of a specification."""

from __future__ import annotations

from collections.abc import Mapping

from tso_fast.generators.engine import Engine, EngineSpec


def open_engine(
    spec: EngineSpec, *, own_process: bool = False, environment: Mapping[str, str] | None = None, log: str | None = None
) -> Engine:
    """An engine that is ready to answer.

    Args:
        own_process: run ``hf`` in its own process too.
        environment: more variables for that process, such as CUDA_VISIBLE_DEVICES.
        log: file to which the process's output is appended; default: a temporary one.

    Raises:
        InputError: the engine cannot run here, e.g. a library is missing or a folder has no model.
        EngineError: the engine did not start; contains its last output.
    """
    if spec.kind == "openai":
        from tso_fast.generators.openai_server import OpenAIEngine

        return OpenAIEngine(spec)
    if spec.kind == "vllm" or own_process:
        from tso_fast.generators.process import EngineProcess

        return EngineProcess(spec, environment=environment, log=log)
    from tso_fast.generators.hf import HFEngine

    return HFEngine(spec)

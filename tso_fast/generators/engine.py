"""Requests, answers and the interface that every engine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tso_fast.errors import InputError
from tso_fast.types import Cell, FinishReason, TopLogprobs

Kind = Literal["hf", "vllm", "openai"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options; temperature 0 is greedy, top_p 1 and top_k 0 keep every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end a response. They are left out of its text, but their tokens are part of its tokens."""
    top_logprobs: int = 0
    """Number of likeliest first tokens to report; an engine may report fewer."""

    @property
    def is_plain(self) -> bool:
        """Whether the tokens are greedy or sampled from the model's own distribution."""
        return self.temperature == 0 or (self.temperature == 1 and self.top_p == 1 and self.top_k == 0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for one response, which depends on these fields only, not on its batch, order or shard."""

    key: bytes
    """Key of the answer in the store, see ``files.responses.response_key``; unique within an engine."""
    cell: str
    """Name of the cell that should answer."""
    token_ids: tuple[int, ...]
    """The prompt, up to where the response starts."""
    seed: int
    """0 .. 2**63 - 1."""
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A sampled response, end-of-sequence token included."""

    key: bytes
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprob: float | None
    """Log-prob of the tokens under the sampling distribution (the model's own if greedy), nats; None: not reported."""
    top_logprobs: TopLogprobs | None = None
    """Likeliest tokens at the first position; None: not requested, or the engine cannot report them."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request that this engine can never answer, such as a prompt longer than a server's context."""

    key: bytes
    reason: str


class Engine(Protocol):
    """Models ready to answer; used by one thread.

    An engine that may run in its own process calls ``self.on_progress(is_loading)`` after every step and before it
    loads weights; the process that watches it replaces that method.

    ``collect`` and ``submit`` raise ``EngineError`` if the engine is dead or silent beyond its timeout. It then gives
    no more answers, and the requests that are still open must go to another engine.
    """

    def submit(self, requests: Sequence[Request]) -> None:
        """Adds requests and returns at once; the requests of one call are one shard."""
        ...

    def collect(self) -> list[Completion | Refusal]:
        """Waits for one or more answers, in any order. Empty: no request is open.

        Raises:
            InputError: a cell's weights are damaged.
        """
        ...

    def close(self) -> None:
        """Frees the models and ends every process of the engine; may be called twice."""
        ...


@dataclass(frozen=True, kw_only=True)
class Server:
    """Address of a cell for ``openai``."""

    url: str
    """Base URL of the API, such as ``http://127.0.0.1:8000/v1``."""
    model: str
    """The cell's name on the server."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Everything needed to open an engine, in any process on any node."""

    kind: Kind
    cells: tuple[Cell, ...]
    """Cells to answer for; for ``vllm``, all of one architecture."""
    tokenizer: str
    """Folder of the tokenizer that all cells share."""
    dtype: str
    """float32, bfloat16 or float16."""
    attn_implementation: str = "sdpa"
    context: int | None = None
    """Maximum number of tokens in prompt and response together."""
    use_cpu: bool = False
    batch_size: int = 64
    """Maximum number of sequences that ``hf`` runs at once."""
    start_timeout_s: float = 600.0
    timeout_s: float = 300.0
    """Longest time without an answer: from an engine with work, or from a server for one request."""
    num_gpus: int = 0
    """Number of GPUs per engine; ``vllm`` splits its tensors over them."""
    batch_invariant: bool = False
    """Whether vLLM on GPUs uses kernels whose results do not depend on the batch."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """More arguments for vLLM's ``LLM``."""
    servers: Mapping[str, Server] = field(default_factory=dict)
    """Servers of ``openai``, by cell name."""
    max_concurrency: int = 64
    """Maximum number of requests that ``openai`` has in flight."""
    max_retries: int = 5
    """Maximum number of retries of one request to a server."""

    @property
    def is_client(self) -> bool:
        """Whether the models run elsewhere, so that the engine needs no GPUs or place here."""
        return self.kind == "openai"

    @property
    def names(self) -> str:
        """Names of the cells, for messages."""
        return ", ".join(cell.name for cell in self.cells)


def generate(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    """Submits all requests and waits; returns completions in the order of the requests.

    Raises:
        InputError: a request was refused.
    """
    requests = list(requests)
    answers: dict[bytes, Completion] = {}
    engine.submit(requests)
    while found := engine.collect():
        for answer in found:
            if isinstance(answer, Refusal):
                raise InputError(answer.reason)
            answers[answer.key] = answer
    return [answers[request.key] for request in requests]

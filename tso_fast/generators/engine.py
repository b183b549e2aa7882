"""What every engine takes and gives back, whatever runs the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tso_fast.errors import InputError
from tso_fast.types import Cell, FinishReason, TopLogprobs

Kind = Literal["hf", "vllm", "openai"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample; temperature 0 is greedy, top_p 1 and top_k 0 keep every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end a response. They are no part of its text; the tokens that complete one are part of its tokens."""
    top_logprobs: int = 0
    """How many of the likeliest first tokens to tell; an engine may tell fewer."""

    @property
    def is_plain(self) -> bool:
        """Whether the model's own distribution is what is sampled from, or all that is asked of it when greedy."""
        return self.temperature == 0 or (self.temperature == 1 and self.top_p == 1 and self.top_k == 0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response wanted; it depends on these fields, not on its batch, order or shard."""

    key: bytes
    """What the answer is stored under, ``response_store.Keys``; distinct within an engine."""
    cell: str
    """Name of the cell that answers."""
    token_ids: tuple[int, ...]
    """The prompt, up to where the response starts."""
    seed: int
    """0 .. 2**63 - 1."""
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was sampled, end-of-sequence token included."""

    key: bytes
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprob: float | None
    """Under the sampling distribution (under the model's own when greedy), nats; None: a server that does not say."""
    top_logprobs: TopLogprobs | None = None
    """Of the first position; None: not asked for, or the engine cannot tell."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request that this engine can not answer, now or later, such as a prompt beyond a server's context."""

    key: bytes
    reason: str


class Engine(Protocol):
    """Models ready to answer. Used by one thread.

    An engine that may run in a process of its own calls ``self.on_progress(is_loading)`` after every step and before it
    loads weights; whoever watches it replaces that method.

    ``collect`` and ``submit`` raise ``EngineError`` when the engine is dead or silent beyond its timeout: then nothing
    more comes from it, and what was submitted and not collected is for another engine.
    """

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes more work and returns at once; the requests of one call are one shard."""
        ...

    def collect(self) -> list[Completion | Refusal]:
        """Waits for an answer or more of what was submitted, in any order. Empty: there is none to wait for.

        Raises:
            InputError: a cell's weights are damaged.
        """
        ...

    def close(self) -> None:
        """Frees the models and ends every process of the engine; may be called twice."""
        ...


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where ``openai`` finds a cell."""

    url: str
    """Base of the API, such as ``http://127.0.0.1:8000/v1``."""
    model: str
    """The cell's name on the server."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """All that an engine needs, so that any process on any node can open it."""

    kind: Kind
    cells: tuple[Cell, ...]
    """Of ``vllm``: of one architecture."""
    tokenizer: str
    """Folder of the tokenizer that all cells share."""
    dtype: str
    """float32, bfloat16 or float16."""
    attn_implementation: str = "sdpa"
    context: int | None = None
    """Most tokens of prompt and response together."""
    use_cpu: bool = False
    batch_size: int = 64
    """Most sequences that ``hf`` runs at once."""
    start_timeout_s: float = 600.0
    timeout_s: float = 300.0
    """Longest silence: of an engine with work, of a server to one request."""
    num_gpus: int = 0
    """GPUs that one engine takes; ``vllm`` splits its tensors over them."""
    batch_invariant: bool = False
    """vLLM on GPUs: kernels whose results do not depend on the batch."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's ``LLM``."""
    servers: Mapping[str, Server] = field(default_factory=dict)
    """Of ``openai``, by cell name."""
    max_concurrency: int = 64
    """Requests that ``openai`` has in flight."""
    max_retries: int = 5
    """Of one request to a server."""

    @property
    def is_client(self) -> bool:
        """It takes no room: its models run elsewhere."""
        return self.kind == "openai"

    @property
    def names(self) -> str:
        """Of the cells, for people."""
        return ", ".join(cell.name for cell in self.cells)


def generate(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    """Submits all and waits for all; completions in the order of the requests.

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

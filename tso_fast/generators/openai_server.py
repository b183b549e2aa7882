"""``openai``: a client of servers that speak the OpenAI API, mainly vLLM's; tokens in, tokens out.

It uses httpx2, which transformers' hub client also installs, instead of the ``openai`` package. That package retries
neither a body that is not JSON nor one without choices, so only its POST would be used. It also reads more environment
variables than the key (base URL, organisation) and describes the machine in headers.

Only OPENAI_API_KEY is read from the environment. Proxies are ignored: the servers run the user's own weights, often on
this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from tso_fast.errors import EngineError, InputError, did_you_mean
from tso_fast.generators.engine import Completion, EngineSpec, Refusal, Request, Sampling
from tso_fast.models.load import end_token_ids, load_tokenizer
from tso_fast.types import Cell, TopLogprobs

try:
    import httpx2
except ImportError as error:
    raise InputError("engine openai needs httpx2; pip install 'tso-fast[openai]'") from error

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_WAIT_S = 60.0
"""Longest pause between two attempts, even if Retry-After asks for more."""
CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 3.0
"""Seconds to keep idle connections. uvicorn closes them after 5 s, and reusing one at that moment costs a retry."""
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
REFUSED = frozenset({400, 413, 422})
"""Statuses that concern a single request. Not 404: a missing model is missing for every request."""
MAX_LOGPROBS = 5
"""Maximum in OpenAI's API; vLLM's server accepts 20."""
NEUTRAL: dict[str, Any] = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Neutral values, sent because vLLM fills in missing fields from the model's generation_config.json."""
EXTENSIONS = frozenset({*NEUTRAL, "top_k", "stop_token_ids", "skip_special_tokens", "return_token_ids"})
"""Fields that are not in OpenAI's API, or have no effect there."""


class _RejectedError(Exception):
    """An error answer that a retry would only repeat."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _BadAnswerError(Exception):
    """A bad answer that a retry may fix."""


@dataclass(kw_only=True)
class _Endpoint:
    """One cell on its server."""

    cell: Cell
    base: httpx2.URL
    """Base URL without user and password."""
    auth: tuple[str, str] | None
    model: str
    end_tokens: tuple[int, ...]
    left_out: frozenset[str] = frozenset()
    """Fields that the server does not accept."""


class OpenAIEngine:
    """``Engine`` over HTTP: ``max_concurrency`` requests in flight, over all cells and servers.

    A request is tried ``1 + max_retries`` times, for ``timeout_s`` each, with at most MAX_WAIT_S between. An attempt
    that times out is repeated only if its server answered another request meanwhile; so a server that hangs raises
    after ``timeout_s``, or after twice that if it hangs soon after an answer.

    Seeds are sent unchanged; vLLM accepts 64 bits, of which torch's CPU generator uses the lower 32.

    Args:
        backoff_s: the pause before retry k is random, up to ``backoff_s * 2**k``.

    Raises:
        InputError: the server has no such model, the key is not accepted, or the address is invalid.
        EngineError: the server does not answer.
    """

    def __init__(self, spec: EngineSpec, *, backoff_s: float = 0.5) -> None:
        self._spec, self._backoff_s = spec, backoff_s
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("OPENAI_API_KEY: holds characters that no key has; expected printable ASCII")
        self._tokenizer: Any = load_tokenizer(spec.tokenizer)
        self._endpoints = {cell.name: _endpoint(cell, spec, self._tokenizer) for cell in spec.cells}
        _check_distinct(self._endpoints)
        # Jitter has its own random stream, since the user may have seeded the global one.
        self._random = random.Random()
        self._heard: dict[httpx2.URL, float] = {}
        """Time of each server's last answer."""
        self._num_answered = self._num_retokenised = 0
        self._num_waited_for = 0
        self._answers: queue.SimpleQueue[Completion | Refusal | None] = queue.SimpleQueue()
        """None: the thread has ended, and ``_error`` says why."""
        self._error: BaseException | None = None
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="tso-fast openai", daemon=True)
        self._thread.start()
        try:
            opened.result()
        except BaseException:
            self.close()
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        if self._error is not None:
            raise self._error
        with contextlib.suppress(RuntimeError):  # the loop has just closed: collect reports why
            self._loop.call_soon_threadsafe(self._take, list(requests))
        self._num_waited_for += len(requests)

    def collect(self) -> list[Completion | Refusal]:
        """See ``Engine``. Answers that arrived before the engine failed are returned first."""
        if not self._num_waited_for:
            return []
        answers: list[Completion | Refusal] = []
        while not answers or not self._answers.empty():
            answer = self._answers.get()
            if answer is None:
                self._answers.put(None)  # for the next call
                if not answers and self._error is not None:
                    raise self._error
                break
            answers.append(answer)
        self._num_waited_for -= len(answers)
        return answers

    def close(self) -> None:
        if self._error is None:
            self._error = EngineError("the engine is closed")
        with contextlib.suppress(AttributeError, RuntimeError):  # the thread's loop has not started, or has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(timeout=5.0)  # a name lookup in progress cannot be cancelled
        if self._num_retokenised:
            logger.warning(
                "%d of %d responses came without token ids and were tokenised from their text, which may give others "
                "than were sampled; vLLM's server tells them",
                self._num_retokenised,
                self._num_answered,
            )
            self._num_retokenised = 0

    # --- in the thread ---

    def _run(self, opened: Future[None]) -> None:
        failure: BaseException = EngineError("the engine is closed")
        try:
            asyncio.run(self._serve(opened))
        except* asyncio.CancelledError:
            pass
        except* Exception as group:
            failure = group.exceptions[0]
            while isinstance(failure, BaseExceptionGroup):
                failure = failure.exceptions[0]
        if opened.done():
            self._error = self._error or failure
            self._answers.put(None)
        else:
            opened.set_exception(failure)

    async def _serve(self, opened: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[Request] = asyncio.Queue()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        limit = self._spec.max_concurrency
        async with httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            # _call measures the time of an attempt: httpx2 would restart its timeout with every byte.
            timeout=httpx2.Timeout(None, connect=min(CONNECT_TIMEOUT_S, self._spec.timeout_s)),
            limits=httpx2.Limits(max_keepalive_connections=limit, keepalive_expiry=KEEP_ALIVE_S),
            trust_env=False,
        ) as self._client:
            try:
                async with asyncio.timeout(self._spec.start_timeout_s):
                    await self._open()
            except TimeoutError:
                raise EngineError(f"the servers were not ready in {self._spec.start_timeout_s:g} s") from None
            opened.set_result(None)
            async with asyncio.TaskGroup() as group:
                for _ in range(limit):
                    group.create_task(self._work())

    def _take(self, requests: list[Request]) -> None:
        for request in requests:
            self._inbox.put_nowait(request)

    async def _work(self) -> None:
        while True:
            request = await self._inbox.get()
            try:
                answer: Completion | Refusal = await self._complete(self._endpoints[request.cell], request)
            except _RejectedError as error:
                if error.status not in REFUSED:
                    raise EngineError(str(error)) from None
                answer = Refusal(key=request.key, reason=str(error))
            self._answers.put(answer)

    # --- opening ---

    async def _open(self) -> None:
        listed: dict[httpx2.URL, list[str]] = {}
        for endpoint in self._endpoints.values():
            try:
                if endpoint.base not in listed:
                    listed[endpoint.base] = await self._call(endpoint, "GET", "models", _models)
                if endpoint.model not in listed[endpoint.base]:
                    await self._load_adapter(endpoint, listed[endpoint.base])
                await self._probe(endpoint)
            except _RejectedError as error:
                raise InputError(f"{error}{self._advice(error.status)}") from None

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            is_set = "is not accepted" if self._key else "is not set"
            return f"; the environment variable OPENAI_API_KEY {is_set}"
        return "; expected the base of an OpenAI API with /completions, such as http://127.0.0.1:8000/v1"

    async def _load_adapter(self, endpoint: _Endpoint, listed: list[str]) -> None:
        cell, model = endpoint.cell, endpoint.model
        missing = (
            f"servers.{cell.name}: no model {model!r} at {endpoint.base}{did_you_mean(model, listed)}; it has "
            f"{', '.join(listed) or 'none'}"
        )
        if not cell.is_adapter:
            raise InputError(missing)
        body = {"lora_name": model, "lora_path": str(cell.path.resolve())}
        try:
            await self._call(endpoint, "POST", "load_lora_adapter", lambda response: None, body)
        except _RejectedError as error:
            raise InputError(
                f"{missing}; start it with --enable-lora --lora-modules {model}={cell.path}, or with "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and that folder in its reach ({error})"
            ) from None
        logger.info("%s: loaded adapter %s as %s", endpoint.base, cell.path, model)

    async def _probe(self, endpoint: _Endpoint) -> None:
        """Requests one token, to learn which fields the server accepts and that it uses the prompt unchanged."""
        ask = Request(
            key=b"",
            cell=endpoint.cell.name,
            token_ids=endpoint.end_tokens[:1],
            seed=2**63 - 1,
            sampling=Sampling(max_tokens=1),
        )
        reasons = []
        for left_out in (frozenset(), EXTENSIONS, EXTENSIONS | {"logprobs"}):
            endpoint.left_out = frozenset(left_out)
            try:
                answer = await self._call(endpoint, "POST", "completions", _json, self._body(endpoint, ask))
            except _RejectedError as error:
                if error.status not in REFUSED:
                    raise
                reasons.append(str(error))
                continue
            break
        else:
            raise InputError(reasons[-1])
        if reasons:
            logger.warning(
                "%s: %s takes no %s: the server's own settings hold for these, and top_k is refused (%s)",
                endpoint.base,
                endpoint.model,
                ", ".join(sorted(endpoint.left_out)),
                reasons[0],
            )
        usage = answer.get("usage") if isinstance(answer, dict) else None
        num_read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(num_read, int) and num_read > 1:
            raise InputError(
                f"{endpoint.base}: {endpoint.model} read a prompt of 1 token id as {num_read} tokens; "
                "expected a server that takes token ids and adds none"
            )

    # --- one request ---

    async def _complete(self, endpoint: _Endpoint, request: Request) -> Completion | Refusal:
        cell, num_prompt, max_tokens = endpoint.cell, len(request.token_ids), request.sampling.max_tokens
        limits = [limit for limit in (self._spec.context, cell.context) if limit is not None]
        if limits and num_prompt + max_tokens > min(limits):
            reason = (
                f"cell {cell.name}: a prompt of {num_prompt} tokens and a response of up to {max_tokens} exceed "
                f"its context of {min(limits)} tokens"
            )
            return Refusal(key=request.key, reason=reason)
        if request.sampling.top_k and request.sampling.temperature and "top_k" in endpoint.left_out:
            return Refusal(key=request.key, reason=f"{endpoint.base}: {endpoint.model} takes no top_k")
        body = self._body(endpoint, request)
        return await self._call(
            endpoint, "POST", "completions", lambda response: self._completion(endpoint, request, response), body
        )

    def _body(self, endpoint: _Endpoint, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        is_greedy = sampling.temperature == 0
        body = {
            "model": endpoint.model,
            "prompt": list(request.token_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if is_greedy else sampling.top_p,
            "top_k": -1 if is_greedy or not sampling.top_k else sampling.top_k,
            "seed": request.seed,
            "logprobs": min(sampling.top_logprobs, MAX_LOGPROBS),
            "stop_token_ids": list(endpoint.end_tokens),
            "skip_special_tokens": True,
            "return_token_ids": True,
            **NEUTRAL,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return {name: value for name, value in body.items() if name not in endpoint.left_out}

    def _completion(self, endpoint: _Endpoint, request: Request, response: httpx2.Response) -> Completion | Refusal:
        """Raises _BadAnswerError."""
        answer = _json(response)
        try:
            choice = answer["choices"][0]
            text, finish_reason = choice["text"], choice["finish_reason"]
            token_ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
        except (LookupError, TypeError, AttributeError):
            raise _BadAnswerError(f"not a completion: {response.text}") from None
        if finish_reason == "content_filter":
            return Refusal(key=request.key, reason=f"{endpoint.base}: its content filter ended the response")
        if not isinstance(text, str) or finish_reason not in ("stop", "length"):
            raise _BadAnswerError(f"finish_reason {finish_reason!r}, expected stop or length: {response.text}")
        if prompt not in (None, list(request.token_ids)):
            raise EngineError(
                f"{endpoint.base}: {endpoint.model} changed a prompt of {len(request.token_ids)} tokens; "
                "expected a server that leaves token ids alone"
            )
        is_retokenised = token_ids is None
        if is_retokenised:
            token_ids = self._retokenise(endpoint, text, finish_reason, choice.get("stop_reason"))
        if not (isinstance(token_ids, list) and token_ids and all(isinstance(i, int) for i in token_ids)):
            raise _BadAnswerError(f"no token ids: {response.text}")
        if finish_reason == "length" and not is_retokenised and len(token_ids) < request.sampling.max_tokens:
            # vLLM's server silently lowers max_tokens to fit its context.
            return Refusal(
                key=request.key,
                reason=f"{endpoint.base}: {endpoint.model} ended the response after "
                f"{len(token_ids)} of {request.sampling.max_tokens} tokens; prompt "
                "and response exceed the server's context",
            )
        self._num_answered += 1
        self._num_retokenised += is_retokenised
        logprob, top_logprobs = None, None
        if request.sampling.is_plain:
            # vLLM's server reports log-probs under the model's own distribution (``--logprobs-mode raw_logprobs``, the
            # default) or the sampling distribution (``processed_logprobs``), and not which; here both are the same.
            logprob = _logprob(choice.get("logprobs"), len(token_ids))
            top_logprobs = _top_logprobs(choice.get("logprobs"), request.sampling.top_logprobs)
        return Completion(
            key=request.key,
            token_ids=tuple(token_ids),
            text=text,
            finish_reason=finish_reason,
            logprob=logprob,
            top_logprobs=top_logprobs,
        )

    def _retokenise(self, endpoint: _Endpoint, text: str, finish_reason: str, stop_reason: object) -> list[int]:
        """Token ids of a text. ``stop_reason`` is vLLM's: the text or token that ended the response; None: the model's
        own end token did."""
        if isinstance(stop_reason, str):
            text, end = text + stop_reason, []
        else:
            end = [stop_reason if isinstance(stop_reason, int) else endpoint.end_tokens[0]]
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return [*ids, *end] if finish_reason == "stop" else ids

    async def _call(
        self,
        endpoint: _Endpoint,
        method: str,
        path: str,
        parse: Callable[[httpx2.Response], T],
        body: dict[str, Any] | None = None,
    ) -> T:
        """Sends a request, with retries, and returns ``parse`` of the answer.

        Raises:
            _RejectedError: the server rejects the request.
            EngineError: all attempts failed, or the server hangs.
        """
        base, timeout_s = endpoint.base, self._spec.timeout_s
        url = base.copy_with(path=f"{base.path.rstrip('/')}/{path}")
        last, wait_s = "", 0.0
        for attempt in range(1 + self._spec.max_retries):
            await asyncio.sleep(wait_s)
            wait_s = self._random.uniform(0, min(MAX_WAIT_S, self._backoff_s * 2**attempt))
            started = time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    response = await self._client.request(method, url, json=body, auth=endpoint.auth)
                self._heard[base] = time.monotonic()
                status = response.status_code
                if 200 <= status < 300:
                    return parse(response)
                last = f"{status}: {self._words(response)}"
                if status not in RETRIED:
                    raise _RejectedError(status, f"{url}: {last}")
                wait_s = min(MAX_WAIT_S, max(wait_s, _retry_after_s(response)))
            except TimeoutError:
                last = f"no answer within {timeout_s:g} s"
                if self._heard.get(base, -math.inf) < started:
                    raise EngineError(
                        f"{url}: {last}, to this request or any other; the server hangs, or has more to "
                        "do than fits timeout_s"
                    ) from None
            except httpx2.ConnectError as error:
                last = f"nothing answers: {error}"
            except httpx2.RequestError as error:
                last = f"{type(error).__name__}: {error}"
            except _BadAnswerError as error:
                last = f"{status}: {error}"
        attempts = "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"
        raise EngineError(f"{url}: {self._clean(last)} (after {attempts})")

    def _words(self, response: httpx2.Response) -> str:
        """The server's error message, or the whole body if there is none."""
        try:
            return self._clean(response.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return self._clean(response.text)

    def _clean(self, text: str) -> str:
        text = " ".join(str(text).split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _endpoint(cell: Cell, spec: EngineSpec, tokenizer: Any) -> _Endpoint:
    server = spec.servers.get(cell.name)
    if server is None:
        raise InputError(
            f"servers: none for cell {cell.name!r}{did_you_mean(cell.name, spec.servers)}; expected url and model"
        )
    try:
        url = httpx2.URL(server.url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise InputError(f"servers.{cell.name}.url: {error}; expected such as http://127.0.0.1:8000/v1") from None
    if url.scheme not in ("http", "https") or not url.host:
        shown = url.copy_with(username="", password="")
        raise InputError(f"servers.{cell.name}.url: {str(shown)!r}, expected such as http://127.0.0.1:8000/v1")
    return _Endpoint(
        cell=cell,
        base=url.copy_with(username="", password=""),
        auth=(url.username, url.password) if url.username or url.password else None,
        model=server.model,
        end_tokens=tuple(end_token_ids(cell.base, tokenizer)),
    )


def _check_distinct(endpoints: dict[str, _Endpoint]) -> None:
    names: dict[tuple[httpx2.URL, str], str] = {}
    for name, endpoint in endpoints.items():
        other = names.setdefault((endpoint.base, endpoint.model), name)
        if other != name:
            raise InputError(
                f"servers: {other} and {name} are both model {endpoint.model!r} at {endpoint.base}; "
                "expected a model of its own for each cell"
            )


def _json(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise _BadAnswerError(f"not JSON: {response.text}") from None


def _models(response: httpx2.Response) -> list[str]:
    try:
        return [str(model["id"]) for model in _json(response)["data"]]
    except (LookupError, TypeError):
        raise _BadAnswerError(f"not a list of models: {response.text}") from None


def _logprob(logprobs: object, num_tokens: int) -> float | None:
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or len(values) != num_tokens or None in values:
        return None
    return math.fsum(values)


def _top_logprobs(logprobs: object, most: int) -> TopLogprobs | None:
    """Likeliest tokens at the first position, by their texts."""
    positions = logprobs.get("top_logprobs") if most and isinstance(logprobs, dict) else None
    first = positions[0] if isinstance(positions, list) and positions else None
    if not isinstance(first, dict) or not all(isinstance(value, int | float) for value in first.values()):
        return None
    return tuple(sorted(first.items(), key=lambda item: -item[1])[:most])


def _retry_after_s(response: httpx2.Response) -> float:
    """Seconds to wait by the Retry-After header, which has seconds or a date; 0 if there is none."""
    value = response.headers.get("retry-after", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0

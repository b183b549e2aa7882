"""OpenAIEngine against a server that fails in every way it can; against vLLM's own it is in test_engine_contract.py."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import gc
import importlib.util
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tso_fast.errors import EngineError, InputError
from tso_fast.generators import Completion, EngineSpec, Refusal, Request, Sampling, Server, generate, openai_server
from tso_fast.generators.openai_server import OpenAIEngine
from tso_fast.models.load import load_tokenizer
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.seeds import seed_of
from tso_fast.types import Cell

pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4
TOKENIZER = make_tokenizer(TEXTS, Recipe(seed=0))
EOS = TOKENIZER.eos_token_id
KEY = "sk-very-secret"
OPENAI_FIELDS = {
    "model",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "logprobs",
    "stop",
    "n",
    "presence_penalty",
    "frequency_penalty",
}
Reply = Callable[["Handler", dict[str, Any]], None]


# --- a server that does as it is told ---


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def answer(self, body: dict[str, Any] | None) -> None:
        with contextlib.suppress(ConnectionError):  # the client has hung up, as it should in some tests
            self.server.answer(self, body)

    def send(self, status: int, body: object, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(length or len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    """Answers completions by ``replies``, one each, and ``reply`` when they are used up; the engine's probe is not
    counted."""

    daemon_threads = True

    def __init__(
        self,
        *replies: Reply,
        models: tuple[str, ...] = ("m",),
        fields: set[str] | None = None,
        key: str = "",
        tells_tokens: bool = True,
        adapters: bool = False,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.reply = list(replies), ok
        self.probe_reply: Reply = ok
        self.models, self.fields, self.key = list(models), fields, key
        self.tells_tokens, self.adapters = tells_tokens, adapters
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.loaded: list[dict[str, Any]] = []
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def answer(self, handler: Handler, body: dict[str, Any] | None) -> None:
        if self.key and handler.headers["authorization"] != f"Bearer {self.key}":
            handler.send(401, {"error": {"message": f"no such key: {handler.headers['authorization']}"}})
        elif handler.path == "/v1/models":
            handler.send(200, {"data": [{"id": model} for model in self.models]})
        elif handler.path == "/v1/load_lora_adapter" and self.adapters and body:
            self.loaded.append(body)
            handler.send(200, "Success")
        elif handler.path != "/v1/completions" or body is None:
            handler.send(404, {"detail": "Not Found"})
        elif self.fields is not None and (unknown := sorted(set(body) - self.fields)):
            handler.send(400, {"error": {"message": f"Unrecognized request argument supplied: {unknown[0]}"}})
        elif body["seed"] == 2**63 - 1 and body["max_tokens"] == 1:
            self.probe_reply(handler, body)
        else:
            with self.lock:
                self.asked.append(body)
                self.times.append(time.monotonic())
                reply = self.replies.pop(0) if self.replies else self.reply
            reply(handler, body)


def choice(handler: Handler, body: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Two tokens that follow from the prompt and the cell, log-probs -1 and -0.5."""
    ids = [body["prompt"][-1], 40 + len(body["model"])]
    told = {"token_ids": ids, "prompt_token_ids": body["prompt"]} if handler.server.tells_tokens else {}
    logprobs = {"token_logprobs": [-1.0, -0.5], "tokens": TOKENIZER.convert_ids_to_tokens(ids)}
    finish_reason = "length" if body["max_tokens"] <= 2 else "stop"
    return {
        "choices": [
            {"text": TOKENIZER.decode(ids), "finish_reason": finish_reason, "logprobs": logprobs, **told, **changed}
        ]
    }


def ok(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, choice(handler, body))


def says(**changed: Any) -> Reply:
    return lambda handler, body: handler.send(200, choice(handler, body, **changed))


def fails(status: int, body: object = "out of order", **headers: str) -> Reply:
    return lambda handler, asked: handler.send(status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def hangs(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.ended.wait(20)
    handler.hang_up()


def trickles(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, "{", length=10**6)
    while not handler.server.ended.wait(0.02):
        handler.wfile.write(b" ")
    handler.hang_up()


def half(handler: Handler, body: dict[str, Any]) -> None:
    data = json.dumps(choice(handler, body))
    handler.send(200, data[: len(data) // 2], length=len(data))
    handler.hang_up()


def truncated(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(200, json.dumps(choice(handler, body))[:-9])


def resets(handler: Handler, body: dict[str, Any]) -> None:
    handler.hang_up()


def after(delay_s: float, reply: Reply) -> Reply:
    def wait(handler: Handler, body: dict[str, Any]) -> None:
        handler.server.ended.wait(delay_s)
        reply(handler, body)

    return wait


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    with contextlib.ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> FakeServer:
            server = FakeServer(*args, **kwargs)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return folder


def make_cell(name: str, base: Path, path: Path | None = None) -> Cell:
    return Cell(
        name=name,
        path=path or base,
        base=base,
        size_b=0.001,
        version_rank=1,
        weight_hash="0" * 16,
        architecture="llama",
        context=None,
        lora_rank=8 if path else None,
    )


Open = Callable[..., OpenAIEngine]


@pytest.fixture
def engine(folder: Path) -> Iterator[Open]:
    """``engine(server)``: opened for one cell a model of the server, and closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(*servers: FakeServer, backoff_s: float = 0.001, **changed: Any) -> OpenAIEngine:
            named = {
                f"{model}{i or ''}": Server(url=server.url, model=model)
                for i, server in enumerate(servers)
                for model in server.models
            }
            cells = tuple(make_cell(name, folder) for name in named)
            spec = EngineSpec(kind="openai", cells=cells, tokenizer=str(folder), dtype="float32", servers=named)
            # A machine under load may take a second for what takes a millisecond.
            opened = OpenAIEngine(dataclasses.replace(spec, **{"timeout_s": 20.0, **changed}), backoff_s=backoff_s)
            stack.callback(opened.close)
            return opened

        yield start


def ask(n: int, cell: str = "m", **sampling: Any) -> list[Request]:
    return [
        Request(
            key=f"{cell}/{i}".encode(),
            cell=cell,
            token_ids=(5, 7, 50 + i),
            seed=seed_of("ask", i),
            sampling=Sampling(**{"max_tokens": 2, **sampling}),
        )
        for i in range(n)
    ]


def collect_all(engine: OpenAIEngine, requests: list[Request]) -> dict[bytes, Completion | Refusal]:
    answers: dict[bytes, Completion | Refusal] = {}
    engine.submit(requests)
    while len(answers) < len(requests):
        got = engine.collect()
        assert got
        assert not answers.keys() & {answer.key for answer in got}
        answers.update({answer.key: answer for answer in got})
    assert engine.collect() == []
    return answers


def expected(request: Request) -> tuple[int, ...]:
    return (request.token_ids[-1], 40 + len(request.cell.rstrip("1")))


def test_tokens_in_tokens_out(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(models=("m", "lm"))
    asked = ask(5) + ask(4, "lm")
    answers = collect_all(engine(server), asked)
    for request in asked:
        want = expected(request)
        assert answers[request.key] == Completion(
            key=request.key, token_ids=want, text=TOKENIZER.decode(want), finish_reason="length", logprob=-1.5
        )
    assert Counter((body["model"], tuple(body["prompt"]), body["seed"]) for body in server.asked) == Counter(
        (request.cell, request.token_ids, request.seed) for request in asked
    )


def test_a_request_says_all_that_a_server_would_fill_in(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve()
    opened = engine(server)
    generate(opened, ask(1, temperature=0.7, top_p=0.9, top_k=4, max_tokens=9, stop=("x", "yz")))
    generate(opened, ask(1, temperature=0.0, top_p=0.9, top_k=4))
    generate(opened, ask(1))
    sampled, greedy, plain = server.asked
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert sampled == {
        "model": "m",
        "prompt": [5, 7, 50],
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "seed": seed_of("ask", 0),
        "stop": ["x", "yz"],
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": True,
        "stop_token_ids": [EOS],
        **neutral,
    }
    assert (greedy["temperature"], greedy["top_p"], greedy["top_k"]) == (0.0, 1.0, -1)
    assert (plain["temperature"], plain["top_p"], plain["top_k"]) == (1.0, 1.0, -1)


@pytest.mark.parametrize(
    ("sampling", "logprob"),
    [
        ({}, -1.5),
        ({"temperature": 0.0, "top_k": 3}, -1.5),
        ({"temperature": 0.7}, None),
        ({"top_p": 0.9}, None),
        ({"top_k": 3}, None),
    ],
    ids=str,
)
def test_logprob_only_where_raw_and_processed_are_the_same(
    sampling: dict[str, Any], logprob: float | None, serve: Callable[..., FakeServer], engine: Open
) -> None:
    [answer] = generate(engine(serve()), ask(1, **sampling))
    assert answer.logprob == logprob


def test_incomplete_logprobs_are_none(serve: Callable[..., FakeServer], engine: Open) -> None:
    replies = [
        says(logprobs=logprobs) for logprobs in (None, {}, {"token_logprobs": [-1.0]}, {"token_logprobs": [-1.0, None]})
    ]
    opened = engine(serve(*replies))
    assert [generate(opened, ask(1))[0].logprob for _ in range(5)] == [None] * 4 + [-1.5]


@pytest.mark.parametrize(
    ("sampling", "is_told"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"top_p": 0.5}, False),
        ({"temperature": 0.5}, False),
        ({"top_logprobs": 0}, False),
    ],
    ids=str,
)
def test_top_logprobs_of_the_first_token(
    sampling: dict[str, Any], is_told: bool, serve: Callable[..., FakeServer], engine: Open
) -> None:
    told = {
        "tokens": ["B", "x"],
        "token_logprobs": [-1.5, -0.5],
        "top_logprobs": [{"B": -1.5, "A": -0.25, " A": -2.0}, {"x": -0.5}],
    }
    server = serve(says(logprobs=told))
    [answer] = generate(engine(server), ask(1, **{"top_logprobs": 2, **sampling}))
    assert server.asked[0]["logprobs"] == sampling.get("top_logprobs", 2)
    assert answer.top_logprobs == ((("A", -0.25), ("B", -1.5)) if is_told else None)


def test_no_more_top_logprobs_than_openai_gives_and_none_where_there_are_none(
    serve: Callable[..., FakeServer], engine: Open
) -> None:
    logprobs = [
        None,
        {},
        {"top_logprobs": None},
        {"top_logprobs": []},
        {"top_logprobs": [None]},
        {"top_logprobs": [{"A": None}]},
    ]
    server = serve(*[says(logprobs=told) for told in logprobs])
    opened = engine(server)
    assert [generate(opened, ask(1, top_logprobs=20))[0].top_logprobs for _ in logprobs] == [None] * len(logprobs)
    assert {body["logprobs"] for body in server.asked} == {5}


def test_context_bounds_prompt_and_response(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve()
    fits, long = ask(2, max_tokens=5)
    long = dataclasses.replace(long, token_ids=(5,) * 4)
    answers = collect_all(engine(server, context=8), [fits, long])
    assert [body["max_tokens"] for body in server.asked] == [5]
    assert isinstance(answers[fits.key], Completion)
    reason = "cell m: a prompt of 4 tokens and a response of up to 5 exceed its context of 8 tokens"
    assert answers[long.key] == Refusal(key=long.key, reason=reason)


def test_a_response_cut_by_the_server_is_refused(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(says(finish_reason="length"))
    [answer] = collect_all(engine(server), ask(1, max_tokens=3)).values()
    assert isinstance(answer, Refusal)
    assert answer.reason == (
        f"{server.url}: m ended the response after 2 of 3 tokens; prompt and response exceed the server's context"
    )


# --- faults ---

FAULTS: dict[str, Reply] = {
    "500": fails(500),
    "502": fails(502, "<html>bad gateway</html>"),
    "503": fails(503, ""),
    "504": fails(504),
    "429": fails(429, {"error": {"message": "slow down"}}),
    "429 now": fails(429, "", retry_after="0"),
    "429 nonsense": fails(429, "", retry_after="soon"),
    "429 past": fails(429, "", retry_after="-5"),
    "half": half,
    "truncated": truncated,
    "reset": resets,
    "empty": fails(200, ""),
    "html": fails(200, "<html>"),
    "no choices": fails(200, {"object": "text_completion"}),
    "empty choices": fails(200, {"choices": []}),
    "null": fails(200, "null"),
    "list": fails(200, [1]),
    "aborted": says(finish_reason="abort"),
    "unfinished": says(finish_reason=None),
    "no text": says(text=None),
    "no tokens": says(token_ids=[]),
    "odd tokens": says(token_ids=["a"]),
    "gzip": fails(200, "no gzip", content_encoding="gzip"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_ridden_out(fault: str, serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(FAULTS[fault], FAULTS[fault])
    asked = ask(1)
    [answer] = generate(engine(server), asked)
    assert answer.token_ids == expected(asked[0])
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


def test_many_faults_at_once(serve: Callable[..., FakeServer], engine: Open) -> None:
    rng = random.Random(0)
    faults = rng.choices(list(FAULTS.values()), k=40) + [ok] * 40
    rng.shuffle(faults)
    server, asked = serve(*faults), ask(60)
    answers = collect_all(engine(server, max_concurrency=8, max_retries=20), asked)
    assert all(answers[request.key].token_ids == expected(request) for request in asked)
    assert len(server.asked) == 100


def test_retry_after_is_honoured_and_capped(
    serve: Callable[..., FakeServer], engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(fails(429, "", retry_after="0.3"))
    generate(engine(server), ask(1))
    assert server.times[1] - server.times[0] >= 0.3
    monkeypatch.setattr(openai_server, "MAX_WAIT_S", 0.2)
    server = serve(fails(503, "", retry_after="3600"), fails(503, "", retry_after="inf"))
    generate(engine(server), ask(1))
    assert 0.4 <= server.times[2] - server.times[0] < 10


def test_retry_after_as_a_date() -> None:
    when = email.utils.formatdate(time.time() + 100, usegmt=True)
    response = openai_server.httpx2.Response(429, headers={"retry-after": when})
    assert 98 < openai_server._retry_after_s(response) <= 100


def test_backoff_grows_with_full_jitter(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(*[fails(500)] * 3)
    opened = engine(server, backoff_s=0.1)
    bounds: list[float] = []
    opened._random.uniform = lambda low, high: bounds.append(high) or high / 4  # type: ignore[func-returns-value,method-assign]
    generate(opened, ask(1))
    assert bounds == [0.1, 0.2, 0.4, 0.8]
    assert server.times[3] - server.times[0] >= 0.175


def test_gives_up_with_the_servers_words(
    serve: Callable[..., FakeServer], engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(key=KEY)
    server.reply = fails(503, f"no GPU is free for {KEY} " + "x" * 1000)
    opened = engine(server, max_retries=2)
    opened.submit(ask(1))
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            opened.collect()
        assert str(caught.value).startswith(f"{server.url}/completions: 503: no GPU is free for *** xxx")
        assert str(caught.value).endswith("xxx (after 3 attempts)")
        assert len(str(caught.value)) < 400
    with pytest.raises(EngineError, match="no GPU"):
        opened.submit(ask(1))
    assert len(server.asked) == 3


def test_what_came_before_the_failure_is_handed_over(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(*[ok] * 7)
    server.reply = fails(404, {"error": {"message": "The model `m` does not exist."}})
    opened = engine(server, max_concurrency=1)
    asked = ask(9)
    opened.submit(asked)
    opened._thread.join(20)
    assert [answer.key for answer in opened.collect()] == [request.key for request in asked[:7]]
    with pytest.raises(EngineError, match=r"404: The model `m` does not exist\.$"):
        opened.collect()
    assert len(server.asked) == 8  # 404 is not tried again


@pytest.mark.parametrize("reply", [hangs, trickles])
def test_a_hung_server_raises_after_the_timeout(reply: Reply, serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve()
    server.reply = reply
    opened = engine(server)
    opened._spec = dataclasses.replace(opened._spec, timeout_s=0.6)  # not before: opening may take longer
    started = time.monotonic()
    opened.submit(ask(3))
    with pytest.raises(EngineError, match=r"completions: no answer within 0\.6 s, to this request or any other"):
        opened.collect()
    assert 0.6 <= time.monotonic() - started < 15  # before the server hangs up
    assert len(server.asked) == 3


def test_a_lost_answer_of_a_living_server_is_asked_for_again(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(hangs)
    server.reply = after(0.15, ok)
    asked = ask(12)
    answers = collect_all(engine(server, max_concurrency=2, timeout_s=1.2), asked)
    assert {request.key: expected(request) for request in asked} == {k: a.token_ids for k, a in answers.items()}
    assert len(server.asked) == 13


def test_one_bad_prompt_is_refused_and_the_rest_goes_on(serve: Callable[..., FakeServer], engine: Open) -> None:
    def picky(handler: Handler, body: dict[str, Any]) -> None:
        status = {52: 400, 53: 413, 54: 422}.get(body["prompt"][-1])
        (fails(status, {"error": {"message": f"too long: {status}"}}) if status else ok)(handler, body)

    server = serve()
    server.reply = picky
    asked = ask(6)
    answers = list(collect_all(engine(server), asked).items())
    refused = {key: answer.reason for key, answer in answers if isinstance(answer, Refusal)}
    assert refused == {
        f"m/{i}".encode(): f"{server.url}/completions: {status}: too long: {status}"
        for i, status in ((2, 400), (3, 413), (4, 422))
    }
    assert len(server.asked) == 6


def test_a_filtered_response_is_refused(serve: Callable[..., FakeServer], engine: Open) -> None:
    with pytest.raises(InputError, match="content filter"):
        generate(engine(serve(says(finish_reason="content_filter"))), ask(1))


def test_concurrency_is_bounded_over_all_servers(serve: Callable[..., FakeServer], engine: Open) -> None:
    servers, lock = [serve(), serve()], threading.Lock()
    busy, seen = 0, []

    def slow(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal busy
        with lock:
            busy += 1
            seen.append(busy)
        time.sleep(0.03)
        with lock:  # before the answer, which lets the next one come
            busy -= 1
        ok(handler, body)

    for server in servers:
        server.reply = slow
    asked = [request for pair in zip(ask(12), ask(12, "m1"), strict=True) for request in pair]
    answers = collect_all(engine(*servers, max_concurrency=3), asked)
    assert all(answers[request.key].token_ids == expected(request) for request in asked)
    assert max(seen) == 3
    assert [len(server.asked) for server in servers] == [12, 12]


def test_a_changed_prompt_is_an_error(serve: Callable[..., FakeServer], engine: Open) -> None:
    opened = engine(serve(says(prompt_token_ids=[2, 5, 7, 50])))
    opened.submit(ask(1))
    with pytest.raises(EngineError, match="m changed a prompt of 3 tokens; expected a server that leaves token ids"):
        opened.collect()


# --- servers that know less ---


def test_a_strict_server(serve: Callable[..., FakeServer], engine: Open, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(fields=OPENAI_FIELDS, tells_tokens=False)
    opened = engine(server)
    assert "Unrecognized request argument supplied: min_p" in caplog.text
    assert "takes no frequency_penalty, min_p" in caplog.text
    asked = ask(3)
    assert {a.token_ids for a in generate(opened, asked)} == {
        tuple(TOKENIZER.encode(TOKENIZER.decode(expected(request)), add_special_tokens=False)) for request in asked
    }
    assert all(set(body) <= OPENAI_FIELDS for body in server.asked)
    [refused] = collect_all(opened, ask(1, top_k=5)).values()
    assert isinstance(refused, Refusal)
    assert refused.reason == f"{server.url}: m takes no top_k"
    assert len(server.asked) == 3
    opened.close()
    opened.close()
    assert caplog.text.count("3 of 3 responses came without token ids") == 1


def test_a_server_without_logprobs(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve(fields={"model", "prompt", "max_tokens", "temperature", "top_p", "seed"})
    [answer] = generate(engine(server), ask(1))
    assert "logprobs" not in server.asked[0]
    assert answer.token_ids == expected(ask(1)[0])


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        ({"finish_reason": "length"}, "ids"),
        ({"finish_reason": "stop"}, "ids eos"),
        ({"finish_reason": "stop", "stop_reason": None}, "ids eos"),
        ({"finish_reason": "stop", "stop_reason": 9}, "ids 9"),
        ({"finish_reason": "stop", "stop_reason": "Write"}, "ids Write"),
    ],
    ids=str,
)
def test_text_becomes_tokens_where_the_server_tells_none(
    told: dict[str, Any], tokens: str, serve: Callable[..., FakeServer], engine: Open
) -> None:
    server = serve(says(text="Sam 1 and", **told), tells_tokens=False)
    [answer] = generate(engine(server), ask(1))
    ids = TOKENIZER.encode("Sam 1 and", add_special_tokens=False)
    end = {"ids": [], "ids eos": [EOS], "ids 9": [9], "ids Write": TOKENIZER.encode("Write", add_special_tokens=False)}
    assert answer.token_ids == (*ids, *end[tokens])
    assert answer.text == "Sam 1 and"


# --- opening and closing ---


def test_a_model_that_is_not_there(serve: Callable[..., FakeServer], folder: Path) -> None:
    server = serve(models=("llama.v1", "llama.v2"))
    with pytest.raises(InputError) as caught:
        open_one(folder, server.url, "lama.v1")
    assert str(caught.value) == (
        f"servers.m: no model 'lama.v1' at {server.url}; did you mean 'llama.v1'?; it has llama.v1, llama.v2"
    )


def open_one(folder: Path, url: str, model: str = "m", path: Path | None = None, **changed: Any) -> None:
    spec = EngineSpec(
        kind="openai",
        cells=(make_cell("m", folder, path),),
        tokenizer=str(folder),
        dtype="float32",
        servers={"m": Server(url=url, model=model)},
        timeout_s=20.0,
        max_retries=2,
    )
    OpenAIEngine(dataclasses.replace(spec, **changed), backoff_s=0.001).close()


def test_an_adapter_is_loaded_where_the_server_lets_us(
    serve: Callable[..., FakeServer], folder: Path, tmp_path: Path
) -> None:
    server = serve(adapters=True)
    open_one(folder, server.url, "new", tmp_path)
    assert server.loaded == [{"lora_name": "new", "lora_path": str(tmp_path)}]
    with pytest.raises(InputError, match=r"no model 'new' .* it has m; start it with --enable-lora --lora-modules new"):
        open_one(folder, serve().url, "new", tmp_path)


def test_the_key_is_sent_and_never_shown(
    serve: Callable[..., FakeServer], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(key=KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        InputError, match=r"401: no such key: None; the environment variable OPENAI_API_KEY is not set$"
    ):
        open_one(folder, server.url)
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    open_one(folder, server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(InputError, match=r"401: no such key: Bearer \*\*\*; .* OPENAI_API_KEY is not accepted$"):
        open_one(folder, server.url)
    with pytest.raises(InputError, match="401"):
        open_one(folder, server.url.replace("//", "//me:password@"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk\nsecret")
    with pytest.raises(InputError, match=r"^OPENAI_API_KEY: holds characters that no key has"):
        open_one(folder, server.url)
    assert "HTTP Request: GET" in caplog.text
    assert not any(secret in caplog.text for secret in (KEY, "sk-wrong", "password"))


def test_nothing_answers(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://me:password@127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EngineError, match=r"^http://127.*/v1/models: nothing answers: .* \(after 3 attempts\)$"):
            open_one(folder, url)


def test_what_is_no_api(serve: Callable[..., FakeServer], folder: Path) -> None:
    with pytest.raises(InputError, match=r"404: .*Not Found.*; expected the base of an OpenAI API .*8000/v1$"):
        open_one(folder, serve().url.removesuffix("/v1"))
    open_one(folder, serve().url + "/")
    chat_only = serve()
    chat_only.probe_reply = fails(405, "chat only")
    with pytest.raises(InputError, match="completions: 405: chat only; expected the base"):
        open_one(folder, chat_only.url)
    texts_only = serve()
    texts_only.probe_reply = fails(422, "prompt: expected a string")
    with pytest.raises(InputError, match="completions: 422: prompt: expected a string"):
        open_one(folder, texts_only.url)
    adds_bos = serve()
    adds_bos.probe_reply = lambda handler, body: handler.send(
        200, {**choice(handler, body), "usage": {"prompt_tokens": 2}}
    )
    with pytest.raises(InputError, match="m read a prompt of 1 token id as 2 tokens"):
        open_one(folder, adds_bos.url)
    for url in ("localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", ""):
        with pytest.raises(InputError, match=r"^servers\.m\.url: .*expected such as http://127\.0\.0\.1:8000/v1"):
            open_one(folder, url)


def test_a_server_that_hangs_from_the_start(serve: Callable[..., FakeServer], folder: Path) -> None:
    server = serve()
    server.probe_reply = hangs
    with pytest.raises(EngineError, match=r"the servers were not ready in 0\.7 s"):
        open_one(folder, server.url, start_timeout_s=0.7)


def test_cells_and_servers_must_match(serve: Callable[..., FakeServer], folder: Path) -> None:
    server = serve()
    with pytest.raises(InputError, match=r"^servers: none for cell 'm'; expected url and model"):
        open_one(folder, server.url, servers={})
    both = {name: Server(url=server.url, model="m") for name in ("m", "m2")}
    with pytest.raises(InputError, match=r"^servers: m and m2 are both model 'm' at"):
        open_one(folder, server.url, servers=both, cells=tuple(make_cell(name, folder) for name in both))


def test_proxies_of_the_environment_are_not_used(
    serve: Callable[..., FakeServer], engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert generate(engine(serve()), ask(1))[0].token_ids == expected(ask(1)[0])


def test_close_ends_everything(serve: Callable[..., FakeServer], engine: Open) -> None:
    server = serve()
    server.reply = hangs
    state = random.getstate()
    opened = engine(server)
    assert opened.collect() == []
    opened.submit(ask(9))
    while len(server.asked) < 9:
        time.sleep(0.01)
    opened.close()
    assert not opened._thread.is_alive()  # which would wait for the servers' answers otherwise
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        opened.collect()
    with pytest.raises(EngineError, match="closed"):
        opened.submit(ask(1))
    assert random.getstate() == state
    del opened
    gc.collect()


def test_without_httpx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    spec = importlib.util.find_spec("tso_fast.generators.openai_server")
    assert spec
    assert spec.loader
    with pytest.raises(InputError, match=r"pip install 'tso-fast\[openai\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_tokenizer_of_the_tests_is_that_of_the_folder(folder: Path) -> None:
    assert load_tokenizer(folder).get_vocab() == TOKENIZER.get_vocab()

"""The same request gets the same kind of answer from every engine, and the one that transformers' logits say.

``hf`` runs here, ``vllm`` in a process of its own, ``openai`` asks vLLM's server. Each is started once, as vLLM takes
half a minute to start; what only one of them does follows the contract, and at the end what it does not survive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_cells import (
    CONTEXT,
    ENDS,
    OTHER_ENDS,
    TOKENIZER,
    VOCAB,
    cell,
    check_digits,
    greedy,
    judge_digits,
    logits,
    logprob,
    make_cells,
    requests,
)

from tso_fast.errors import EngineError, InputError
from tso_fast.generators import (
    Completion,
    Engine,
    EngineSpec,
    Refusal,
    Request,
    Sampling,
    Server,
    generate,
    open_engine,
)
from tso_fast.generators.openai_server import OpenAIEngine
from tso_fast.generators.process import EngineProcess
from tso_fast.types import Cell

pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
BLOCKS = 512
"""Of 128 tokens each; filling a GiB with zeros takes seconds."""
FILTERED = [
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 9},
    {"top_p": 0.6},
    {"temperature": 0.8, "top_p": 0.8, "top_k": 20},
]


class Live(NamedTuple):
    engine: Engine
    cells: dict[str, Cell]
    """A base, and after it its adapters."""
    most_top_logprobs: int
    refusals: dict[bytes, str]
    """What it says to a prompt that it can't answer."""

    @property
    def names(self) -> list[str]:
        return [*self.cells]

    @property
    def is_client(self) -> bool:
        return isinstance(self.engine, OpenAIEngine)

    def tolerance(self, name: str) -> float:
        """Of a sum of log-probs; vLLM's adapters on a CPU round more than its models."""
        return 1e-3 if self.cells[name].lora_rank is None else 8e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:
    return make_cells(tmp_path_factory.mktemp("models"))


def spec_of(kind: str, cells: Sequence[Cell], **options: Any) -> EngineSpec:
    given: dict[str, Any] = {
        "kind": kind,
        "dtype": "float32",
        "tokenizer": str(cells[0].base),
        "use_cpu": True,
        "start_timeout_s": 240.0,
        "timeout_s": 120.0,
        **options,
    }
    return EngineSpec(cells=tuple(cells), **given)


@pytest.fixture(scope="module")
def hf(models: dict[str, Cell]) -> Iterator[Live]:
    cells = {name: models[name] for name in ("one", "one_a", "one_b")}
    engine = open_engine(spec_of("hf", [*cells.values()], context=CONTEXT, batch_size=16))
    refusals = {
        b"empty": "the prompt has no tokens",
        b"long": f"cell one: a prompt of {CONTEXT - 11} tokens and a response of up to 12 exceed its context of 320",
        b"beyond": f"has token {VOCAB}, beyond the {VOCAB} of the model's embeddings",
        b"negative": "the prompt has token -1, beyond the",
    }
    yield Live(engine, cells, VOCAB, refusals)
    engine.close()
    engine.close()


@pytest.fixture(scope="module")
def vllm(models: dict[str, Cell], server: tuple[subprocess.Popen[bytes], str], tmp_path_factory: Any) -> Iterator[Live]:
    """Of all cells and a copy of `three` to be damaged; the server starts meanwhile."""
    shutil.copytree(models["three"].path, copy := tmp_path_factory.mktemp("copy") / "three")
    cells = {**models, "three": cell(copy)}
    engine = EngineProcess(
        spec_of("vllm", [*cells.values()], context=CONTEXT, engine_args={"num_gpu_blocks_override": BLOCKS}),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    refusals = {
        b"empty": "no tokens",
        b"long": f"has {CONTEXT - 11} tokens; with max_tokens 12 that exceeds the context of {CONTEXT}",
        b"beyond": f"token id {VOCAB}",
        b"negative": "token id -1",
    }
    yield Live(engine, {name: cells[name] for name in ("one", "one_a", "one_b")}, 20, refusals)
    engine.close()
    engine.close()


@pytest.fixture(scope="module")
def server(
    models: dict[str, Cell], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Of `two`, adapter `two_a` and, once asked to, adapter `two_b`; its address, where it may not yet answer."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "model": models["two"].path,
        "served-model-name": "two",
        "dtype": "float32",
        "max-model-len": CONTEXT,
        "max-lora-rank": 8,
        "max-loras": 3,
        "max-num-seqs": 16,
        "num-gpu-blocks-override": BLOCKS,
        "lora-modules": f"two_a={models['two_a'].path}",
        "distributed-executor-backend": "uni",
        "host": "127.0.0.1",
        "port": port,
    }
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in a third process otherwise, which would import it all again
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    flags = ["--enforce-eager", "--enable-lora"]
    flags += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *flags],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}/v1"
        if process.poll() not in (None, -signal.SIGKILL):
            pytest.fail(f"vLLM's server ended:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
    finally:
        end_group(process.pid)
        process.wait(20)


def end_group(group: int) -> None:
    """Kills a group but for multiprocessing's tracker, which then removes what the others left in /dev/shm."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            leader = int((process / "stat").read_text().rpartition(")")[2].split()[2])
            if leader == group and b"resource_tracker" not in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def served(models: dict[str, Cell], server: tuple[subprocess.Popen[bytes], str]) -> EngineSpec:
    """All that the server serves, once it answers."""
    process, url = server
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(OSError):
            direct.open(url + "/models", timeout=30).read()
            break
        assert process.poll() is None, "vLLM's server did not start"
        assert time.monotonic() < deadline, "vLLM's server did not answer in 240 s"
        time.sleep(0.2)
    names = ("two", "two_a", "two_b")
    servers = {name: Server(url=url, model=name) for name in names}
    # That its context is too short is for the server to say.
    return spec_of("openai", [dataclasses.replace(models[name], context=None) for name in names], servers=servers)


@pytest.fixture(scope="module")
def openai(served: EngineSpec) -> Iterator[Live]:
    engine = open_engine(served)
    refusals = {
        b"long": f"maximum context length is {CONTEXT}",
        b"full": "ended the response after 11 of 12 tokens",
        b"beyond": f"Token id {VOCAB} is out of vocabulary",
    }
    yield Live(engine, {cell.name: cell for cell in served.cells}, 5, refusals)
    engine.close()
    engine.close()


@pytest.fixture(params=["hf", pytest.param("vllm", marks=needs_vllm), pytest.param("openai", marks=needs_vllm)])
def live(request: pytest.FixtureRequest) -> Live:
    return request.getfixturevalue(request.param)


def same(got: Sequence[Completion], want: Sequence[Completion]) -> bool:
    """Of log-probs, the last bits depend on the batch."""
    bare = [[dataclasses.replace(c, logprob=None) for c in side] for side in (got, want)]
    return bare[0] == bare[1] and [c.logprob for c in got] == pytest.approx([c.logprob for c in want], abs=1e-3)


def collect_all(engine: Engine, *shards: Sequence[Request]) -> dict[bytes, Any]:
    """Every answer comes once, and nothing after the last."""
    for shard in shards:
        engine.submit(shard)
    answers: dict[bytes, Any] = {}
    while found := engine.collect():
        assert not answers.keys() & {answer.key for answer in found}
        answers.update({answer.key: answer for answer in found})
    assert answers.keys() == {request.key for shard in shards for request in shard}
    return answers


def narrowed(asked: Sequence[Request], **sampling: Any) -> list[Request]:
    return [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, **sampling)) for r in asked]


# ----------------------------------------------------------------------------------------------------- the contract


def test_a_response_depends_on_its_request_alone(live: Live) -> None:
    """Nor on the generation config: its top_k of 1 would give every seed the same tokens."""
    asked = requests(24, live.names)
    want = generate(live.engine, asked)
    assert len({c.token_ids for c in want}) > 20
    assert same(generate(live.engine, asked[::-1])[::-1], want)
    assert same([generate(live.engine, [request])[0] for request in asked[:6]], want[:6])
    others = [dataclasses.replace(request, seed=request.seed + 1) for request in asked]
    assert sum(a.token_ids == b.token_ids for a, b in zip(generate(live.engine, others), want, strict=True)) < 3


def test_shards_are_answered_once_each_as_if_alone(live: Live) -> None:
    shards = [requests(8, live.names[:2], f"shard {i}", max_tokens=3 + 5 * i) for i in range(3)]
    answers = collect_all(live.engine, *shards)
    assert same([answers[r.key] for r in shards[2]], generate(live.engine, shards[2]))
    assert live.engine.collect() == []


def test_seeds_of_63_bits(live: Live) -> None:
    request = requests(1, live.names, max_tokens=20)[0]
    # Their lower halves differ: torch's generator on a CPU uses no more.
    seeds = [0, 1, 2**31, 2**32 + 2, 2**53 + 3, 2**62 + 4, 2**62 + 5, 2**63 - 2, 2**63 - 1]
    asked = [dataclasses.replace(request, key=str(seed).encode(), seed=seed) for seed in seeds]
    first = [answer.token_ids for answer in generate(live.engine, asked)]
    assert [answer.token_ids for answer in generate(live.engine, asked)] == first
    assert len(set(first)) == len(seeds)


def test_a_longer_limit_only_goes_on(live: Live) -> None:
    asked = requests(6, live.names[:1], max_tokens=12)
    long, short = generate(live.engine, asked), generate(live.engine, narrowed(asked, max_tokens=4))
    assert any(len(c.token_ids) == 12 for c in long)
    assert [c.token_ids for c in short] == [c.token_ids[:4] for c in long]


def test_greedy_is_that_of_transformers(live: Live) -> None:
    asked = requests(15, live.names, temperature=0.0)
    for request, got in zip(asked, generate(live.engine, asked), strict=True):
        cell = live.cells[request.cell]
        assert got.token_ids == greedy(cell, request)
        want = logprob(cell, request, got.token_ids)
        assert got.logprob == pytest.approx(want, abs=live.tolerance(request.cell))


@pytest.mark.parametrize("sampling", [{}, *FILTERED], ids=str)
def test_logprob_is_that_of_the_tokens_under_the_sampling_distribution(live: Live, sampling: dict[str, Any]) -> None:
    """Of the request's cell and no other, in one batch: vLLM on CPUs gives rows without an adapter the last slot's,
    unless that is empty."""
    asked = requests(18, live.names, **sampling)
    for request, got in zip(asked, generate(live.engine, asked), strict=True):
        want = logprob(live.cells[request.cell], request, got.token_ids)
        if live.is_client and sampling:  # a server tells the model's own alone
            assert got.logprob is None
            assert want > -1e9  # and yet took no token that the filters leave out
            continue
        assert got.logprob == pytest.approx(want, abs=live.tolerance(request.cell))
        if len(got.token_ids) > 3 and not sampling:
            others = [cell for name, cell in live.cells.items() if name != request.cell]
            assert all(abs(got.logprob - logprob(other, request, got.token_ids)) > 0.1 for other in others)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.01}], ids=str)
def test_what_leaves_one_token_is_greedy(live: Live, sampling: dict[str, Any]) -> None:
    asked = requests(6, live.names, temperature=0.0, max_tokens=6)
    want = [answer.token_ids for answer in generate(live.engine, asked)]
    got = generate(live.engine, narrowed(asked, **{"temperature": 1.0, **sampling}))
    assert [answer.token_ids for answer in got] == want


def test_top_logprobs_are_the_models_own_at_the_first_token(live: Live) -> None:
    """A server gives texts in place of tokens."""
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0}):
        asked = requests(6, live.names[:2], top_logprobs=4, name=f"top{sampling}", **sampling)
        for request, got in zip(asked, generate(live.engine, asked), strict=True):
            want = logits(live.cells[request.cell], request.token_ids)[-1].log_softmax(-1).topk(4)
            tokens = want.indices.tolist()
            assert got.top_logprobs is not None
            assert [token for token, _ in got.top_logprobs] == (
                [TOKENIZER.decode(token) for token in tokens] if live.is_client else tokens
            )
            assert [value for _, value in got.top_logprobs] == pytest.approx(want.values.tolist(), abs=5e-3)
    # No more than the engine gives.
    [all_] = generate(live.engine, requests(1, live.names, temperature=0.0, top_logprobs=VOCAB + 9))
    assert len(all_.top_logprobs or ()) == live.most_top_logprobs
    [none] = generate(live.engine, requests(1, live.names))
    assert none.top_logprobs is None


def test_ends_at_any_end_of_sequence_token(live: Live) -> None:
    """The tokenizer's and those that the generation config names."""
    asked = [
        dataclasses.replace(r, token_ids=(5, 110, 85))
        for r in requests(120, live.names[:1], max_tokens=9, temperature=2.0)
    ]
    completions = generate(live.engine, asked)
    assert len({c.token_ids[0] for c in completions}) > 10
    for c in completions:
        *before, last = c.token_ids
        assert not set(before) & set(ENDS)
        assert c.finish_reason == ("stop" if last in ENDS else "length")
        assert len(c.token_ids) == 9 if c.finish_reason == "length" else len(c.token_ids) <= 9
        shown = before if live.is_client and last in ENDS else c.token_ids  # a server leaves out the end
        assert c.text == TOKENIZER.decode(shown, skip_special_tokens=True)
    found = {c.token_ids[-1] for c in completions if c.finish_reason == "stop"}
    assert TOKENIZER.eos_token_id in found
    assert found & set(OTHER_ENDS)


def test_stop_texts(live: Live) -> None:
    asked = [dataclasses.replace(r, token_ids=(5, 9, 33)) for r in requests(60, live.names[:1], max_tokens=20)]
    free = generate(live.engine, asked)
    texts = [c.text for c in free]
    pairs = [text[i : i + 2] for text in texts for i in range(3, len(text) - 4)]
    stops = tuple(
        sorted({pair for pair in pairs if pair.isprintable()}, key=lambda p: (-pairs.count(p), p))[:4]
    )  # vLLM's server takes no more
    cut = 0
    for before, after in zip(free, generate(live.engine, narrowed(asked, stop=stops)), strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        if not any(stop in before.text for stop in stops):
            assert same([after], [before])
            continue
        cut += 1
        assert after.finish_reason == "stop"
        assert after.text == before.text[: min(before.text.find(stop) for stop in stops if stop in before.text)]
        whole = TOKENIZER.decode(after.token_ids, skip_special_tokens=True)
        assert any(stop in whole for stop in stops)
        assert not any(stop in TOKENIZER.decode(after.token_ids[:-1], skip_special_tokens=True) for stop in stops)
    assert 5 < cut < 60


def test_one_bad_prompt_fails_no_other(live: Live) -> None:
    good = requests(12, live.names)
    want = generate(live.engine, good)
    prompts = {
        b"empty": (),
        b"long": (5,) * (CONTEXT - 11 if not live.is_client else CONTEXT + 1),
        b"full": (5,) * (CONTEXT - 11),
        b"beyond": (5, VOCAB),
        b"negative": (-1, 5),
    }
    bad = [dataclasses.replace(good[0], key=key, token_ids=prompts[key]) for key in live.refusals]
    just = dataclasses.replace(good[0], key=b"just", token_ids=(5,) * (CONTEXT - 12))
    answers = collect_all(live.engine, [*good[:6], *bad, just, *good[6:]])
    for key, words in live.refusals.items():
        assert isinstance(answers[key], Refusal), key
        assert words in answers[key].reason
    assert same([answers[r.key] for r in good], want)
    assert 1 <= len(answers[b"just"].token_ids) <= 12
    with pytest.raises(InputError, match=r"context"):
        generate(live.engine, [next(r for r in bad if r.key == b"long")])


# -------------------------------------------------------------------------------------------------- vLLM's engine


@needs_vllm
def test_what_vllm_refuses(vllm: Live) -> None:
    good = requests(2)
    bad = {
        b"unknown": ({"cell": "four"}, "'four'"),
        b"cold": ({"sampling": Sampling(temperature=0.001, max_tokens=4)}, "0.01"),
        b"nucleus": ({"sampling": Sampling(top_p=0.0, max_tokens=4)}, "top_p"),  # vLLM's own words
    }
    asked = [dataclasses.replace(good[0], key=key, **changes) for key, (changes, _) in bad.items()]
    answers = collect_all(vllm.engine, [*good[:1], *asked, *good[1:]])
    for key, (_, words) in bad.items():
        assert isinstance(answers[key], Refusal)
        assert words in answers[key].reason
    assert same([answers[r.key] for r in good], generate(vllm.engine, good))


@needs_vllm
def test_after_temperature_and_filters_the_models_own_logprobs_cannot_be_told(vllm: Live, openai: Live) -> None:
    for live in (vllm, openai):
        [answer] = generate(live.engine, requests(1, live.names, temperature=0.5, top_logprobs=5))
        assert answer.top_logprobs is None


@needs_vllm
def test_more_prompts_than_fit_a_step(vllm: Live) -> None:
    """A seeded prompt that vLLM splits between two steps ends its engine on a CPU; a step takes 4096 tokens."""
    tokens = np.random.default_rng(2).integers(5, VOCAB, (40, 290)).tolist()
    asked = [dataclasses.replace(r, token_ids=tuple(ids)) for r, ids in zip(requests(40), tokens, strict=True)]
    together = generate(vllm.engine, asked)
    assert same([generate(vllm.engine, [request])[0] for request in asked[::8]], together[::8])


@needs_vllm
def test_shards_stream(vllm: Live) -> None:
    """What is submitted while others run joins them; each answer comes once."""
    tried = requests(60, name="long", max_tokens=100)
    lasting = [r for r, c in zip(tried, generate(vllm.engine, tried), strict=True) if len(c.token_ids) == 100]
    brief = requests(200, max_tokens=3)
    vllm.engine.submit([*brief[:1], *lasting])
    order = [answer.key for answer in vllm.engine.collect()]
    assert order == [brief[0].key]  # the others are running
    for start in range(1, 200, 20):
        vllm.engine.submit(brief[start : start + 20])
    while found := vllm.engine.collect():
        order += [answer.key for answer in found]
    assert sorted(order) == sorted(request.key for request in [*brief, *lasting])
    assert set(order[:21]) <= {request.key for request in brief}  # how many more, is a matter of speed


@needs_vllm
def test_bases_one_after_the_other(vllm: Live, models: dict[str, Cell]) -> None:
    """The rows of the present base are all answered before another one is loaded, which brings its own adapters."""
    names = ["two", "one", "two_a", "one_b"]
    asked = requests(40, names, max_tokens=8)
    first = generate(vllm.engine, asked[1:2])[0]  # now `one` is loaded
    vllm.engine.submit(asked)
    order: list[Any] = []
    while found := vllm.engine.collect():
        order += found
    cells = {request.key: request.cell for request in asked}
    bases = [cells[c.key].split("_")[0] for c in order]
    assert bases == ["one"] * 20 + ["two"] * 20
    answers = {c.key: c for c in order}
    for request in asked:
        got = answers[request.key]
        assert got.logprob == pytest.approx(logprob(models[request.cell], request, got.token_ids), abs=8e-3)
    assert same([answers[asked[1].key]], [first])


@needs_vllm
def test_reloaded_weights_are_as_good_as_fresh_ones(vllm: Live, openai: Live) -> None:
    """The server has loaded no others."""
    # The prefix cache, which keeps blocks of 128 tokens, must not outlive the weights.
    long = tuple(np.random.default_rng(1).integers(5, VOCAB, 270).tolist())
    ones, twos = (
        [dataclasses.replace(r, token_ids=long + r.token_ids) for r in requests(12, [name])] for name in ("one", "two")
    )
    before = generate(vllm.engine, ones)
    reloaded = generate(vllm.engine, twos)
    fresh = generate(openai.engine, twos)
    assert [c.token_ids for c in reloaded] == [c.token_ids for c in fresh]
    assert [c.logprob for c in reloaded] == pytest.approx([c.logprob for c in fresh], abs=1e-3)
    assert not same(reloaded, before)
    assert same(generate(vllm.engine, ones), before)


@needs_vllm
def test_a_judge_asks_it(vllm: Live, models: dict[str, Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from candidates to comparisons, but that the engine runs already: another would start for long."""
    asked: list[EngineSpec] = []

    def running(spec: EngineSpec, **options: Any) -> Engine:
        asked.append(spec)
        return Borrowed(vllm.engine)

    monkeypatch.setattr("tso_fast.executors.local.open_engine", running)
    path = models["judge"].path
    check_digits(path, judge_digits(path, tmp_path, generator="vllm"))
    assert [(spec.kind, [c.path for c in spec.cells]) for spec in asked] == [("vllm", [path])]


class Borrowed:
    """An engine that who is done with it leaves running."""

    def __init__(self, engine: Engine) -> None:
        self.submit, self.collect = engine.submit, engine.collect

    def close(self) -> None:
        pass


@needs_vllm
def test_damaged_weights_end_the_engine(vllm: Live) -> None:
    """After the tests that need it whole. What was fine at the start may be cut when its turn comes."""
    engine = vllm.engine
    assert isinstance(engine, EngineProcess)
    assert generate(engine, requests(1, ["three"]))[0].token_ids
    assert generate(engine, requests(1, ["two"]))[0].token_ids
    file = next(c for c in engine.spec.cells if c.name == "three").path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    engine.submit(requests(4, ["three"]))
    with pytest.raises(EngineError, match=r"three: loading these weights over those of .*two failed: .*safetensors"):
        engine.collect()
    with pytest.raises(EngineError, match="loading these weights"):
        engine.submit(requests(1, ["two"]))


# ------------------------------------------------------------------------------------------------- vLLM's server


@needs_vllm
def test_the_server_names_its_models(served: EngineSpec) -> None:
    servers = {"two": dataclasses.replace(served.servers["two"], model="tow")}
    with pytest.raises(InputError, match=r"no model 'tow' at .* did you mean 'two'\?; it has two, two_a"):
        OpenAIEngine(dataclasses.replace(served, cells=served.cells[:1], servers=servers))
    lost = (dataclasses.replace(served.cells[1], path=Path("nowhere")),)
    servers = {"two_a": dataclasses.replace(served.servers["two_a"], model="c")}
    with pytest.raises(InputError, match=r"no model 'c' .*--lora-modules c=nowhere.*404: .*No adapter found"):
        OpenAIEngine(dataclasses.replace(served, cells=lost, servers=servers))


@needs_vllm
def test_a_killed_server_is_an_error_at_once(served: EngineSpec, server: tuple[subprocess.Popen[bytes], str]) -> None:
    """The last one: it takes the server along."""
    engine = OpenAIEngine(served, backoff_s=0.01)
    engine.submit(requests(200, ["two"], max_tokens=200))
    answers = engine.collect()
    os.killpg(server[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"/v1/completions: .* \(after 6 attempts\)$"):
        while True:
            answers += engine.collect()
    assert time.monotonic() - started < served.timeout_s / 2
    assert len(answers) < 200
    engine.close()

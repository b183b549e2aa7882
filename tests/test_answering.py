"""Every cell answers every prompt, by the real engine in this process and in processes of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import interrupt_store, make_adapter, read_rows

from tso_fast import answering, executors
from tso_fast.answering import answer, ask, max_tokens, resolve_generator
from tso_fast.config.checks import check
from tso_fast.config.settings import CellConfig, GenerateConfig
from tso_fast.errors import EngineError, InputError
from tso_fast.executors import local
from tso_fast.files.responses import ResponseStore, settings_hash
from tso_fast.files.rows import BadRows, candidates_row
from tso_fast.matrix import ModelMatrix
from tso_fast.types import HUMAN, Candidates, Prompt, Response


@pytest.fixture(scope="module")
def prompts(tiny_matrix: Path) -> list[Candidates]:
    rows = read_rows(tiny_matrix / "prompts.jsonl")[:9]
    return [Candidates(prompt=Prompt(id=row["id"], prompt=row["prompt"]), responses=()) for row in rows]


@pytest.fixture
def setup(tiny_matrix: Path, tmp_path: Path) -> Any:
    """`setup("m.v1", lora, num_generations=3)`: configuration and matrix."""

    def make(*cells: str | CellConfig, **settings: Any) -> tuple[GenerateConfig, ModelMatrix]:
        configs = [c if isinstance(c, CellConfig) else CellConfig(path=str(tiny_matrix / c)) for c in cells]
        values = {"max_completion_length": 6, "use_cpu": True, "engine_timeout_s": 60.0, **settings}
        config = GenerateConfig(prompts="-", output=str(tmp_path / "out"), cells=configs, **values)
        check(config)
        return config, ModelMatrix(configs)

    return make


def answers(
    made: tuple[GenerateConfig, ModelMatrix],
    candidates: list[Candidates],
    folder: Path,
    bad: BadRows | None = None,
    progress: list[int] | None = None,
) -> list[Candidates]:
    config, matrix = made
    asked = [ask(cell, config, matrix.configs.get(cell.name)) for cell in matrix.cells]
    with ResponseStore(folder) as store:
        advance = (lambda n: None) if progress is None else progress.append
        return list(answer(asked, candidates, matrix, config, store, bad or BadRows(), advance))


def texts(answered: list[Candidates]) -> list[list[tuple[str, int, tuple[int, ...] | None]]]:
    return [[(r.model, r.sample, r.token_ids) for r in item.responses] for item in answered]


@pytest.mark.parametrize("shard_size", [2, 256])
def test_cells_of_the_same_weights_share_their_answers(
    shard_size: int, setup: Any, prompts: list[Candidates], tiny_matrix: Path, tmp_path: Path
) -> None:
    """One folder under two names, with a third cell between them: what both ask for is generated once."""
    twins = [CellConfig(path=str(tiny_matrix / "s.v1"), name=name) for name in ("one", "two")]
    progress: list[int] = []
    answered = answers(setup(twins[0], "m.v2", twins[1], shard_size=shard_size), prompts, tmp_path, progress=progress)
    assert sum(progress) == 9 * 3 * 2
    for item in answered:
        said = {(r.model, r.sample): (r.text, r.token_ids) for r in item.responses}
        assert len(said) == 6
        assert all(said["one", sample] == said["two", sample] for sample in (0, 1))
    with ResponseStore(tmp_path) as store:
        assert len(store) == 9 * 2 * 2


def test_answers_depend_on_prompt_and_seed_not_on_batch_order_or_shard(
    setup: Any, prompts: list[Candidates], tmp_path: Path
) -> None:
    progress: list[int] = []
    whole = answers(setup("s.v1", "m.v2"), prompts, tmp_path / "a", progress=progress)
    assert sum(progress) == 9 * 2 * 2
    other = setup("m.v2", "s.v1", shard_size=2, generation_batch_size=3)
    again = answers(other, prompts[::-1], tmp_path / "b")[::-1]
    for ours, theirs in zip(whole, again, strict=True):
        by_name = sorted(theirs.responses, key=lambda r: (r.model != "s.v1", r.sample))
        for a, b in zip(ours.responses, by_name, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)  # padding moves the last bits
            assert dataclasses.replace(a, logprob=None) == dataclasses.replace(b, logprob=None)
    cells = {cell.name: cell for cell in setup("s.v1", "m.v2")[1].cells}
    for item in whole:
        assert [(r.model, r.sample) for r in item.responses] == [("s.v1", 0), ("s.v1", 1), ("m.v2", 0), ("m.v2", 1)]
        assert all(r.weight_hash == cells[r.model].weight_hash for r in item.responses)
        assert all(r.token_ids is not None and 1 <= len(r.token_ids) <= 6 for r in item.responses)
    assert len({r.text for item in whole for r in item.responses}) > 12


def no_engine(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an engine was opened")


def test_nothing_is_generated_twice(
    setup: Any, prompts: list[Candidates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answers(setup("s.v1"), prompts[:6], tmp_path)
    submitted: list[int] = []
    run = executors.run

    def counting(executor: Any, jobs: Any, done: Any, **options: Any) -> None:
        def count(shards: Any) -> Any:
            for shard in shards:
                submitted.append(len(shard))
                yield shard

        for job in jobs:
            job.shards = count(job.shards)
        run(executor, jobs, done, **options)

    monkeypatch.setattr(executors, "run", counting)
    more = answers(setup("s.v1", num_generations=3), prompts, tmp_path)  # 3 prompts and a sample each more
    assert sum(submitted) == 6 + 9
    assert [item.responses[:2] for item in more[:6]] == [item.responses for item in first]
    submitted.clear()
    answers(setup("s.v1", temperature=0.7), prompts[:1], tmp_path)  # another setting, other responses
    answers(setup("s.v2"), prompts[:1], tmp_path)
    answers(setup("s.v1", seed=1), prompts[:1], tmp_path)
    assert sum(submitted) == 6
    monkeypatch.setattr(local, "open_engine", no_engine)
    assert answers(setup("s.v1", num_generations=3), prompts, tmp_path) == more


def test_keys_are_those_of_before_there_were_likeliest_tokens(
    setup: Any, prompts: list[Candidates], tmp_path: Path
) -> None:
    config, matrix = setup("s.v1")
    asked = ask(matrix.cells[0], config)
    before = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 6, "stop": ()}
    want = settings_hash(weights=asked.cell.weight_hash, engine="hf", dtype="float32", sampling=before)
    telling = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, top_logprobs=3))
    with ResponseStore(tmp_path) as store:
        got = [answering._Plan([a], prompts, matrix, config, store).settings["s.v1"] for a in (asked, telling)]
        [told] = answer([telling], prompts[:1], matrix, config, store, BadRows())
    assert got[0] == want != got[1]
    assert [len(r.top_logprobs or ()) for r in told.responses] == [3, 3]
    assert all("top_logprobs" not in row for row in candidates_row(told)["responses"])


def test_an_interrupted_run_goes_on_with_the_same_bytes(
    setup: Any, prompts: list[Candidates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup("s.v1", "m.v1", shard_size=2)
    whole = answers(made, prompts, tmp_path / "whole")
    interrupt_store(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        answers(made, prompts, tmp_path / "parts")
    monkeypatch.undo()
    with ResponseStore(tmp_path / "parts") as store:
        assert 0 < len(store) < 36
    assert answers(made, prompts, tmp_path / "parts") == whole


def test_cells_sample_by_their_own_settings(setup: Any, prompts: list[Candidates], tmp_path: Path) -> None:
    def own(name: str, **settings: Any) -> CellConfig:
        return CellConfig(path=str(tiny / "m.v2"), name=name, **settings)

    tiny = setup("m.v2")[1].cells[0].path.parent
    made = setup(
        own("greedy", temperature=0.0, num_generations=1),
        own("long", max_completion_length=9),
        own("plain"),
        own("silent", num_generations=0),
        top_p=0.9,
    )
    config, matrix = made
    assert max_tokens(matrix, config) == 9
    asked = {a.cell.name: a for a in (ask(c, config, matrix.configs[c.name]) for c in matrix.cells)}
    assert (asked["greedy"].sampling.temperature, asked["greedy"].sampling.top_p) == (0.0, 1.0)
    assert (asked["plain"].sampling.top_p, asked["plain"].sampling.max_tokens) == (0.9, 6)
    assert ask(matrix.cells[0], config, matrix.configs["greedy"], is_own_sampling=False).sampling.temperature == 1.0
    answered = answers(made, prompts, tmp_path)
    for item in answered:
        assert [(r.model, r.sample) for r in item.responses] == [
            ("greedy", 0),
            ("long", 0),
            ("long", 1),
            ("plain", 0),
            ("plain", 1),
        ]
    lengths = [len(r.token_ids or ()) for item in answered for r in item.responses if r.model == "long"]
    assert max(lengths) > 6
    # One seed, one model: the shorter response is the start of the longer one.
    assert all(item.responses[1].token_ids[:6] == item.responses[3].token_ids for item in answered)  # type: ignore[index]


def test_lora_versions_answer_beside_their_base(
    setup: Any, tiny_matrix: Path, prompts: list[Candidates], tmp_path: Path
) -> None:
    adapters = [make_adapter(tiny_matrix / "m.v2", tmp_path / f"lora-{i}", seed=i) for i in (1, 2)]
    made = setup("m.v2", *(CellConfig(path=str(a), version_rank=i) for i, a in enumerate(adapters, 1)))
    answered = answers(made, prompts, tmp_path)
    by_cell = {
        name: [r.token_ids for item in answered for r in item.responses if r.model == name]
        for name in ("m.v2", "lora-1", "lora-2")
    }
    assert len({tuple(ids) for ids in by_cell.values()}) == 3
    assert len({r.weight_hash for r in answered[0].responses}) == 3


def test_stop_texts_end_responses(setup: Any, prompts: list[Candidates], tmp_path: Path) -> None:
    free = answers(setup("m.v2", max_completion_length=30), prompts, tmp_path)
    ended = answers(setup("m.v2", max_completion_length=30, stop=["e"]), prompts, tmp_path)
    pairs = [(a, b) for x, y in zip(free, ended, strict=True) for a, b in zip(x.responses, y.responses, strict=True)]
    assert sum("e" in a.text for a, _ in pairs) > 9
    for a, b in pairs:
        assert b.text == a.text.split("e")[0]
        assert a.token_ids is not None
        assert b.token_ids == a.token_ids[: len(b.token_ids or ())]
        assert "e" not in a.text or b.finish_reason == "stop"


def test_every_setting_of_an_engine_reaches_it(setup: Any, prompts: list[Candidates], tmp_path: Path) -> None:
    turned = {
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "engine_start_timeout_s": 11.0,
        "engine_timeout_s": 12.0,
        "generation_batch_size": 13,
        "max_concurrency": 14,
        "max_retries": 15,
        "batch_invariant": True,
        "vllm_args": {"gpu_memory_utilization": 0.5},
        "generator": "vllm",
    }
    config, matrix = setup("s.v1", "s.v2", "m.v1", **turned)
    asked = [ask(cell, config, matrix.configs[cell.name]) for cell in matrix.cells]
    with ResponseStore(tmp_path) as store:
        jobs = answering._Plan(asked, prompts, matrix, config, store).jobs(lambda n: None)
    assert [[c.name for c in job.spec.cells] for job in jobs] == [["s.v1", "s.v2"], ["m.v1"]]  # by architecture
    spec = jobs[0].spec
    got = {
        "dtype": spec.dtype,
        "attn_implementation": spec.attn_implementation,
        "engine_start_timeout_s": spec.start_timeout_s,
        "engine_timeout_s": spec.timeout_s,
        "generation_batch_size": spec.batch_size,
        "max_concurrency": spec.max_concurrency,
        "max_retries": spec.max_retries,
        "batch_invariant": spec.batch_invariant,
        "vllm_args": spec.engine_args,
        "generator": spec.kind,
    }
    assert got == turned
    assert (spec.use_cpu, spec.num_gpus, spec.context) == (True, 0, 512)


LONG = Candidates(prompt=Prompt(id="long", prompt="Sam has 2 pears. " * 200, where="p.jsonl:9"), responses=())


def test_a_refused_prompt_is_set_aside_and_the_rest_goes_on(
    setup: Any, prompts: list[Candidates], tmp_path: Path
) -> None:
    made = setup("s.v1")
    mixed = [*prompts[:2], LONG, *prompts[2:4]]
    with pytest.raises(InputError, match=r"p\.jsonl:9: field 'prompt' was refused: .*512"):
        answers(made, mixed, tmp_path)
    with ResponseStore(tmp_path) as store:
        assert len(store) == 8
    bad = BadRows("skip")
    answered = answers(made, mixed, tmp_path, bad)
    assert [item.prompt.id for item in answered] == [item.prompt.id for item in prompts[:4]]
    assert [row["row"]["id"] for row in bad.rows] == ["long"]


def test_what_they_came_with_stays_in_front(setup: Any, prompts: list[Candidates], tmp_path: Path) -> None:
    human = Response(model=HUMAN, text="by hand")
    (item,) = answers(setup("s.v1"), [dataclasses.replace(prompts[0], responses=(human,))], tmp_path)
    assert [r.model for r in item.responses] == [HUMAN, "s.v1", "s.v1"]


# ---- engines in processes


def engine_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "tso_fast.generators.process" in p.cmdline()]


@pytest.mark.slow
def test_killed_engines_cost_a_retry_each(
    setup: Any, prompts: list[Candidates], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two processes one while it starts, one while it works: the responses of this one, and nothing is left."""
    settings = {"shard_size": 1, "max_completion_length": 80, "top_k": 40}
    cells = ("s.v1", "m.v2")
    whole = answers(setup(*cells, **settings), prompts, tmp_path / "whole")
    log = tmp_path / "parts" / "responses.sqlite3-wal"
    killed: dict[int, int] = {}
    is_over = threading.Event()

    def killer() -> None:
        while len(killed) < 2 and not is_over.wait(0.01):
            size = log.stat().st_size if log.exists() else 0
            for process in engine_processes():
                if process.pid not in killed and (not killed or size > next(iter(killed.values()))):
                    killed[process.pid] = size
                    os.killpg(process.pid, signal.SIGKILL)
                    break

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        parts = answers(setup(*cells, num_engines=2, **settings), prompts, tmp_path / "parts")
    finally:
        is_over.set()
        thread.join()
    assert parts == whole
    assert len(killed) == 2
    assert caplog.text.count("an engine died, its work is given to another") == 2
    assert "SIGKILL" in caplog.text
    assert engine_processes() == []
    assert {"engine-1.log", "engine-2.log"} <= {p.name for p in (tmp_path / "parts" / "logs").iterdir()}


@pytest.mark.slow
def test_engines_that_cannot_start_stop_the_run_with_their_words(
    setup: Any, prompts: list[Candidates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import os, sys\nsys.stderr.write('the driver is too old\\n')\nsys.stderr.flush()\nos._exit(7)\n"
    )
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"2 engines died over one shard; stopped(?s:.*)the driver is too old"):
        answers(setup("s.v1", num_engines=2, max_shard_retries=1), prompts, tmp_path)
    assert time.monotonic() - started < 300  # half of what an engine may take to start


# ---- which engine


def test_auto_is_hf_without_a_gpu(setup: Any, caplog: pytest.LogCaptureFixture) -> None:
    answering._logged.clear()
    with caplog.at_level("INFO"):
        assert resolve_generator(setup("s.v1")[0]) == "hf"
        assert resolve_generator(setup("s.v1")[0]) == "hf"
    assert caplog.text.count("generator auto: hf (no GPU in use)") == 1


def test_trained_versions_are_on_no_server(setup: Any, tiny_matrix: Path) -> None:
    config, matrix = setup(
        "s.v1",
        CellConfig(path=str(tiny_matrix / "m.v1"), url="http://b:1/v1", served_name="x"),
        generator="openai",
        url="http://a:1/v1/",
    )
    matrix.add_version(tiny_matrix / "m.v2", "tso-1")
    asked = [ask(cell, config, matrix.configs.get(cell.name)) for cell in matrix.cells]
    assert [a.kind for a in asked] == ["openai", "openai", "hf"]
    assert [(a.server.url, a.server.model) for a in asked if a.server] == [
        ("http://a:1/v1", "s.v1"),
        ("http://b:1/v1", "x"),
    ]
    with pytest.raises(InputError, match=r"url: cell 's.v1' has none, and generator 'openai' needs to know its server"):
        ask(matrix.cells[0], dataclasses.replace(config, url=None), matrix.configs["s.v1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ray_address": "x"}, "ray_address: it has no effect with executor 'local'"),
        ({"generator": "hf", "vllm_args": {"a": 1}}, "vllm_args: it has no effect with generator 'hf'"),
        ({"generator": "openai", "batch_invariant": True}, "batch_invariant: it has no effect with generator 'openai'"),
        ({"url": "http://a"}, "url: it has no effect with generator 'auto'"),
        ({"url": "a:8000", "generator": "openai"}, "url: got 'a:8000', expected an address such as"),
        ({"stop": [""]}, r"stop: got \[''\], expected texts that are not empty"),
        ({"shard_size": 0}, "shard_size: got 0, expected an integer >= 1"),
        ({"engine_timeout_s": 0}, "engine_timeout_s: got 0, expected a finite number > 0"),
    ],
)
def test_settings_that_cannot_be(setup: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        setup("s.v1", **settings)


def test_a_cells_own_settings_are_checked(setup: Any, tiny_matrix: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            setup("s.v1", CellConfig(path=str(tiny_matrix / "m.v1"), **settings))
        return str(caught.value)

    assert refused(top_p=1.5) == "cells[1].top_p: got 1.5, expected a number in (0, 1]"
    assert refused(num_gpus=0) == "cells[1].num_gpus: got 0, expected an integer >= 1"
    assert refused(temperature=0.0, top_k=5).startswith("cells[1].top_k: 5 has no effect with temperature 0")

"""A real Ray cluster of several nodes, each a set of processes on this machine; one is killed while it works."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from helpers import make_adapter, read_rows

from tso_fast.answering import answer, ask
from tso_fast.config.settings import AnsweringConfig, CellConfig, GenerateConfig, JudgeConfig
from tso_fast.errors import EngineError, InputError
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows
from tso_fast.matrix import ModelMatrix
from tso_fast.types import Candidates, Prompt, Response

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'tso-fast[ray]'")


MEMORY = 80 * 2**20
"""Of each node's object store, the least that there is: the models are tiny."""


class Cluster(NamedTuple):
    address: str
    kill: Callable[[], None]
    """Ends the second of its two nodes, of which each has room for one engine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from ray.cluster_utils import Cluster as RayCluster

    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Nobody answers for a killed node, which is known after two seconds instead of fifteen; a busy one has ten for
        # each of its answers.
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_health_check_period_ms": "400",
        "RAY_health_check_failure_threshold": "5",
        "RAY_health_check_timeout_ms": "10000",
    }
    unused = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        made = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, **unused})
        try:
            node = made.add_node(num_cpus=1, object_store_memory=MEMORY)
            made.wait_for_nodes()
            yield Cluster(made.address, lambda: made.remove_node(node, allow_graceful=False))
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def run(tiny_matrix: Path, tmp_path: Path, cluster: Cluster) -> Any:
    rows = read_rows(tiny_matrix / "prompts.jsonl")[:8]
    prompts = [Candidates(prompt=Prompt(id=row["id"], prompt=row["prompt"]), responses=()) for row in rows]

    def start(name: str, cells: list[CellConfig] | None = None, **settings: Any) -> list[Candidates]:
        values = {
            "max_completion_length": 100,
            "top_k": 40,
            "num_generations": 2,
            "use_cpu": True,
            "shard_size": 1,
            "executor": "ray",
            "ray_address": cluster.address,
            "engine_start_timeout_s": 90.0,
            "engine_timeout_s": 60.0,
            **settings,
        }
        config = GenerateConfig(
            prompts="-", output="-", cells=cells or [CellConfig(path=str(tiny_matrix / "s.v1"))], **values
        )
        matrix = ModelMatrix(config.cells)
        asked = [ask(cell, config, matrix.configs[cell.name]) for cell in matrix.cells]
        with ResponseStore(tmp_path / name) as store:
            return list(answer(asked, prompts, matrix, config, store, BadRows()))

    return start


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "tso_fast.generators.process" in process.cmdline() and "RAY_RAYLET_PID" in process.environ():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until_gone(timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while engines() and time.monotonic() < end:
        time.sleep(0.1)
    assert engines() == []


def test_a_node_killed_while_it_works_loses_nothing(
    run: Any, cluster: Cluster, tiny_matrix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of versions as adapters, too."""
    adapter = make_adapter(tiny_matrix / "s.v1", tmp_path / "lora")
    cells = [CellConfig(path=str(tiny_matrix / "s.v1")), CellConfig(path=str(adapter), version_rank=1)]
    whole = run("local", cells, executor="local", ray_address=None)
    log = tmp_path / "ray" / "responses.sqlite3-wal"
    is_killed, is_over = threading.Event(), threading.Event()

    def killer() -> None:
        first: int | None = None
        while not is_over.wait(0.01):
            if len(engines()) < 2 or not log.exists():  # until both nodes have one
                continue
            first = log.stat().st_size if first is None else first
            if log.stat().st_size > first:  # and something was answered
                cluster.kill()
                return is_killed.set()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        parts = run("ray", cells)
    finally:
        is_over.set()
        thread.join()
    assert is_killed.is_set()
    assert parts == whole
    assert len({r.token_ids for item in parts for r in item.responses}) > 24  # the adapter's are others
    with ResponseStore(tmp_path / "ray") as store:
        assert len(store) == 32
    # Once, and again where an engine was placed on the dead node before Ray knew.
    assert 1 <= caplog.text.count("an engine died, its work is given to another (retry") <= 3
    wait_until_gone()


def test_bad_input_arrives_as_such(run: Any, tiny_matrix: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_matrix / "s.v1", tmp_path / "broken")
    matrix_cell = CellConfig(path=str(broken))
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(InputError, match="broken"):
        run("ray", [matrix_cell], shard_size=64)
    wait_until_gone()


def test_more_gpus_than_the_cluster_has(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tso_fast.answering as answering

    spec_of = answering._Plan._spec

    def with_gpus(self: Any, group: Any) -> Any:
        return dataclasses.replace(spec_of(self, group), num_gpus=4)

    monkeypatch.setattr(answering._Plan, "_spec", with_gpus)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"on Ray: it did not start in 0.5 s; free in the cluster: .*CPU"):
        run("ray", engine_start_timeout_s=0.5, max_shard_retries=0)
    assert time.monotonic() - started < 80


def test_no_cluster_there(run: Any) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(InputError, match=r"ray_address: no Ray cluster can be joined at 127\.0\.0\.1:1"):
        run("ray", ray_address="127.0.0.1:1")


def test_a_judge_on_the_cluster(tiny_matrix: Path, cluster: Cluster, tmp_path: Path) -> None:
    from tso_fast.judges.judge import Bench
    from tso_fast.judges.llm import LlmJudge

    (tmp_path / "short.txt").write_text("---\nread: label\n---\n{prompt} {first} {second}")
    matrix = ModelMatrix([CellConfig(path=str(tiny_matrix / "m.v2"))])
    texts = [tuple(Response(model="m", text=f"{i + j}") for j in range(3)) for i in range(4)]
    candidates = [Candidates(prompt=Prompt(id=f"q{i}", prompt="?"), responses=of) for i, of in enumerate(texts)]
    config = JudgeConfig(kind="llm", cell="policy", template=str(tmp_path / "short.txt"))
    found = []
    for executor, address in (("local", None), ("ray", cluster.address)):
        settings = AnsweringConfig(use_cpu=True, executor=executor, ray_address=address, shard_size=64)  # type: ignore[arg-type]
        with ResponseStore(tmp_path / executor) as store:
            bench = Bench(bad=BadRows(), settings=settings, store=store, matrix=matrix)
            found.append(LlmJudge(config).judge(candidates, bench))
    assert found[0] == found[1]
    assert found[0].cost.new_requests == 18  # pairs that two prompts share are asked about once

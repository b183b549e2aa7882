"""Shared by all tests: no network, no cache outside the test's folders, and models small enough to make on the spot."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DATA = ROOT.parent / "shared" / "data"


def take_root_off_the_path() -> None:
    """The folder `kernels/` would answer to the name of a PyPI package that transformers looks for."""
    before = list(sys.path)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    importlib.invalidate_caches()
    if importlib.util.find_spec("tso_fast") is None:  # not installed: the checkout itself is under test
        sys.path[:] = before


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; some tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
take_root_off_the_path()
# Bytecode is kept even where the environment says not to: the workers and all that they start would compile anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.path.insert(0, str(TESTS))  # helpers, toy_verifier
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200")
# Tensors here are tiny: a second thread only waits for the first, and very long when the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Modules that take longest, longest first, and some of their seconds on one core: a worker that gets one of them last
# keeps the other waiting. What is not here takes less than the last.
SLOWEST = {
    "test_engine_contract": 60,
    "test_ray": 50,
    "test_shard": 45,
    "test_resume": 45,
    "test_gpu_benchmarks": 40,
    "test_answering": 35,
    "test_environment": 30,
    "test_trainer": 28,
    "test_compiled_kernels": 25,
    "test_generators": 25,
    "test_planning": 20,
    "test_logprob_compiled": 20,
    "test_fuzz": 18,
    "test_security": 18,
    "test_cli": 18,
    "test_process": 17,
    "test_config": 15,
    "test_quickstart": 15,
    "test_optimise": 15,
    "test_annotate_page": 15,
    "test_llm_judge": 14,
    "test_openai_server": 14,
    "test_launch": 14,
    "test_logprob_groups": 14,
    "test_integrations": 12,
    "test_kernels": 12,
    "test_samplers": 12,
    "test_packaging": 12,
    "test_constraints": 10,
    "test_report": 10,
}
WORKERS = 3
"""One more than most small machines have cores: a third of the time is waited for engines and other processes."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """None for a single module, which goes to one worker anyway, and none where the tests share a GPU."""
    paths = {Path(argument.partition("::")[0]) for argument in config.args}
    is_single = len(paths) == 1 and paths.pop().is_file()
    return 0 if is_single or Path("/dev/nvidiactl").exists() else WORKERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -SLOWEST.get(item.path.stem, 0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Garbage is looked for among what tests make, not among the libraries: that takes a quarter of a second."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TSO_FAST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def own_accelerator() -> Iterator[None]:
    """A module's precision and devices, which accelerate keeps for the whole process, end with it."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_matrix(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells `s.v1 s.v2 m.v1 m.v2` of one vocabulary, twenty steps old, with `prompts.jsonl` and `held_out.jsonl`.

    Made by one worker for all.
    """
    from tso_fast.quickstart.build import Recipe, Size, build

    sizes = {"s": Size(hidden=32, layers=1, ffn=64, steps=20), "m": Size(hidden=32, layers=2, ffn=64, steps=20)}
    recipe = Recipe(
        seed=0, sizes=sizes, versions=(0.5, 1.0), demonstrations=200, context=512, prompts=24, human_share=0.25,
        held_out=12, development=12,
    )  # fmt: skip
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("TSO_FAST_CACHE", str(shared))
        return build(recipe)


def _data(name: str) -> Path:
    file = DATA / name
    if not file.exists():
        pytest.skip(f"test data beside the checkout is missing: {file.relative_to(ROOT.parent)}")
    return file


@pytest.fixture(scope="session")
def gsm8k_dev() -> Path:
    """660 questions, each answered by a real 2 x 2 matrix and a person, `is_correct` on every response."""
    return _data("gsm8k_matrix/matrix_dev.jsonl.gz")


@pytest.fixture(scope="session")
def gsm8k_train() -> Path:
    """7473 questions with a person's solution and the answer."""
    return _data("gsm8k_matrix/train_human.jsonl.gz")


@pytest.fixture(scope="session")
def ifeval() -> Path:
    """IFEval's 541 prompts with their 834 constraints; no responses."""
    return _data("ifeval/ifeval_input_data.jsonl.gz")


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`cli("pairs", ["--output", file])` runs a command in this process."""
    from tso_fast.cli import main

    def run(command: str, arguments: Iterable[object] = ()) -> Ended:
        capsys.readouterr()
        try:
            status = main([command, *map(str, arguments)])
        except SystemExit as error:  # --help and --print_config
            status = int(error.code or 0)
        return Ended(status, *capsys.readouterr())

    return run

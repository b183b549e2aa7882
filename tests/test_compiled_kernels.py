"""What the Triton kernels compile to for GPUs that need not be here: with the installed Triton, and with 3.6.0.

Each version compiles in a process of its own: this one may hold triton in its interpreter mode.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tso_fast.kernels import linear_logprob, linear_logprob_backward, pair_loss

pytestmark = pytest.mark.slow
FOLDERS = {"installed": None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}
# With the installed Triton every tile of every architecture in bf16, float16, float32, each head once, pointers where
# descriptors cannot fetch (D 4100), and kernels that are no product by Blackwell's assembler; with the oldest one each
# architecture, under the head that takes most registers, and those kernels by the other assembler. More takes minutes:
# python tests/compile_kernels.py --all
CASES = {
    "installed": [
        "90-bfloat16-4096-plain-heaviest",
        "90-bfloat16-4096-softcap-heaviest",
        "90-bfloat16-1024-softcap-heaviest",
        "90-bfloat16-4100-plain-heaviest",
        "90-float32-4096-plain-heaviest",
        "80-float16-4096-plain-heaviest",
        "80-bfloat16-4100-plain-heaviest",
        "89-bfloat16-4096-plain-heaviest",
        "100-bfloat16-4096-bias-all",
        "100-bfloat16-4096-softcap-heaviest",
        "100-bfloat16-1024-plain-heaviest",
        "120-bfloat16-4096-softcap-heaviest",
    ],
    "3.6.0": [
        "80-bfloat16-4096-bias-all",
        "90-bfloat16-4096-softcap-heaviest",
        "90-bfloat16-1024-softcap-heaviest",
        "89-bfloat16-4096-plain-heaviest",
        "100-bfloat16-4096-softcap-heaviest",
        "120-bfloat16-4096-softcap-heaviest",
    ],
}
CAPABILITIES = (80, 89, 90, 100, 120)
SHARED_KB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # that one program may have
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
TILED = {"sumexp", "exp", "dhidden", "dweight"}
GATHERED = {"target_logit", "redo"}  # products of rows that lie anywhere, which no descriptor fetches

Row = dict[str, Any]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """One row a kernel and kind of arguments, by version; none of a version that is not there."""
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    runs = {}
    for version, folder in FOLDERS.items():
        if folder is not None and not folder.is_dir():
            continue
        env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
        env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        if folder is not None:
            env["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [env.get("PYTHONPATH")])])
        runs[version] = subprocess.Popen(
            [*command, *CASES[version]], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    rows = {}
    outputs = {version: run.communicate(timeout=600) for version, run in runs.items()}
    for version, (out, err) in outputs.items():
        assert runs[version].returncode == 0, err[-3000:]
        rows[version] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows


@pytest.fixture(params=FOLDERS)
def compiled(request: pytest.FixtureRequest, processes: dict[str, list[Row]]) -> list[Row]:
    """The rows of one version."""
    version: str = request.param
    if version not in processes:
        pytest.skip(f"{FOLDERS[version]} is missing; `make test` installs it on Linux x86_64")
    assert version in ("installed", *{row["triton"] for row in processes[version]})
    return processes[version]


def of(capability: int, compiled: list[Row]) -> list[Row]:
    return [row for row in compiled if row["capability"] == capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit_without_spills(capability: int, compiled: list[Row]) -> None:
    for row in of(capability, compiled):
        assert row["spills"] == 0, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED_KB[capability] * 1024, row
        assert not row["is_serialised"], row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_code_is_for_the_architecture(capability: int, compiled: list[Row]) -> None:
    """Also its assembler, of which Triton has another for Blackwell."""
    for row in of(capability, compiled):
        assert row["target"] == f"sm_{capability}" + ("a" if capability >= 90 else ""), row
        assert row["ptxas"] == ("ptxas-blackwell" if capability >= 100 else "ptxas"), row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_use_tensor_cores_and_the_copy_engine(capability: int, compiled: list[Row]) -> None:
    rows = [row for row in of(capability, compiled) if row["kernel"] in TILED | GATHERED]
    assert {row["kernel"] for row in rows} >= {"target_logit", "exp", "dhidden", "dweight"}
    for row in rows:
        _, dtype, D, *_ = row["case"].split("-")
        assert row["product"] == (None if dtype == "float32" else TENSOR_CORES[capability]), row
        if int(D) % 8 == 0:  # else rows are not whole words of 16 bytes
            is_tma = capability >= 90 and row["kernel"] in TILED
            assert row["loads"] == ("cp.async.bulk.tensor" if is_tma else "cp.async"), row


def test_two_programs_of_a_small_head_share_a_multiprocessor(compiled: list[Row]) -> None:
    rows = [row for row in compiled if "-1024-" in row["case"] and row["kernel"] in TILED]
    assert {row["kernel"] for row in rows} >= {"exp", "dhidden", "dweight"}
    for row in rows:
        assert row["registers"] * row["warps"] * 32 * 2 <= 65536, row
        assert (row["shared"] + 1024) * 2 <= 228 * 1024, row  # 1 KB is the system's


def test_every_kernel_is_compiled(compiled: list[Row]) -> None:
    modules = linear_logprob, linear_logprob_backward, pair_loss
    kernels = {name.removesuffix("_kernel") for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {row["kernel"] for row in compiled} == kernels


def test_scalars_of_the_pair_loss_are_float64(compiled: list[Row]) -> None:
    """A Python float is a float32 argument unless it is annotated; in the interpreter it stays one of 64 bits."""
    rows = [row for row in compiled if row["kernel"] == "dual_clip"]
    assert rows
    for row in rows:
        assert row["floats"] == dict.fromkeys(("beta", "clip_chosen", "clip_rejected"), "fp64"), row

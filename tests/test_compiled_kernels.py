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
# With the installed Triton the largest and the smallest tiles of an architecture, bf16, float16, float32, each head
# once, pointers where descriptors cannot fetch (D 4100), and all kernels with every kind of chunk by Blackwell's
# assembler; with the oldest one each kernel by the other assembler, and Blackwell's products. More takes minutes:
# python tests/compile_kernels.py --all
CASES = {
    "installed": [
        "90-bfloat16-4096-softcap-heaviest",
        "90-bfloat16-1024-softcap-heaviest",
        "80-bfloat16-4100-plain-heaviest",
        "80-float16-4096-plain-heaviest",
        "80-float32-4096-plain-heaviest",
        "100-bfloat16-1024-bias-all",
        "100-bfloat16-4096-softcap-heaviest",
        "120-bfloat16-4096-softcap-heaviest",
    ],
    "3.6.0": [
        "90-bfloat16-4096-bias-each",
        "90-bfloat16-1024-softcap-heaviest",
        "100-bfloat16-4096-softcap-heaviest",
    ],
}
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}  # that one program may have
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
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
    rows = processes[version]
    assert version in ("installed", *{row["triton"] for row in rows})
    assert {row["case"] for row in rows} == set(CASES[version])
    return rows


def test_kernels_fit_without_spills(compiled: list[Row]) -> None:
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED_KB[row["capability"]] * 1024, row
        assert not row["is_serialised"], row


def test_code_is_for_the_architecture(compiled: list[Row]) -> None:
    """Also its assembler, of which Triton has another for Blackwell."""
    for row in compiled:
        assert row["case"].startswith(f"{row['capability']}-"), row
        assert row["target"] == f"sm_{row['capability']}" + ("a" if row["capability"] >= 90 else ""), row
        assert row["ptxas"] == ("ptxas-blackwell" if row["capability"] >= 100 else "ptxas"), row


def test_products_use_tensor_cores_and_the_copy_engine(compiled: list[Row]) -> None:
    found: dict[int, set[str]] = {row["capability"]: set() for row in compiled}
    for row in compiled:
        if row["kernel"] not in TILED | GATHERED:
            continue
        found[row["capability"]].add(row["kernel"])
        _, dtype, D, *_ = row["case"].split("-")
        assert row["product"] == (None if dtype == "float32" else TENSOR_CORES[row["capability"]]), row
        if int(D) % 8 == 0:  # else rows are not whole words of 16 bytes
            is_tma = row["capability"] >= 90 and row["kernel"] in TILED
            assert row["loads"] == ("cp.async.bulk.tensor" if is_tma else "cp.async"), row
    assert all(kernels >= {"target_logit", "exp", "dhidden", "dweight"} for kernels in found.values())


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

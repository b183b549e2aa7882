"""Compiles the Triton kernels for GPUs that need not be here; prints one JSON object a kernel.

    python tests/compile_kernels.py 90-bfloat16-4096-plain ...        capability, dtype, D, head: plain, bias or softcap

The launchers themselves run, on meta tensors and with a driver that names the target, so what is compiled is what is
launched: same tiles, same specialisation of the arguments. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from tso_fast.kernels import linear_logprob, pair_loss


class NamedTarget:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(log: str) -> dict[str, int]:
    """Registers and spilled bytes a thread, from what ptxas -v said."""
    assert "serializ" not in log, log  # wgmma that waits for itself
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers, log
    assert spills, log
    return {"registers": int(registers[1]), "spills": int(spills[1])}


def launch_all(dtype: torch.dtype, D: int, head: dict[str, Any], V: int = 128256, T: int = 4099) -> None:
    """Every kernel with every kind of argument, on meta tensors."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, weight = empty(T, D, dtype=dtype), empty(V, D, dtype=dtype)
    bias = empty(V, dtype=dtype) if head.pop("bias") else None
    columns = linear_logprob.padded_vocab(D, V, dtype, hidden.device)
    for room in (None, empty(T * columns, dtype=dtype)):
        _, saved = linear_logprob.linear_logprob_forward(
            hidden, weight, bias, empty(T, dtype=torch.int64), **head, room=room
        )
    dbias = None if bias is None else empty(V, dtype=torch.float64)
    rest = {torch.bfloat16: empty(V, D, dtype=torch.int16), torch.float16: empty(V, D)}.get(dtype)
    for dhidden, is_first, is_last in ((hidden, True, False), (empty(T, D), False, False), (hidden, False, True)):
        linear_logprob.linear_logprob_backward(
            saved, empty(T), dhidden_TD=dhidden, dweight_VD=weight, dweight_rest_VD=rest, dbias_V=dbias,
            is_first=is_first, is_last=is_last,
        )  # fmt: skip
    if bias is None:
        return
    pair_loss.segment_sum(empty(T, dtype=torch.float64), empty(T), empty(65, dtype=torch.int64))
    sums = empty(64, dtype=torch.float64)
    scalars = [empty(32)] * 3
    pair_loss.dual_clip_epilogue(sums, sums, empty(32, 2, dtype=torch.int64), *scalars, 0.1, 0.5, 0.3, empty())


def main(case: str, report: Callable[[str], None]) -> None:
    capability, dtype, D, head = case.split("-")
    bias, softcap = {"plain": (False, None), "bias": (True, None), "softcap": (False, 30.0)}[head]
    driver.set_active(NamedTarget(int(capability)))
    linear_logprob._capability = lambda device: divmod(int(capability), 10)
    linear_logprob.tiles.cache_clear()
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if not log.getvalue():  # the same arguments once more
            return
        ptx = kernel.asm["ptx"]
        report(json.dumps({
            "case": case, "kernel": kernel.metadata.name,
            "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared,
            **resources(log.getvalue()),
            "product": next((x for x in ("tcgen05.mma", "wgmma", "mma.sync") if x in ptx), None),
            "loads": next((x for x in ("cp.async.bulk.tensor", "cp.async") if x in ptx), None),
        }))  # fmt: skip

    JITFunction.run = compile_only
    try:
        launch_all(getattr(torch, dtype), int(D), {"bias": bias, "softcap": softcap, "temperature": 1.0})
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    for case in sys.argv[1:]:
        main(case, functools.partial(print, flush=True))

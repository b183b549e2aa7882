"""Compiles the Triton kernels for GPUs that need not be here, with the Triton that this process imports.

    python tests/compile_kernels.py 90-bfloat16-4096-plain ...    capability, dtype, D, head; one JSON object a kernel
    python tests/compile_kernels.py --all                         every architecture, dtype and head, as a table
    python tests/compile_kernels.py --candidates                  every tile that autotune may choose, as a table
    PYTHONPATH=.venv/triton-3.6.0 python tests/compile_kernels.py ...               with the other Triton of `make test`

A fifth word, ``90-bfloat16-4096-plain-heaviest``, is one of ``SCOPES`` and leaves out kernels, which saves seconds.

The launchers themselves run, on meta tensors and with a driver that names the target, so what is compiled is what is
launched: same tiles, same specialisation of the arguments. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TSO_FAST_TILES"] = "tiles that were timed are not wanted"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from tso_fast.kernels import blocks, linear_logprob, linear_logprob_backward, pair_loss, tiles
from tso_fast.kernels.tiles import Tile, Tiles

CAPABILITIES = (80, 89, 90, 100, 120)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False, "softcap": None},
    "bias": {"bias": True, "softcap": None},
    "softcap": {"bias": False, "softcap": 30.0},
}
ALL = [
    "bfloat16-4096-plain", "bfloat16-4096-bias", "bfloat16-4096-softcap", "bfloat16-1024-plain",
    "bfloat16-1024-softcap", "bfloat16-4100-plain", "float16-4096-plain", "float32-4096-plain",
]  # fmt: skip
PRODUCTS = {"target_logit", "sumexp", "exp", "redo", "dhidden", "dweight"}  # what depends on the head and its tiles
SCOPES: dict[str, Collection[str] | None] = {"all": None, "each": None, "heaviest": PRODUCTS - {"sumexp", "redo"}}
"""Kernels by name; None: every one. Of the gradients ``all`` has every kind of chunk, the others what takes most
registers, a chunk in the middle of several."""
T, V = 4099, 128256

default_tiles = tiles.default_tiles

Row = dict[str, Any]


class NamedTarget:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.device: object = capability
        """what kernels are remembered by, so that none is compiled twice"""

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0


def resources(log: str) -> dict[str, Any]:
    """Registers and spilled bytes a thread, from what ptxas -v said."""
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    target = re.search(r"for '(sm_\w+)'", log)
    assert registers and spills and target, log  # noqa: PT018
    return {
        "target": target[1],
        "registers": int(registers[1]),
        "spills": int(spills[1]),
        "is_serialised": "serializ" in log,  # C7510 and on: wgmma that waits for itself
    }


@contextlib.contextmanager
def compiling(capability: int, kernels: Collection[str] | None) -> Iterator[list[Row]]:
    """Inside, a launch compiles its kernel for ``capability``; yields what came out, once for each specialisation.

    Kernels that are no product are much alike everywhere: they are compiled once for each of the two ptxas, as Triton
    has one for Blackwell. Those that are not among ``kernels`` are left out.
    """
    rows: list[Row] = []
    names = NamedTarget(capability)
    driver.set_active(names)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    ptxas = Path(get_ptxas(capability).path).name
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__.removesuffix("_kernel")
        if kernels is not None and name not in kernels:
            return
        names.device = capability if name in PRODUCTS else ptxas
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if not log.getvalue():  # the same arguments once more
            return
        ptx = kernel.asm["ptx"]
        rows.append({
            "triton": triton.__version__, "ptxas": ptxas, "capability": kernel.metadata.target.arch, "kernel": name,
            "tile": "x".join(str(size) for arg, size in options.items() if arg.startswith("BLOCK")),
            "warps": options["num_warps"], "stages": options.get("num_stages"), "shared": kernel.metadata.shared,
            **resources(log.getvalue()),
            "product": next((x for x in ("tcgen05.mma", "wgmma", "mma.sync") if x in ptx), None),
            "loads": next((x for x in ("cp.async.bulk.tensor", "cp.async") if x in ptx), None),
            "floats": {arg: kind for arg, kind in kernel.src.signature.items() if kind.startswith(("fp", "bf"))},
        })  # fmt: skip

    JITFunction.run = compile_only
    try:
        yield rows
    finally:
        JITFunction.run = run


def pretend(capability: int, tile: Tile | None = None) -> None:
    """Lets the launchers see a device of ``capability``, and choose ``tile`` for everything if it is given."""
    blocks.capability = tiles.capability = linear_logprob.capability = lambda device: divmod(capability, 10)
    tiles.default_tiles = default_tiles if tile is None else lambda *head: Tiles(*[tile] * len(Tiles._fields))
    tiles.tiles.cache_clear()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_head(dtype: torch.dtype, D: int, *, bias: bool, softcap: float | None, only_added: bool = False) -> None:
    """Every kernel of a head with every kind of argument, on meta tensors.

    ``only_added``: of the gradients only those of a chunk in the middle of several.
    """
    hidden, weight = empty(T, D, dtype=dtype), empty(V, D, dtype=dtype)
    bias_V = empty(V, dtype=dtype) if bias else None
    room = empty(T * linear_logprob.padded_vocab(D, V, dtype, hidden.device), dtype=dtype)
    head: dict[str, Any] = {"softcap": softcap, "temperature": 1.0}
    rooms: list[dict[str, Any]] = [
        {"room": None}, {"room": room, "gather": lambda x: x.new_empty(2, *x.shape)}, {"room": room},
    ]  # fmt: skip
    for option in rooms:
        _, saved = linear_logprob.linear_logprob_forward(
            hidden, weight, bias_V, empty(T, dtype=torch.int64), **head, **option
        )
    # dhidden, may_skip, is_first, is_last
    chunks = [(hidden, True, False, False)]
    if not only_added:
        chunks += [(empty(T, D), True, True, False), (hidden, False, False, True), (hidden, False, True, True)]
    for dhidden, may_skip, is_first, is_last in chunks:
        linear_logprob_backward.linear_logprob_backward(
            saved, empty(T), dhidden_TD=dhidden, dweight_VD=weight,
            dweight_rest_VD=None if dtype == torch.float32 else empty(V, D, dtype=torch.uint8),
            dbias_V=empty(V, dtype=torch.float64) if bias else None,
            is_first=is_first, is_last=is_last, may_skip=may_skip,
        )  # fmt: skip
    linear_logprob_backward.scale_in_place(weight, empty())


def launch_pairs() -> None:
    """Every kernel of the pair losses, on meta tensors."""
    pair_loss.segment_sum(empty(T), empty(T), empty(65, dtype=torch.int64))
    sums, scalars = empty(64, dtype=torch.float64), [empty(32)] * 3
    for given in (scalars, [None] * 3):
        pair_loss.dual_clip_epilogue(sums, sums, empty(32, 2, dtype=torch.int64), *given, 0.1, 0.5, 0.3, empty())


def compile_case(case: str) -> list[Row]:
    """What a head launches on one architecture, and the pair losses."""
    name, dtype_name, D, head, *rest = case.split("-")
    scope = rest[0] if rest else "all"
    pretend(int(name))
    with compiling(int(name), SCOPES[scope]) as rows:
        launch_head(getattr(torch, dtype_name), int(D), **HEADS[head], only_added=scope != "all")
        launch_pairs()
    return [{"case": case} | row for row in rows]


def compile_candidates(capability: int) -> Iterator[Row]:
    """Every tile that ``autotune`` may choose, for the product that it may choose it for."""
    candidates = tiles.CANDIDATES.get(tiles.architecture(divmod(capability, 10)), {})
    # How tiles are grouped makes no difference to what is compiled.
    known = {product: {tile._replace(group=1) for tile in some if tile} for product, some in candidates.items()}
    products = {"sumexp": "logits", "exp": "logits", "redo": "logits", "dhidden": "dhidden", "dweight": "dweight"}
    for tile in sorted(set().union(*known.values())):
        kernels = [kernel for kernel, product in products.items() if tile in known[product]]
        pretend(capability, tile)
        for head in ("plain", "softcap"):
            with compiling(capability, kernels) as rows:
                launch_head(torch.bfloat16, 4096, **HEADS[head])
            yield from ({"case": f"{capability}-bfloat16-4096-{head}"} | row for row in rows)


def table(rows: Iterable[Row]) -> str:
    """Markdown; a kernel with several kinds of arguments has several numbers in a cell."""
    fixed = ["Triton", "GPU", "dtype", "D", "head", "kernel", "tile", "stages", "warps"]
    measured = ["registers", "spills", "shared KB", "product", "loads"]
    lines: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for row in rows:
        _, dtype, D, head, *_ = row["case"].split("-")
        gpu, shared_kb = f"sm_{row['capability']}", -(-row["shared"] // 1024)
        product = f"{row['product']}, serialised" if row["is_serialised"] else row["product"]
        values = row | {"Triton": row["triton"], "GPU": gpu, "dtype": dtype, "D": D, "head": head}
        values |= {"shared KB": shared_kb, "product": product}
        line = lines.setdefault(tuple(values[name] for name in fixed), {name: [] for name in measured})
        for name, cell in line.items():
            if name == "registers" or values[name] not in cell:
                cell.append(values[name])
    text = [fixed + measured, ["---"] * len(fixed + measured)]
    for key, line in lines.items():
        text.append([str(x) for x in key] + [" / ".join(str(x) for x in cell) for cell in line.values()])
    return "\n".join(f"| {' | '.join(line)} |".replace("None", "-") for line in text)


def main(arguments: list[str]) -> None:
    if arguments == ["--all"]:
        print(table(row for name in CAPABILITIES for head in ALL for row in compile_case(f"{name}-{head}")))
    elif arguments == ["--candidates"]:
        print(table(row for name in CAPABILITIES for row in compile_candidates(name)))
    else:
        for case in arguments:
            for row in compile_case(case):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

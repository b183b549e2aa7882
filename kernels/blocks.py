"""Code that the kernels share: tiles of a product, their loads, and roundings that the interpreter gets wrong."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# The interpreter (seen in 3.6 and 3.9) multiplies the bit patterns of bf16 operands and truncates float32 to bf16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0): the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_tma_layout(matrix: torch.Tensor) -> bool:
    """Whether TMA, the copy engine of Hopper and later, can address a matrix: disjoint rows with 16-byte strides."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.itemsize % 16 == 0
    )


def tma_fits(*matrices: torch.Tensor) -> bool:
    """Whether TMA can fetch tiles of these matrices on their device; otherwise tiles are loaded through pointers."""
    has_engine = capability(matrices[0].device)[0] in (0, 9, 10, 11, 12)
    return has_engine and all(x.numel() > 0 and has_tma_layout(x) for x in matrices)


def operand(matrix: torch.Tensor, block: tuple[int, int], use_tma: bool) -> torch.Tensor | TensorDescriptor:
    """A matrix as a kernel argument: a descriptor of its tiles, or the matrix itself as a pointer."""
    return TensorDescriptor.from_tensor(matrix, list(block)) if use_tma else matrix


@triton.jit
def tile_of(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles run through all column tiles before the next group."""
    per_group = GROUP * num_cols
    first = pid // per_group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def load_tile(
    matrix, row, col, num_rows, num_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, USE_TMA: tl.constexpr
):
    """The tile [ROWS, COLS] at (row, col), zero outside ``matrix``, which is a descriptor or a pointer."""
    if USE_TMA:
        tile = matrix.load([row, col])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = col + tl.arange(0, COLS)
        mask = (offs_r < num_rows)[:, None] & (offs_c < num_cols)[None, :]
        tile = tl.load(matrix + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32, never by TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Rounds float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh, as the interpreter lacks libdevice's; below 1/4 a series exact to float32, as ``tail`` cancels near 0."""
    u = tl.exp(-2.0 * tl.abs(x))
    tail = 1.0 - 2.0 * u / (1.0 + u)
    q = x * x
    series = x * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -tail, tail))

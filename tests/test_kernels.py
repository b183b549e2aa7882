"""The Triton kernels against float64: on a GPU if there is one, else in Triton's interpreter; and what they compile to.

The interpreter is set up in conftest.py, before triton is imported. It has small tiles of its own, so small shapes have
several; on a GPU the same shapes are a part of one tile, and ``test_large`` has several of those.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton.language as tl
from tso_fast.kernels import autotune, linear_logprob, linear_logprob_backward, pair_loss, tiles
from tso_fast.kernels.blocks import INTERPRETED
from tso_fast.kernels.tiles import CANDIDATES

from tso_fast import logprob
from tso_fast.logprob import impls
from tso_fast.logprob import triton as backend
from tso_fast.logprob.gradients import WeightSum
from tso_fast.logprob.plan import Shape
from tso_fast.losses import dual_clip
from tso_fast.types import PairLogprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED.value, reason="no GPU, and triton was imported uninterpreted"
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on what is not finite
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"softcap": None, "temperature": 1.0},
    "softcap": {"softcap": 4.0, "temperature": 1.0},
    "temperature": {"softcap": None, "temperature": 0.7},
    "both": {"softcap": 4.0, "temperature": 1.5},
}


@pytest.fixture(scope="module", autouse=True)
def replaced_once() -> Iterator[None]:
    """Each call of a function in a kernel looks for what to replace in triton.language, a third of the time here.

    It finds nothing that an earlier call of a function of the same module has not replaced.
    """
    if not INTERPRETED.value:
        yield
        return
    from triton.runtime import interpreter

    replace, scopes = interpreter._patch_lang, {}

    def replace_once(fn: Any) -> Any:
        if fn.__module__ not in scopes:
            scopes[fn.__module__] = replace(fn)
        return type(scopes[fn.__module__])()  # a call of a kernel takes back what is in this one, which is nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


class Problem(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    upstream: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        return self.hidden, self.weight, self.bias, self.targets


def problem(T: int, V: int, D: int, dtype: torch.dtype = BF16, *, bias: bool = False, std: float = 2.5) -> Problem:
    """Logits have the standard deviation ``std``; every third row has no gradient, if there are three."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g) * std / math.sqrt(D)
    bias_V = torch.randn(V, generator=g) if bias else None
    targets, upstream = torch.randint(V, (T,), generator=g), torch.randn(T, generator=g)
    upstream[2::3] = 0
    floats = [None if x is None else x.to(DEVICE, dtype) for x in (hidden, weight, bias_V)]
    return Problem(*floats, targets.to(DEVICE), upstream.to(DEVICE))


def nan_like(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    return (
        None
        if tensor is None
        else torch.full_like(tensor, math.nan, dtype=dtype, memory_format=torch.contiguous_format)
    )


def plain(p: Problem, dtype: torch.dtype, softcap: float | None, temperature: float) -> list[torch.Tensor]:
    """Log-probs and the gradients of hidden, weight and bias by torch, all in ``dtype``."""
    leaves = [x.to(dtype).requires_grad_() for x in p.inputs[:3] if x is not None]
    z = leaves[0] @ leaves[1].T
    if p.bias is not None:
        z = z + leaves[2]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    out = (z / temperature).log_softmax(-1).gather(1, p.targets[:, None])[:, 0]
    return [out.detach(), *torch.autograd.grad(out, leaves, p.upstream.to(dtype))]


def room(p: Problem) -> torch.Tensor:
    return backend.make_room(p.targets.numel(), p.weight)


def fused(p: Problem, **head: Any) -> list[torch.Tensor]:
    """The same by the kernels, in one chunk."""
    logprob, saved = backend.forward(*p.inputs, **head, room=room(p))
    return [logprob, *gradients(p, saved)]


def gradients(
    p: Problem, saved: linear_logprob.Saved, may_skip: bool = True, of: Collection[str] = ("hidden", "weight", "bias")
) -> list[torch.Tensor]:
    """Gradients of what ``of`` names; ``saved`` stays as it is, for others."""
    saved = dataclasses.replace(saved, exp_TV=saved.exp_TV.clone())
    given = {"hidden": nan_like(p.hidden), "weight": nan_like(p.weight), "bias": nan_like(p.bias, F32)}
    grads = [grad if name in of else None for name, grad in given.items()]
    backend.backward(saved, p.upstream, dhidden_TD=grads[0], dweight_VD=grads[1], dweight_rest_VD=None,
                     dbias_V=grads[2], is_first=True, is_last=True, may_skip=may_skip)  # fmt: skip
    return [x for x in grads if x is not None]


def assert_as_good_as_torch(p: Problem, got: list[torch.Tensor], luck: float = 1.0, **head: Any) -> None:
    """Log-probs as good as float32's whatever the dtype, gradients as good as the dtype's, plus a hair.

    ``luck``: how much less torch may err by chance where few roundings decide.
    """
    exact, in_dtype, in_f32 = plain(p, F64, **head), plain(p, p.hidden.dtype, **head), plain(p, F32, **head)
    error = (got[0] - exact[0]).abs().max()
    assert got[0].dtype == F32
    # Tensor cores cut off what they add: over thousands of terms a little more than float32's rounding.
    hair = 1e-5 if DEVICE != "cpu" and p.hidden.dtype != F32 else 1e-6
    assert error <= (in_f32[0] - exact[0]).abs().max() + hair * (1 + exact[0].abs().max()), error
    for mine, true, torchs in zip(got[1:], exact[1:], in_dtype[1:], strict=True):
        # In float32 both err by a few roundings, in another order.
        hair = torch.finfo(p.hidden.dtype).eps * true.abs().max() * (3 if p.hidden.dtype == F32 else 0.5)
        assert (mine - true).abs().max() <= luck * (torchs - true).abs().max() + hair
        # Over few elements it is chance which rounding errs less.
        hair = (
            torch.finfo(p.hidden.dtype).eps * true.norm() * (0.1 if true.numel() > 500 and p.hidden.dtype != F32 else 1)
        )
        assert (mine - true).norm() <= luck * (torchs - true).norm() + hair


# ------------------------------------------------------------------------------------------------------- log-probs


# Whole tiles fetched by descriptors; primes; D that only pointers can fetch; one token; fewer classes than a tile.
SHAPES = {
    (32, 128, 64, False, "plain"): [F32, BF16, F16],
    (37, 131, 72, True, "both"): [F32, BF16, F16],
    (19, 131, 43, True, "temperature"): [F32, BF16, F16],
    (1, 67, 13, False, "softcap"): [BF16],
    (7, 5, 1, True, "plain"): [F16],
}


@needs_kernels
@pytest.mark.parametrize(
    ("T", "V", "D", "bias", "head", "dtype"), [(*shape, dtype) for shape, dtypes in SHAPES.items() for dtype in dtypes]
)
def test_values_and_gradients(T: int, V: int, D: int, bias: bool, head: str, dtype: torch.dtype) -> None:
    p = problem(T, V, D, dtype, bias=bias)
    got = fused(p, **HEADS[head])
    assert_as_good_as_torch(p, got, **HEADS[head])
    assert not got[1][p.upstream == 0].any()
    logprob, saved = backend.forward(*p.inputs, **HEADS[head], room=None)
    assert saved is None
    torch.testing.assert_close(logprob, got[0], rtol=2e-6, atol=2e-6)


@needs_gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("D", "head", "bias"), [(2048, "plain", False), (2050, "both", True), (512, "softcap", True)])
def test_large(D: int, head: str, bias: bool, dtype: torch.dtype) -> None:
    p = problem(701, 50257, D, dtype, bias=bias)
    assert_as_good_as_torch(p, fused(p, **HEADS[head]), **HEADS[head])
    alone = backend.forward(p.hidden[5:6], p.weight, p.bias, p.targets[5:6], **HEADS[head], room=room(p))[0]
    assert torch.equal(alone, backend.forward(*p.inputs, **HEADS[head], room=room(p))[0][5:6])


@needs_gpu
def test_more_than_2_to_31_logits() -> None:
    p = problem(20000, 120001, 64)
    logprob, saved = backend.forward(*p.inputs, **HEADS["plain"], room=room(p))
    z = p.hidden[-3:].to(F64) @ p.weight.to(F64).T
    exact = z.log_softmax(1).gather(1, p.targets[-3:, None])[:, 0]
    torch.testing.assert_close(logprob[-3:], exact.to(F32), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        saved.exp_TV[-3:, :120001].to(F64), (z - saved.offset_T[-3:, None]).exp(), rtol=8e-3, atol=0
    )
    last = Problem(p.hidden[-3:], p.weight, None, p.targets[-3:], p.upstream[-3:])
    torch.testing.assert_close(
        gradients(p, saved)[0][-3:].to(F64), plain(last, F64, **HEADS["plain"])[1], rtol=0.02, atol=1e-4
    )


@needs_kernels
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.slow
def test_a_row_has_the_same_bits_alone_and_in_a_batch(keep: bool) -> None:
    p = problem(37, 131, 72, bias=True)
    logprob, saved = backend.forward(*p.inputs, **HEADS["both"], room=room(p) if keep else None)
    dhidden = gradients(p, saved, of=["hidden"])[0] if keep else None
    for t in (0, 20, 36):
        one = Problem(p.hidden[t : t + 1], p.weight, p.bias, p.targets[t : t + 1], p.upstream[t : t + 1])
        one_logprob, one_saved = backend.forward(*one.inputs, **HEADS["both"], room=room(p) if keep else None)
        assert torch.equal(one_logprob, logprob[t : t + 1])
        if dhidden is not None:
            assert torch.equal(gradients(one, one_saved, of=["hidden"])[0], dhidden[t : t + 1])


@needs_kernels
@pytest.mark.parametrize(("dtype", "head"), [(F32, "plain"), (BF16, "plain"), (F32, "both")])
@pytest.mark.slow
def test_targets_out_of_reach(dtype: torch.dtype, head: str) -> None:
    """Exponentials are relative to the target's logit; rows where that is too low are done again, and no others."""
    p = problem(23, 131, 40, dtype, bias=True)
    logprob, saved = backend.forward(*p.inputs, **HEADS[head], room=room(p))
    (dhidden,) = gradients(p, saved, of=["hidden"])
    p.hidden[:16] *= torch.linspace(2, 400, 16, device=DEVICE)[:, None].to(dtype)
    p.targets[:16] = (p.hidden[:16].to(F64) @ p.weight.to(F64).T + p.bias.to(F64)).argmin(1)
    got = fused(p, **HEADS[head])
    # Near a softcap's bounds dW of a target is the rounding of one logit, of a size where float32 has few digits left.
    assert_as_good_as_torch(p, got, **HEADS[head], luck=2.0 if head == "both" else 1.0)
    if head == "plain":  # a softcap keeps all targets within reach
        assert (got[0][:16] < -linear_logprob.REACH.value).sum() > 8
    torch.testing.assert_close(got[0], backend.forward(*p.inputs, **HEADS[head], room=None)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0][16:], logprob[16:])
    assert torch.equal(got[1][16:], dhidden[16:])


@needs_kernels
def test_float16_logits_of_10_000_and_upstream_gradients_of_1e_9() -> None:
    p = problem(23, 131, 40, F16, std=3000.0)
    assert (p.hidden.float() @ p.weight.float().T).abs().max() > 9000
    exact, got = plain(p, F64, **HEADS["plain"]), fused(p, **HEADS["plain"])
    torch.testing.assert_close(got[0], exact[0].to(F32), rtol=1e-5, atol=0.01)
    p = problem(23, 131, 40, F16)
    exact = plain(p, F64, **HEADS["plain"])
    _, saved = backend.forward(*p.inputs, **HEADS["plain"], room=room(p))
    dhidden, dweight = nan_like(p.hidden, F32), WeightSum(p.weight, 2)
    backend.backward(saved, p.upstream * 1e-9, dhidden_TD=dhidden, dweight_VD=dweight.total_VD,
                     dweight_rest_VD=dweight.rest_VD, dbias_V=None, is_first=True, is_last=False)  # fmt: skip
    upper = dweight.total_VD.view(torch.int16).to(torch.int32) << 16  # of a float32, and 8 bits more
    total = (upper | (dweight.rest_VD.to(torch.int32) << 8)).view(F32)
    for mine, true in ((dhidden, exact[1]), (total, exact[2])):
        assert (mine * 1e9 - true).norm() < 1e-3 * true.norm()


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.slow
def test_chunks_add_up(dtype: torch.dtype) -> None:
    p = problem(37, 131, 40, dtype, bias=True)
    exact = plain(p, F64, **HEADS["both"])
    dweight, dbias = WeightSum(p.weight, 3), nan_like(p.bias, F64)
    for x in (dweight.total_VD, dweight.rest_VD):
        if x is not None:
            x.fill_(255 if x.dtype == torch.uint8 else math.nan)
    dhidden = torch.full((47, 40), math.nan, dtype=F32, device=DEVICE)
    bounds = [0, 17, 18, 37]
    for start, end in itertools.pairwise(bounds):
        inputs = p.hidden[start:end], p.weight, p.bias, p.targets[start:end]
        _, saved = backend.forward(*inputs, **HEADS["both"], room=room(p))
        backend.backward(
            saved, p.upstream[start:end], dhidden_TD=dhidden[start:end], dweight_VD=dweight.total_VD,
            dweight_rest_VD=dweight.rest_VD, dbias_V=dbias, is_first=start == 0, is_last=end == 37,
        )  # fmt: skip
    assert dhidden[37:].isnan().all()
    for mine, true in zip((dhidden[:37], dweight.total_VD, dbias), exact[1:], strict=True):
        assert (mine - true).norm() <= 2 * torch.finfo(dtype).eps * true.norm()


@needs_kernels
@pytest.mark.parametrize(("value", "head"), [(1e4, "plain"), (math.inf, "both"), (math.nan, "plain")])
@pytest.mark.slow
def test_rows_without_a_gradient_add_nothing_whatever_they_hold(value: float, head: str) -> None:
    p = problem(37, 131, 40)  # some rows in a block, and a whole block
    idle = torch.tensor([3, 5, 36, *range(16, 32)])
    p.upstream[:] = 1.5
    p.upstream[idle] = 0
    want = fused(p, **HEADS[head])
    p.hidden[idle] = p.hidden[idle] * value
    logprob, saved = backend.forward(*p.inputs, **HEADS[head], room=room(p))
    if not math.isfinite(value):
        assert not logprob[idle].isfinite().any()
    dhidden, dweight = gradients(p, saved)
    assert not dhidden[idle].any()
    assert torch.equal(dhidden, want[1])
    assert torch.equal(dweight, want[2])
    # A block of such rows is not even read.
    if DEVICE == "cpu":
        saved.exp_TV[16:32] = math.nan
    assert torch.equal(gradients(p, saved, of=["weight"])[0], want[2])


@needs_kernels
def test_no_gradient_at_all() -> None:
    p = problem(20, 131, 40, F16, bias=True)
    p.upstream.zero_()
    assert not any(g.any() for g in fused(p, **HEADS["plain"])[1:])


@needs_kernels
@pytest.mark.parametrize(
    ("value", "dtype", "head"),
    [(math.inf, BF16, "plain"), (-math.inf, F16, "both"), (math.nan, F16, "plain"), (math.nan, BF16, "both")],
)
@pytest.mark.slow
def test_a_row_that_is_not_finite_shows_and_disturbs_no_other(value: float, dtype: torch.dtype, head: str) -> None:
    p = problem(23, 131, 40, dtype)
    p.upstream[:] = 1.0
    logprob, saved = backend.forward(*p.inputs, **HEADS[head], room=room(p))
    (dhidden,) = gradients(p, saved, of=["hidden"])
    p.hidden[4, 7] = value
    got = fused(p, **HEADS[head])
    others = torch.arange(23) != 4
    assert not got[0][4].isfinite()
    assert not backend.forward(*p.inputs, **HEADS[head], room=None)[0][4].isfinite()
    assert torch.equal(got[0][others], logprob[others])
    assert torch.equal(got[1][others], dhidden[others])
    assert not got[1][4].isfinite().all()
    assert not got[2].isfinite().all()


@needs_kernels
def test_a_bias_may_rule_out_classes() -> None:
    p = problem(23, 131, 40, bias=True)
    p.bias[64:128] = -math.inf  # a whole tile
    p.targets[p.bias[p.targets].isinf()] = 1
    assert_as_good_as_torch(p, fused(p, **HEADS["plain"]), **HEADS["plain"])
    exact = plain(p, F64, **HEADS["plain"])[0].to(F32)
    torch.testing.assert_close(backend.forward(*p.inputs, **HEADS["plain"], room=None)[0], exact, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_probabilities_sum_to_one_and_are_at_most_one() -> None:
    p = problem(1, 131, 40, std=0.5)
    every = Problem(p.hidden.expand(131, -1), p.weight, None, torch.arange(131, device=DEVICE), torch.ones(131))
    logprob = backend.forward(*every.inputs, **HEADS["plain"], room=None)[0]
    torch.testing.assert_close(logprob.to(F64).exp().sum().item(), 1.0, rtol=1e-6, atol=0)
    p = problem(16, 131, 40, std=100.0)
    targets = (p.hidden.float() @ p.weight.float().T).argmax(1)
    for keep in (True, False):
        assert (
            backend.forward(p.hidden, p.weight, None, targets, **HEADS["plain"], room=room(p) if keep else None)[0] <= 0
        ).all()


@needs_kernels
@pytest.mark.slow
def test_strides_and_addresses_do_not_matter() -> None:
    p = problem(23, 131, 40)
    want = fused(p, **HEADS["plain"])
    wide = torch.full((2, 23, 41), math.nan, dtype=BF16, device=DEVICE)
    wide[1, :, 1:] = p.hidden
    turned = p.weight.T.contiguous().T
    for a, b in zip(fused(p._replace(hidden=wide[1, :, 1:], weight=turned), **HEADS["plain"]), want, strict=True):
        assert torch.equal(a, b)


@needs_kernels
@pytest.mark.slow
def test_a_frozen_head_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(23, 131, 40)
    _, saved = backend.forward(*p.inputs, **HEADS["plain"], room=room(p))
    dhidden, dweight = gradients(p, saved)
    called = []
    monkeypatch.setattr(linear_logprob_backward, "scaled_hidden", lambda *args: called.append("scaled_hidden"))
    assert torch.equal(gradients(p, saved, of=["hidden"])[0], dhidden)
    monkeypatch.undo()
    monkeypatch.setattr(linear_logprob_backward, "dhidden", lambda *args: called.append("dhidden"))
    assert torch.equal(gradients(p, saved, of=["weight"])[0], dweight)
    assert not called


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.slow
def test_dhidden_by_torch_is_that_by_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and in slices of 16 rows."""
    p = problem(37, 131, 40, dtype)
    p.hidden[7] = math.inf  # without a gradient, so it must not show
    p.upstream[7] = 0
    _, saved = backend.forward(*p.inputs, **HEADS["both"], room=room(p))
    (by_tiles,) = gradients(p, saved, of=["hidden"])
    for rows in (linear_logprob_backward.DHIDDEN_ROWS, 16):
        monkeypatch.setattr(linear_logprob_backward, "DHIDDEN_ROWS", rows)
        (by_torch,) = gradients(p, saved, may_skip=False, of=["hidden"])
        assert not by_torch[p.upstream == 0].any()
        torch.testing.assert_close(by_tiles, by_torch, rtol=torch.finfo(dtype).eps, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.slow
def test_a_sum_of_24_bits(dtype: torch.dtype) -> None:
    """Five chunks of 6 rows: as good as a float32 sum, which bf16 alone is not; a NaN stays one."""
    p = problem(30, 67, 24, dtype)
    p.upstream[:] = torch.linspace(0.5, 1.5, 30)
    exact = plain(p, F64, **HEADS["plain"])[2]
    once = fused(p, **HEADS["plain"])[2]
    dweight, rounded = WeightSum(p.weight, 5), torch.zeros_like(p.weight)
    for start in range(0, 30, 6):
        rows = slice(start, start + 6)
        part = Problem(p.hidden[rows], p.weight, None, p.targets[rows], p.upstream[rows])
        _, saved = backend.forward(*part.inputs, **HEADS["plain"], room=room(p))
        rounded += gradients(part, saved, of=["weight"])[0]
        backend.backward(saved, part.upstream, dhidden_TD=None, dweight_VD=dweight.total_VD, dbias_V=None,
                         dweight_rest_VD=dweight.rest_VD, is_first=start == 0, is_last=start == 24,
                         may_skip=False)  # fmt: skip
    error, whole, plain_sum = ((x - exact).norm() / exact.norm() for x in (dweight.total_VD, once, rounded))
    assert error <= 1.01 * whole
    assert dtype == F16 or plain_sum > 1.2 * error
    # What the first chunk leaves is within 2^-17 of its float32, and NaN stays NaN, whose bits a carry would turn to 0.
    exp = torch.ones(16, 64, dtype=dtype, device=DEVICE)
    scaled = torch.full((16, 8), 1.2345, dtype=dtype, device=DEVICE)
    scaled[:, 3] = math.nan
    blocks = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.ones((), dtype=torch.int32, device=DEVICE)
    total, rest = torch.empty(64, 8, dtype=dtype, device=DEVICE), torch.empty(64, 8, dtype=torch.uint8, device=DEVICE)
    tile = tiles.tiles(8, 64, dtype, total.device).dweight
    args = exp, scaled, None, blocks, total, rest, tile
    linear_logprob_backward.dweight(*args, is_first=True, is_last=False)
    bits = (total.view(torch.int16).to(torch.int32) << 16) | (rest.to(torch.int32) << 8)
    want = 16 * scaled[:1].float().expand(64, 8)
    torch.testing.assert_close(bits.view(F32), want, rtol=2**-17, atol=0, equal_nan=True)
    linear_logprob_backward.dweight(*args, is_first=False, is_last=True)
    torch.testing.assert_close(total.float(), 2 * want, rtol=2**-8, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_scaling_in_place(dtype: torch.dtype) -> None:
    x = torch.randn(20_001, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    third = torch.tensor(1 / 3, device=DEVICE)
    want = (x.double() * third.double()).to(dtype)
    scaled = x.clone()
    backend.scale(scaled, third)
    torch.testing.assert_close(scaled, want, rtol=0, atol=0)
    same = x.clone()
    same[3] = math.nan  # 1 reads and writes nothing
    backend.scale(same, torch.ones((), device=DEVICE))
    assert torch.equal(same[4:], x[4:])
    backend.scale(same, torch.tensor(math.nan, device=DEVICE))
    assert same.isnan().all()
    backend.scale(x.new_empty(0), third)


@pytest.mark.skipif(DEVICE != "cpu", reason="emulates in the interpreter what a GPU does by itself")
def test_tensor_cores_that_round_toward_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Confident tokens: logits near 20 from 4096 terms, added 16 at a time and cut off, as tensor cores do.

    The bias of the log-sum-exp is also the target logit's, bit for bit, so it does not show in the log-prob; taken from
    a target's logit that is exact it would.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def truncated(x: np.ndarray) -> np.ndarray:
        """float64 to float32, toward zero."""
        nearest = x.astype(np.float32)
        return np.where(np.abs(nearest.astype(np.float64)) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        acc = d.data.astype(np.float32)
        for k in range(0, a.data.shape[1], 16):
            part = a.data[:, k : k + 16].astype(np.float64) @ b.data[k : k + 16].astype(np.float64)
            acc = truncated(acc + part)
        return TensorHandle(acc, d.dtype.scalar)

    T, V, D = 16, 67, 4096
    p = problem(T, V, D, std=0.0)
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(V, D, generator=g) * D**-0.5
    p = p._replace(weight=weight.to(BF16), hidden=(20 * weight[p.targets]).to(BF16) + p.hidden)  # x[y] = 20 +- 1
    monkeypatch.setattr(tiles, "default_tiles", lambda *args: tiles.Tiles(*[tiles.Tile(16, 64, 64, 4, 1)] * 4))
    tiles.tiles.cache_clear()
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    logprob_T, saved = backend.forward(*p.inputs, **HEADS["plain"], room=room(p))
    exact = plain(p, F64, **HEADS["plain"])[0]
    z = (p.hidden.to(F64) * p.weight.to(F64)[p.targets]).sum(1)
    assert 15 < z.mean() < 25
    lost = z - saved.target_logit_T
    assert (lost > 2e-5).all()  # what the truncation took from every logit
    assert (logprob_T - exact).abs().max() < 0.2 * lost.mean()
    # E at the target is exp(0), exactly, as its logit has the same bits on both ways.
    assert (saved.exp_TV[torch.arange(T), p.targets] == 1).all()
    tiles.tiles.cache_clear()


@pytest.mark.skipif(DEVICE != "cpu", reason="emulates in the interpreter what a GPU does by itself")
@pytest.mark.parametrize("has_scalars", [False, True])
def test_arguments_that_become_float32(monkeypatch: pytest.MonkeyPatch, has_scalars: bool) -> None:
    """A Python float reaches a kernel on a GPU as float32 unless its annotation says float64; here it never would."""
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__
    annotations = pair_loss.dual_clip_kernel.fn.__annotations__
    rounded = []

    def on_a_gpu(self: Any, *args: Any, **kw: Any) -> Any:
        names = self.fn.__code__.co_varnames
        if self.fn.__name__ == "dual_clip_kernel":
            is_double = [annotations.get(name) in ("tl.float64", tl.float64) for name in names[: len(args)]]
            rounded.extend(n for n, x, d in zip(names, args, is_double, strict=False) if isinstance(x, float) and not d)
            args = tuple(
                float(np.float32(x)) if isinstance(x, float) and not d else x
                for x, d in zip(args, is_double, strict=True)
            )
        return call(self, *args, **kw)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", on_a_gpu)
    test_dual_clip_agrees_with_the_loss((0.7, 0.3), has_scalars)
    assert not rounded


@needs_kernels
@pytest.mark.slow
def test_gradients_are_scaled_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass makes no second gradient, unless the graph is kept for another walk."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=g).to(DEVICE, BF16).requires_grad_() for shape in ((2, 10, 40), (67, 40))]
    targets = torch.randint(67, (2, 10), generator=g).to(DEVICE)
    made, given = [], logprob.fused.Gradients.finished
    monkeypatch.setattr(logprob.fused.Gradients, "finished", lambda self: made.append(given(self)) or made[-1])

    def loss() -> torch.Tensor:
        return logprob.preference_loss(*leaves, targets, ref_logprobs=torch.zeros(2, device=DEVICE), impl="triton").loss

    def walk(loss: torch.Tensor, factor: float, keeps: bool) -> list[torch.Tensor]:
        grads = torch.autograd.grad(factor * loss, leaves, retain_graph=keeps)
        shares = [a.data_ptr() == b.data_ptr() for a, b in zip(grads, made[-1], strict=False)]
        assert shares == [not keeps] * 2
        return list(grads)

    once, scaled, kept = walk(loss(), 1.0, False), walk(loss(), -3.0, False), loss()
    for factor, want in ((-3.0, scaled), (1.0, once), (-3.0, scaled)):
        for a, b in zip(walk(kept, factor, True), want, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(walk(kept, 1.0, False), once, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close((-3.0 * a.float()).to(BF16), b, rtol=0, atol=0)


@needs_kernels
def test_a_matrix_whose_rows_overlap_is_copied() -> None:
    """The copy engine is not asked to fetch rows that are 0 bytes apart."""
    p = problem(1, 131, 40)
    same = p.hidden.expand(23, -1)
    assert same.stride(0) == 0
    targets = torch.arange(23, device=DEVICE)
    copied = linear_logprob._aligned(same)
    assert copied.is_contiguous()
    logprob_T = backend.forward(same, p.weight, None, targets, **HEADS["plain"], room=None)[0]
    assert torch.equal(logprob_T, backend.forward(copied, p.weight, None, targets, **HEADS["plain"], room=None)[0])


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.fixture
def tile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TSO_FAST_TILES", str(tmp_path / "tiles.json"))
    autotune.ensure.cache_clear()
    tiles.tiles.cache_clear()
    yield tmp_path / "tiles.json"
    tiles.tiles.cache_clear()


@needs_kernels
@pytest.mark.slow
def test_autotune_writes_a_file_that_decides(
    tile_files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TSO_FAST_AUTOTUNE", "1")
    slow, quick = tiles.Tile(32, 64, 32, 4, 1), tiles.Tile(32, 32, 32, 4, 1)
    table = {"logits": [slow, quick], "dhidden": [None, quick], "dweight": [quick, slow]}
    if DEVICE == "cpu":
        monkeypatch.setitem(tiles.CANDIDATES, "interpreter", table)
        monkeypatch.setattr(autotune, "time_ms", lambda call: (call(), 1.0 + (call.args[0] != quick))[1])
    monkeypatch.setattr(autotune.autotune, "__kwdefaults__", {"rows": 16 if DEVICE == "cpu" else 4096})
    p = problem(37, 131, 40) if DEVICE == "cpu" else problem(301, 32000, 2048)
    with caplog.at_level("INFO", logger="tso_fast.kernels"):
        assert_as_good_as_torch(p, fused(p, **HEADS["plain"]), **HEADS["plain"])
    ((key, entry),) = json.loads(tile_files.read_text()).items()
    assert key.endswith(f"bfloat16, D {p.weight.shape[1]}, V {p.weight.shape[0]}")
    assert entry["ms"].keys() == {"logits", "dhidden", "dhidden_skipping", "dweight"}
    if DEVICE == "cpu":
        chosen = tiles.tiles(40, 131, BF16, p.hidden.device)
        assert chosen == tiles.Tiles(quick, quick, quick, quick)
        assert autotune.fastest({None: 1.0, quick: 1.4, slow: 2.0}) == quick
        assert autotune.fastest({None: 1.0, quick: 1.6, slow: 2.0}) is None
    assert f"from {tile_files}: logits" in caplog.text
    before = tile_files.stat().st_mtime_ns
    backend.forward(p.hidden[:1], p.weight, None, p.targets[:1], **HEADS["plain"], room=None)  # nothing is timed twice
    assert tile_files.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "tiles.json is no JSON .*delete it, it is made again"), ("[]", "must hold a JSON object .*got list"),
     ('{"KEY": {"logits": {"rows": 12}}}', r"KEY: logits is \{'rows': 12\}; expected 'cublas' or an object of rows"),
     ('{"KEY": {"dweight": "cublas"}}', "KEY: only dhidden may be 'cublas'"),
     ('{"KEY": {"logits": {"rows": 12, "cols": 64, "inner": 32, "num_warps": 4, "num_stages": 1}}}', "powers of 2")],
)  # fmt: skip
def test_a_damaged_file_of_tiles_is_refused(tile_files: Path, text: str, message: str) -> None:
    device = torch.device(DEVICE)
    tile_files.write_text(text.replace("KEY", tiles.key_of(40, 131, BF16, device)))
    with pytest.raises(ValueError, match=message.replace("KEY", ".*")):
        tiles.tiles(40, 131, BF16, device)


def test_a_slow_shape_is_said_once(
    tile_files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with caplog.at_level("INFO", logger="tso_fast.kernels"):
        for D in (4096, 4100, 4100):
            tiles.tiles(D, 32000, BF16, torch.device("cuda"))
    words = [record.getMessage() for record in caplog.records]
    assert words[0].startswith(
        "triton tiles of NVIDIA H200, bfloat16, D 4096, V 32000 from the table: logits 128x256x64"
    )
    assert "dhidden cublas" in words[0]
    assert [text for text in words if "no multiple of 8" in text] == words[2:3]
    assert len(words) == 3


def test_the_table_has_a_choice_for_every_architecture() -> None:
    versions = {(0, 0): "interpreter", (8, 0): "ampere", (8, 6): "consumer", (8, 7): "ampere", (8, 9): "consumer",
                (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell", (12, 0): "consumer"}  # fmt: skip
    for version, kind in versions.items():
        assert tiles.architecture(version) == kind
        for dtype in (F32, BF16, F16):
            chosen = tiles.default_tiles(4096, dtype, version)
            # float32 by torch's product could be TF32.
            assert (chosen.dhidden is None) == (dtype != F32 and tiles.has_float32_product())
            products = CANDIDATES.get(kind, {})
            assert dtype == F32 or all(chosen.logits in products[name] for name in products)


@needs_kernels
@pytest.mark.slow
def test_memory_of_a_row() -> None:
    for V, dtype in ((131, BF16), (131, F32), (64, F16)):
        p = problem(3, V, 24, dtype)
        for head in ("plain", "both"):
            _, saved = backend.forward(*p.inputs, **HEADS[head], room=room(p))
            kept = [saved.exp_TV, saved.sumexp_T, saved.offset_T, saved.target_logit_T]
            kept += [] if saved.slope_T is None else [saved.slope_T]
            assert sum(x.nbytes for x in kept) <= 3 * backend.bytes_per_row(p.weight) <= 3 * (256 + V) * 8


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no torch.float64; use impl='reference'"):
        backend.forward(*problem(2, 5, 3, F64).inputs, **HEADS["plain"], room=None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
        with pytest.raises(ValueError, match=r"needs triton >= 3.4, which comes with torch >= 2.8, and found 3\."):
            backend.check_available()
        if DEVICE == "cpu":  # auto goes on without it, and says why
            impls.backend.cache_clear()
            patch.setattr(torch.cuda, "is_available", lambda: True)
            chosen, reason = impls.choose("cuda", BF16)
            assert chosen == "reference"
            assert "needs triton >= 3.4" in reason
            impls.backend.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        with pytest.raises(ValueError, match="this torch is built for AMD GPUs"):
            backend.check_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "IS_INTERPRETED", False)
    with pytest.raises(ValueError, match="torch sees no CUDA device; install"):
        backend.check_available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed; pip install triton"):
        backend.check_available()


# ------------------------------------------------------------------------------------------------------- pair losses

CU_SEQLENS = [0, 3, 3, 1200, 3300, 3301]


@needs_kernels
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("has_weights", [False, True])
def test_sums_over_sequences(has_weights: bool, integer: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logprob, weight = torch.randn(3301, generator=g).to(DEVICE), torch.rand(3301, generator=g).to(DEVICE)
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=integer, device=DEVICE)
    weights = weight if has_weights else torch.ones_like(weight)
    sums = backend.segment_sum(logprob, weight if has_weights else None, cu_seqlens)
    parts = [(logprob.to(F64) * weights)[a:b].sum() for a, b in itertools.pairwise(CU_SEQLENS)]
    torch.testing.assert_close(sums, torch.stack(parts), rtol=1e-13, atol=1e-13)
    alone = backend.segment_sum(logprob[3:1200], weight[3:1200] if has_weights else None, cu_seqlens[2:4] - 3)
    assert torch.equal(alone, sums[2:3])


@needs_kernels
@pytest.mark.parametrize("has_scalars", [False, True])
@pytest.mark.parametrize("clips", [(0.5, 0.3), (math.inf, math.inf), (0.0, 0.0)])
def test_dual_clip_agrees_with_the_loss(clips: tuple[float, float], has_scalars: bool) -> None:
    g = torch.Generator().manual_seed(1)
    S, N = 40, 300  # most sequences are in several pairs; sequence 39 is in none
    logprob, ref = torch.randn(S, generator=g) * 9 - 80, torch.randn(S, generator=g) * 9 - 80
    pairs = torch.randint(S - 1, (N, 2), generator=g)
    scale, label, margin = (torch.rand(N, generator=g) if has_scalars else None for _ in range(3))
    weight_sum = torch.tensor(float(N)) if scale is None else scale.sum()
    kw = {"beta": 0.1, "clip_chosen": clips[0], "clip_rejected": clips[1]}
    there = [None if x is None else x.to(DEVICE) for x in (scale, label, margin)]
    losses, grad = backend.dual_clip_epilogue(
        logprob.to(DEVICE), ref.to(DEVICE), pairs.to(DEVICE), *there, **kw, weight_sum=weight_sum.to(DEVICE)
    )

    leaf, ref = logprob.to(F64).requires_grad_(), ref.to(F64)
    tokens = torch.ones(N, dtype=torch.int64)
    record = PairLogprobs(
        chosen=leaf[pairs[:, 0]], rejected=leaf[pairs[:, 1]], ref_chosen=ref[pairs[:, 0]],
        ref_rejected=ref[pairs[:, 1]], num_chosen_tokens=tokens, num_rejected_tokens=tokens,
        soft_label=None if label is None else label.to(F64), margin=None if margin is None else margin.to(F64),
    )  # fmt: skip
    want = dual_clip(record, **kw)
    ((want if scale is None else scale * want).sum() / weight_sum).backward()
    torch.testing.assert_close(losses.cpu(), want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad.cpu(), leaf.grad, rtol=1e-11, atol=1e-14)
    assert grad[-1] == 0


@needs_kernels
def test_a_side_at_its_bound_has_no_gradient() -> None:
    # beta 1 and references 0: rewards are log-probs. Pairs 0 and 1 are at a bound on one side, pair 2 has scale 0.
    logprob = torch.tensor([0.5, 0.1, 0.4, -0.25, 0.3, 0.2, math.nan, 0.0], device=DEVICE)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]], device=DEVICE)
    scale = torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE)
    losses, grad = pair_loss.dual_clip_epilogue(
        logprob, torch.zeros_like(logprob), pairs, scale, None, None, 1.0, 0.5, 0.25, torch.tensor(3.0, device=DEVICE)
    )
    assert grad[[0, 3, 4, 5]].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert (grad[1] > 0) & (grad[2] < 0)
    assert losses.isfinite().tolist() == [True, True, True, False]
    assert not grad[6:].isfinite().any()


@needs_kernels
def test_losses_far_out() -> None:
    logprob = torch.tensor([0.0, 200.0, 1e6, 0.0], device=DEVICE)
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]], device=DEVICE)
    losses, grad = pair_loss.dual_clip_epilogue(
        logprob, torch.zeros_like(logprob), pairs, None, None, None, 1.0, math.inf, math.inf,
        torch.tensor(4.0, device=DEVICE),
    )  # fmt: skip
    assert losses.tolist() == pytest.approx([200.0, 0.0, 0.0, 1e6])
    assert grad.tolist() == pytest.approx([-0.25, 0.25, 0.25, -0.25])


# --------------------------------------------------------------------------------------------------- through the ops


def budget_mib(weight: torch.Tensor, rows: int) -> float:
    """What several chunks of so many rows take."""
    V, D = weight.shape
    shape = Shape(backend=backend, dim=D, vocab=V, dtype=weight.dtype, component_rows=[rows], device_type=DEVICE)
    return sum(backend.memory(shape, rows, 2).values()) / 2**20


@pytest.fixture
def head(request: pytest.FixtureRequest) -> Iterator[list[torch.Tensor]]:
    """Leaves hidden [6, 9, 40], weight and bias, with memory for as many rows as the parameter says."""
    g = torch.Generator().manual_seed(0)
    shapes = {(6, 9, 40): 1.0, (67, 40): 0.3, (67,): 1.0}
    leaves = [(std * torch.randn(*shape, generator=g)).to(DEVICE).requires_grad_() for shape, std in shapes.items()]
    logprob.set_memory_budget_mib(budget_mib(leaves[1], request.param), DEVICE)
    yield leaves
    logprob.set_memory_budget_mib(None, DEVICE)


def completions() -> torch.Tensor:
    """Targets of 3 positions that are prompt and at most 6 that are not, [6, 9]."""
    targets = torch.randint(67, (6, 9), generator=torch.Generator().manual_seed(1))
    targets[:, :3] = -100
    targets[1, 6:] = -100
    return targets.to(DEVICE)


def assert_same(results: list[list[torch.Tensor]]) -> None:
    for mine, true in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-5, atol=3e-5 * true.abs().max().item())


@needs_kernels
@pytest.mark.parametrize(
    ("loss", "head"), [("dual_clip", 1000), ("dual_clip", 20), ("dual_clip", 8), ("dpo", 20)], indirect=["head"]
)
@pytest.mark.slow
def test_the_loss_agrees_with_the_reference(loss: str, head: list[torch.Tensor]) -> None:
    """In one chunk, in chunks of pairs, and with pairs that fit into none."""
    g = torch.Generator().manual_seed(2)
    hidden, weight, bias = head
    options = {
        "pairs": torch.tensor([[0, 1], [4, 3], [0, 5], [2, 1]]), "scale": torch.tensor([1.0, 2.0, 0.5, 0.0]),
        "soft_label": torch.tensor([1.0, 0.9, 0.8, 0.7]), "margin": torch.tensor([0.0, 0.1, 0.0, 0.2]),
        "token_weights": torch.rand(6, 9, generator=g), "ref_hidden": 0.3 * torch.randn(6, 9, 40, generator=g),
    }  # fmt: skip
    options = {name: x.to(DEVICE) for name, x in options.items()}
    options["ref_hidden"] += hidden.detach()
    if loss == "dual_clip":
        options.update(clip_chosen=0.05, clip_rejected=0.05, beta=0.2)
    results = []
    for impl in ("reference", "triton"):
        out = logprob.preference_loss(
            hidden, weight, completions(), bias=bias, loss=loss, softcap=8.0, temperature=1.2, impl=impl, **options
        )
        slopes = torch.autograd.grad(out.loss, head)
        results.append([out.loss, out.losses, out.logprobs, out.chosen_rewards, *slopes])
    assert loss == "dpo" or 0 < out.clipped.sum() < out.clipped.numel()
    assert_same(results)


@needs_kernels
@pytest.mark.parametrize("head", [1000, 20], indirect=True)
@pytest.mark.slow
def test_the_logprobs_agree_with_the_reference(head: list[torch.Tensor]) -> None:
    """In one chunk and in two; with the head trained and frozen."""
    results = []
    for impl in ("reference", "triton"):
        tokens = logprob.linear_logprobs(*head[:2], completions(), bias=head[2], impl=impl)
        slopes = torch.autograd.grad(tokens.square().sum(), head)
        frozen = logprob.linear_logprobs(head[0], head[1].detach(), completions(), impl=impl).sum()
        results.append([tokens, *slopes, *torch.autograd.grad(frozen, head[:1])])
    assert_same(results)


@needs_gpu
def test_nothing_waits_for_the_device_once_work_began(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(8, 300, 256, device=DEVICE, dtype=BF16, requires_grad=True)
    weight = torch.randn(5000, 256, device=DEVICE, dtype=BF16, requires_grad=True)
    targets = torch.randint(5000, (8, 300), device=DEVICE)
    fused = logprob.fused.preference_loss

    def watched(*args: Any, **kw: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        return fused(*args, **kw)

    for loss in ("dual_clip", "dpo", "dual_clip"):
        monkeypatch.setattr(logprob.fused, "preference_loss", fused if loss == "dpo" else watched)
        try:
            logprob.preference_loss(hidden, weight, targets, ref_hidden=hidden.detach(), loss=loss).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all()

"""The C++ op with every instruction set of this machine: against float64, and that only a row decides its bits."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tso_fast import linear_logprobs, logprob, preference_loss
from tso_fast.logprob import cpu, impls
from tso_fast.logprob.gradients import WeightSum

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLES = [(isa, name) for name, dtype in DTYPES.items() for isa in cpu.isas(dtype)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, which is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=TABLES, ids="-".join)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype, computed with each instruction set."""
    isa, name = request.param
    monkeypatch.setattr(cpu, "ISA", isa)
    return DTYPES[name]


def make(
    rows: int, dim: int, vocab: int, dtype: torch.dtype, seed: int = 0, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64) * (2.5 / math.sqrt(dim))
    targets = torch.randint(vocab, (rows,), generator=g)
    bias_V = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, bias_V


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def slopes(out: torch.Tensor, leaves: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    return [g.double() for g in torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def norm(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# One token, primes, nothing divides anything, a whole number of tiles and more tiles than a task takes, one class, one
# dimension, more columns than a block.
SHAPES = [
    (1, 16, 64),
    (7, 13, 67),
    (252, 123, 507),
    (131, 96, 1201),
    (64, 64, 2400),
    (100, 1, 5),
    (33, 700, 97),
    (5, 8, 1),
]


EVERY = {(7, 13, 67), (252, 123, 507)}
"""Shapes that end within a register and a tile in every dimension: the two that every table has to have to itself."""


def pairs_of(case: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def covering() -> list[tuple[Any, ...]]:
    """(shape, head, instruction set, dtype): any two of them together at least once, not any three.

    The rest of the product, two cases of three, would repeat what these say.
    """
    every = [(shape, head, *table) for table in TABLES for shape in SHAPES for head in ("plain", "all")]
    chosen = [case for i, case in enumerate(every) if case[0] in EVERY and (i // 16 + (case[1] == "all")) % 2]
    missing = set().union(*map(pairs_of, every)) - set().union(*map(pairs_of, chosen))
    while missing:
        chosen.append(max(every, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


@pytest.mark.parametrize(("shape", "head", "isa", "dtype_name"), covering(), ids=str)
def test_errs_no_more_than_plain_torch(
    shape: tuple[int, int, int], head: str, isa: str, dtype_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "ISA", isa)
    dtype = DTYPES[dtype_name]
    rows, dim, vocab = shape
    options: dict[str, Any] = (
        {"softcap": 6.0, "temperature": 0.7} if head == "all" else {"softcap": None, "temperature": 1.0}
    )
    hidden, weight, targets, bias = make(rows, dim, vocab, dtype, bias=head == "all")
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[rows // 3 : rows // 2] = 0

    want = plain(exact[0], exact[1], targets, exact[2] if bias is not None else None, **options)
    want_slopes = slopes(want, exact, upstream)
    torch_out = plain(hidden, weight, targets, bias, **options)
    torch_slopes = slopes(torch_out, leaves, upstream)
    out = linear_logprobs(hidden, weight, targets, bias=bias, impl="cpu", **options)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    # Logits are never rounded to a half: log-probs are as good as float32's, whatever the dtype.
    atol = 1e-13 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(out.double(), want.detach(), rtol=1e-6 if atol > 1e-7 else 1e-13, atol=atol)
    eps = torch.finfo(dtype).eps
    for got, theirs, true in zip(slopes(out, leaves, upstream), torch_slopes, want_slopes, strict=True):
        assert got.isfinite().all()
        if vocab == 1:
            assert got.abs().max() <= 1e-6 if atol > 1e-7 else got.abs().max() <= 1e-14
        else:  # at least eps: a few elements may round worse than torch's
            assert norm(got, true) <= max(
                1.1 * norm(theirs, true), eps if dtype in (torch.bfloat16, torch.float16) else 16 * eps
            )


def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = make(300, 200, 1500, dtype, bias=True)
    assert bias is not None
    seen = []
    for threads in (1, 2, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = linear_logprobs(hidden, weight, targets, bias=bias, impl="cpu")
            seen.append([out, *torch.autograd.grad(out.sum(), [hidden, weight, bias])])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_a_row_scores_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    hidden, weight, targets, _ = make(150, 96, 1201, dtype)
    # Row 3 is computed once more, by the safe way: its neighbours must not notice.
    with torch.no_grad():
        hidden[3] *= 60
        targets[3] = (hidden[3].double() @ weight.double().T).argmin()
        together = linear_logprobs(hidden, weight, targets, impl="cpu")
        order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
        shuffled = linear_logprobs(hidden[order], weight, targets[order], impl="cpu")
        alone = torch.cat(
            [linear_logprobs(hidden[t : t + 1], weight, targets[t : t + 1], impl="cpu") for t in range(0, 150, 9)]
        )
    assert together[3] < -80
    assert torch.equal(together[order], shuffled)
    assert torch.equal(together[::9], alone)


@pytest.mark.parametrize("factor", [1.0, 30.0, 300.0])
def test_a_target_far_below_the_maximum(dtype: torch.dtype, factor: float) -> None:
    """Exponentials are relative to the target's logit; where that overflows the row is done again with its maximum."""
    hidden, weight, _, _ = make(40, 64, 301, dtype)
    with torch.no_grad():
        hidden[::2] *= factor
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    targets = (exact[0] @ exact[1].T).argmin(-1)
    want = plain(*exact, targets, None, None, 1.0)  # type: ignore[misc]
    out = linear_logprobs(hidden, weight, targets, impl="cpu")
    torch.testing.assert_close(out.double(), want.detach(), rtol=3e-6 if dtype != torch.float64 else 1e-12, atol=1e-5)
    upstream = torch.ones(40, dtype=torch.float64)
    for got, true in zip(slopes(out, [hidden, weight], upstream), slopes(want, exact, upstream), strict=True):
        assert norm(got, true) <= (4e-3 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_keeps_to_itself(dtype: torch.dtype, bad: float) -> None:
    hidden, weight, targets, _ = make(70, 32, 150, dtype)
    with torch.no_grad():
        good = linear_logprobs(hidden, weight, targets, impl="cpu")
        hidden[5, 7] = bad
        out = linear_logprobs(hidden, weight, targets, impl="cpu")
    others = torch.arange(70) != 5
    assert not out[5].isfinite()
    assert torch.equal(out[others], good[others])


def test_rows_without_a_gradient_enter_no_product(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = make(200, 48, 333, dtype, bias=True)
    assert bias is not None
    upstream = torch.zeros(200)
    upstream[[3, 64, 65, 199]] = torch.tensor([1.0, -2.0, 0.5, 1.5])
    some = upstream.nonzero()[:, 0]
    got = torch.autograd.grad(
        linear_logprobs(hidden, weight, targets, bias=bias, impl="cpu"), [hidden, weight, bias], upstream
    )
    assert got[0].abs().sum(1).nonzero()[:, 0].tolist() == some.tolist()
    with torch.no_grad():
        hidden[10] = torch.finfo(dtype).max / 1e3  # would drown the others, if it entered
    again = torch.autograd.grad(
        linear_logprobs(hidden, weight, targets, bias=bias, impl="cpu"), [hidden, weight, bias], upstream
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_chunks_add_up(dtype: torch.dtype) -> None:
    """With room for one pair at a time, and for less than one, the result is that of one chunk, rounding aside."""
    hidden, weight, targets, bias = make(8 * 40, 64, 300, dtype, bias=True)
    assert bias is not None
    hidden, targets = hidden.detach().view(8, 40, 64).requires_grad_(), targets.view(8, 40)
    targets[:, :7] = -100
    targets[2, 20:] = -100
    results = []
    try:
        for rows in (1000, 80, 20):
            logprob.set_memory_budget_mib(rows * cpu.bytes_per_row(weight) / 2**20, "cpu")
            reference = {"ref_hidden": hidden.detach() + 0.1, "ref_weight": weight}
            out = preference_loss(hidden, weight, targets, bias=bias, **reference, loss="dpo", impl="cpu")
            results.append([out.loss, out.logprobs, *torch.autograd.grad(out.loss, [hidden, weight, bias])])
    finally:
        logprob.set_memory_budget_mib(None, "cpu")
    for other in results[1:]:
        assert torch.equal(results[0][1], other[1])
        for a, b in zip(results[0][2:], other[2:], strict=True):
            assert norm(a, b.double()) <= 4 * torch.finfo(dtype).eps


def weight_gradients(dtype: torch.dtype, upstream: torch.Tensor, sums: list[tuple[WeightSum, bool, bool]]) -> None:
    """Adds the gradient of 40 rows to every sum, with those values of is_first and is_last."""
    hidden, weight, targets, _ = make(40, 64, 300, dtype)
    for total, is_first, is_last in sums:
        _, saved = cpu.forward(
            hidden.detach(),
            weight.detach(),
            None,
            targets,
            softcap=None,
            temperature=1.0,
            room=cpu.make_room(40, weight),
        )
        assert saved is not None
        cpu.backward(
            saved,
            upstream,
            dhidden_TD=None,
            dweight_VD=total.total_VD,
            dweight_rest_VD=total.rest_VD,
            dbias_V=None,
            is_first=is_first,
            is_last=is_last,
        )


def test_a_sum_over_chunks_is_rounded_once(dtype: torch.dtype) -> None:
    """Of a 16-bit dtype 24 bits of a float32 are kept: as good as the rounded sum of what each chunk adds."""
    like = torch.empty(300, 64, dtype=dtype)
    total, exact = WeightSum(like, 6), torch.zeros(300, 64, dtype=torch.float64)
    is_half = dtype.itemsize == 2
    assert (total.rest_VD is not None) == is_half
    g = torch.Generator().manual_seed(1)
    for chunk in range(6):
        alone = WeightSum(like, 6)
        upstream = torch.randn(40, generator=g, dtype=torch.float64)
        weight_gradients(dtype, upstream, [(total, chunk == 0, chunk == 5), (alone, True, False)])
        exact += kept(alone)
    best = norm(exact.to(dtype), exact)
    assert norm(total.total_VD, exact) <= (1.02 * best if is_half else 4 * torch.finfo(dtype).eps)

    alone, rounded = WeightSum(like, 2), WeightSum(like, 1)
    weight_gradients(dtype, upstream, [(alone, True, False), (rounded, True, True)])
    once = kept(alone).to(dtype)
    alone.round()
    assert torch.equal(alone.total_VD, once)
    # A tie that the 24 bits make or break is all that may differ.
    assert float((once != rounded.total_VD).double().mean()) <= (0.02 if is_half else 0)


def kept(weight_sum: WeightSum) -> torch.Tensor:
    """What a sum holds before its last chunk."""
    if weight_sum.rest_VD is None:
        return weight_sum.total_VD.double()
    upper = weight_sum.total_VD.view(torch.int16).to(torch.int32) << 16
    return (upper | weight_sum.rest_VD.to(torch.int32) << 8).view(torch.float32).double()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_over_chunks_that_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    total = WeightSum(torch.empty(300, 64, dtype=dtype), 3)
    upstream = torch.ones(40, dtype=torch.float64)
    upstream[7] = bad
    for chunk in range(3):
        weight_gradients(dtype, upstream if chunk == 0 else torch.ones(40).double(), [(total, chunk == 0, chunk == 2)])
    assert not total.total_VD.isfinite().any()


class Rank:
    """A rank of a head in a thread of this process, with the rows [first, first + size) of it."""

    def __init__(self, rank: int, sizes: list[int], barrier: threading.Barrier, given: list[torch.Tensor]) -> None:
        self.rank, self.first, self.size = rank, sum(sizes[:rank]), sizes[rank]
        self.barrier, self.given = barrier, given

    def local_targets(self, targets: torch.Tensor) -> torch.Tensor:
        local = targets - self.first
        return torch.where((local >= 0) & (local < self.size), local, -1)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        self.given[self.rank] = values.clone()
        self.barrier.wait()
        everyone = torch.stack(self.given)
        self.barrier.wait()
        return everyone


def on_ranks(
    sizes: list[int],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    upstream: torch.Tensor,
    options: dict[str, Any],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs on each rank; dhidden as the sum over ranks, dweight and dbias of the whole head."""
    barrier, given = threading.Barrier(len(sizes), timeout=60), [torch.empty(0)] * len(sizes)

    def run(rank: int) -> list[torch.Tensor]:
        shard = Rank(rank, sizes, barrier, given)
        rows = slice(shard.first, shard.first + shard.size)
        part, part_bias = weight[rows], None if bias is None else bias[rows]
        try:
            logprobs, saved = cpu.forward(
                hidden,
                part,
                part_bias,
                targets,
                **options,
                shard=shard,  # type: ignore[arg-type]
                room=cpu.make_room(len(targets), part),
            )
        except BaseException:
            barrier.abort()
            raise
        dhidden = torch.empty_like(hidden, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        dweight, dbias = torch.empty_like(part), torch.empty(len(part), dtype=torch.float64)
        assert saved is not None
        cpu.backward(
            saved,
            upstream,
            dhidden_TD=dhidden,
            dweight_VD=dweight,
            dweight_rest_VD=None,
            dbias_V=dbias,
            is_first=True,
            is_last=True,
            may_skip=True,
        )
        return [logprobs, dhidden, dweight, dbias]

    with ThreadPoolExecutor(len(sizes)) as pool:
        logprobs, dhidden, dweight, dbias = zip(*pool.map(run, range(len(sizes))), strict=True)
    return list(logprobs), [torch.stack(dhidden).sum(0), torch.cat(dweight), torch.cat(dbias)]


@pytest.mark.parametrize("sizes", [[1, 66], [20, 47], [1, 20, 46], [400, 1, 800]], ids=str)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_ranks_that_share_a_head(dtype: torch.dtype, sizes: list[int], head: str) -> None:
    options: dict[str, Any] = (
        {"softcap": 6.0, "temperature": 0.7} if head == "all" else {"softcap": None, "temperature": 1.0}
    )
    hidden, weight, targets, bias = make(140, 33, sum(sizes), dtype, bias=head == "all")
    hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    hidden[3] *= 60
    targets[3] = (hidden[3].double() @ weight.double().T).argmin()  # done again, with the maximum over the ranks
    hidden[70, 7] = math.nan
    upstream = torch.randn(140, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[64:100] = 0
    arguments = hidden, weight, bias, targets, upstream, options
    (want,), want_slopes = on_ranks([sum(sizes)], *arguments)
    logprobs, got_slopes = on_ranks(sizes, *arguments)

    assert want.isnan().nonzero().tolist() == [[70]]
    assert want[3] < -80 or head == "all"
    assert all(torch.equal(other.nan_to_num(), logprobs[0].nan_to_num()) for other in logprobs[1:])
    eps = 1e-15 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(logprobs[0], want, rtol=10 * eps, atol=10 * eps, equal_nan=True)
    # A sum that differs in its last bits flips the rounding of a few stored exponentials and of a few results.
    for got, true in zip(got_slopes, want_slopes, strict=True):
        assert norm(got, true.double()) <= max(20 * eps, 0.1 * torch.finfo(dtype).eps)


def test_an_error_on_the_way_to_the_other_ranks() -> None:
    """Whatever the exchange raises reaches the caller; a target elsewhere needs an exchange."""
    from tso_fast import _C

    hidden, weight, targets, _ = make(4, 8, 11, torch.float32)
    targets[2] = -1
    head = [hidden.detach().numpy(), weight.detach().numpy(), None, targets.numpy(), "float32", 0.0, 1.0, 2, "", None]
    with pytest.raises(ValueError, match=r"targets must be in \[0, V\)"):
        _C.logprob_forward(*head)
    calls = []

    def reduce(values: Any, find_max: bool) -> None:
        calls.append((values.shape, find_max))
        if len(calls) == 2:
            raise ConnectionResetError("rank 1 is gone")

    with pytest.raises(ConnectionResetError, match="rank 1 is gone"):
        _C.logprob_forward(*head, reduce)
    assert calls == [((4,), False), ((4,), False)]
    targets[2] = -2
    with pytest.raises(ValueError, match="targets must be in"):
        _C.logprob_forward(*head, reduce)


@pytest.mark.slow
def test_memory_that_malloc_filled(tmp_path: Any) -> None:
    """glibc fills what it hands out with 0x7f, huge numbers in every dtype: nothing reads what was not written."""
    tests = [f"{__file__}::{test}" for test in ("test_chunks_add_up", "test_rows_without_a_gradient_enter_no_product")]
    env = {**os.environ, "MALLOC_PERTURB_": str(0x7F ^ 0xFF), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:]


def tiles(isa: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Log-probs, dhidden in float32 and dweight of bfloat16, of shapes that fill tiles and end in them."""
    monkeypatch.setattr(cpu, "ISA", isa)
    results = []
    for rows, dim, vocab in SHAPES:
        hidden, weight, targets, _ = make(rows, dim, vocab, torch.bfloat16)
        upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        logprobs, saved = cpu.forward(
            hidden, weight, None, targets, softcap=None, temperature=1.0, room=cpu.make_room(rows, weight)
        )
        dhidden, dweight = torch.empty(rows, dim), torch.empty_like(weight)
        assert saved is not None
        cpu.backward(
            saved,
            upstream,
            dhidden_TD=dhidden,
            dweight_VD=dweight,
            dweight_rest_VD=None,
            dbias_V=None,
            is_first=True,
            is_last=True,
        )
        results += [logprobs, dhidden, dweight]
    return results


def test_amx_has_the_bits_of_its_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In software the tiles take the steps of Intel's manual, which the machine should take too."""
    if "amx" not in cpu.isas(torch.bfloat16):
        pytest.skip("this machine has no AMX, or its kernel does not hand it out")
    assert cpu.isas(torch.bfloat16)[0] == "amx"
    both = zip(tiles("amx", monkeypatch), tiles("amx_emulated", monkeypatch), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


@pytest.mark.parametrize("isa", ["amx", "amx_emulated"])
def test_amx_and_avx512_differ_in_the_last_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two instructions add up their products in another order, and so can't agree bit by bit."""
    known = cpu.isas(torch.bfloat16)
    if isa not in known or "avx512_bf16" not in known:
        pytest.skip(f"this machine has {', '.join(known)}")
    for index, (got, want) in enumerate(zip(tiles(isa, monkeypatch), tiles("avx512_bf16", monkeypatch), strict=True)):
        if index % 3 == 0:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=4e-6)
        elif want.abs().max() > 1e-6:  # not of a vocabulary of one
            assert norm(got, want.double()) <= 0.1 * torch.finfo(torch.bfloat16).eps


def test_an_instruction_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "portable" in cpu.isas(torch.float32)
    monkeypatch.setattr(cpu, "ISA", "avx1024")
    impls.backend.cache_clear()
    with pytest.raises(
        ValueError, match=r"TSO_FAST_CPU_ISA='avx1024' is not available on this machine; it has .*portable"
    ):
        linear_logprobs(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64), impl="cpu")


def test_a_missing_extension_is_an_error_by_name_and_logged_by_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setitem(sys.modules, "tso_fast._C", None)
    impls.backend.cache_clear()
    impls._log_choice.cache_clear()
    with pytest.raises(ValueError, match=r"impl='cpu' is not available: the C\+\+ extension is not built .*reinstall"):
        linear_logprobs(*args, impl="cpu")
    with caplog.at_level("INFO", logger="tso_fast.logprob.impls"):
        assert linear_logprobs(*args).item() == pytest.approx(-math.log(3))
    assert "chose 'reference'" in caplog.text
    assert "extension is not built" in caplog.text
    monkeypatch.undo()
    impls.backend.cache_clear()
    impls._log_choice.cache_clear()


def test_the_extension_checks_what_it_is_given() -> None:
    from tso_fast import _C

    hidden, weight, targets, _ = make(4, 8, 11, torch.float32)
    head = [hidden.detach().numpy(), weight.detach().numpy(), None, targets.numpy(), "float32", 0.0, 1.0, 1, "", None]
    for index, wrong, message in (
        (0, hidden.detach().numpy()[:, ::2], "hidden"),
        (1, weight.detach().double().numpy(), "weight must be 88 contiguous items of 4 bytes"),
        (3, torch.tensor([0, 1, 2, 11]).numpy(), r"targets must be in \[0, V\)"),
        (3, torch.tensor([0, 1, 2]).numpy(), r"targets must be \[T\]"),
        (8, "mmx", "this machine has no 'mmx'"),
        (9, torch.empty(7, dtype=torch.uint8).numpy(), "exps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.logprob_forward(*head[:index], wrong, *head[index + 1 :])

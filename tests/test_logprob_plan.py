"""The plan of a step: chunks and bytes, for shapes that no test could hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import LargestTensor

from tso_fast import preference_loss
from tso_fast.logprob import fused, impls, plan, reference, triton

pytest.importorskip("triton")
GIB = 2**30
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def llama3_8b(**change: object) -> plan.Shape:
    """Eight pairs of 2 x 1024 completion tokens at Llama-3-8B's head."""
    given = {"backend": triton, "dim": 4096, "vocab": 128256, "dtype": BF16, "component_rows": [2048] * 8}
    return plan.Shape(**given | change)


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize(
    ("dtype", "needs_dweight", "chunks"),
    [
        (BF16, True, [4096] * 4),
        (F16, True, [4096] * 4),
        (F32, True, [2048] * 8),
        (BF16, False, [6144, 6144, 4096]),
        (F32, False, [2048] * 8),
    ],
)
def test_llama3_8b_stays_under_2_gib(
    dtype: torch.dtype, needs_dweight: bool, chunks: list[int], is_gathered: bool
) -> None:
    made = fused.plan(llama3_8b(dtype=dtype, needs_dweight=needs_dweight, is_gathered=is_gathered))
    assert made.chunks == chunks
    assert made.total_bytes <= 1920 * plan.MIB < 2 * GIB
    exponentials = max(chunks) * 128256 * dtype.itemsize
    assert made.bytes["exponentials"] == pytest.approx(exponentials, rel=0.01)
    assert made.bytes["sum of dweight"] == (128256 * 4096 if needs_dweight and dtype != F32 else 0)


def test_chunks_are_balanced() -> None:
    """32 short pairs: not three full chunks and a rest that runs alone."""
    made = fused.plan(llama3_8b(component_rows=[512] * 32))
    assert made.chunks == [4096] * 4
    assert [group.components for group in made.groups] == [list(range(i, i + 8)) for i in range(0, 32, 8)]
    uneven = fused.plan(llama3_8b(component_rows=[3000, 100, 2000, 2500, 700, 3900]))
    assert list(itertools.chain(*(group.components for group in uneven.groups))) == list(range(6))
    assert max(uneven.chunks) == 4600  # 5100, 3200 and 3900 would also fit


def test_a_pair_that_does_not_fit_goes_in_chunks_of_its_own() -> None:
    made = fused.plan(llama3_8b(component_rows=[1000, 20000, 1000]))
    assert [group.components for group in made.groups] == [[0], [1], [2]]
    assert len(made.groups[1].chunks) > 1
    assert sum(made.chunks) == 22000
    assert made.total_bytes <= 1920 * plan.MIB


def test_a_loss_over_all_pairs_is_one_group() -> None:
    made = fused.plan(llama3_8b(can_split=False))
    assert len(made.groups) == 1
    assert len(made.chunks) > 1


def test_what_fits_at_once_is_one_chunk_without_a_sum() -> None:
    made = fused.plan(llama3_8b(component_rows=[2048] * 3))
    assert made.chunks == [6144]
    assert made.bytes["sum of dweight"] == 0


def test_ranks_of_a_head_go_in_the_same_chunks_and_hold_their_part() -> None:
    """A 70B model's head on eight GPUs."""
    whole, part = (fused.plan(llama3_8b(dim=8192, num_ranks=n)) for n in (1, 8))
    assert part.chunks == whole.chunks
    for name in ("exponentials", "sum of dweight"):
        assert part.bytes[name] == pytest.approx(whole.bytes[name] / 8, rel=0.01)
    assert part.total_bytes < 0.4 * whole.total_bytes


@pytest.mark.parametrize("budget", [1, 100, 700, 4000, 20000])
def test_a_budget_is_kept_from_16_rows_on(budget: float) -> None:
    made = fused.plan(llama3_8b(), budget)
    assert sum(made.chunks) == 16384
    assert made.total_bytes <= budget * plan.MIB or max(made.chunks) == 16


def test_the_plan_is_what_a_step_takes() -> None:
    """The largest tensor that a step makes, on a shape that is small enough."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 40, 16, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(4000, 16, generator=g).bfloat16().requires_grad_()
    targets = torch.randint(4000, (8, 40), generator=g)
    per_row = impls.backend("cpu").bytes_per_row(weight)
    budget = 160 * per_row / plan.MIB  # half of it is filled with pairs: one of 80 rows
    plan.set_memory_budget_mib(budget, "cpu")
    try:
        with LargestTensor() as seen:
            preference_loss(
                hidden, weight, targets, ref_logprobs=torch.zeros(8), loss="dpo", impl="cpu"
            ).loss.backward()
        made = fused.plan(
            plan.Shape(
                backend=impls.backend("cpu"), dim=16, vocab=4000, dtype=BF16, component_rows=[80] * 4, device_type="cpu"
            )
        )
    finally:
        plan.set_memory_budget_mib(None, "cpu")
    assert made.chunks == [80] * 4
    # Rows are stored in blocks of up to 32.
    assert made.bytes["exponentials"] == seen.largest <= 96 * per_row


def test_the_reference_keeps_nothing() -> None:
    made = fused.plan(llama3_8b(backend=reference))
    assert made.chunks == [16384]
    assert made.total_bytes < GIB

"""The public ops against float64 log-softmax of full logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LargestTensor

from tso_fast import LOSSES, linear_logprobs, logprob, preference_loss
from tso_fast.logprob import fused, impls, reference
from tso_fast.types import PairLogprobs

F64 = torch.float64
IGNORE = -100
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "all": {"bias": True, "softcap": 3.0, "temperature": 1.5},
}


@pytest.fixture(autouse=True, params=["reference", "cpu", "cpu-chunks", "cpu-again"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What ``auto`` stands for: each implementation, and the C++ op with memory for a few pairs, or not even for one.

    Tiles are small, so that small shapes have several of them, the last one short.
    """
    name, _, memory = request.param.partition("-")
    monkeypatch.setattr(impls, "choose", lambda device, dtype: (name, ""))
    monkeypatch.setattr(reference, "ROWS", 5)
    monkeypatch.setattr(reference, "VOCAB", 32)
    if memory:
        per_row = impls.backend("cpu").bytes_per_row(torch.zeros(67, 1, dtype=F64))
        limits = impls.backend("cpu").limits
        monkeypatch.setattr(
            impls.backend("cpu"), "limits", lambda *args: dataclasses.replace(made := limits(*args), single=made.rows)
        )
        logprob.set_memory_budget_mib({"chunks": 20, "again": 1}[memory] * per_row / fused.MIB, "cpu")
    yield name
    logprob.set_memory_budget_mib(None, "cpu")


def truth(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE,
    dtype: torch.dtype = F64,
) -> torch.Tensor:
    """Log-probs of the targets from full logits, computed in ``dtype``; 0 where ignored."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    is_valid = targets != ignore_index
    picked = logprobs.gather(-1, (targets * is_valid)[..., None])[..., 0]
    return torch.where(is_valid, picked, 0.0)


def inputs(
    *shape: int,
    vocab: int = 67,
    dim: int = 13,
    dtype: torch.dtype = F64,
    bias: bool = False,
    seed: int = 0,
    ignored: float = 0.3,
    **head: Any,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """hidden, weight, targets and the keywords of a head; logits have a standard deviation of about 2."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(size, generator=g, dtype=F64)).to(dtype).requires_grad_()

    targets = torch.randint(vocab, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = IGNORE
    tensors = [normal(*shape, dim), normal(vocab, dim, std=2 / math.sqrt(dim)), targets]
    return tensors, {**head, "bias": normal(vocab) if bias else None}


def gradients(out: torch.Tensor, args: list[torch.Tensor], head: dict[str, Any], seed: int = 9) -> list[torch.Tensor]:
    """Of a random projection of ``out`` with respect to hidden, weight and bias."""
    leaves = [*args[:2], *([] if head["bias"] is None else [head["bias"]])]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(out)
    return list(torch.autograd.grad(out, leaves, upstream, retain_graph=True))


# ---------------------------------------------------------------------------------------------- linear_logprobs


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_values_and_gradients(head: str, dtype: torch.dtype) -> None:
    args, kw = inputs(3, 7, dtype=dtype, **HEADS[head])
    out, want = linear_logprobs(*args, **kw), truth(*args, **kw)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    assert out.dtype == dtype
    torch.testing.assert_close(out, want.to(dtype), **tolerance)
    for got, exact in zip(gradients(out, args, kw), gradients(want, args, kw), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, exact.to(dtype), **tolerance)


# The usual; dimensions that divide nothing; primes; one token; one class; a single tile; a whole number of tiles.
@pytest.mark.parametrize(
    ("rows", "vocab", "dim"),
    [(252, 507, 123), (31, 101, 17), (1, 67, 13), (7, 1, 13), (5, 32, 8), (10, 64, 8), (11, 65, 1)],
)
def test_awkward_shapes(rows: int, vocab: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "VOCAB", 32 if vocab < 500 else 200)
    monkeypatch.setattr(reference, "ROWS", 5 if vocab < 500 else 100)
    args, kw = inputs(rows, vocab=vocab, dim=dim, ignored=0.2 if rows > 1 else 0, bias=True)
    out, want = linear_logprobs(*args, **kw), truth(*args, **kw)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for got, exact in zip(gradients(out, args, kw), gradients(want, args, kw), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (0,), (2, 0)])
def test_no_token_left(shape: tuple[int, ...]) -> None:
    args, kw = inputs(*shape, ignored=1.1, bias=True)
    out = linear_logprobs(*args, **kw)
    assert out.shape == shape
    assert not out.any()
    assert all(not g.any() for g in gradients(out, args, kw))


def test_first_and_last_class_and_another_ignore_index() -> None:
    args, _ = inputs(2, ignored=0)
    args[2] = torch.tensor([0, 66])
    torch.testing.assert_close(linear_logprobs(*args), truth(*args), rtol=1e-12, atol=1e-12)
    out = linear_logprobs(*args, ignore_index=0)
    torch.testing.assert_close(out, truth(*args, ignore_index=0), rtol=1e-12, atol=1e-12)
    assert out[0] == 0


def test_probabilities_sum_to_one() -> None:
    (hidden, weight, _), kw = inputs(1, **HEADS["all"])
    every = linear_logprobs(hidden.expand(67, -1), weight, torch.arange(67), **kw)
    torch.testing.assert_close(every.exp().sum(), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_half_precision_errs_no_more_than_torch(dtype: torch.dtype, head: str) -> None:
    args, kw = inputs(40, vocab=301, dim=64, dtype=dtype, **HEADS[head])
    out, want, plain = linear_logprobs(*args, **kw), truth(*args, **kw), truth(*args, **kw, dtype=dtype)
    assert out.dtype == torch.float32
    error, plain_error = (out - want).abs().max(), (plain - want).abs().max()
    assert error < 1e-5  # the logits were never rounded
    assert error < plain_error / 50
    names = zip(gradients(out, args, kw), gradients(want, args, kw), gradients(plain, args, kw), strict=True)
    for got, exact, plain_got in names:
        assert got.dtype == dtype
        hair = torch.finfo(dtype).eps * exact.abs().max()
        assert (got.double() - exact.double()).abs().max() <= (plain_got.double() - exact.double()).abs().max() + hair


def test_half_precision_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over a sequence, logits rounded to bf16 make margins wrong by tenths of a nat."""
    monkeypatch.setattr(reference, "ROWS", 500)
    monkeypatch.setattr(reference, "VOCAB", 200)
    args, _ = inputs(8, 200, vocab=301, dim=64, dtype=torch.bfloat16, ignored=0)
    want = truth(*args).sum(1)
    for sums, bound in ((linear_logprobs(*args).sum(1), 2e-4), (truth(*args, dtype=torch.bfloat16).sum(1), None)):
        error = ((sums[:4] - sums[4:]) - (want[:4] - want[4:])).abs().max().item()
        assert error < bound if bound else error > 0.02


def test_fp16_logits_of_ten_thousand_do_not_overflow() -> None:
    args, kw = inputs(6, dim=64, dtype=torch.float16, ignored=0)
    args[0] = (args[0].detach() * 4096).requires_grad_()
    logits = args[0].double() @ args[1].double().T
    assert logits.abs().max() > 1e4
    out = linear_logprobs(*args)
    torch.testing.assert_close(out.double(), truth(*args), rtol=1e-5, atol=0.02)
    assert all(g.isfinite().all() for g in gradients(out, args, kw))


def test_shift_of_all_logits_changes_nothing() -> None:
    args, kw = inputs(9, bias=True)
    out = linear_logprobs(*args, **kw)
    shifted = {**kw, "bias": (kw["bias"].detach() + 1000.0).requires_grad_()}
    again = linear_logprobs(*args, **shifted)
    torch.testing.assert_close(again, out, rtol=1e-11, atol=1e-11)
    dbias = gradients(out, args, kw)[2]
    torch.testing.assert_close(dbias.sum(), torch.zeros((), dtype=F64), atol=1e-12, rtol=0)


def test_a_bias_may_mask_classes_out() -> None:
    args, kw = inputs(9, bias=True)
    kw["bias"] = kw["bias"].detach()
    kw["bias"][:40] = -torch.inf  # more than the first tile
    args[2][args[2] != IGNORE] = 50
    kw["bias"].requires_grad_()
    out, want = linear_logprobs(*args, **kw), truth(*args, **kw)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for got, exact in zip(gradients(out, args, kw), gradients(want, args, kw), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head: str) -> None:
    (hidden, weight, targets), kw = inputs(2, 3, vocab=37, dim=3, **HEADS[head])
    bias = kw.pop("bias")
    leaves = (hidden, weight) if bias is None else (hidden, weight, bias)

    def op(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_logprobs(hidden, weight, targets, bias=bias, **kw)

    assert torch.autograd.gradcheck(op, leaves)


def test_non_contiguous_inputs() -> None:
    (hidden, weight, targets), kw = inputs(6, 4, bias=True)
    views = [
        hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        weight.detach().T.contiguous().T.requires_grad_(),
        targets.T.contiguous().T,
    ]
    assert not any(view.is_contiguous() for view in views)
    strided = {"bias": kw["bias"].detach().repeat_interleave(2)[::2].requires_grad_()}
    out, again = linear_logprobs(hidden, weight, targets, **kw), linear_logprobs(*views, **strided)
    torch.testing.assert_close(again, out, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(out, [hidden, weight], kw), gradients(again, views, strided), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_stride_0_upstream_and_double_use() -> None:
    args, _ = inputs(6, ignored=0)
    out = linear_logprobs(*args)
    once = torch.autograd.grad(out, args[:2], torch.ones_like(out), retain_graph=True)
    stride_0 = torch.autograd.grad(out, args[:2], torch.ones((), dtype=F64).expand_as(out), retain_graph=True)
    twice = torch.autograd.grad(out.sum() + (2 * out).sum(), args[:2])
    for a, b, c in zip(once, stride_0, twice, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(3 * a, c, rtol=1e-12, atol=1e-12)


def test_a_graph_may_be_walked_again() -> None:
    args, kw, ref = batch(bias=True)
    leaves = [*args[:2], kw["bias"]]
    for out in (
        lambda: preference_loss(*args, **kw, ref_logprobs=ref, loss="dpo").loss,
        lambda: linear_logprobs(*args, **kw).sum(),
    ):
        once = torch.autograd.grad(out(), leaves)
        value = out()
        for leaf in leaves:
            leaf.grad = None
        for _ in range(3):
            value.backward(retain_graph=True)
        for leaf, slope in zip(leaves, once, strict=True):
            torch.testing.assert_close(leaf.grad, 3 * slope)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    args, _ = inputs(4, ignored=0)
    out = linear_logprobs(*args)
    slope = torch.autograd.grad((out**2).sum(), args[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (slope**2).sum().backward()


def test_no_grad_and_frozen_parts() -> None:
    args, kw = inputs(6, bias=True)
    hidden, weight, targets = args
    with torch.no_grad():
        assert not linear_logprobs(*args, **kw).requires_grad
        assert not preference_loss(
            hidden[None].expand(2, -1, -1), weight, targets.expand(2, -1), ref_logprobs=torch.zeros(2)
        ).loss.requires_grad
    full = gradients(linear_logprobs(*args, **kw), args, kw)
    upstream = torch.randn(6, generator=torch.Generator().manual_seed(9), dtype=F64)
    for frozen in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        leaves = [leaf.detach() if i in frozen else leaf for i, leaf in enumerate((hidden, weight, kw["bias"]))]
        out = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2])
        slopes = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], upstream))
        for i, want in enumerate(full):
            if i not in frozen:
                torch.testing.assert_close(next(slopes), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_part_is_not_computed(frozen: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = set()
    backend = impls.backend(impl)
    real = backend.backward

    def spy(*args: Any, **kw: Any) -> None:
        computed.update(
            name for name in ("hidden", "weight") if kw[f"d{name}_{'TD' if name == 'hidden' else 'VD'}"] is not None
        )
        real(*args, **kw)

    monkeypatch.setattr(backend, "backward", spy)
    args, kw, ref = batch()
    args[{"hidden": 0, "weight": 1}[frozen]].requires_grad_(False)
    linear_logprobs(*args, **kw).sum().backward()
    assert computed == {"hidden", "weight"} - {frozen}
    preference_loss(*args, **kw, ref_logprobs=ref).loss.backward()
    assert computed == {"hidden", "weight"} - {frozen}


def test_autocast_does_not_round_the_logits() -> None:
    args, kw = inputs(20, vocab=301, dim=64, dtype=torch.bfloat16)
    want = linear_logprobs(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprobs(*args)
        slopes = gradients(out, args, kw)
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(slopes, gradients(want, args, kw), strict=True))


def test_full_logits_never_exist(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS", 16)
    monkeypatch.setattr(reference, "VOCAB", 64)
    logprob.set_memory_budget_mib(0.05, "cpu")
    args, _ = inputs(8, 75, vocab=640, dim=4, ignored=0, dtype=torch.bfloat16)
    full = 2 * 8 * 75 * 640
    for loss in ("dpo", LOSSES["dpo"]):
        with LargestTensor() as seen:
            preference_loss(*args, ref_logprobs=torch.zeros(8), loss=loss).loss.backward()
        assert seen.largest <= 0.06 * fused.MIB < full / 10
    with LargestTensor() as seen:  # the mode does see them
        truth(*args).sum().backward()
    assert seen.largest >= full


# ---------------------------------------------------------------------------------------------- preference_loss


def batch(dtype: torch.dtype = F64, **options: Any) -> tuple[list[torch.Tensor], dict[str, Any], torch.Tensor]:
    """Six padded sequences, the keywords of a head, and reference sums near the policy's."""
    args, kw = inputs(6, 9, dtype=dtype, **options)
    args[2][:, 4] = torch.arange(6)  # no sequence is empty
    ref = truth(*args, **kw).sum(1).detach() + torch.linspace(-4, 4, 6, dtype=F64)
    return args, kw, ref


def expected_loss(
    args: list[torch.Tensor],
    head: dict[str, Any],
    ref: torch.Tensor,
    *,
    loss: str = "dual_clip",
    pairs: Any = ((0, 3), (1, 4), (2, 5)),
    scale: Any = None,
    soft_label: Any = None,
    margin: Any = None,
    token_weights: Any = None,
    **options: Any,
) -> torch.Tensor:
    """The loss in float64 from full logits."""
    weights = 1.0 if token_weights is None else token_weights.to(F64)
    sums = (truth(*args, **head) * weights).sum(1)
    tokens = (args[2] != IGNORE).sum(1)
    chosen, rejected = (torch.tensor([p[k] for p in pairs]) for k in (0, 1))
    losses = LOSSES[loss](
        PairLogprobs(
            chosen=sums[chosen],
            rejected=sums[rejected],
            ref_chosen=ref[chosen].to(F64),
            ref_rejected=ref[rejected].to(F64),
            num_chosen_tokens=tokens[chosen],
            num_rejected_tokens=tokens[rejected],
            soft_label=soft_label,
            margin=margin,
        ),
        **options,
    )
    scale = torch.ones(len(pairs), dtype=F64) if scale is None else scale
    return (scale * losses).sum() / scale.sum()


SCALARS = {
    "scale": torch.tensor([0.5, 0.0, 2.0], dtype=F64),
    "soft_label": torch.tensor([1.0, 0.6, 0.8], dtype=F64),
    "margin": torch.tensor([0.0, 0.3, 0.7], dtype=F64),
}


# The other losses: test_losses_op.py. Here two that take different ways.
@pytest.mark.parametrize("loss", ["dual_clip", "dpo"])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("scalars", [{}, SCALARS], ids=["", "scalars"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_loss_and_gradient(loss: str, head: str, scalars: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    args, kw, ref = batch(dtype, **HEADS[head])
    out = preference_loss(*args, **kw, ref_logprobs=ref, loss=loss, **scalars)
    want = expected_loss(args, kw, ref, loss=loss, **scalars)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.loss, want.to(dtype), **tolerance)
    for got, exact in zip(gradients(out.loss, args, kw), gradients(want, args, kw), strict=True):
        torch.testing.assert_close(got, exact.to(dtype), **tolerance)


def test_every_field_of_the_output() -> None:
    args, kw, ref = batch()
    out = preference_loss(*args, **kw, ref_logprobs=ref, beta=0.2, clip_chosen=0.3, clip_rejected=0.5)
    sums = truth(*args, **kw).sum(1).detach()
    torch.testing.assert_close(out.logprobs, sums)
    torch.testing.assert_close(out.ref_logprobs, ref)
    assert out.num_tokens.tolist() == (args[2] != IGNORE).sum(1).tolist()
    rewards = 0.2 * (sums - ref)  # 0.8, 0.48, 0.16 and -0.16, -0.48, -0.8 by the spacing of ref
    torch.testing.assert_close(out.chosen_rewards, rewards[:3])
    torch.testing.assert_close(out.rejected_rewards, rewards[3:])
    assert out.clipped.tolist() == [[True, False], [True, False], [False, True]]
    torch.testing.assert_close(out.loss, out.losses.mean())
    assert out.loss.requires_grad
    assert not any(value.requires_grad for name, value in vars(out).items() if name != "loss")


def test_policy_equal_to_reference_gives_ln_2_and_no_rewards() -> None:
    args, kw, _ = batch(torch.bfloat16, bias=True)
    for loss in ("dual_clip", "dpo"):
        out = preference_loss(*args, **kw, ref_hidden=args[0], loss=loss)
        assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert not out.chosen_rewards.any()


def test_clipped_sequences_and_scale_0_pairs_have_no_gradient() -> None:
    args, kw, ref = batch()
    scale = torch.tensor([1.0, 0.0, 1.0])
    out = preference_loss(*args, **kw, ref_logprobs=ref, scale=scale, clip_chosen=0.3, clip_rejected=0.3)
    assert out.clipped.T.reshape(-1).tolist() == [True, False, False, False, False, True]
    moves = gradients(out.loss, args, kw)[0].any(-1).any(-1)
    assert moves.tolist() == [False, False, True, True, False, False]
    zero = preference_loss(*args, ref_logprobs=ref, scale=torch.zeros(3))
    assert zero.loss == 0
    assert all(not g.any() for g in gradients(zero.loss, args, kw))


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_packed_equals_padded(dtype: torch.dtype) -> None:
    (hidden, weight, targets), kw, ref = batch(dtype, bias=True)
    lengths = torch.tensor([9, 5, 7, 9, 6, 8])
    for row, length in enumerate(lengths):
        targets[row, length:] = IGNORE
    keep = torch.arange(9) < lengths[:, None]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weights = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    padded = preference_loss(hidden, weight, targets, ref_logprobs=ref, token_weights=weights, **kw, **SCALARS)
    for integer in (torch.int32, torch.int64):
        packed = preference_loss(
            hidden[keep],
            weight,
            targets[keep],
            cu_seqlens=cu_seqlens.to(integer),
            ref_logprobs=ref,
            token_weights=weights[keep],
            **kw,
            **SCALARS,
        )
        for name, value in vars(padded).items():
            torch.testing.assert_close(getattr(packed, name), value, rtol=1e-6, atol=1e-6)
        for a, b in zip(
            gradients(packed.loss, [hidden, weight], kw), gradients(padded.loss, [hidden, weight], kw), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_a_sequence_scores_the_same_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS", 100)
    monkeypatch.setattr(reference, "VOCAB", 200)
    for dtype in (torch.float32, torch.bfloat16):
        args, _ = inputs(16, 23, vocab=301, dim=64, dtype=dtype)
        together = linear_logprobs(*args).sum(1)
        alone = torch.stack([linear_logprobs(args[0][s], args[1], args[2][s]).sum() for s in range(16)])
        torch.testing.assert_close(alone, together, rtol=1e-6, atol=2e-5)
        back = linear_logprobs(args[0].flip(0), args[1], args[2].flip(0)).sum(1).flip(0)
        torch.testing.assert_close(back, together, rtol=1e-6, atol=2e-5)


def test_a_sequence_in_several_pairs() -> None:
    args, kw, ref = batch(bias=True)
    pairs = [(5, 0), (5, 1), (2, 0), (5, 0)]
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64)
    out = preference_loss(*args, **kw, ref_logprobs=ref, pairs=torch.tensor(pairs), scale=scale, loss="dpo")
    want = expected_loss(args, kw, ref, pairs=pairs, scale=scale, loss="dpo")
    torch.testing.assert_close(out.loss, want, rtol=1e-11, atol=1e-12)
    assert out.losses.shape == (4,)
    assert out.logprobs.shape == (6,)
    for got, exact in zip(gradients(out.loss, args, kw), gradients(want, args, kw), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)
    assert not gradients(out.loss, args, kw)[0][3:5].any()  # in no pair


def test_sequences_in_no_pair_may_be_empty() -> None:
    args, kw, ref = batch()
    args[2][1] = IGNORE
    out = preference_loss(*args, **kw, ref_logprobs=ref, pairs=torch.tensor([[0, 3]]))
    torch.testing.assert_close(out.loss, expected_loss(args, kw, ref, pairs=[(0, 3)]))


def test_token_weights_enter_policy_and_reference() -> None:
    args, kw, _ = batch(bias=True)
    weights = torch.rand(6, 9, generator=torch.Generator().manual_seed(2), dtype=F64)
    ref_args, ref_kw = inputs(6, 9, dim=5, seed=4, bias=True)
    ref = (truth(*ref_args[:2], args[2], **ref_kw) * weights).sum(1).detach()
    out = preference_loss(
        *args,
        **kw,
        token_weights=weights,
        ref_hidden=ref_args[0].detach(),
        ref_weight=ref_args[1],
        ref_bias=ref_kw["bias"],
        loss="dpo",
    )
    torch.testing.assert_close(out.ref_logprobs, ref)
    want = expected_loss(args, kw, ref, token_weights=weights, loss="dpo")
    torch.testing.assert_close(out.loss, want)
    for got, exact in zip(gradients(out.loss, args, kw), gradients(want, args, kw), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)


def test_ref_hidden_is_the_same_as_its_ref_logprobs() -> None:
    args, kw, _ = batch(**HEADS["all"])
    other = inputs(6, 9, seed=5)[0][0]
    given = preference_loss(*args, **kw, ref_hidden=other)
    sums = truth(other, *args[1:], **kw).sum(1).detach()
    torch.testing.assert_close(given.ref_logprobs, sums)
    assert torch.equal(given.loss, preference_loss(*args, **kw, ref_logprobs=given.ref_logprobs).loss)
    assert torch.autograd.grad(given.loss, other, allow_unused=True) == (None,)
    # A reference head without a bias of its own has none.
    bare = preference_loss(*args, **kw, ref_hidden=other, ref_weight=args[1].detach())
    torch.testing.assert_close(bare.ref_logprobs, truth(other, *args[1:], **{**kw, "bias": None}).sum(1).detach())


def test_a_loss_may_be_a_function() -> None:
    args, kw, ref = batch()

    def hinge(pairs: PairLogprobs, *, beta: float = 0.1, clip_chosen: float = 0.3) -> torch.Tensor:
        return (1 - beta * (pairs.chosen - pairs.ref_chosen - pairs.rejected + pairs.ref_rejected)).relu()

    log_ratio = truth(*args).sum(1).detach() - ref
    for options in ({}, {"beta": 0.15}):
        out = preference_loss(*args, **kw, ref_logprobs=ref, loss=hinge, **options)
        beta = options.get("beta", 0.1)
        torch.testing.assert_close(out.losses, (1 - beta * (log_ratio[:3] - log_ratio[3:])).relu())
        torch.testing.assert_close(out.chosen_rewards, beta * log_ratio[:3])
        assert out.clipped[:, 0].tolist() == (beta * log_ratio[:3] >= 0.3).tolist()
    assert gradients(out.loss, args, kw)[0].any()
    # The function behind a name gives what the name gives, figures included.
    for a, b in zip(
        *(
            vars(preference_loss(*args, ref_logprobs=ref, loss=loss)).values()
            for loss in ("dual_clip", LOSSES["dual_clip"])
        ),
        strict=True,
    ):
        assert torch.equal(a, b)
    mean = preference_loss(
        *args,
        ref_logprobs=ref,
        loss=lambda pairs: pairs.chosen / pairs.num_chosen_tokens - pairs.rejected / pairs.num_rejected_tokens,
    )
    means = mean.logprobs / (args[2] != IGNORE).sum(1)
    torch.testing.assert_close(mean.losses, means[:3] - means[3:])
    with pytest.raises(ValueError, match=r"one value a pair, \[3\], got \(\)"):
        preference_loss(*args, ref_logprobs=ref, loss=lambda pairs: pairs.chosen.sum())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_hidden_gives_a_non_finite_loss(bad: float) -> None:
    args, kw, ref = batch(torch.float32)
    hidden = args[0].detach().clone()
    hidden[2, 4, 3] = bad
    out = preference_loss(hidden.requires_grad_(), *args[1:], ref_logprobs=ref)
    assert not out.loss.isfinite()
    assert not gradients(out.loss, [hidden, args[1]], kw)[1].isfinite().all()
    # Where the target is ignored it enters nothing.
    targets = args[2].clone()
    targets[2, 4], targets[2, 5] = IGNORE, 7
    out = preference_loss(hidden, args[1], targets, ref_logprobs=ref)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(out.loss, [hidden, args[1]], kw))


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture, impl: str) -> None:
    impls._log_choice.cache_clear()
    args, _ = inputs(4, dtype=torch.float32)
    with caplog.at_level("INFO", logger="tso_fast.logprob.impls"):
        linear_logprobs(*args)
        linear_logprobs(*args)
    assert [r.getMessage() for r in caplog.records] == [
        f"linear_logprobs: impl='auto' chose {impl!r} for torch.float32 tensors on cpu"
    ]

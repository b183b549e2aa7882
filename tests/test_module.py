"""``FusedLinearTSOLoss`` beside Liger's DPO loss and beside plain float64 torch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from tso_fast import FusedLinearTSOLoss, preference_loss
from tso_fast.logprob import module, reference

F64 = torch.float64
NO_CLIP = {"clip_chosen": math.inf, "clip_rejected": math.inf}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS", 5)
    monkeypatch.setattr(reference, "VOCAB", 32)
    monkeypatch.setattr(module, "VOCAB", 32)


def inputs(
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    pairs: int = 3,
    length: int = 7,
    dim: int = 13,
    vocab: int = 67,
    seed: int = 0,
) -> dict[str, Any]:
    """Forward's arguments by name; every sequence has a prompt, a completion and padding."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(size, generator=g, dtype=F64)).to(dtype)

    target = torch.randint(vocab, (2 * pairs, length), generator=g)
    target[:, :2] = -100
    target[::2, -2:] = -100
    given = {
        "lin_weight": normal(vocab, dim, std=2 / math.sqrt(dim)).requires_grad_(),
        "_input": normal(2 * pairs, length, dim).requires_grad_(),
        "target": target,
        "bias": normal(vocab).requires_grad_() if bias else None,
        "ref_input": normal(2 * pairs, length, dim),
        "ref_weight": normal(vocab, dim, std=2 / math.sqrt(dim)),
        "ref_bias": normal(vocab) if bias else None,
    }
    return given


def gradients(loss: torch.Tensor, given: dict[str, Any]) -> list[torch.Tensor]:
    leaves = [given[name] for name in ("_input", "lin_weight", "bias") if given[name] is not None]
    return list(torch.autograd.grad(3 * loss, leaves))


def plain_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Of every token, float64, 0 where ignored."""
    logits = hidden.to(F64) @ weight.to(F64).T + (0 if bias is None else bias.to(F64))
    picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target >= 0, picked, 0)


def plain_dpo(given: dict[str, Any], beta: float = 0.1, average: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and policy log-probs per sequence, float64."""
    policy = plain_logprobs(given["_input"], given["lin_weight"], given["target"], given["bias"]).sum(-1)
    ref = plain_logprobs(given["ref_input"], given["ref_weight"], given["target"], given["ref_bias"]).sum(-1)
    if average:
        count = (given["target"] >= 0).sum(-1)
        policy, ref = policy / count, ref / count
    chosen, rejected = (policy - ref).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean(), policy


# ----------------------------------------------------------------------------------------------------- beside Liger


def liger(**options: Any) -> torch.nn.Module:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    loss: torch.nn.Module = chunked_loss.LigerFusedLinearDPOLoss(compiled=False, **options)
    return loss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7},
        {"average_log_prob": True, "beta": 2.0},
        {"use_ref_model": False},
        {"compute_nll_loss": True},
        {"compute_nll_loss": True, "alpha": 0.3, "average_log_prob": True},
        {"ignore_index": 5},
        {"chunk_size": 2},
    ],
    ids=repr,
)
def test_same_loss_aux_and_gradients_as_liger(options: dict[str, Any], bias: bool) -> None:
    given = inputs(bias=bias)
    if "ignore_index" in options:
        given["target"][given["target"] < 0] = options["ignore_index"]
    want, want_aux = liger(**options)(*given.values())
    loss, aux = FusedLinearTSOLoss(**options, **NO_CLIP)(*given.values())
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    assert len(aux) == len(want_aux)
    for got, expected in zip(aux, want_aux, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
    for got, expected in zip(gradients(loss, given), gradients(want, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_as_in_liger() -> None:
    given = inputs()
    given["lin_weight"].requires_grad_(False)
    for loss in (liger(), FusedLinearTSOLoss(**NO_CLIP)):
        loss(*given.values())[0].backward()
    assert given["lin_weight"].grad is None
    summed = given["_input"].grad.clone()
    given["_input"].grad = None
    FusedLinearTSOLoss(**NO_CLIP)(*given.values())[0].backward()
    torch.testing.assert_close(summed, 2 * given["_input"].grad, rtol=1e-5, atol=1e-7)


def test_signatures_begin_with_ligers() -> None:
    theirs = type(liger())
    for name in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, name)).parameters
        parameters = inspect.signature(getattr(FusedLinearTSOLoss, name)).parameters
        positional = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected.values()]


# ------------------------------------------------------------------------------------------------ beside plain torch


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(average: bool, bias: bool) -> None:
    given = inputs(bias=bias, dtype=F64)
    loss, aux = FusedLinearTSOLoss(average_log_prob=average, **NO_CLIP)(*given.values())
    want, policy = plain_dpo(given, average=average)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(aux[:2]), policy.detach(), rtol=1e-12, atol=1e-12)
    for got, exact in zip(gradients(loss, given), gradients(want, given), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)
    logits = given["_input"] @ given["lin_weight"].T + (given["bias"] if bias else 0)
    for got, half in zip(aux[2:4], logits.detach().chunk(2), strict=True):
        torch.testing.assert_close(got, half.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["dual_clip", "dpo", "sft"])
def test_is_preference_loss(loss: str) -> None:
    """Options and extras arrive: softcap, temperature, pair scalars, token weights, cached reference."""
    given = inputs(dtype=F64)
    shape = given["target"].shape
    extras = {
        "scale": torch.tensor([1.0, 0.0, 3.0], dtype=F64),
        "soft_label": torch.tensor([1.0, 0.8, 0.6], dtype=F64),
        "margin": torch.tensor([0.0, 0.1, 0.2], dtype=F64),
        "token_weights": torch.linspace(0.5, 1.5, shape.numel(), dtype=F64).reshape(shape),
        "ref_logprobs": torch.linspace(-30, -20, shape[0], dtype=F64),
    }
    head = {"softcap": 3.0, "temperature": 0.8}
    clips = {"clip_chosen": 0.2, "clip_rejected": 0.1} if loss == "dual_clip" else {}
    beta = {} if loss == "sft" else {"beta": 0.3}
    policy = (given["_input"], given["lin_weight"], given["target"])
    want = preference_loss(*policy, loss=loss, **beta, **clips, **extras, **head)
    ours = FusedLinearTSOLoss(beta=0.3, loss=loss, impl="reference", **clips, **head)
    got, aux = ours(given["lin_weight"], given["_input"], given["target"], **extras)
    torch.testing.assert_close(got, want.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(aux[:2]), want.logprobs)
    torch.testing.assert_close(torch.cat(aux[5:]), 0.3 * (want.logprobs - want.ref_logprobs))


def test_clips_are_on_by_default_and_bind() -> None:
    given = inputs(dtype=F64)
    policy = (given["_input"], given["lin_weight"], given["target"])
    want = preference_loss(*policy, ref_hidden=given["ref_input"], ref_weight=given["ref_weight"], loss="dual_clip")
    assert want.clipped.any()
    torch.testing.assert_close(FusedLinearTSOLoss()(*given.values())[0], want.loss)


def test_the_reference_head_defaults_to_the_policys() -> None:
    given = inputs(bias=True, dtype=F64)
    del given["ref_weight"], given["ref_bias"]
    want = plain_dpo({**given, "ref_weight": given["lin_weight"], "ref_bias": given["bias"]})[0]
    torch.testing.assert_close(FusedLinearTSOLoss(**NO_CLIP)(**given)[0], want)


@pytest.mark.parametrize("average", [False, True])
def test_cached_reference_sums_give_the_same(average: bool) -> None:
    given = inputs(dtype=F64)
    loss = FusedLinearTSOLoss(average_log_prob=average)
    sums = plain_logprobs(given["ref_input"], given["ref_weight"], given["target"], None).sum(-1)
    cached = loss(given["lin_weight"], given["_input"], given["target"], ref_logprobs=sums)[0]
    torch.testing.assert_close(cached, loss(*given.values())[0])


def test_the_nll_has_weight_alpha_whatever_the_scales() -> None:
    given = inputs(dtype=F64)
    extras = {"scale": torch.tensor([0.0, 0.5, 2.0], dtype=F64)}
    plain = FusedLinearTSOLoss()(**given, **extras)[0]
    loss, aux = FusedLinearTSOLoss(compute_nll_loss=True, alpha=0.3)(**given, **extras)
    chosen = given["target"][:3]
    logprobs = plain_logprobs(given["_input"][:3], given["lin_weight"], chosen, None)
    nll = -logprobs.sum() / (chosen >= 0).sum()
    torch.testing.assert_close(aux[4], nll.detach())
    torch.testing.assert_close(loss, plain + 0.3 * nll)
    for got, exact in zip(gradients(loss, given), gradients(plain + 0.3 * nll, given), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)


def test_bf16_log_probs_come_from_unrounded_logits() -> None:
    given = inputs(dtype=torch.bfloat16, length=64, dim=64, vocab=301)
    loss, aux = FusedLinearTSOLoss(**NO_CLIP)(*given.values())
    want, policy = plain_dpo(given)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(torch.cat(aux[:2]).to(F64), policy.detach(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(loss.to(F64), want, rtol=1e-5, atol=1e-5)
    for got, exact in zip(gradients(loss, given), gradients(want, given), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.to(F64) - exact.to(F64)).norm() < 5e-3 * exact.to(F64).norm()


def test_holds_nothing_but_options() -> None:
    loss = FusedLinearTSOLoss(clip_chosen=0.2)
    assert not loss.state_dict()
    assert "dual_clip" in repr(loss)
    assert "clip_chosen=0.2" in repr(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "hinge"}, "loss_type='hinge' is not supported; expected 'sigmoid'"),
        ({"label_smoothing": 0.1}, r"soft_label, \[N\] filled with 0.9"),
        ({"loss": "dpu"}, "unknown loss 'dpu'; known: apo_down"),
        ({"loss": "dpo", "clip_chosen": 0.5}, "loss 'dpo' has no option 'clip_chosen'"),
    ],
)
def test_unsupported_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearTSOLoss(**options)


def test_an_nll_beside_a_loss_of_tokens() -> None:
    given = inputs(bias=True, dtype=F64)
    plain, both = (FusedLinearTSOLoss(loss="humanline", alpha=0.3, compute_nll_loss=x) for x in (False, True))
    loss, (chosen, *_) = plain(**given)
    total, aux = both(**given)
    nll = -chosen.sum() / (given["target"].chunk(2)[0] >= 0).sum()
    torch.testing.assert_close(total, loss + 0.3 * nll)
    torch.testing.assert_close(aux[4], nll)


def test_arguments_that_do_not_fit() -> None:
    given = inputs()
    policy = (given["lin_weight"], given["_input"], given["target"])
    with pytest.raises(ValueError, match="give exactly one of ref_logprobs, ref_hidden and ref_token_logprobs: none"):
        FusedLinearTSOLoss()(*policy)
    with pytest.raises(ValueError, match="ref_logprobs has no effect with use_ref_model=False"):
        FusedLinearTSOLoss(use_ref_model=False)(*policy, ref_logprobs=torch.zeros(6))
    with pytest.raises(ValueError, match=r"ref_logprobs must be \(6,\)"):
        FusedLinearTSOLoss(average_log_prob=True)(*policy, ref_logprobs=torch.zeros(3))
    with pytest.raises(ValueError, match="unknown impl 'gpu'"):
        FusedLinearTSOLoss(impl="gpu")(**given)
    given["target"][1] = -100
    with pytest.raises(ValueError, match="sequence 1 belongs to a pair but has no completion token"):
        FusedLinearTSOLoss()(**given)

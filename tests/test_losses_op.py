"""Every loss through ``preference_loss``: value and gradient against full logits in float64, with every ``impl``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tso_fast.logprob import fused, impls, preference_loss
from tso_fast.logprob.plan import Limits
from tso_fast.losses import LOSSES, loss_options, resolve_loss, weighted_sum
from tso_fast.types import PairLogprobs, TokenLogprobs

F64 = torch.float64
N, L, D, V = 2, 3, 8, 37
OPTIONS: dict[str, dict[str, Any]] = {
    "dual_clip": {"beta": 0.2, "nll_weight": 0.3, "clip_chosen": 0.2},
    "sppo": {"beta": 0.5},  # at the default its targets are 500 nats away
    "selm": {"alpha": 0.5},
    "humanline": {"log_epsilon_P": -0.3, "log_epsilon_R": 0.4},
    "bmc": {"beta": 0.3},
}


@pytest.fixture(params=["reference", "cpu", "cpu in chunks", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation, and one with memory for three rows: pairs are then computed one by one, and twice."""
    name: str = request.param.partition(" ")[0]
    if name != request.param:
        monkeypatch.setattr(impls.backend(name), "limits", lambda *args: Limits(single=3, group=3, rows=3))
    return name


def inputs(num_extra: int = 0, dtype: torch.dtype = F64) -> dict[str, Any]:
    """Arguments of a call with everything that some loss reads; the last pair's first further sequence is its chosen
    one."""
    g = torch.Generator().manual_seed(0)
    pairs = torch.arange(N * (2 + num_extra)).view(2 + num_extra, N).T.contiguous()
    sequences = pairs.numel()
    if num_extra:
        pairs[-1, 2] = pairs[-1, 0]

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, generator=g, dtype=F64)).to(dtype)

    targets = torch.randint(V, (sequences, L), generator=g)
    targets[:, 0], targets[1, 1] = -100, -100
    hidden, weight, bias = normal(sequences, L, D), normal(V, D, std=0.5), normal(V)
    tokens = logprobs(hidden, weight, bias, targets).to(dtype) + normal(sequences, L, std=0.5)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
        "targets": targets,
        "pairs": pairs,
        "scale": torch.tensor([0.5, 2.0], dtype=F64),
        "soft_label": torch.tensor([0.9, 0.6], dtype=F64),
        "margin": torch.tensor([0.3, 0.1], dtype=F64),
        "ref_token_logprobs": tokens.detach(),
        "ref2_logprobs": tokens.detach().sum(1) - 1,
        "win_rates": torch.tensor([[0.9, 0.2], [0.6, 0.5]], dtype=F64),
        "token_values": torch.randint(2, (sequences, L), generator=g),
        "token_weights": torch.rand(sequences, L, generator=g, dtype=F64),
    }


def logprobs(hidden: Any, weight: Any, bias: Any, targets: torch.Tensor) -> torch.Tensor:
    """[S, L] float64 from full logits; 0 where ignored."""
    every = (hidden.to(F64) @ weight.to(F64).T + bias.to(F64)).log_softmax(-1)
    return every.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)


def expected(name: str, x: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    """The loss, by the pure function and autograd through full logits."""
    loss, is_valid, pairs = resolve_loss(name, options), x["targets"] >= 0, x["pairs"]
    weights = x.get("token_weights", torch.ones(1)) * is_valid
    y = logprobs(x["hidden"], x["weight"], x["bias"], x["targets"])
    ref = x["ref_token_logprobs"].to(F64)
    fields: dict[str, Any] = {}
    sums, ref_sums, tokens = (y * weights).sum(1), (ref * weights).sum(1), is_valid.sum(1)
    if loss.token_term is not None:
        values = x["token_values"].to(F64) if "token_values" in x else None
        term = loss.terms(TokenLogprobs(logprobs=y, ref_logprobs=ref, values=values))
        terms = (term * weights).sum(1)
        fields |= {"chosen_terms": terms[pairs[:, 0]], "rejected_terms": terms[pairs[:, 1]]}
    if loss.num_extra:
        fields |= {"extra": sums[pairs[:, 2:]], "ref_extra": ref_sums[pairs[:, 2:]]}
    if "ref2_logprobs" in x:
        ref2 = x["ref2_logprobs"].to(F64)
        fields |= {"ref2_chosen": ref2[pairs[:, 0]], "ref2_rejected": ref2[pairs[:, 1]]}
    record = PairLogprobs(
        **{side: sums[pairs[:, i]] for i, side in enumerate(("chosen", "rejected"))},
        **{f"ref_{side}": ref_sums[pairs[:, i]] for i, side in enumerate(("chosen", "rejected"))},
        **{f"num_{side}_tokens": tokens[pairs[:, i]] for i, side in enumerate(("chosen", "rejected"))},
        **fields,
        **{k: x.get(k) for k in ("soft_label", "margin", "win_rates")},
    )
    return (loss(record) * x["scale"]).sum() / x["scale"].sum()


def arguments(name: str, dtype: torch.dtype = F64) -> dict[str, Any]:
    """Those that the loss reads."""
    loss = LOSSES[name]
    x = inputs(loss.num_extra or 0, dtype)
    return {k: v for k, v in x.items() if k not in ("ref2_logprobs", "win_rates", "token_values")
            or k in loss.needs | loss.takes}  # fmt: skip


def gradients(total: torch.Tensor, x: dict[str, Any]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [x["hidden"], x["weight"], x["bias"]], retain_graph=True))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_with_every_implementation(name: str, impl: str) -> None:
    dtype = torch.float32 if impl == "triton" else F64
    x, options = arguments(name, dtype), OPTIONS.get(name, {})
    out = preference_loss(**x, loss=name, impl=impl, **options)
    want = expected(name, x, options)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.loss, want.to(dtype), **tolerance)
    assert any(slope.any() for slope in gradients(want, x))
    for got, exact in zip(gradients(out.loss, x), gradients(want, x), strict=True):
        torch.testing.assert_close(got, exact, **tolerance)
    for column in range(2):
        rewards = (out.chosen_rewards, out.rejected_rewards)[column]
        sums = (out.logprobs - out.ref_logprobs)[x["pairs"][:, column]]
        beta = {"beta": 0.1, **loss_options(name), **options}["beta"]
        torch.testing.assert_close(rewards, beta * sums, rtol=1e-4, atol=1e-5)


def test_groups_are_of_pairs_with_all_their_sequences() -> None:
    parts = fused._components(7, [(0, 1, 6), (2, 3, 3), (4, 5, 6)])
    assert parts == [([0, 1, 4, 5, 6], [0, 2]), ([2, 3], [1])]


@pytest.mark.parametrize("name", ["dpo", "humanline", "ipo"])
def test_a_reference_in_three_forms(name: str) -> None:
    """Hidden states, log-probs of tokens, and, where the loss needs no tokens, their sums."""
    x = inputs()
    own = {k: x[k] for k in ("hidden", "weight", "bias", "targets", "pairs", "token_weights")}
    other = x["hidden"].detach() + 0.3
    tokens = logprobs(other, x["weight"], x["bias"], x["targets"]).detach()
    given = preference_loss(**own, ref_hidden=other, loss=name)
    nan = tokens.where(x["targets"] >= 0, torch.nan)  # what is ignored is not read
    forms = [{"ref_token_logprobs": nan}]
    if name != "humanline":
        forms.append({"ref_logprobs": (tokens * x["token_weights"]).sum(1)})
    for form in forms:
        out = preference_loss(**own, **form, loss=name)
        for key, value in vars(given).items():
            torch.testing.assert_close(getattr(out, key), value, rtol=1e-10, atol=1e-10)
        for a, b in zip(gradients(out.loss, x), gradients(given.loss, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tokens_packed_are_tokens_padded() -> None:
    x = arguments("bmc")
    x["targets"][:, 0] = x["targets"][:, 2]  # all positions, but of sequence 1
    padded = preference_loss(**x, loss="bmc")
    keep = torch.ones(2 * N, L, dtype=torch.bool)
    keep[1, 1] = False
    cu_seqlens = torch.tensor([0, *itertools.accumulate(keep.sum(1).tolist())])
    names = "hidden", "targets", "ref_token_logprobs", "token_values", "token_weights"
    packed = preference_loss(**x | {name: x[name][keep] for name in names}, cu_seqlens=cu_seqlens, loss="bmc")
    torch.testing.assert_close(packed.losses, padded.losses)
    for a, b in zip(gradients(packed.loss, x), gradients(padded.loss, x), strict=True):
        torch.testing.assert_close(a, b)


def test_an_nll_reaches_a_pair_whose_two_sides_are_clipped(impl: str) -> None:
    dtype = torch.float32 if impl == "triton" else F64
    x = arguments("dual_clip", dtype) | {"loss": "dual_clip", "impl": impl, "clip_chosen": 0.0, "clip_rejected": 0.0}
    logp = logprobs(x["hidden"], x["weight"], x["bias"], x["targets"]).detach()
    side = torch.tensor([-1.0] * N + [1.0] * N)[:, None]  # the chosen ones rose, the rejected ones fell
    x["ref_token_logprobs"] = (logp + side).to(dtype)
    out = preference_loss(**x)
    assert out.clipped.all()
    assert not any(slope.any() for slope in gradients(out.loss, x))
    with_nll = preference_loss(**x, nll_weight=0.5)
    alone = preference_loss(**{k: v for k, v in x.items() if "clip" not in k} | {"loss": "sft"})
    torch.testing.assert_close(with_nll.loss, out.loss + 0.5 * alone.loss)
    for a, b in zip(gradients(with_nll.loss, x), gradients(alone.loss, x), strict=True):
        torch.testing.assert_close(a, 0.5 * b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_loss_without_reference_needs_none(impl: str) -> None:
    """Its loss and gradients are those with any reference; rewards are NaN, as there is nothing to compare with."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 16, generator=g), torch.randn(37, 16, generator=g)
    targets = torch.randint(0, 37, (4, 5), generator=g)
    targets[:, :2] = -100

    def run(**reference: Any) -> tuple[Any, list[torch.Tensor]]:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = preference_loss(*inputs, targets, loss="sft", impl=impl, **reference)
        return out, list(torch.autograd.grad(out.loss, inputs))

    out, gradients = run()
    same, others = run(ref_logprobs=torch.tensor([-3.0, -7.0, -2.0, -9.0]))
    assert torch.equal(out.losses, same.losses)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert out.ref_logprobs.isnan().all()
    assert out.chosen_rewards.isnan().all()
    assert not out.clipped.any()
    with pytest.raises(ValueError, match="none was given, and plain DPO needs one"):
        preference_loss(hidden, weight, targets, loss="dpo", impl=impl)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_sum_of_losses_goes_through_the_op(impl: str) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(4, 5, 16, generator=g), torch.randn(37, 16, generator=g).requires_grad_()
    targets = torch.randint(0, 37, (4, 5), generator=g)
    reference = -20 * torch.rand(4, generator=g)

    def gradient(loss: Any, **options: Any) -> torch.Tensor:
        out = preference_loss(hidden, weight, targets, loss=loss, ref_logprobs=reference, impl=impl, **options)
        return torch.autograd.grad(out.loss, weight)[0]

    both = gradient(weighted_sum(["dual_clip", "sft"], [1.0, 0.5], {"beta": 0.2, "clip_chosen": 9.0}))
    want = gradient("dual_clip", beta=0.2, clip_chosen=9.0) + 0.5 * gradient("sft")
    torch.testing.assert_close(both, want, rtol=1e-4, atol=1e-5)

"""Every loss: its value and gradient against numpy in float64, and what the clip promises."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from tso_fast.logprob import preference_loss
from tso_fast.losses import (
    LOSSES,
    clipped_sides,
    dpo,
    dual_clip,
    find_loss,
    loss_options,
    resolve_loss,
    sft,
    weighted_sum,
)
from tso_fast.types import PairLogprobs

N = 400
INF = math.inf
OPTIONS = {
    "dual_clip": [
        {},
        {"beta": 0.3, "clip_chosen": 1.0, "clip_rejected": 0.2},
        {"clip_chosen": 0.0, "clip_rejected": 0.0},
    ],
    "dpo": [{}, {"beta": 0.5}],
    "sft": [{}],
}


def records(seed: int = 0, *, soft: bool = True, margin: bool = True) -> PairLogprobs:
    """Log-ratios of a few nats either way, so that at the default options all four clip states occur."""
    rng = np.random.default_rng(seed)

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    ref_chosen, ref_rejected = -rng.uniform(5, 60, (2, N))
    return PairLogprobs(
        chosen=tensor(ref_chosen + rng.normal(0, 6, N)).requires_grad_(),
        rejected=tensor(ref_rejected + rng.normal(0, 6, N)).requires_grad_(),
        ref_chosen=tensor(ref_chosen),
        ref_rejected=tensor(ref_rejected),
        num_chosen_tokens=torch.tensor(rng.integers(1, 50, N)),
        num_rejected_tokens=torch.tensor(rng.integers(1, 50, N)),
        soft_label=tensor(rng.uniform(0.5, 1, N)) if soft else None,
        margin=tensor(rng.uniform(0, 2, N)) if margin else None,
    )


def pair(chosen: float, rejected: float, **fields: float) -> PairLogprobs:
    """One pair with these log-ratios against a reference of 0."""
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen": 0.0,
        "ref_rejected": 0.0,
        "num_chosen_tokens": 1.0,
        "num_rejected_tokens": 1.0,
    } | fields
    tensors = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    tensors["chosen"].requires_grad_()
    tensors["rejected"].requires_grad_()
    return PairLogprobs(**tensors)


def expected(name: str, r: PairLogprobs, options: dict[str, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, d/d chosen and d/d rejected, from the formulas alone."""
    a, b, ra, rb = (getattr(r, k).detach().numpy() for k in ("chosen", "rejected", "ref_chosen", "ref_rejected"))
    if name == "sft":
        tokens = r.num_chosen_tokens.numpy()
        return -a / tokens, -1 / tokens, np.zeros(N)
    p = 1.0 if r.soft_label is None else r.soft_label.numpy()
    m = 0.0 if r.margin is None else r.margin.numpy()
    beta = options.get("beta", 0.1)
    bounds = {"clip_chosen": 0.5, "clip_rejected": 0.3} | options if name == "dual_clip" else {}
    reward_w, reward_l = beta * (a - ra), beta * (b - rb)
    c_w, c_l = bounds.get("clip_chosen", INF), bounds.get("clip_rejected", INF)
    z = np.minimum(reward_w, c_w) - np.maximum(reward_l, -c_l) - m
    value = p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z)
    dz = 1 / (1 + np.exp(-z)) - p
    return value, beta * dz * (reward_w < c_w), -beta * dz * (reward_l > -c_l)


def gradient(loss: Any, r: PairLogprobs, **options: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = loss(r, **options)
    chosen, rejected = torch.autograd.grad(value.sum(), (r.chosen, r.rejected), allow_unused=True)
    zeros = torch.zeros_like(value)
    return value.detach(), zeros if chosen is None else chosen, zeros if rejected is None else rejected


# A new loss needs a row in OPTIONS and its formula in expected().
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LOSSES for options in OPTIONS[name]], ids=str
)
@pytest.mark.parametrize(("soft", "margin"), [(False, False), (True, False), (False, True), (True, True)])
def test_value_and_gradient(name: str, options: dict[str, float], soft: bool, margin: bool) -> None:
    r = records(soft=soft, margin=margin)
    for got, want in zip(gradient(LOSSES[name], r, **options), expected(name, r, options), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_slope_of_the_value(name: str) -> None:
    r, step = records(1), 1e-6
    _, *slopes = gradient(LOSSES[name], r)
    rewards = [0.1 * (r.chosen - r.ref_chosen), 0.1 * (r.rejected - r.ref_rejected)]
    away = ((rewards[0] - 0.5).abs() > 1e-5) & ((rewards[1] + 0.3).abs() > 1e-5)  # from the kinks
    assert away.sum() > N - 5
    for side, slope in zip(("chosen", "rejected"), slopes, strict=True):
        here = getattr(r, side).detach()
        up, down = (LOSSES[name](dataclasses.replace(r, **{side: here + d})).detach() for d in (step, -step))
        torch.testing.assert_close(slope[away], ((up - down) / (2 * step))[away], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_bounds_dual_clip_is_dpo_bit_for_bit(dtype: torch.dtype) -> None:
    r = records(2)
    r = PairLogprobs(
        **{k: v.detach().to(dtype).requires_grad_(k in ("chosen", "rejected")) for k, v in vars(r).items()}
    )
    clipped = gradient(dual_clip, r, beta=0.2, clip_chosen=INF, clip_rejected=INF)
    assert all(torch.equal(x, y) for x, y in zip(clipped, gradient(dpo, r, beta=0.2), strict=True))
    # A bound that nothing reaches is no bound either.
    assert all(
        torch.equal(x, y)
        for x, y in zip(clipped, gradient(dual_clip, r, beta=0.2, clip_chosen=1e6, clip_rejected=1e6), strict=True)
    )


# Rewards of (chosen, rejected) at beta 1 with bounds 0.5 and 0.25: beyond, exactly at, and just inside each bound.
@pytest.mark.parametrize(
    ("chosen", "rejected", "moves"),
    [
        (0.6, 0.1, (False, True)),
        (0.5, 0.1, (False, True)),
        (np.nextafter(0.5, 0), 0.1, (True, True)),
        (0.1, -0.3, (True, False)),
        (0.1, -0.25, (True, False)),
        (0.1, np.nextafter(-0.25, 0), (True, True)),
        (0.5, -0.25, (False, False)),
        (-9.0, 9.0, (True, True)),  # one-sided: what fell is pulled up, what rose is pushed down
        (-9.0, -9.0, (True, False)),
        (9.0, 9.0, (False, True)),
    ],
)
@pytest.mark.parametrize("soft_label", [1.0, 0.7])
def test_a_side_moves_until_it_reaches_its_bound(
    chosen: float, rejected: float, moves: tuple[bool, bool], soft_label: float
) -> None:
    r = pair(chosen, rejected, soft_label=soft_label)
    bounds = {"clip_chosen": 0.5, "clip_rejected": 0.25}
    _, *slopes = gradient(dual_clip, r, beta=1.0, **bounds)
    assert tuple(bool(slope != 0) for slope in slopes) == moves
    assert clipped_sides(r.chosen, r.rejected, **bounds)[0].tolist() == [not m for m in moves]


def test_a_fallen_chosen_response_is_pulled_up_as_in_dpo() -> None:
    r = pair(-30.0, -0.5)
    _, pull, _ = gradient(dual_clip, r)
    assert pull < 0  # descent raises the log-prob
    assert torch.equal(pull, gradient(dpo, r)[1])


def test_no_pair_dominates() -> None:
    """z stays below c_w + c_l however far the rewards run."""
    for chosen, rejected in ((1e6, -1e6), (6.0, -4.0)):
        loss = dual_clip(pair(chosen, rejected), clip_chosen=0.5, clip_rejected=0.3)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-0.8)), abs=1e-12)


def test_policy_equal_to_reference_gives_ln_2() -> None:
    for name in ("dual_clip", "dpo"):
        for soft_label in (1.0, 0.6):
            assert LOSSES[name](pair(0.0, 0.0, soft_label=soft_label)).item() == pytest.approx(math.log(2), abs=1e-15)
    assert dual_clip(pair(0.0, 0.0, margin=0.5)).item() == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-12)


@pytest.mark.parametrize("field", ["chosen", "rejected", "ref_chosen", "ref_rejected", "soft_label", "margin"])
def test_nan_in_nan_out(field: str) -> None:
    r = pair(0.1, -0.1, soft_label=1.0, margin=0.0)
    r = dataclasses.replace(r, **{field: torch.full_like(r.chosen, math.nan)})
    assert dual_clip(r).isnan().all()
    assert dpo(r).isnan().all()
    assert sft(r).isnan().all() == (field == "chosen")


def test_far_from_zero_nothing_overflows() -> None:
    for name in ("dual_clip", "dpo"):
        for chosen, rejected in ((1e30, -1e30), (-1e30, 1e30)):
            value, *slopes = gradient(LOSSES[name], pair(chosen, rejected, soft_label=0.9))
            assert value.isfinite()
            assert all(slope.isfinite() for slope in slopes)


@pytest.mark.parametrize("loss", [dual_clip, dpo])
@pytest.mark.parametrize("beta", [0.0, -0.1, INF, math.nan])
def test_beta_out_of_range(loss: Any, beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got"):
        loss(pair(0.0, 0.0), beta=beta)


@pytest.mark.parametrize("name", ["clip_chosen", "clip_rejected"])
@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_bound_out_of_range(name: str, bound: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0"):
        dual_clip(pair(0.0, 0.0), **{name: bound})


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown loss 'dual-clip'; known: dpo, dual_clip, sft"):
        resolve_loss("dual-clip", {})
    with pytest.raises(
        ValueError, match=r"'dual_clip' has no option 'betta'; its options: beta, clip_chosen, clip_rej"
    ):
        resolve_loss("dual_clip", {"betta": 0.1})
    with pytest.raises(ValueError, match=r"'sft' has no option 'beta'; its options: none"):
        resolve_loss("sft", {"beta": 0.1})
    assert loss_options("dual_clip") == {"beta": 0.1, "clip_chosen": 0.5, "clip_rejected": 0.3}


def test_resolve_binds_options_of_names_and_functions() -> None:
    r = records(3)
    assert torch.equal(resolve_loss("dpo", {"beta": 0.7})(r), dpo(r, beta=0.7))
    assert torch.equal(resolve_loss(dpo, {"beta": 0.7})(r), dpo(r, beta=0.7))
    assert resolve_loss("dpo", {}) is LOSSES["dpo"]
    assert resolve_loss(dpo, {}).function is dpo
    assert not resolve_loss(dpo, {}).is_per_pair  # nothing is known of a bare function


def test_a_row_is_its_function_and_what_others_must_know() -> None:
    r = records(3)
    assert {name for name, loss in LOSSES.items() if not loss.needs_reference} == {"sft"}
    assert {name for name, loss in LOSSES.items() if not loss.takes_labels} == {"sft"}
    for name, loss in LOSSES.items():
        assert torch.equal(loss(r), loss.function(r)), name
        assert loss.title


def test_a_loss_from_elsewhere_is_found_by_its_address() -> None:
    assert find_loss("tso_fast.losses:dpo").function is dpo
    for address, message in (
        ("nowhere.at_all:loss", "cannot be imported: ModuleNotFoundError"),
        ("tso_fast.losses:nothing", "cannot be imported: AttributeError"),
        ("tso_fast.losses:__doc__", "expected a function or a tso_fast.losses.Loss"),
    ):
        with pytest.raises(ValueError, match=message):
            find_loss(address)


def test_a_weighted_sum_is_the_sum_of_its_losses() -> None:
    r = records(5)
    total = weighted_sum(["dual_clip", "sft"], [1.0, 0.3], {"beta": 0.2, "dual_clip": {"clip_chosen": 0.7}})
    want = dual_clip(r, beta=0.2, clip_chosen=0.7) + 0.3 * sft(r)
    torch.testing.assert_close(total(r), want, rtol=1e-12, atol=0)
    assert total.title == "dual clip (TSO) + 0.3 x chosen-only NLL"
    assert total.needs_reference
    assert total.takes_labels
    assert loss_options(total) == {"beta": 0.2, "clip_chosen": 0.7, "clip_rejected": 0.3}
    assert weighted_sum(["dpo"], None, {"beta": 0.2})(r).equal(dpo(r, beta=0.2))
    assert not weighted_sum(["sft"], [2.0], {}).needs_reference


@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        ([], None, {}, "got the losses none; expected one or more, each once"),
        (["dpo", "dpo"], None, {}, "got the losses dpo, dpo; expected one or more, each once"),
        (["dpo", "sft"], [1.0], {}, "loss_weights has 1 items for 2 losses"),
        (["dpo", "sft"], None, {"clip_chosen": 1}, "none of the losses has the option 'clip_chosen'"),
        (["dpo", "sft"], None, {"sft": {"beta": 1}}, "'sft' has no option 'beta'"),
        (["dpo", "nmae"], None, {}, "unknown loss 'nmae'"),
        (["dpo"], None, {"beta": 0}, "beta must be a finite number > 0"),
    ],
)
def test_a_weighted_sum_that_cannot_be(names: Any, weights: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(names, weights, options)


# ---- through the op


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
    with pytest.raises(ValueError, match="neither was given, and plain DPO needs one"):
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
